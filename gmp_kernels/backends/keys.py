"""The integer keys that magnitudes are ranked by, in Python; csrc/order/magnitude_key.h defines them."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
import torch

from gmp_kernels.backends.dtypes import DTYPES

__all__ = ["bits_of", "key_of", "keys_of", "keys_of_magnitudes", "largest_key", "magnitude_of", "magnitudes_of_keys"]

# Of float32. A CPU that flushes subnormal numbers would lose those below as it converts them to float64.
SMALLEST_NORMAL, LOWEST_EXPONENT = 1 << 23, -149


def key_of(magnitude: float, dtype: torch.dtype) -> int:
    """Return the key of a magnitude that is a value of ``dtype``; every NaN has the one above Inf.

    What is too large for it has the key of Inf.
    """
    if math.isnan(magnitude):
        return largest_key(dtype)
    row = DTYPES[dtype]
    try:
        # Tensors would take far longer.
        packed = struct.pack(row.value, abs(magnitude))
    except OverflowError:
        packed = struct.pack(row.value, math.inf)
    key: int = struct.unpack(row.bits, packed)[0] >> row.shift
    return key


def magnitude_of(key: int, dtype: torch.dtype) -> float:
    """Return the magnitude whose key it is, exactly."""
    row = DTYPES[dtype]
    bits = key << row.shift
    if row.value == "<f" and bits < SMALLEST_NORMAL:
        return math.ldexp(bits, LOWEST_EXPONENT)
    magnitude: float = struct.unpack(row.value, struct.pack(row.bits, bits))[0]
    return magnitude


@cache
def largest_key(dtype: torch.dtype) -> int:
    """Return the key of NaN."""
    return key_of(math.inf, dtype) + 1


def bits_of(weights: torch.Tensor) -> torch.Tensor:
    """Return contiguous weights as integers, in the same memory."""
    return weights.view(DTYPES[weights.dtype].integer)


def keys_of(weights: torch.Tensor) -> torch.Tensor:
    """Return the key of every weight, as integers of the same size; contiguous weights."""
    bits = bits_of(weights)
    return (bits & torch.iinfo(bits.dtype).max).clamp(max=largest_key(weights.dtype))


def keys_of_magnitudes(magnitudes: Sequence[float], dtype: torch.dtype) -> npt.NDArray[np.int64]:
    """Return what ``key_of`` returns, for many."""
    values = np.abs(np.asarray(magnitudes, np.float64))
    row = DTYPES[dtype]
    with np.errstate(over="ignore"):
        keys = values.astype(row.value).view(row.bits).astype(np.int64) >> row.shift
    return np.where(np.isnan(values), largest_key(dtype), keys)


def magnitudes_of_keys(keys: npt.NDArray[np.int64], dtype: torch.dtype) -> npt.NDArray[np.float64]:
    """Return what ``magnitude_of`` returns, for many."""
    row = DTYPES[dtype]
    bits = (keys << row.shift).astype(row.bits)
    with np.errstate(invalid="ignore"):  # the key of NaN is one that signals
        magnitudes: npt.NDArray[np.float64] = bits.view(row.value).astype(np.float64)
    if row.value == "<f":
        magnitudes = np.where(bits < SMALLEST_NORMAL, np.ldexp(bits.astype(np.float64), LOWEST_EXPONENT), magnitudes)
    return magnitudes
