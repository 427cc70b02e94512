"""Checks of a parameter and its gradient before a kernel walks them, and a record of what was checked."""

from __future__ import annotations

from operator import is_
from typing import Any

import torch

from gmp_kernels.backends import UpdateTensor
from gmp_kernels.backends.dtypes import DTYPES
from gmp_kernels.checks import has_memory
from gmp_kernels.distributed.placement import local
from gmp_kernels.errors import DTypeError, LayoutError, ShapeError
from gmp_kernels.masks import BitMask
from gmp_kernels.optim.compact import MASTER, STEP, is_count, layout_of, version_of

__all__ = ["CheckedParameter", "check_mask", "checked_gradient", "is_dense"]


class CheckedParameter:
    """A parameter that has passed every check, for as long as nothing of it changes.

    Parameters
    ----------
    parameter, weight : torch.Tensor
        The parameter, and the tensor that holds its value here.
    state : dict or None
        Its entry in the optimizer's state, in the form it is kept in.
    keys : tuple of str
        The entries that the rule reads and writes.
    mask : BitMask or None

    Attributes
    ----------
    tensor : UpdateTensor
    bits : torch.Tensor or None
        The packed bits that the mask had.
    version : int or None
        The version of these bits, where the step is right for no other: compact state is laid out by them, or they were
        brought into another order.
    written : list of torch.Tensor
        All that a step changes.
    pointer : int
    form : tuple
        Shape, strides, dtype and device of weight and gradient.
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
        self.version = None if self.bits is None or reads_as_they_are else version_of(self.bits)
        # A plain parameter and what is detached from it count versions together.
        own = [parameter] if weight is parameter else [parameter, self.tensor.weight]
        self.written = [t for t in (*own, self.tensor.master, *self.tensor.state) if t is not None]
        self.pointer = weight.data_ptr()
        self.form = weight.shape, weight.stride(), weight.dtype, weight.get_device()
        self._keys = keys
        self._names = keys if master is None else (MASTER, *keys)
        self._values = [entries[name] for name in self._names]
        self._is_counted = is_count(self.count)

    @property
    def count(self) -> torch.Tensor | None:
        """Its step count, if the state has one."""
        return None if self.state is None else self.state.get(STEP)

    def holds(self, weight: torch.Tensor, state: dict[str, Any] | None, keys: tuple[str, ...]) -> bool:
        """Whether parameter, mask and state are still those that were checked."""
        return (
            keys == self._keys
            and (self.mask is None or self.mask.packed is self.bits)
            and (self.version is None or self.bits is None or self.version == version_of(self.bits))
            and self.holds_state(weight, state)
        )

    def holds_state(self, weight: torch.Tensor, state: dict[str, Any] | None) -> bool:
        """Whether parameter and state are still those that were checked, whatever the mask."""
        shape, stride, dtype, _ = self.form
        return (
            state is self.state
            and weight.data_ptr() == self.pointer
            and weight.shape == shape
            and weight.stride() == stride
            and weight.dtype is dtype
            and (state is None or all(map(is_, map(state.get, self._names), self._values)))
            and is_count(self.count) == self._is_counted
        )

    def fits(self, gradient: torch.Tensor) -> bool:
        """Whether a kernel can walk this gradient beside the parameter."""
        shape, stride, dtype, device = self.form
        return (
            gradient.layout is torch.strided
            and gradient.dtype is dtype
            and gradient.shape == shape
            and gradient.stride() == stride
            and gradient.get_device() == device
            and not gradient.is_neg()
        )


def checked_gradient(
    optimizer: str,
    p: torch.Tensor,
    weight: torch.Tensor,
    gradient: torch.Tensor,
    mask: BitMask | None,
    *,
    is_compact: bool,
) -> torch.Tensor:
    """Return the dense gradient in the layout of ``weight``, which is what this process holds of ``p``.

    Raises DTypeError, LayoutError or ShapeError for a weight, gradient or mask that the kernels do not take, or that do
    not fit each other.
    """
    if p.dtype not in DTYPES:
        raise DTypeError(f"{optimizer}: expected float32, float64, bfloat16 or float16 parameters, got {p.dtype}")
    if gradient.dtype != p.dtype:
        raise DTypeError(f"{optimizer}: expected gradients of their parameter's {p.dtype}, got {gradient.dtype}; cast")
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
    if mask is not None:
        check_mask(optimizer, weight, mask)
    # Compact state counts in the order of the dimensions; anything else may be in any order.
    if not (weight.is_contiguous() if is_compact else is_dense(weight)):
        wanted = "contiguous parameters with compact state" if is_compact else "parameters without gaps in memory"
        raise LayoutError(
            f"{optimizer}: expected {wanted}, got strides {weight.stride()} for shape {tuple(weight.shape)}; "
            "use .contiguous()"
        )
    if not (has_memory(weight) and has_memory(gradient)):
        raise LayoutError(
            f"{optimizer}: expected parameters and gradients in memory, got a tensor of shape {tuple(weight.shape)} "
            "whose storage was freed or cut; gather it"
        )
    # The kernel walks memory: a gradient laid out differently is brought into the parameter's order.
    is_beside = gradient.stride() == weight.stride() and not gradient.is_neg()
    return gradient if is_beside else torch.empty_like(weight).copy_(gradient)


def check_mask(op: str, weight: torch.Tensor, mask: BitMask) -> None:
    """Raise ShapeError or LayoutError for a mask that does not fit what this process holds of a parameter."""
    if mask.shape != weight.shape or not mask.is_packed:
        raise ShapeError(
            f"{op}: expected a mask of shape {tuple(weight.shape)} in {-(-weight.numel() // 8)} bytes, got one for "
            f"{tuple(mask.shape)}, {mask.packed.dtype} of shape {tuple(mask.packed.shape)}; set a new BitMask"
        )
    if mask.packed.device != weight.device:
        raise LayoutError(
            f"{op}: expected a mask on {weight.device}, got {mask.packed.device}; use mask.to(device), and set masks "
            "again after moving a model"
        )


def _bits_beside(weight: torch.Tensor, mask: BitMask) -> torch.Tensor:
    """Return the packed bits of a mask in the order of the weight's memory; its own where that is row-major."""
    if weight.is_contiguous():
        return mask.packed
    strides = weight.stride()
    order = sorted(range(weight.ndim), key=lambda dimension: -strides[dimension])
    return BitMask.from_bool(mask.to_bool().permute(order).contiguous()).packed


def is_dense(p: torch.Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlap, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(p.stride(), p.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True
