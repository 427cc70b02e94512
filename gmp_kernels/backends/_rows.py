"""What backends share in handing layers to native code: names of dtypes, addresses, one call per dtype."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from gmp_kernels.backends import Layer

__all__ = ["address", "by_dtype", "dtype_name", "parts"]

# As in csrc/dtypes.h.
_DTYPE_NAMES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


def address(tensor: torch.Tensor | None) -> int:
    """Address of the first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def dtype_name(tensor: torch.Tensor) -> str:
    """Return the name of its dtype in csrc/dtypes.h."""
    return _DTYPE_NAMES[tensor.dtype]


def by_dtype(layers: Sequence[Layer]) -> dict[str, list[int]]:
    """Positions of the layers of each dtype: one call per dtype nearly always means one call."""
    positions: dict[str, list[int]] = defaultdict(list)
    for i, layer in enumerate(layers):
        positions[dtype_name(layer.weight)].append(i)
    return positions


def parts(layers: Sequence[Layer], num_prune: Sequence[float]) -> list[tuple[str, list[int], list[int]]]:
    """Split a selection by dtype: its name, the positions of its layers and of their entries in ``num_prune``."""
    is_global = len(num_prune) != len(layers)
    return [(dtype, positions, [0] if is_global else positions) for dtype, positions in by_dtype(layers).items()]
