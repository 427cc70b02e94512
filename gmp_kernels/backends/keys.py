"""The integer keys by which magnitudes are ranked, in Python; csrc/order/magnitude_key.h defines them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
import torch

from gmp_kernels.backends.dtypes import DTYPES

__all__ = ["bits_of", "key_of", "keys_of", "keys_of_magnitudes", "largest_key", "magnitude_of", "magnitudes_of_keys"]


@cache
def largest_key(dtype: torch.dtype) -> int:
    """Return the key of every NaN: the one right above the key of Inf, which is reserved even in dtypes without Inf."""
    nan = int(bits_of(torch.tensor([math.nan], dtype=dtype, device="cpu"))) & torch.iinfo(DTYPES[dtype].integer).max
    return min(nan, _largest_finite(dtype) + 2)


def bits_of(weights: torch.Tensor) -> torch.Tensor:
    """Return contiguous weights as integers, in the same memory."""
    return weights.view(DTYPES[weights.dtype].integer)


def keys_of(weights: torch.Tensor) -> torch.Tensor:
    """Return the keys of contiguous weights, as integers of the same size."""
    bits = bits_of(weights)
    return (bits & torch.iinfo(bits.dtype).max).clamp(max=largest_key(weights.dtype))


def keys_of_magnitudes(magnitudes: Sequence[float], dtype: torch.dtype) -> npt.NDArray[np.int64]:
    """Return the keys of magnitudes that are values of ``dtype``; those too large for it get the key of Inf."""
    values, largest = np.abs(np.asarray(magnitudes, np.float64)), largest_key(dtype)
    is_finite = values <= torch.finfo(dtype).max
    keys = _keys_of_finite(np.where(is_finite, values, 0.0), dtype)
    return np.where(is_finite, keys, np.where(np.isnan(values), largest, largest - 1))


def magnitudes_of_keys(keys: npt.NDArray[np.int64], dtype: torch.dtype) -> npt.NDArray[np.float64]:
    """Return the exact magnitudes of these keys, even if the CPU treats subnormal numbers as zero."""
    row, largest = DTYPES[dtype], largest_key(dtype)
    if dtype == torch.float64:
        magnitudes = keys.view(np.float64)
    else:
        exponents, fractions = keys >> row.fraction_bits, keys & ((1 << row.fraction_bits) - 1)
        fractions = fractions + ((exponents > 0).astype(np.int64) << row.fraction_bits)
        # Powers of two are made from bits. They are normal float64 numbers for every value of the smaller dtypes.
        powers = (np.maximum(exponents, 1) - row.bias - row.fraction_bits + 1023 << 52).view(np.float64)
        magnitudes = fractions * powers
    if keys.max(initial=0) <= (finite := _largest_finite(dtype)):
        return magnitudes
    return np.where(keys <= finite, magnitudes, np.where(keys < largest, math.inf, math.nan))


def key_of(magnitude: float, dtype: torch.dtype) -> int:
    """Return the key of one magnitude, as ``keys_of_magnitudes`` does."""
    return int(keys_of_magnitudes([magnitude], dtype)[0])


def magnitude_of(key: int, dtype: torch.dtype) -> float:
    """Return the magnitude of one key, as ``magnitudes_of_keys`` does."""
    return float(magnitudes_of_keys(np.array([key]), dtype)[0])


@cache
def _largest_finite(dtype: torch.dtype) -> int:
    return int(_keys_of_finite(np.array([torch.finfo(dtype).max]), dtype)[0])


def _keys_of_finite(values: npt.NDArray[np.float64], dtype: torch.dtype) -> npt.NDArray[np.int64]:
    row = DTYPES[dtype]
    if dtype == torch.float64:
        return values.view(np.int64)
    # Subnormal numbers and zero have the exponent of the smallest normal one.
    exponents = np.where(values > 0, np.maximum(np.frexp(values)[1] - 1, 1 - row.bias), 1 - row.bias)
    fractions = np.ldexp(values, row.fraction_bits - exponents).astype(np.int64)
    keys: npt.NDArray[np.int64] = fractions + ((exponents + row.bias - 1).astype(np.int64) << row.fraction_bits)
    return keys
