"""Entries of a parameter's state: which there are, what they must be, and how they follow the parameter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gmp_kernels.backends import StateMove, choose
from gmp_kernels.backends.dtypes import DTYPES
from gmp_kernels.checks import PLAIN, has_memory
from gmp_kernels.distributed.placement import is_sharded, local, sharded_like
from gmp_kernels.errors import StateError
from gmp_kernels.optim.compact import CompactState

__all__ = [
    "MASTER",
    "STEP",
    "as_count",
    "check_complete",
    "check_loaded",
    "check_state",
    "dense_state",
    "follow",
    "follows",
    "per_weight",
    "state_dtype",
]

MASTER = "master_weight"  # the name of the float32 copy in the state
STEP = "step"
_OURS = frozenset({MASTER, "momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"})


def state_dtype(p: torch.Tensor) -> torch.dtype:
    """Return the dtype in which the state of a parameter is kept."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def per_weight(p: torch.Tensor, state: Mapping[str, Any]) -> list[str]:
    """Return the names of the entries that have a value for each weight or, laid out compactly, each kept one."""
    compact = state.names if isinstance(state, CompactState) else frozenset()
    return [
        name
        for name, value in state.items()
        if isinstance(value, torch.Tensor)
        and name != STEP
        and (name in compact or (value.shape == p.shape and value.is_floating_point()))
    ]


def follows(p: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the elements of ``value`` lie in memory as those of the parameter do."""
    of_p, of_value = local(p), local(value)
    return of_value.stride() == of_p.stride() or all(
        s == t for s, t, n in zip(of_p.stride(), of_value.stride(), of_p.shape, strict=True) if n > 1
    )


def follow(p: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return a dense entry with its elements where the parameter has its own; itself if they are there."""
    return value if follows(p, value) else torch.empty_like(p, dtype=value.dtype).copy_(value)


def as_count(value: Any, device: torch.device) -> torch.Tensor:
    """Return a step count as a float32 tensor without dimensions: one in 16 bits would end at 256 or 2048.

    Itself if it is one.
    """
    if isinstance(value, torch.Tensor):
        is_one = value.dtype is torch.float32 and value.ndim == 0 and value.device == device
        return value if is_one else value.detach().to(device, torch.float32).reshape(())
    return torch.tensor(float(value), dtype=torch.float32, device=device)


def check_state(optimizer: str, p: torch.Tensor, state: Mapping[str, Any], essential: Sequence[str]) -> None:
    """Refuse state that a kernel cannot walk beside the parameter as it is now, whoever put it there.

    Parameters
    ----------
    optimizer : str
        Its name, for the message.
    p : torch.Tensor
    state : mapping
    essential : sequence of str
        Entries of which there are all or none.

    Raises
    ------
    StateError
    """
    check_complete(optimizer, p, state, essential)
    compact = state.names if isinstance(state, CompactState) else frozenset()
    for name, value in state.items():
        if name == STEP or value is None:
            continue
        if name in _OURS or name in compact:
            shape = (state.layout.num_kept,) if isinstance(state, CompactState) and name in compact else local(p).shape
            dtype = torch.float32 if name == MASTER else state_dtype(p)
            is_right = (
                isinstance(value, torch.Tensor)
                and _is_plain_beside(p, value, is_whole=name not in compact)
                and local(value).shape == shape
                and value.dtype == dtype
                and value.device == p.device
                and has_memory(local(value))
                and (name not in compact or value.is_contiguous())
            )
            if not is_right:
                raise StateError(
                    f"{optimizer}: expected '{name}' as {dtype} of shape {tuple(shape)} on {p.device} for a parameter "
                    f"that is now {p.dtype} of shape {tuple(p.shape)}, got {_described(value)}; load the state again "
                    "after converting or moving a model"
                )
        elif name in per_weight(p, state) and not (
            _is_plain_beside(p, value, is_whole=True) and value.dtype in DTYPES and value.device == p.device
        ):
            raise StateError(
                f"{optimizer}: expected entries of the parameter's shape {tuple(p.shape)} as plain tensors on "
                f"{p.device}, got '{name}' as {_described(value)}; keep it elsewhere than in the optimizer's state"
            )


def check_complete(optimizer: str, p: torch.Tensor, state: Mapping[str, Any], essential: Sequence[str]) -> None:
    """Refuse state that lacks entries, or whose step count is none.

    Raises
    ------
    StateError
    """
    missing = [name for name in essential if state.get(name) is None]
    if 0 < len(missing) < len(essential):
        raise StateError(
            f"{optimizer}: expected all of {list(essential)} in the state of a parameter of shape {tuple(p.shape)}, "
            f"got none of {missing}; load the whole state, or clear it"
        )
    count = state.get(STEP)
    if isinstance(count, torch.Tensor):
        is_number = count.numel() == 1 and not count.is_complex() and type(count) in PLAIN
    else:
        is_number = count is None or (isinstance(count, (int, float)) and math.isfinite(count))
    if not is_number:
        raise StateError(f"{optimizer}: expected one number as '{STEP}', got {_described(count)}; load the state again")


def check_loaded(optimizer: str, p: torch.Tensor, index: object, name: str, value: torch.Tensor) -> None:
    """Refuse an entry of a state_dict that is no state of this parameter's weights.

    Raises
    ------
    StateError
    """
    if value.shape != p.shape or local(value).shape != local(p).shape:
        raise StateError(
            f"{optimizer}.load_state_dict: expected '{name}' of shape {tuple(p.shape)} for parameter {index}, got "
            f"{tuple(value.shape)}; is it the state of another model?"
        )
    is_plain = (type(value) in PLAIN or is_sharded(value)) and value.layout is torch.strided
    if not is_plain or value.dtype not in DTYPES or not has_memory(local(value)):
        raise StateError(
            f"{optimizer}.load_state_dict: expected '{name}' of parameter {index} as a plain tensor of float32, "
            f"float64, bfloat16 or float16, got {_described(value)}; convert it first"
        )


def dense_state(p: torch.Tensor, state: Mapping[str, Any], backend: str | None) -> dict[str, Any]:
    """Return the state as torch has it, with zeros where compact state has no value; what is there stays."""
    dense = dict(state)
    if not isinstance(state, CompactState):
        return dense
    moves = []
    spread: list[tuple[str, torch.Tensor]] = []
    for name in state.names & state.keys():
        values = torch.empty(local(p).shape, dtype=state[name].dtype, device=state[name].device)
        moves.append(StateMove(state[name], state.layout, values, None, values.numel()))
        spread.append((name, values))
    if moves:
        choose(backend, p.device).move_state(moves)
    dense.update((name, follow(p, sharded_like(values, p))) for name, values in spread)
    return dense


def _is_plain_beside(p: torch.Tensor, value: torch.Tensor, *, is_whole: bool) -> bool:
    """Whether memory can be walked; state of a parameter of another type may be of that type."""
    is_known = is_sharded(value) if is_sharded(p) and is_whole else type(value) in PLAIN or type(value) is type(p)
    if not is_known or (is_sharded(value) and value.placements != p.placements):  # type: ignore[attr-defined]
        return False
    return local(value).layout is torch.strided and not local(value).is_neg()


def _described(value: object) -> str:
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}"
    kind = "" if type(value) in PLAIN else f"a {type(value).__name__} of "
    layout = "" if value.layout is torch.strided else f"{value.layout} "
    return f"{kind}{layout}{value.dtype} of shape {tuple(value.shape)} on {value.device}"
