"""The integer keys that magnitudes are ranked by, in Python; csrc/order/magnitude_key.h defines them."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["bits_of", "key_of", "keys_of", "keys_of_magnitudes", "largest_key", "magnitude_of", "magnitudes_of_keys"]

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# As struct has them: a value, its bits, and how many of those the dtype leaves out. Tensors would take far longer.
_FORMATS = {
    torch.float32: ("<f", "<I", 0),
    torch.float64: ("<d", "<Q", 0),
    torch.float16: ("<e", "<H", 0),
    torch.bfloat16: ("<f", "<I", 16),
}

# The same for numpy.
_ARRAYS: dict[torch.dtype, tuple[Any, Any, int]] = {
    torch.float32: (np.float32, np.uint32, 0),
    torch.float64: (np.float64, np.uint64, 0),
    torch.float16: (np.float16, np.uint16, 0),
    torch.bfloat16: (np.float32, np.uint32, 16),
}


def key_of(magnitude: float, dtype: torch.dtype) -> int:
    """Return the key of a magnitude that is a value of ``dtype``; every NaN has the one above Inf.

    What is too large for it has the key of Inf.
    """
    if math.isnan(magnitude):
        return largest_key(dtype)
    value, bits, shift = _FORMATS[dtype]
    try:
        packed = struct.pack(value, abs(magnitude))
    except OverflowError:
        packed = struct.pack(value, math.inf)
    key: int = struct.unpack(bits, packed)[0] >> shift
    return key


def magnitude_of(key: int, dtype: torch.dtype) -> float:
    """Return the magnitude whose key it is, exactly."""
    value, bits, shift = _FORMATS[dtype]
    magnitude: float = struct.unpack(value, struct.pack(bits, key << shift))[0]
    return magnitude


@cache
def largest_key(dtype: torch.dtype) -> int:
    """Return the key of NaN."""
    return key_of(math.inf, dtype) + 1


def bits_of(weights: torch.Tensor) -> torch.Tensor:
    """Return contiguous weights as integers, in the same memory."""
    return weights.view(_INTEGERS[weights.dtype.itemsize])


def keys_of(weights: torch.Tensor) -> torch.Tensor:
    """Return the key of every weight, as integers of the same size; contiguous weights."""
    bits = bits_of(weights)
    return (bits & torch.iinfo(bits.dtype).max).clamp(max=largest_key(weights.dtype))


def keys_of_magnitudes(magnitudes: Sequence[float], dtype: torch.dtype) -> npt.NDArray[np.int64]:
    """Return what ``key_of`` returns, for many."""
    values = np.abs(np.asarray(magnitudes, np.float64))
    value, bits, shift = _ARRAYS[dtype]
    with np.errstate(over="ignore"):
        keys = values.astype(value).view(bits).astype(np.int64) >> shift
    return np.where(np.isnan(values), largest_key(dtype), keys)


def magnitudes_of_keys(keys: npt.NDArray[np.int64], dtype: torch.dtype) -> npt.NDArray[np.float64]:
    """Return what ``magnitude_of`` returns, for many."""
    value, bits, shift = _ARRAYS[dtype]
    with np.errstate(invalid="ignore"):  # the key of NaN is one that signals
        magnitudes: npt.NDArray[np.float64] = (keys << shift).astype(bits).view(value).astype(np.float64)
    return magnitudes
