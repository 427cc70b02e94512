"""Checks of a parameter, its gradient and the entries of its state, before a kernel walks them."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gmp_kernels.backends.dtypes import DTYPES
from gmp_kernels.checks import PLAIN, check_mask, has_memory
from gmp_kernels.distributed.placement import is_sharded, local
from gmp_kernels.errors import DTypeError, LayoutError, ShapeError, StateError
from gmp_kernels.formats import format_of, lie_alike
from gmp_kernels.masks import BitMask
from gmp_kernels.optim.compact import MASTER, STEP, as_count, compact_names, layout_of, per_weight, state_dtype_of

__all__ = [
    "bits_beside",
    "check_memory",
    "check_state",
    "check_weight",
    "gradient_beside",
    "is_dense",
    "laid_out_like",
    "loaded_state",
]


def check_weight(optimizer: str, weight: torch.Tensor, mask: BitMask | None, *, is_compact: bool) -> None:
    """Raise DTypeError, LayoutError or ShapeError for a weight and its mask that the kernels do not take.

    ``weight`` is what this process holds of a parameter.
    """
    if weight.dtype not in DTYPES:
        raise DTypeError(f"{optimizer}: expected float32, float64, bfloat16 or float16 parameters, got {weight.dtype}")
    if mask is not None:
        check_mask(optimizer, mask, weight, f"a parameter of shape {tuple(weight.shape)}")
    # Compact state is in the order of the mask's bits; without it, memory may be in any order of dimensions.
    if not (format_of(weight) is not None if is_compact else is_dense(weight)):
        wanted = (
            "contiguous or channels_last parameters with compact state"
            if is_compact
            else "parameters without gaps in memory"
        )
        raise LayoutError(
            f"{optimizer}: expected {wanted}, got strides {weight.stride()} for shape {tuple(weight.shape)}; "
            "use .contiguous()"
        )
    check_memory(optimizer, weight)


def gradient_beside(optimizer: str, weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Return a dense gradient in the layout of ``weight``, which is what this process holds of its parameter.

    Raises DTypeError, LayoutError or ShapeError for a gradient that does not fit.
    """
    if gradient.dtype != weight.dtype:
        raise DTypeError(
            f"{optimizer}: expected gradients of their parameter's {weight.dtype}, got {gradient.dtype}; cast"
        )
    if gradient.shape != weight.shape:
        raise ShapeError(
            f"{optimizer}: expected gradients of their parameter's shape {tuple(weight.shape)}, got "
            f"{tuple(gradient.shape)}; compute them again after reshaping a parameter"
        )
    if gradient.device != weight.device:
        raise LayoutError(
            f"{optimizer}: expected gradients on their parameter's {weight.device}, got {gradient.device}; compute "
            "them again after moving a model"
        )
    check_memory(optimizer, gradient)
    return laid_out_like(gradient, weight)


