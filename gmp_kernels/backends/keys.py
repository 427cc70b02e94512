"""The integer keys by which magnitudes are ranked, in Python; csrc/order/magnitude_key.h defines them."""

from __future__ import annotations

import math
import struct
from functools import cache

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["bits_of", "key_of", "keys_of", "keys_of_magnitudes", "largest_key", "magnitude_of", "magnitudes_of_keys"]


@cache
def largest_key(dtype: torch.dtype) -> int:
    """Return the key of every NaN: the one right above that of Inf, which not every dtype has."""
    above, (fraction_bits, _) = _largest_finite(dtype) + 1, _format(dtype)
    has_inf = above % (1 << fraction_bits) == 0
    return above + has_inf


def bits_of(weights: torch.Tensor) -> torch.Tensor:
    """Return contiguous weights as integers, in the same memory."""
    return weights.view(_integer(weights.dtype))


def keys_of(weights: torch.Tensor) -> torch.Tensor:
    """Return the keys of contiguous weights, as integers of the same size."""
    bits = bits_of(weights)
    return (bits & torch.iinfo(bits.dtype).max).clamp(max=largest_key(weights.dtype))


def keys_of_magnitudes(magnitudes: npt.ArrayLike, dtype: torch.dtype) -> npt.NDArray[np.int64]:
    """Return the keys of magnitudes that are values of ``dtype``; those too large for it get the key of Inf."""
    values = np.abs(np.asarray(magnitudes, np.float64))
    is_finite = values <= torch.finfo(dtype).max
    if is_finite.all():
        return _keys_of_finite(values, dtype)
    keys, largest = _keys_of_finite(np.where(is_finite, values, 0.0), dtype), largest_key(dtype)
    return np.where(is_finite, keys, np.where(np.isnan(values), largest, largest - 1))


def magnitudes_of_keys(keys: npt.NDArray[np.int64], dtype: torch.dtype) -> npt.NDArray[np.float64]:
    """Return the magnitudes whose keys these are, exactly, even where the CPU takes subnormal numbers for zero."""
    (fraction_bits, bias), largest = _format(dtype), largest_key(dtype)
    if dtype == torch.float64:
        magnitudes = keys.view(np.float64)
    else:
        exponents, fractions = keys >> fraction_bits, keys & ((1 << fraction_bits) - 1)
        fractions = fractions + ((exponents > 0).astype(np.int64) << fraction_bits)
        # Powers of two by their bits: a normal float64 for every value of the others.
        powers = (np.maximum(exponents, 1) - bias - fraction_bits + 1023 << 52).view(np.float64)
        magnitudes = fractions * powers
    if keys.max(initial=0) <= (finite := _largest_finite(dtype)):
        return magnitudes
    return np.where(keys <= finite, magnitudes, np.where(keys < largest, math.inf, math.nan))


def key_of(magnitude: float, dtype: torch.dtype) -> int:
    """Return the key of one magnitude, as ``keys_of_magnitudes`` does."""
    return int(keys_of_magnitudes([magnitude], dtype)[0])


def magnitude_of(key: int, dtype: torch.dtype) -> float:
    """Return the magnitude of one key, as ``magnitudes_of_keys`` does, in a tenth of the time."""
    if key > _largest_finite(dtype):
        return math.inf if key < largest_key(dtype) else math.nan
    if dtype == torch.float64:
        value: float = struct.unpack("<d", struct.pack("<q", key))[0]
        return value
    fraction_bits, bias = _format(dtype)
    exponent, fraction = divmod(key, 1 << fraction_bits)
    return math.ldexp(fraction + (exponent > 0) * (1 << fraction_bits), max(exponent, 1) - bias - fraction_bits)


@cache
def _integer(dtype: torch.dtype) -> torch.dtype:
    """Return the integers of the same size."""
    return {8: torch.int8, 16: torch.int16, 32: torch.int32, 64: torch.int64}[torch.finfo(dtype).bits]


@cache
def _format(dtype: torch.dtype) -> tuple[int, int]:
    """Return how many low bits are the fraction, and what the exponent of 1.0 is stored as, in the bits above them."""
    numbers = torch.finfo(dtype)
    return -round(math.log2(numbers.eps)), 1 - round(math.log2(numbers.smallest_normal))


@cache
def _largest_finite(dtype: torch.dtype) -> int:
    return int(_keys_of_finite(np.array([torch.finfo(dtype).max]), dtype)[0])


def _keys_of_finite(values: npt.NDArray[np.float64], dtype: torch.dtype) -> npt.NDArray[np.int64]:
    fraction_bits, bias = _format(dtype)
    # A normal number has the same fraction and exponent in float64, but for their lengths and the bias.
    keys: npt.NDArray[np.int64] = (values.view(np.int64) >> 52 - fraction_bits) - (1023 - bias << fraction_bits)
    if dtype != torch.float64 and (is_subnormal := keys < 1 << fraction_bits).any():
        units = np.ldexp(np.where(is_subnormal, values, 0.0), fraction_bits + bias - 1)
        keys = np.where(is_subnormal, units.astype(np.int64), keys)
    return keys
