"""Optimizers that other optimizers wrap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from gmp_kernels.errors import LayoutError, TargetError

__all__ = ["inside", "optimizer_chain", "with_own_hooks"]

# Attributes by which wrappers are known to hold what they wrap.
USUAL = ("optimizer", "_optimizer", "base_optimizer", "inner_optimizer", "inner")


def _hooks(optimizer: object) -> Any:
    """Return the dict of an optimizer's step hooks; None for a wrapper that skipped the constructor."""
    return vars(optimizer).get("_optimizer_step_post_hooks") if isinstance(optimizer, Optimizer) else None


def with_own_hooks(chain: Sequence[Any]) -> list[Any]:
    """Return the optimizers of a chain whose steps run hooks of their own."""
    kept = {id(hooks): optimizer for optimizer in chain if (hooks := _hooks(optimizer)) is not None}
    return list(kept.values())


def optimizer_chain(optimizer: Any) -> list[Any]:
    """Return the optimizer and those it wraps, outermost first; the last takes the steps.

    Raises
    ------
    TypeError
        It is no optimizer, and wraps none.
    TargetError
        Its steps cannot be watched.
    LayoutError
        It is DeepSpeed's, which steps flat copies of the parameters.
    """
    chain = [optimizer]
    while (inner := _wrapped(chain[-1])) is not None and not any(inner is known for known in chain):
        if not _steps_all_of(inner, chain[-1]):
            # It steps copies of the parameters, or a part of them; only the wrapper writes all of them.
            break
        chain.append(inner)
    for one in (*chain, getattr(chain[-1], "optimizer", None)):
        # Not deepspeed.ops, whose optimizers step the parameters themselves.
        if type(one).__module__.startswith("deepspeed.runtime."):
            raise LayoutError(
                f"GMPScheduler: expected an optimizer of the model's own parameters, got DeepSpeed's "
                f"{type(one).__name__}, which steps flat copies of them; shard the model by "
                "torch.distributed.fsdp.fully_shard instead"
            )
    # Learning rate schedulers hold an optimizer too, and no parameters.
    if not isinstance(chain[-1], Optimizer) or not hasattr(optimizer, "param_groups"):
        raise TypeError(
            f"GMPScheduler: expected a torch.optim.Optimizer or a wrapper around one, got a {type(optimizer).__name__}"
            "; of several, pass the one that steps the targets"
        )
    if _hooks(chain[-1]) is None:
        raise TargetError(
            f"GMPScheduler: expected an optimizer that runs torch's hooks of steps, or a wrapper around one, got "
            f"{type(chain[-1]).__name__}; pass the optimizer inside it, or call Optimizer.__init__ in its constructor"
        )
    return chain


def inside(optimizer: Any) -> list[Optimizer]:
    """Return an optimizer and all optimizers that it holds, at any depth."""
    found, rest = list[Optimizer](), [optimizer]
    while rest:
        one = rest.pop()
        if isinstance(one, Optimizer) and not any(one is known for known in found):
            found.append(one)
            rest += [value for value in vars(one).values() if isinstance(value, Optimizer)]
    return found


def _steps_all_of(inner: Optimizer, outer: Any) -> bool:
    held = {id(p) for group in inner.param_groups for p in group["params"]}
    return all(id(p) in held for group in getattr(outer, "param_groups", ()) for p in group["params"])


def _wrapped(optimizer: Any) -> Any:
    held = getattr(optimizer, "__dict__", {})
    for name in USUAL:
        # Some wrappers show what they hold by a property.
        inner = held[name] if name in held else getattr(type(optimizer), name, None) and getattr(optimizer, name)
        if isinstance(inner, Optimizer):
            return inner
    found = [value for value in held.values() if isinstance(value, Optimizer)]
    return found[0] if len(found) == 1 else None
