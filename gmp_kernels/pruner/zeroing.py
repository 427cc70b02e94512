"""Zeros at the pruned places of tensors that no kernel takes, such as other people's optimizer state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from gmp_kernels.backends.dtypes import DTYPES
from gmp_kernels.checks import PLAIN, has_memory, is_wrapper, may_overlap
from gmp_kernels.distributed.placement import local
from gmp_kernels.formats import format_of, in_memory_order
from gmp_kernels.masks import BitMask
from gmp_kernels.model.wrappers import inside
from gmp_kernels.ops import apply_masks_

__all__ = ["slices", "state_beside", "zero_all_where_pruned_", "zero_where_pruned_", "zero_with_state_"]

SLICE = 1 << 20  # elements whose bits are unpacked at a time
MOST_ROUNDING = 1 / 8  # relative change, in norm, that kept values may have when they are quantized again


def state_beside(p: torch.Tensor, state: Mapping[torch.Tensor, Mapping[str, Any]]) -> list[tuple[str, torch.Tensor]]:
    """Return an optimizer's state of a parameter that has its shape: momentum, averages of gradients."""
    return [
        (key, value)
        for key, value in state.get(p, {}).items()
        # Counters such as Adam's ``step`` are floating tensors too, without dimensions.
        if isinstance(value, torch.Tensor) and value.ndim and value.shape == p.shape and value.is_floating_point()
    ]


def zero_with_state_(
    optimizer: Any, weights: Iterable[torch.Tensor], masks: Mapping[torch.Tensor, BitMask], *, backend: str | None
) -> list[tuple[str, torch.Tensor]]:
    """Zero the pruned places of these weights, and of the state of all parameters in ``masks``.

    Returns
    -------
    list of (str, torch.Tensor)
        What cannot be zeroed, and what it is.
    """
    entries = [("weight", p.detach(), masks[p]) for p in weights]
    for own in inside(optimizer):
        for p, mask in masks.items():
            entries += [(f"state '{key}'", value, mask) for key, value in state_beside(p, own.state)]
    left = zero_all_where_pruned_([entry[1:] for entry in entries], backend=backend)
    return [entries[i][:2] for i in left]


def zero_all_where_pruned_(tensors: Sequence[tuple[torch.Tensor, BitMask]], *, backend: str | None = None) -> list[int]:
    """Set tensors to zero wherever their mask bits are 0. Those that kernels take need one call per device.

    Parameters
    ----------
    tensors : sequence of (torch.Tensor, BitMask)
        As in ``zero_where_pruned_``; the local part of a sharded one may be empty.
    backend : str, optional
        As in ``apply_masks_``.

    Returns
    -------
    list of int
        Positions of tensors that are left as they were.
    """
    calls: dict[torch.device, tuple[list[torch.Tensor], list[BitMask]]] = {}
    others = []
    for i, (whole, mask) in enumerate(tensors):
        tensor = local(whole)
        is_walked = type(tensor) in PLAIN and tensor.dtype in DTYPES and tensor.numel()
        if is_walked and format_of(tensor) is mask.memory_format:
            members, bits = calls.setdefault(tensor.device, ([], []))
            members.append(tensor)
            bits.append(mask.to(tensor.device))
        else:
            others.append(i)
    for members, bits in calls.values():
        apply_masks_(members, bits, backend=backend)
    return [i for i in others if not zero_where_pruned_(*tensors[i])]


@torch.no_grad()
def zero_where_pruned_(tensor: torch.Tensor, mask: BitMask) -> bool:
    """Set a tensor to zero wherever its mask bit is 0, with torch's own operations, in place.

    Parameters
    ----------
    tensor : torch.Tensor
        Floating or complex, of any strides, on any device. Of a sharded one, the local part is set. A subclass that
        keeps its values elsewhere, as quantized state does, is written by its ``copy_``, because its in-place
        operations may act on a temporary. Its kept values are then rounded once more.
    mask : BitMask
        A mask of its shape, on any device.

    Returns
    -------
    bool
        Whether every pruned place is zero now. If not, nothing has changed. That is so for codes whose zero is not 0,
        elements that share memory, freed memory, and subclasses that cannot be read back or do not hold what was
        written.

    Notes
    -----
    Temporary memory: 2 MB; for a subclass three times its plain values.
    """
    tensor = local(tensor)
    if tensor.is_nested or tensor.layout != torch.strided or tensor.device.type == "meta" or tensor.is_quantized:
        return False
    if tensor.shape != mask.shape or not (tensor.is_floating_point() or tensor.is_complex()):
        return False
    if tensor.numel() == 0:
        return True
    return _zero_wrapped(tensor, mask) if is_wrapper(tensor) else _zero_plain(tensor, mask)


