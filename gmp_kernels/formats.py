"""Memory formats: the order in which a tensor's elements lie in memory, as torch names it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = [
    "CHANNELS_LAST",
    "ROW_MAJOR",
    "format_of",
    "format_of_shape",
    "in_memory_order",
    "in_row_major_order",
    "lie_alike",
]

ROW_MAJOR = torch.contiguous_format
# By the number of dimensions; the second one comes last in memory.
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def format_of(tensor: torch.Tensor) -> torch.memory_format | None:
    """Return the memory format of a tensor; None if its strides are those of no format.

    A tensor whose elements lie in the same order in several formats, such as the weight of a 1x1 convolution, is
    contiguous.
    """
    if tensor.is_contiguous():
        return ROW_MAJOR
    memory_format = CHANNELS_LAST.get(tensor.ndim)
    is_in_it = memory_format is not None and tensor.is_contiguous(memory_format=memory_format)
    return memory_format if is_in_it else None


def format_of_shape(shape: Sequence[int], memory_format: torch.memory_format) -> torch.memory_format | None:
    """Return the format that ``format_of`` has for a tensor of this shape in ``memory_format``; None if there is none.

    There is none if the number of dimensions is another than that of the format.
    """
    if memory_format is ROW_MAJOR:
        return ROW_MAJOR
    if CHANNELS_LAST.get(len(shape)) is not memory_format:
        return None
    return format_of(torch.empty(tuple(shape), device="meta").to(memory_format=memory_format))


def lie_alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the elements of two tensors of the same shape, neither with gaps, lie in the same order."""
    if one.stride() == other.stride():
        return True
    strides = zip(one.stride(), other.stride(), one.shape, strict=True)
    return all(s == t for s, t, size in strides if size > 1)


def in_memory_order(tensor: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
    """Return a view of a tensor whose row-major order is the order of memory in ``memory_format``."""
    return tensor if memory_format is ROW_MAJOR else tensor.movedim(1, -1)


def in_row_major_order(view: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
    """Return the tensor that ``in_memory_order`` has returned a view of."""
    return view if memory_format is ROW_MAJOR else view.movedim(-1, 1)