def laid_out_like(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return values in the order of the weight's memory, in which kernels walk them; a copy if they lie otherwise."""
    is_beside = lie_alike(values, weight) and not values.is_neg()
    return values if is_beside else torch.empty_like(weight).copy_(values)


def check_memory(optimizer: str, tensor: torch.Tensor) -> None:
    """Raise LayoutError for a strided tensor whose storage does not reach its last element."""
    if tensor.layout is torch.strided and not has_memory(tensor):
        raise LayoutError(
            f"{optimizer}: expected parameters and gradients in memory, got a tensor of shape {tuple(tensor.shape)} "
            "whose storage was freed or cut; gather it"
        )


def bits_beside(weight: torch.Tensor, mask: BitMask) -> torch.Tensor:
    """Return the packed bits of a mask in the order of the weight's memory; those it has if it is in that format."""
    memory_format = format_of(weight)
    if memory_format is not None:
        return mask.to(memory_format=memory_format).packed
    strides = weight.stride()
    order = sorted(range(weight.ndim), key=lambda dimension: -strides[dimension])
    return BitMask.from_bool(mask.to_bool().permute(order).contiguous()).packed


def is_dense(p: torch.Tensor) -> bool:
    """Whether the elements, if there are any, fill their memory without gaps or overlap, in any order of dimensions."""
    if p.numel() == 0:
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(p.stride(), p.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True


# -- state -----------------------------------------------------------------------------------------------------------


def check_state(
    optimizer: str,
    p: torch.Tensor,
    state: Mapping[str, Any],
    state_dtype: torch.dtype,
    names: Sequence[str],
    essential: Sequence[str],
) -> None:
    """Raise StateError for state that a kernel cannot walk beside the parameter as it is now.

    Parameters
    ----------
    optimizer : str
        Its name, for the message.
    p : torch.Tensor
    state : mapping
    state_dtype : torch.dtype
        That of the optimizer.
    names : sequence of str
        Entries that the optimizer keeps per weight, beside the master weight.
    essential : sequence of str
        Entries that must be all present or all absent.
    """
    _check_complete(optimizer, p, state, essential)
    layout, compact, beside = layout_of(state), compact_names(state), per_weight(p, state)
    for name, value in state.items():
        if name == STEP or value is None:
            continue
        if name == MASTER or name in names or name in compact:
            is_compact = layout is not None and name in compact
            shape = (layout.num_kept,) if layout is not None and is_compact else local(p).shape
            dtype = torch.float32 if name == MASTER else state_dtype_of(p, state_dtype)
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


def _check_complete(optimizer: str, p: torch.Tensor, state: Mapping[str, Any], essential: Sequence[str]) -> None:
    """Raise StateError for state that lacks entries, or whose step count is not a number."""
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
    op: str,
    index: object,
    p: torch.Tensor,
    values: object,
    state_dtype: torch.dtype,
    essential: Sequence[str],
    *,
    is_capturable: bool,
) -> dict[str, Any]:
    """Return a copy of the state that a state_dict has for parameter ``index``, in the form the optimizer keeps it in.

    With ``is_capturable`` the step count goes to the parameter's device. Raises StateError if the values are not a
    state of this parameter's weights.
    """
    if not isinstance(values, Mapping):
        raise StateError(
            f"{op}: expected a dictionary as the state of parameter {index}, got a {type(values).__name__}; is it a "
            "state_dict?"
        )
    _check_complete(op, p, values, essential)
    state: dict[str, Any] = {}
    for name, value in values.items():
        if name == STEP and value is not None:
            is_beside = isinstance(value, torch.Tensor) and value.device == p.device
            device = p.device if is_capturable or is_beside else torch.device("cpu")
            state[name] = as_count(value, device).clone()
        elif isinstance(value, torch.Tensor):
            if value.shape != p.shape or local(value).shape != local(p).shape:
                raise StateError(
                    f"{op}: expected '{name}' of shape {tuple(p.shape)} for parameter {index}, got "
                    f"{tuple(value.shape)}; is it the state of another model?"
                )
            is_plain = (type(value) in PLAIN or is_sharded(value)) and value.layout is torch.strided
            if not is_plain or value.dtype not in DTYPES or not has_memory(local(value)):
                raise StateError(
                    f"{op}: expected '{name}' of parameter {index} as a plain tensor of float32, float64, bfloat16 or "
                    f"float16, got {_described(value)}; convert it first"
                )
            # torch casts state to the parameter's dtype, which would round state that is float32 on purpose.
            dtype = state_dtype_of(p, torch.float32 if name == MASTER else state_dtype)
            state[name] = torch.empty_like(p, dtype=dtype).copy_(value)
        else:
            state[name] = copy.deepcopy(value)
    return state


def _is_plain_beside(p: torch.Tensor, value: torch.Tensor, *, is_whole: bool) -> bool:
    """Whether a kernel can walk the memory of ``value``, which may be of the parameter's own tensor subclass."""
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
