"""Checks of a parameter and its gradient before a kernel walks them."""

from __future__ import annotations

import torch

from gmp_kernels.backends.dtypes import DTYPES
from gmp_kernels.checks import check_mask, has_memory
from gmp_kernels.errors import DTypeError, LayoutError, ShapeError
from gmp_kernels.masks import BitMask

__all__ = [
    "bits_beside",
    "check_memory",
    "check_weight",
    "gradient_beside",
    "is_dense",
]


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


def bits_beside(weight: torch.Tensor, mask: BitMask) -> torch.Tensor:
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
