"""SGD with the mask inside the update."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from gmp_kernels.optim.constants import scalar
from gmp_kernels.optim.masked import MaskedOptimizer

__all__ = ["SGD"]


class SGD(MaskedOptimizer, torch.optim.SGD):
    """``torch.optim.SGD`` in one pass over weights, gradients and momentum, in which pruned weights cost nothing.

    Parameters
    ----------
    *args, **kwargs
        Those of ``torch.optim.SGD``. ``foreach`` and ``fused`` are accepted and change nothing; ``differentiable`` is
        refused.
    compact_state : bool
        Keep the momentum of the kept weights only: 4 bytes per weight become 4 x density.
    master_weights : bool
        As in ``Adam``.
    backend : str, optional
        As in ``gmp_kernels.prune_``.
    """

    rule: ClassVar[str] = "sgd"
    counts_steps: ClassVar[bool] = False

    def __init__(
        self,
        *args: Any,
        compact_state: bool = False,
        master_weights: bool = False,
        backend: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._init_masking(compact_state=compact_state, master_weights=master_weights, backend=backend)

    def _state_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def _densified(self, grad: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        if group["weight_decay"]:
            raise RuntimeError(f"{self._name} does not support sparse gradients with weight_decay; set it to 0")
        return grad.to_dense()

    def _constants(self, group: dict[str, Any], step: Any) -> dict[str, Any]:
        return {
            "lr": scalar(group["lr"]),
            "weight_decay": float(group["weight_decay"]),
            "momentum": float(group["momentum"]),
            "one_minus_dampening": 1 - float(group["dampening"]),
            "nesterov": float(group["nesterov"]),
            "first_step": float(step == 1),
        }
