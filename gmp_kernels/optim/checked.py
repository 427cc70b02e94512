"""Checks of a parameter and its gradient before a kernel walks them, and a record of what was checked."""

from __future__ import annotations

from collections.abc import Iterable
from operator import is_
from typing import Any, TypeAlias

import torch

from gmp_kernels.backends import UpdateTensor
from gmp_kernels.backends.dtypes import DTYPES
from gmp_kernels.backends.layouts import layouts_of
from gmp_kernels.checks import check_mask, has_memory
from gmp_kernels.distributed.placement import local
from gmp_kernels.errors import DTypeError, LayoutError, ShapeError
from gmp_kernels.masks import BitMask
from gmp_kernels.optim.compact import MASTER, STEP, is_count, layout_of, version_of

__all__ = [
    "CheckedParameter",
    "Snapshot",
    "check_memory",
    "check_weight",
    "gradient_beside",
    "is_dense",
    "is_unchanged",
    "plain_layouts",
    "snapshot",
]

Snapshot: TypeAlias = tuple[list[object], list[object]]


def snapshot(
    weights: list[torch.Tensor], objects: Iterable[object], frozen: Iterable[torch.Tensor], *facts: object
) -> Snapshot:
    """Return all that the outcome of checks depends on: objects that have to stay, and facts that have to stay equal.

    Parameters
    ----------
    weights : list of torch.Tensor
    objects : iterable of object
        The snapshot keeps them alive, so that no other object can take the place of one.
    frozen : iterable of torch.Tensor
        Tensors that nobody may write.
    *facts : object
        Other values to compare.
    """
    return [*objects], [plain_layouts(weights, True), [version_of(tensor) for tensor in frozen], *facts]


def is_unchanged(now: Snapshot, before: Snapshot) -> bool:
    """Whether nothing has changed between two snapshots."""
    is_known = now[1][0] is not None and now[1] == before[1]
    return is_known and len(now[0]) == len(before[0]) and all(map(is_, now[0], before[0]))


def plain_layouts(tensors: list[torch.Tensor], with_addresses: bool) -> object | None:
    """Return ``layouts_of`` the tensors; None also if one is a view that negates its memory."""
    return None if any(map(torch.Tensor.is_neg, tensors)) else layouts_of(tensors, with_addresses)


class CheckedParameter:
    """A parameter that has passed every check, valid as long as nothing about it changes.

    Parameters
    ----------
    parameter, weight : torch.Tensor
        The parameter, and the tensor that holds its value here.
    state : dict or None
        Its entry in the optimizer's state, in the form the optimizer keeps it in.
    keys : tuple of str
        The state entries that the rule reads and writes.
    mask : BitMask or None

    Attributes
    ----------
    parameter, state, keys, mask
        As given.
    tensor : UpdateTensor
    bits : torch.Tensor or None
        The packed bits that the mask had.
    frozen : list of torch.Tensor
        These bits, if they must not be written: compact state is laid out by them, or the step reads a reordered copy
        of them.
    written : list of torch.Tensor
        All tensors that a step changes.
    """

    def __init__(
        self,
        parameter: torch.Tensor,
        weight: torch.Tensor,
        state: dict[str, Any] | None,
        keys: tuple[str, ...],
        mask: BitMask | None,
    ) -> None:
        entries = state or {}
        master = entries.get(MASTER)
        self.parameter, self.state, self.mask = parameter, state, mask
        self.bits = None if mask is None else mask.packed
        self.tensor = UpdateTensor(
            weight=weight.detach(),
            master=None if master is None else local(master),
            state=tuple(local(entries[key]) for key in keys),
            mask=None if mask is None else _bits_beside(weight, mask),
            compaction=layout_of(state),
        )
        reads_as_they_are = self.tensor.compaction is None and self.tensor.mask is self.bits
        self.frozen = [] if self.bits is None or reads_as_they_are else [self.bits]
        # A plain parameter and a tensor detached from it share their version counter.
        own = [parameter] if weight is parameter else [parameter, self.tensor.weight]
        self.written = [t for t in (*own, self.tensor.master, *self.tensor.state) if t is not None]
        self.keys = keys
        self._checked = self._snapshot(weight, state)

    def holds(self, weight: torch.Tensor, state: dict[str, Any] | None) -> bool:
        """Whether parameter, bits of the mask and state are still those that were checked."""
        return is_unchanged(self._snapshot(weight, state), self._checked)

    def _snapshot(self, weight: torch.Tensor, state: dict[str, Any] | None) -> Snapshot:
        entries = state or {}
        # The step count is left out: a batch joins the counts of its members, so another batch replaces it.
        values = [value for name, value in entries.items() if name != STEP]
        objects = [state, None if self.mask is None else self.mask.packed, *values]
        return snapshot([weight], objects, self.frozen, is_count(entries.get(STEP)))


def check_weight(optimizer: str, weight: torch.Tensor, mask: BitMask | None, *, is_compact: bool) -> None:
    """Raise DTypeError, LayoutError or ShapeError for a weight and its mask that the kernels do not take.

    ``weight`` is what this process holds of a parameter.
    """
    if weight.dtype not in DTYPES:
        raise DTypeError(f"{optimizer}: expected float32, float64, bfloat16 or float16 parameters, got {weight.dtype}")
    if mask is not None:
        check_mask(optimizer, mask, weight, f"a parameter of shape {tuple(weight.shape)}")
    # Compact state counts weights in row-major order; without it, memory may be in any order of dimensions.
    if not (weight.is_contiguous() if is_compact else is_dense(weight)):
        wanted = "contiguous parameters with compact state" if is_compact else "parameters without gaps in memory"
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
    # The kernel walks memory, so a gradient laid out differently is copied into the parameter's order.
    is_beside = gradient.stride() == weight.stride() and not gradient.is_neg()
    return gradient if is_beside else torch.empty_like(weight).copy_(gradient)


def check_memory(optimizer: str, tensor: torch.Tensor) -> None:
    """Raise LayoutError for a strided tensor whose storage does not reach its last element."""
    if tensor.layout is torch.strided and not has_memory(tensor):
        raise LayoutError(
            f"{optimizer}: expected parameters and gradients in memory, got a tensor of shape {tuple(tensor.shape)} "
            "whose storage was freed or cut; gather it"
        )


def _bits_beside(weight: torch.Tensor, mask: BitMask) -> torch.Tensor:
    """Return the packed bits of a mask in the order of the weight's memory; if that is row-major, the bits it has."""
    if weight.is_contiguous():
        return mask.packed
    strides = weight.stride()
    order = sorted(range(weight.ndim), key=lambda dimension: -strides[dimension])
    return BitMask.from_bool(mask.to_bool().permute(order).contiguous()).packed


def is_dense(p: torch.Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlap, in any order of dimensions."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(p.stride(), p.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True
