"""Tools for backends to hand layers to kernels: names of dtypes, addresses, one call per dtype, GPU errors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch

from gmp_kernels.backends.dtypes import DTYPES
from gmp_kernels.backends.types import Layer
from gmp_kernels.errors import DeviceError, LayoutError

__all__ = [
    "address",
    "array_address",
    "bits_address",
    "by_dtype",
    "dtype_name",
    "element_address",
    "group_positions",
    "on_device",
]


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


def dtype_name(tensor: torch.Tensor) -> str:
    """Return the name of the tensor's dtype in csrc/order/dtypes.h."""
    return DTYPES[tensor.dtype].name


def by_dtype(layers: Sequence[Layer]) -> dict[str, list[int]]:
    """Return the positions of the layers of each dtype. Most calls have one dtype."""
    positions: dict[str, list[int]] = defaultdict(list)
    for i, layer in enumerate(layers):
        positions[dtype_name(layer.weight)].append(i)
    return positions


def group_positions(positions: Sequence[int], group_sizes: Sequence[int]) -> Sequence[int]:
    """Return the groups that the layers at these positions make up; each group has layers of one dtype."""
    if len(group_sizes) == 1 or max(group_sizes) == 1:
        return range(1) if len(group_sizes) == 1 else positions
    firsts, wanted = accumulate(group_sizes[:-1], initial=0), set(positions)
    return [g for g, first in enumerate(firsts) if first in wanted]


@contextmanager
def on_device(device: torch.device, what: str) -> Iterator[None]:
    """Make a GPU current and turn its errors into DeviceError; do nothing for the CPU."""
    if device.type == "cpu":
        yield
        return
    try:
        with torch.cuda.device(device):
            yield
    except torch.OutOfMemoryError as error:
        raise DeviceError(f"{what}: no memory left on {device} for the workspace ({error}); free some") from error
    except RuntimeError as error:
        raise DeviceError(
            f"{what}: {device} reports an error, of this kernel or an earlier one ({error}); run again with "
            "CUDA_LAUNCH_BLOCKING=1 to see which"
        ) from error
