"""The integer keys that magnitudes are ranked by (see csrc/magnitude_key.h), for whoever handles them in Python."""

from __future__ import annotations

import math

import torch

__all__ = ["key_of", "keys_of", "largest_key", "magnitude_of"]

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def key_of(magnitude: float, dtype: torch.dtype) -> int:
    """Return the key of a magnitude that is a value of ``dtype``; every NaN has the one above Inf."""
    if math.isnan(magnitude):
        return largest_key(dtype)
    return int(torch.tensor(abs(magnitude), dtype=dtype).view(_INTEGERS[dtype.itemsize]))


def magnitude_of(key: int, dtype: torch.dtype) -> float:
    """Return the magnitude whose key it is, exactly."""
    return float(torch.tensor(key, dtype=_INTEGERS[dtype.itemsize]).view(dtype))


def largest_key(dtype: torch.dtype) -> int:
    """Return the key of NaN."""
    return key_of(math.inf, dtype) + 1


def keys_of(weights: torch.Tensor) -> torch.Tensor:
    """Return the key of every weight, as integers of the same size; contiguous weights."""
    integer = _INTEGERS[weights.dtype.itemsize]
    return (weights.view(integer) & torch.iinfo(integer).max).clamp(max=largest_key(weights.dtype))
