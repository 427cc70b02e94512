"""Brackets in which a threshold is expected, given an earlier threshold of the same weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from gmp_kernels.backends.keys import keys_of_magnitudes, largest_key
from gmp_kernels.backends.types import Brackets, Threshold

__all__ = ["brackets_near", "without_far_below"]

DRIFT = 1 / 64  # of an octave: the most a threshold is expected to move, up or down, between two updates
# If the count has changed by more than this part of the weights, the bracket would often miss, which costs a read.
NEAR = 1 / 1024
NOTHING = Threshold(0.0, 0, 0, 0)
FEW_BITS = 9  # of the key, the fewest that one round tells apart


def brackets_near(
    previous: Sequence[Threshold | None], num_prune: Sequence[int], sizes: Sequence[int], dtypes: Sequence[torch.dtype]
) -> Brackets | None:
    """Return one bracket per group, in which its threshold is likely to lie; empty if it is not worth trying.

    None if it is not worth trying for any group.

    Parameters
    ----------
    previous : sequence of Threshold or None
        Per group, the threshold of an earlier selection.
    num_prune, sizes, dtypes : sequences
        Per group: number of weights to prune, number of all weights, their dtype.
    """
    last = [threshold or NOTHING for threshold in previous]
    near = [
        ties > 0 and abs(below + ties - kept - count) <= size * NEAR
        for (_, below, ties, kept), count, size in zip(last, num_prune, sizes, strict=True)
    ]
    if not any(near):
        return None
    lo, hi = _around(np.array([threshold.value for threshold in last]), dtypes)
    is_near = np.array(near)
    return Brackets(np.where(is_near, lo, 1), np.where(is_near, hi, 0))


def without_far_below(
    brackets: Brackets, previous: Sequence[Threshold | None], dtypes: Sequence[torch.dtype]
) -> Brackets:
    """Narrow brackets that reach well below the previous thresholds: there are many keys there, but few weights."""
    lo, _ = _around(np.array([0.0 if last is None else last.value for last in previous]), dtypes)
    # Go as far below it as costs nothing: bins are a power of two.
    bits = np.array([max(FEW_BITS, (hi - low).bit_length()) for hi, low in zip(*_lists(brackets.hi, lo), strict=True)])
    narrowed = np.maximum(brackets.lo, brackets.hi - (np.int64(1) << bits) + 1)
    return Brackets(np.where((brackets.lo < lo) & (lo <= brackets.hi), narrowed, brackets.lo), brackets.hi)


def _around(values: np.ndarray, dtypes: Sequence[torch.dtype]) -> Brackets:
    """Return brackets around thresholds of these values."""
    lo, hi = np.empty((2, len(values)), np.int64)
    for dtype in (own_dtypes := set(dtypes)):
        own = slice(None) if len(own_dtypes) == 1 else np.array([other == dtype for other in dtypes])
        keys = keys_of_magnitudes(values[own], dtype)
        drift = max(1, int(DRIFT / torch.finfo(dtype).eps))
        lo[own], hi[own] = np.maximum(keys - drift, 0), np.minimum(keys + drift, largest_key(dtype))
    return Brackets(lo, hi)


def _lists(*columns: np.ndarray) -> list[list[int]]:
    return [column.tolist() for column in columns]
