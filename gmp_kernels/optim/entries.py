"""Entries of a parameter's state: which there are, what they must be, and the form they are kept in."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gmp_kernels.checks import DTYPES, PLAIN, has_memory
from gmp_kernels.distributed.placement import is_sharded, local
from gmp_kernels.errors import StateError
from gmp_kernels.optim.compact import compact_names, layout_of

__all__ = [
    "MASTER",
    "STEP",
    "as_count",
    "check_complete",
    "check_state",
    "follow",
    "is_count",
    "loaded_state",
    "per_weight",
    "state_dtype",
]

MASTER = "master_weight"  # the name of the float32 copy in the state
STEP = "step"


def state_dtype(p: torch.Tensor) -> torch.dtype:
    """Return the dtype in which the state of a parameter is kept."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def per_weight(p: torch.Tensor, state: Mapping[str, Any]) -> list[str]:
    """Return the names of the entries that have a value for each weight or, laid out compactly, each kept one."""
    compact = compact_names(state)
    return [
        name
        for name, value in state.items()
        if isinstance(value, torch.Tensor)
        and name != STEP
        and (name in compact or (value.shape == p.shape and value.is_floating_point()))
    ]


def follow(p: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return a dense entry with its elements where the parameter has its own; itself if they are there."""
    of_p, of_value = local(p), local(value)
    follows = of_value.stride() == of_p.stride() or all(
        s == t for s, t, n in zip(of_p.stride(), of_value.stride(), of_p.shape, strict=True) if n > 1
    )
    return value if follows else torch.empty_like(p, dtype=value.dtype).copy_(value)


def is_count(value: object) -> bool:
    """Whether a step count has the form in which it is kept."""
    return type(value) is torch.Tensor and value.dtype is torch.float32 and value.ndim == 0


def as_count(value: Any, device: torch.device) -> torch.Tensor:
    """Return a step count as a float32 tensor without dimensions: one in 16 bits would end at 256 or 2048.

    Itself if it is one.
    """
    if isinstance(value, torch.Tensor):
        is_one = is_count(value) and value.device == device
        return value if is_one else value.detach().to(device, torch.float32).reshape(())
    return torch.tensor(float(value), dtype=torch.float32, device=device)


def check_state(
    optimizer: str, p: torch.Tensor, state: Mapping[str, Any], names: Sequence[str], essential: Sequence[str]
) -> None:
    """Refuse state that a kernel cannot walk beside the parameter as it is now, whoever put it there.

    Parameters
    ----------
    optimizer : str
        Its name, for the message.
    p : torch.Tensor
    state : mapping
    names : sequence of str
        Entries that the optimizer keeps per weight, beside the master weight.
    essential : sequence of str
        Entries of which there are all or none.

    Raises
    ------
    StateError
    """
    check_complete(optimizer, p, state, essential)
    layout, compact, beside = layout_of(state), compact_names(state), per_weight(p, state)
    for name, value in state.items():
        if name == STEP or value is None:
            continue
        if name == MASTER or name in names or name in compact:
            is_compact = layout is not None and name in compact
            shape = (layout.num_kept,) if layout is not None and is_compact else local(p).shape
            dtype = torch.float32 if name == MASTER else state_dtype(p)
            is_right = (
                isinstance(value, torch.Tensor)
                and _is_plain_beside(p, value, is_whole=not is_compact)
                and local(value).shape == shape
                and value.dtype == dtype
                and value.device == p.device
                and has_memory(local(value))
                and (not is_compact or value.is_contiguous())
            )
            if not is_right:
                raise StateError(
                    f"{optimizer}: expected '{name}' as {dtype} of shape {tuple(shape)} on {p.device} for a parameter "
                    f"that is now {p.dtype} of shape {tuple(p.shape)}, got {_described(value)}; load the state again "
                    "after converting or moving a model"
                )
        elif name in beside and not (
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


def loaded_state(
    optimizer: str,
    p: torch.Tensor,
    values: Mapping[str, Any],
    essential: Sequence[str],
    *,
    index: object,
    is_capturable: bool,
) -> dict[str, Any]:
    """Return a copy of what a state_dict says of a parameter, in the form it is kept in.

    Parameters
    ----------
    optimizer : str
    p : torch.Tensor
    values : mapping
    essential : sequence of str
        As in ``check_state``.
    index : object
        The name of the parameter in the state_dict.
    is_capturable : bool
        Whether the step count goes to the parameter's device.

    Raises
    ------
    StateError
        The values are no state of this parameter's weights.
    """
    op = f"{optimizer}.load_state_dict"
    if not isinstance(values, Mapping):
        raise StateError(
            f"{op}: expected a dictionary as the state of parameter {index}, got a {type(values).__name__}; is it a "
            "state_dict?"
        )
    check_complete(op, p, values, essential)
    state: dict[str, Any] = {}
    for name, value in values.items():
        if name == STEP and value is not None:
            is_beside = isinstance(value, torch.Tensor) and value.device == p.device
            device = p.device if is_capturable or is_beside else torch.device("cpu")
            state[name] = as_count(value, device).clone()
        elif isinstance(value, torch.Tensor):
            _check_loaded(op, p, value, f"'{name}'", index)
            # torch casts state to the parameter's dtype, which would round what is kept in float32 on purpose.
            state[name] = torch.empty_like(p, dtype=state_dtype(p)).copy_(value)
        else:
            state[name] = copy.deepcopy(value)
    return state


def _check_loaded(op: str, p: torch.Tensor, value: torch.Tensor, name: str, index: object) -> None:
    if value.shape != p.shape or local(value).shape != local(p).shape:
        raise StateError(
            f"{op}: expected {name} of shape {tuple(p.shape)} for parameter {index}, got {tuple(value.shape)}; is it "
            "the state of another model?"
        )
    is_plain = (type(value) in PLAIN or is_sharded(value)) and value.layout is torch.strided
    if not is_plain or value.dtype not in DTYPES or not has_memory(local(value)):
        raise StateError(
            f"{op}: expected {name} of parameter {index} as a plain tensor of float32, float64, bfloat16 or float16, "
            f"got {_described(value)}; convert it first"
        )


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
