"""Scores of layers, as a function of the user gives them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from gmp_kernels.distributed.placement import is_sharded, local
from gmp_kernels.errors import DTypeError
from gmp_kernels.model.wrappers import inside, optimizer_chain
from gmp_kernels.optim.masked import MaskedOptimizer
from gmp_kernels.pruner.enforcement import Enforcement

__all__ = ["scores_of"]


@torch.no_grad()
def scores_of(held: Enforcement, names: Iterable[str]) -> list[torch.Tensor]:
    """Call the function for each of these layers and return what this process ranks of its answers.

    What the function raises is raised. Of sharded parameters every rank calls it in the same order.
    """
    scores = held.limits.scores
    assert scores is not None
    found = []
    for name in names:
        parameter = held.parameters[name]
        own = scores(name, parameter, _state_of(held.optimizer, parameter))
        if not isinstance(own, torch.Tensor):
            raise DTypeError(
                f"GMPScheduler: expected scores to return a tensor for '{name}', got {type(own).__name__}; return one "
                "score per weight"
            )
        if is_sharded(parameter) and is_sharded(own):
            placements = parameter.placements  # type: ignore[attr-defined]
            if own.placements != placements:  # type: ignore[attr-defined]
                own = own.redistribute(placements=placements)  # type: ignore[attr-defined]
            own = local(own)
        found.append(own.detach())
    return found


def _state_of(optimizer: Any, parameter: torch.Tensor) -> dict[str, Any]:
    """Return the state of a parameter in its innermost optimizer, dense; empty before the first step."""
    innermost = optimizer_chain(optimizer)[-1]
    if isinstance(innermost, MaskedOptimizer):
        return innermost.dense_state(parameter)
    return dict(next((own.state[parameter] for own in inside(innermost) if parameter in own.state), {}))
