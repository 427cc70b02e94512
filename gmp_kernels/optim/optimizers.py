"""SGD, Adam and AdamW: the arguments of each, the state it keeps and the constants of its rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from gmp_kernels.optim.constants import scalar
from gmp_kernels.optim.masked import MaskedOptimizer

__all__ = ["SGD", "Adam", "AdamW"]


class SGD(MaskedOptimizer, torch.optim.SGD):
    """``torch.optim.SGD`` in one pass over weights, gradients and momentum, in which pruned weights cost nothing.

    Parameters
    ----------
    *args, **kwargs
        Those of ``torch.optim.SGD``. ``foreach`` and ``fused`` are accepted and change nothing; ``differentiable`` is
        refused.
    compact_state : bool
        Keep the momentum of the kept weights only: 4 bytes per weight become 4 x density.
    state_dtype : torch.dtype, optional
        As in ``Adam``.
    master_weights : bool
        As in ``Adam``.
    backend : str, optional
        As in ``gmp_kernels.prune_``.
    """

    rule: ClassVar[str] = "sgd"
    state_names: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    def _state_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.state_names if group["momentum"] else ()

    def _densified(self, gradient: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        if group["weight_decay"]:
            raise RuntimeError(f"{self._name} does not support sparse gradients with weight_decay; set it to 0")
        return gradient.to_dense()

    def _constants(self, group: dict[str, Any], step: Any) -> dict[str, Any]:
        is_first = step == 1
        return {
            "lr": scalar(group["lr"]),
            "weight_decay": float(group["weight_decay"]),
            "momentum": float(group["momentum"]),
            "one_minus_dampening": 1 - float(group["dampening"]),
            "nesterov": float(group["nesterov"]),
            "first_step": is_first.double() if isinstance(is_first, torch.Tensor) else float(is_first),
            "rounding_seed": step % (1 << 24),
        }


class Adam(MaskedOptimizer, torch.optim.Adam):
    """``torch.optim.Adam`` in one pass over weights, gradients and state, in which pruned weights cost nothing.

    Parameters
    ----------
    *args, **kwargs
        Those of ``torch.optim.Adam``. ``foreach`` and ``fused`` are accepted and change nothing; with ``capturable``
        the step count stays on the device, so that a CUDA graph can hold the step of dense state; ``differentiable`` is
        refused.
    compact_state : bool
        Keep exp_avg, exp_avg_sq (and max_exp_avg_sq) for the kept weights only: 8 bytes per weight become
        8 x density. ``state_dict`` still speaks torch's dense format.
    state_dtype : torch.dtype, optional
        ``torch.bfloat16`` keeps state, dense or compact, in half of the memory. The arithmetic stays in float32; its
        results are rounded up or down at random, right on average. The random numbers depend on value and step alone,
        so a run can be repeated, on any backend and any number of ranks. By default float32.
    master_weights : bool
        For bfloat16 and float16 parameters, run the arithmetic on a float32 copy held in the state and write the
        rounded weights in the same pass.
    backend : str, optional
        As in ``gmp_kernels.prune_``.

    Notes
    -----
    State is float32 or ``state_dtype``, also for 16-bit parameters, and float64 for float64 parameters. The order of
    operations is that of torch's single-tensor loop. Operations are fused where torch's vector loops fuse them and
    nowhere else, so that every machine gives the same bits.
    Source: D. P. Kingma and J. Ba, arXiv:1412.6980; amsgrad: S. J. Reddi et al., arXiv:1904.09237.
    """

    rule: ClassVar[str] = "adam"
    state_names: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    essential: ClassVar[Sequence[str]] = ("step", "exp_avg", "exp_avg_sq")

    def _state_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.state_names if group["amsgrad"] else self.state_names[:2]

    def _constants(self, group: dict[str, Any], step: Any) -> dict[str, Any]:
        lr, weight_decay = scalar(group["lr"]), float(group["weight_decay"])
        beta1, beta2 = map(scalar, group["betas"])
        decoupled = group["decoupled_weight_decay"]
        return {
            "decay": 1 - lr * weight_decay if decoupled else 1.0,
            "weight_decay": 0.0 if decoupled else weight_decay,
            "one_minus_beta1": 1 - beta1,
            "beta2": beta2,
            "one_minus_beta2": 1 - beta2,
            "bias_correction2_sqrt": (1 - beta2**step) ** 0.5,
            "eps": group["eps"],
            "step_size": lr / (1 - beta1**step),
            "rounding_seed": step % (1 << 24),
        }


class AdamW(Adam):
    """``torch.optim.AdamW``: ``Adam`` with decoupled weight decay, 0.01 by default.

    Takes the parameters of ``torch.optim.AdamW`` and those that ``Adam`` adds.
    Source: I. Loshchilov and F. Hutter, arXiv:1711.05101.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # torch.optim.AdamW's signature is Adam's but for the default of the fifth argument.
        if len(args) < 5:
            kwargs.setdefault("weight_decay", 1e-2)
        super().__init__(*args, decoupled_weight_decay=True, **kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # As in torch.optim.AdamW: state dicts of older versions, and of Adam, do not set this.
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True
