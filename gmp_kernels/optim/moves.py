"""Moves of a parameter's state between its dense and its compact form. The state that is there stays as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from gmp_kernels.backends import StateMove, choose
from gmp_kernels.distributed.placement import local, sharded_like
from gmp_kernels.masks import BitMask
from gmp_kernels.optim.compact import CompactState, check_layout, compact_names, layout_of
from gmp_kernels.optim.entries import MASTER, follow, per_weight

__all__ = ["compacted", "expanded"]


def compacted(
    states: Mapping[torch.Tensor, Mapping[str, Any]], masks: Mapping[torch.Tensor, BitMask], backend: str | None
) -> dict[torch.Tensor, CompactState]:
    """Return the states of these parameters laid out for the weights that their masks keep. A GPU is waited for once.

    Master weights stay dense.
    """
    found: dict[torch.Tensor, CompactState] = {}
    for device in {p.device for p in states}:
        owners = [p for p in states if p.device == device]
        implementation = choose(backend, device)
        layouts = implementation.compactions([(masks[p].packed, local(p).numel()) for p in owners])
        moves = []
        for p, layout in zip(owners, layouts, strict=True):
            state, packed = states[p], dict[str, torch.Tensor]()
            for name in per_weight(p, state):
                if name == MASTER:
                    continue
                is_compact = name in compact_names(state)
                source = state[name] if is_compact else local(state[name]).contiguous()
                packed[name] = torch.empty(layout.num_kept, dtype=source.dtype, device=device)
                source_layout = layout_of(state) if is_compact else None
                moves.append(StateMove(source, source_layout, packed[name], layout, local(p).numel()))
            found[p] = CompactState({**state, **packed}, layout, packed, local(p).shape)
        if moves:
            implementation.move_state(moves)
    return found


def expanded(optimizer: str, p: torch.Tensor, state: Mapping[str, Any], backend: str | None) -> dict[str, Any]:
    """Return the state as torch has it, with zeros where compact state has no value.

    Raises
    ------
    StateError
        Bits by which the state is laid out have been written, or the parameter has grown.
    """
    check_layout(optimizer, p, state)
    layout, names = layout_of(state), compact_names(state) & state.keys()
    spread = {name: torch.empty(local(p).shape, dtype=state[name].dtype, device=p.device) for name in names}
    if spread:
        moves = [StateMove(state[name], layout, values, None, values.numel()) for name, values in spread.items()]
        choose(backend, p.device).move_state(moves)
    return {**state, **{name: follow(p, sharded_like(values, p)) for name, values in spread.items()}}
