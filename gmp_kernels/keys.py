"""The integer keys that magnitudes are ranked by (see csrc/magnitude_key.h), for whoever handles them in Python."""

from __future__ import annotations

import math
import struct
from functools import cache

import torch

__all__ = ["bits_of", "key_of", "keys_of", "largest_key", "magnitude_of"]

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# As struct has them: a value, its bits, and how many of those the dtype leaves out. Tensors would take far longer.
_FORMATS = {
    torch.float32: ("<f", "<I", 0),
    torch.float64: ("<d", "<Q", 0),
    torch.float16: ("<e", "<H", 0),
    torch.bfloat16: ("<f", "<I", 16),
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
