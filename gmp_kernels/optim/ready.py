"""Checks of a parameter, its gradient and its state before a kernel walks them, and a record that they were made."""

from __future__ import annotations

import operator
from typing import Any

import torch

from gmp_kernels.backends import UpdateTensor
from gmp_kernels.backends.dtypes import DTYPES
from gmp_kernels.checks import has_memory
from gmp_kernels.errors import DTypeError, LayoutError, ShapeError
from gmp_kernels.masks import BitMask
from gmp_kernels.optim.compact import version_of
from gmp_kernels.optim.entries import MASTER, STEP

__all__ = ["Ready", "bits_beside", "checked_grad", "is_dense"]


class Ready:
    """A parameter that has passed every check, and what a step needs of it.

    Attributes
    ----------
    parameter : torch.Tensor
    state : dict or None
        Its entry in the optimizer's state.
    tensor : UpdateTensor
    mask : BitMask or None
        Its mask; ``bits`` are the packed ones that were there.
    version : int or None
        The version of the bits, where the step is right for these only: compact state is laid out by them, or they were
        brought into another order.
    written : list of torch.Tensor
        All that a step changes.
    is_empty : bool
        Whether there is nothing of it here.
    pointer, shape, stride, dtype, device
        Of what is here of the parameter, and therefore of its gradient.
    """

    __slots__ = (
        *("parameter", "state", "tensor", "mask", "bits", "version", "written", "is_empty"),
        *("pointer", "shape", "stride", "dtype", "device", "_keys", "_names", "_held", "_is_counted"),
    )

    def __init__(
        self,
        parameter: torch.Tensor,
        weight: torch.Tensor,
        state: dict[str, Any] | None,
        keys: tuple[str, ...],
        tensor: UpdateTensor,
        mask: BitMask | None,
    ) -> None:
        self.parameter = parameter
        self.state = state
        self.tensor = tensor
        self.mask, self.bits = mask, None if mask is None else mask.packed
        reads_as_they_are = tensor.compaction is None and tensor.mask is self.bits
        self.version = None if self.bits is None or reads_as_they_are else version_of(self.bits)
        # A plain parameter and what is detached from it count versions together.
        own = [parameter] if weight is parameter else [parameter, tensor.weight]
        self.written = [t for t in (*own, tensor.master, *tensor.state) if t is not None]
        self.is_empty = weight.numel() == 0
        self.pointer = weight.data_ptr()
        self.shape, self.stride, self.dtype = weight.shape, weight.stride(), weight.dtype
        self.device = weight.get_device()
        self._keys = keys
        self._names = (MASTER, *keys) if tensor.master is not None else keys
        self._held = () if state is None else tuple(map(state.get, self._names))
        self._is_counted = self.count is not None

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
        return (
            state is self.state
            and weight.data_ptr() == self.pointer
            and weight.shape == self.shape
            and weight.stride() == self.stride
            and weight.dtype is self.dtype
            and (state is None or all(map(operator.is_, map(state.get, self._names), self._held)))
            and (not self._is_counted or self._has_good_count())
        )

    def _has_good_count(self) -> bool:
        count = self.count
        return type(count) is torch.Tensor and count.dtype is torch.float32 and count.ndim == 0

    def fits(self, grad: torch.Tensor) -> bool:
        """Whether a kernel can walk this gradient beside the parameter."""
        return (
            grad.layout is torch.strided
            and grad.dtype is self.dtype
            and grad.shape == self.shape
            and grad.stride() == self.stride
            and grad.get_device() == self.device
            and not grad.is_neg()
        )


def checked_grad(
    optimizer: str,
    p: torch.Tensor,
    weight: torch.Tensor,
    grad: torch.Tensor,
    mask: BitMask | None,
    *,
    is_compact: bool,
) -> torch.Tensor:
    """Return the gradient in the layout of ``weight``, which is what this process holds of ``p``.

    Raises
    ------
    DTypeError, LayoutError, ShapeError
        Weight, gradient or mask that the kernels do not take, or that do not fit each other.
    """
    if p.dtype not in DTYPES:
        raise DTypeError(f"{optimizer}: expected float32, float64, bfloat16 or float16 parameters, got {p.dtype}")
    if grad.layout is not torch.strided:
        raise LayoutError(f"{optimizer}: expected dense gradients, got {grad.layout}; use .to_dense()")
    if grad.dtype != p.dtype:
        raise DTypeError(f"{optimizer}: expected gradients of their parameter's {p.dtype}, got {grad.dtype}; cast")
    if grad.shape != weight.shape:
        raise ShapeError(
            f"{optimizer}: expected gradients of their parameter's shape {tuple(weight.shape)}, got "
            f"{tuple(grad.shape)}; compute them again after reshaping a parameter"
        )
    if grad.device != weight.device:
        raise LayoutError(
            f"{optimizer}: expected gradients on their parameter's {weight.device}, got {grad.device}; compute them "
            "again after moving a model"
        )
    if mask is not None and mask.shape != weight.shape:
        raise ShapeError(
            f"{optimizer}: expected the shape {tuple(mask.shape)} that the mask was made for, got a parameter of "
            f"{tuple(weight.shape)}; set another mask"
        )
    if mask is not None and mask.packed.device != p.device:
        raise LayoutError(
            f"{optimizer}: expected the mask of a parameter on {p.device} there, got it on {mask.packed.device}; "
            "set masks again after moving a model"
        )
    if mask is not None and not mask.is_packed:
        raise ShapeError(
            f"{optimizer}: expected {-(-mask.numel // 8)} bytes as the mask of a parameter of shape "
            f"{tuple(weight.shape)}, got {mask.packed.dtype} of shape {tuple(mask.packed.shape)}; make a new BitMask"
        )
    # Compact state counts in the order of the dimensions; anything else may be in any order.
    if not (weight.is_contiguous() if is_compact else is_dense(weight)):
        wanted = "contiguous parameters with compact state" if is_compact else "parameters without gaps in memory"
        raise LayoutError(
            f"{optimizer}: expected {wanted}, got strides {weight.stride()} for shape {tuple(weight.shape)}; "
            "use .contiguous()"
        )
    if not (has_memory(weight) and has_memory(grad)):
        raise LayoutError(
            f"{optimizer}: expected parameters and gradients in memory, got a tensor of shape {tuple(weight.shape)} "
            "whose storage was freed or cut; gather it"
        )
    # The kernel walks memory: a gradient laid out differently is brought into the parameter's order.
    return grad if grad.stride() == weight.stride() and not grad.is_neg() else torch.empty_like(weight).copy_(grad)


def bits_beside(weight: torch.Tensor, mask: BitMask) -> torch.Tensor:
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
