"""Optimizers that other optimizers wrap."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from gmp_kernels.errors import TargetError

__all__ = ["has_hooks", "optimizer_chain"]

# Attributes by which wrappers are known to hold what they wrap.
USUAL = ("optimizer", "_optimizer", "base_optimizer", "inner_optimizer", "inner")


def has_hooks(optimizer: object) -> bool:
    """Whether hooks can be registered that run at every step: wrappers may skip the constructor that makes them."""
    return isinstance(optimizer, Optimizer) and "_optimizer_step_post_hooks" in vars(optimizer)


def optimizer_chain(optimizer: Any) -> list[Any]:
    """Return the optimizer and what it wraps, outermost first; the last takes the steps.

    Raises
    ------
    TypeError
        It is no optimizer, and wraps none.
    TargetError
        Its steps cannot be watched.
    """
    chain = [optimizer]
    while (inner := _wrapped(chain[-1])) is not None and not any(inner is known for known in chain):
        chain.append(inner)
    # Learning rate schedulers hold an optimizer too, and no parameters.
    if not isinstance(chain[-1], Optimizer) or not hasattr(optimizer, "param_groups"):
        raise TypeError(f"GMPScheduler: expected a torch.optim.Optimizer or a wrapper around one, got {optimizer!r}")
    if not has_hooks(chain[-1]):
        raise TargetError(
            f"GMPScheduler: expected an optimizer that runs torch's hooks of steps, or a wrapper around one, got "
            f"{type(chain[-1]).__name__}; pass the optimizer inside it, or call Optimizer.__init__ in its constructor"
        )
    return chain


def _wrapped(optimizer: Any) -> Any:
    held = getattr(optimizer, "__dict__", {})
    for name in USUAL:
        # Some wrappers show what they hold by a property.
        inner = held[name] if name in held else getattr(type(optimizer), name, None) and getattr(optimizer, name)
        if isinstance(inner, Optimizer):
            return inner
    inside = [value for value in held.values() if isinstance(value, Optimizer)]
    return inside[0] if len(inside) == 1 else None
