"""Addresses of tensors as kernels take them, held against the number of elements and their size."""

from __future__ import annotations

import torch

from gmp_kernels.errors import LayoutError

__all__ = ["address", "array_address", "bits_address", "element_address"]


def address(tensor: torch.Tensor | None) -> int:
    """Return the address of the first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def array_address(tensor: torch.Tensor | None, numel: int, what: str) -> int:
    """Return the ``element_address`` of a tensor that must have ``numel`` elements.

    Raises
    ------
    ValueError
        It has another number of elements, so that a kernel could walk past its end.
    """
    if tensor is not None and tensor.numel() != numel:
        raise ValueError(f"expected {numel} elements of {what}, got {tensor.numel()}")
    return element_address(tensor)


def bits_address(mask: torch.Tensor | None, numel: int) -> int:
    """Return the ``array_address`` of the packed bits of ``numel`` weights."""
    return array_address(mask, -(-numel // 8), "a mask")


def element_address(tensor: torch.Tensor | None) -> int:
    """Return the ``address`` for kernels that load whole elements, which fails unless they are aligned to their size.

    Raises
    ------
    LayoutError
        The tensor does not begin at a multiple of its element size, as views of raw bytes may not.
    """
    if tensor is not None and tensor.data_ptr() % tensor.itemsize:
        raise LayoutError(
            f"expected tensors that begin on a multiple of their element size, got a {tensor.dtype} one at address "
            f"{tensor.data_ptr():#x}; copy it, or use backend 'cpu'"
        )
    return address(tensor)