def _zero_plain(tensor: torch.Tensor, mask: BitMask) -> bool:
    zero = torch.zeros((), dtype=tensor.dtype, device="cpu")  # float8_e8m0fnu has none
    if bool(zero.to(torch.complex64).abs() != 0) or may_overlap(tensor) or not has_memory(tensor):
        return False
    with torch.inference_mode(tensor.is_inference()):
        # torch has few operations for float8, but all for bytes, and 0 has the same bits in both.
        values = tensor.detach().view(torch.uint8) if tensor.itemsize == 1 else tensor.detach()
        for piece, kept in slices(values, mask):
            piece.masked_fill_(kept.logical_not_(), 0)
    return True


def slices(tensor: torch.Tensor, mask: BitMask) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Cut a tensor into views of at most ``SLICE`` elements, each with a bool tensor that says which are kept.

    The dimensions of the views are in the order in which the mask has its bits.
    """
    return _slices(in_memory_order(tensor, mask.memory_format), mask.packed, 0)


def _slices(tensor: torch.Tensor, packed: torch.Tensor, start: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Do so; ``start`` is the index of the first element in the mask, whose order is the row-major one here."""
    if tensor.numel() <= SLICE:
        first, end = start // 8, start + tensor.numel()
        packed = packed[first : -(-end // 8)].to(tensor.device)
        bits = BitMask.of(packed, torch.Size([end - 8 * first]))
        yield tensor, bits.to_bool()[start % 8 :].view(tensor.shape)
        return
    if tensor.is_contiguous():
        tensor = tensor.view(-1)
    # The halves follow each other if no dimension before this one has several places.
    dimension = next(i for i, size in enumerate(tensor.shape) if size > 1)
    for half in tensor.tensor_split(2, dimension):
        yield from _slices(half, packed, start)
        start += half.numel()


def _zero_wrapped(tensor: torch.Tensor, mask: BitMask) -> bool:
    inner = _inner(tensor)
    before = None if inner is None else _plain(tensor)
    if inner is None or before is None:
        return False
    pruned = mask.to_bool().to(before.device).logical_not_()
    if not before[pruned].any():
        return True  # rounding correct values again would let them drift
    saved = [part.clone() for _, part in inner]
    holds = False
    try:
        tensor.copy_(before.masked_fill(pruned, 0))
        after = _plain(tensor)
        holds = after is not None and _holds(before, after, pruned)
    except Exception:  # whatever their code raises
        pass
    finally:
        if not holds:
            for (name, part), values in zip(inner, saved, strict=True):
                part.copy_(values)
                if getattr(tensor, name) is not part:
                    setattr(tensor, name, part)
    return holds


def _inner(tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]] | None:
    """Return the plain tensors in which a subclass keeps its values, by name; None if it does not tell them."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return None
    names, _ = tensor.__tensor_flatten__()
    inner = [(name, getattr(tensor, name)) for name in names]
    return None if any(is_wrapper(part) for _, part in inner) else inner


def _plain(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return the values of a subclass as a plain floating tensor; None if it cannot be read."""
    for read in (tensor.dequantize, partial(torch.add, tensor, 0)):
        try:
            values = read()
        except Exception:  # whatever their code raises
            continue
        if values.shape == tensor.shape and values.is_floating_point() and not is_wrapper(values):
            return values.clone()
    return None


def _holds(before: torch.Tensor, after: torch.Tensor, pruned: torch.Tensor) -> bool:
    """Whether pruned values are zero and all others are as they were, except for rounding."""
    if after[pruned].any():
        return False
    kept = before.masked_fill(pruned, 0).double()
    return bool((after.double() - kept).norm() <= MOST_ROUNDING * kept.norm())
