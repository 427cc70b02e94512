"""Fixes of Triton's interpreter, which rounds a fused multiply-add twice, unlike any GPU, and is slower than need be.

Source: S. Boldo and G. Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to
odd", IEEE Trans. Computers 57(4), 2008; products and sums with their errors after Dekker and Knuth.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from triton.runtime import interpreter

__all__ = ["put_right"]


def _two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rounded sum and its error."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _split(a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Upper and lower half of a float64's digits."""
    shifted = a * 134217729.0  # 2^27 + 1
    upper = shifted - (shifted - a)
    return upper, a - upper


def _two_product(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    product = a * b
    (a1, a2), (b1, b2) = _split(a), _split(b)
    return product, a2 * b2 - (((product - a1 * b1) - a2 * b1) - a1 * b2)


def _sum_to_odd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The exact sum if it is a float64, else the one of its two neighbours whose last bit is 1."""
    total, error = _two_sum(a, b)
    bits = total.view(np.int64)
    inexact = (error != 0) & np.isfinite(error) & (bits & 1 == 0)
    step = np.where((error > 0) == (total > 0), 1, -1)
    odd: np.ndarray = np.where(inexact, bits + step, bits).view(np.float64)
    return odd


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c rounded once, for float32 and, except for errors below 2^-1022, for float64."""
    with np.errstate(all="ignore"):
        if c.dtype == np.float32:
            exact = a.astype(np.float64) * b.astype(np.float64)
            return _sum_to_odd(exact, c.astype(np.float64)).astype(np.float32)
        product, lower = _two_product(a, b)
        upper, lowest = _two_sum(c, lower)
        total, error = _two_sum(product, upper)
        result = total + _sum_to_odd(lowest, error)
        # Infinities, NaN and the sign of zero come out of plain arithmetic.
        rounded: np.ndarray = np.where(np.isfinite(result) & (result != 0), result, a * b + c)
        return rounded


def put_right() -> None:
    """Patch the interpreter of this process."""

    def create_fma(_: Any, a: Any, b: Any, c: Any) -> Any:
        arrays = np.broadcast_arrays(a.data, b.data, c.data)
        return interpreter.TensorHandle(_fma(*arrays), c.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = create_fma

    # The rest is for speed: by default every launch patches the language anew, and so does every call of a jitted
    # function in it.
    @functools.cache
    def patch_once(function: Any) -> Any:
        patch(function)
        return interpreter._LangPatchScope()

    patch, interpreter._patch_lang = interpreter._patch_lang, patch_once
    # Turn off checks of integer overflow whose results nothing uses.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
