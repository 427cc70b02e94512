"""Brackets in which a threshold is expected because the last one of the same weights is known."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import repeat

import numpy as np
import torch

from gmp_kernels.backends.keys import key_of, keys_of_magnitudes, largest_key
from gmp_kernels.backends.types import Bracket, Threshold

__all__ = ["bracket_near", "brackets_near", "without_far_below"]

DRIFT = 1 / 64  # of an octave to each side, that a threshold is expected to move between two updates
# A count that has moved by more than this part of the weights would often miss, and a miss costs a read.
NEAR = 1 / 1024
NOTHING = Threshold(0.0, 0, 0, 0)
FEW_BITS = 9  # of the key, that one round tells apart at least


def bracket_near(threshold: Threshold, dtype: torch.dtype) -> Bracket:
    """Return the bracket in which the threshold of the next update is likely to lie."""
    key, drift = key_of(threshold.value, dtype), _drift(dtype)
    return Bracket(max(0, key - drift), min(largest_key(dtype), key + drift))


def brackets_near(
    previous: Sequence[Threshold | None], num_prune: Sequence[int], sizes: Sequence[int], dtypes: Sequence[torch.dtype]
) -> list[Bracket | None]:
    """Return one bracket per group; None where it is not worth trying.

    Parameters
    ----------
    previous : sequence of Threshold or None
        Of an earlier selection.
    num_prune, sizes, dtypes : sequences
        Per group: weights to prune, weights there are, their dtype.
    """
    value, below, ties, kept = zip(*(last or NOTHING for last in previous), strict=True)
    moved = np.abs(np.array(below, float) + ties - kept - num_prune)
    near = (np.array(ties, float) > 0) & (moved <= np.array(sizes) * NEAR)
    found: list[Bracket | None] = [None] * len(previous)
    for dtype in set(dtypes):
        keys, drift = keys_of_magnitudes(value, dtype), _drift(dtype)
        lo, hi = np.maximum(keys - drift, 0), np.minimum(keys + drift, largest_key(dtype))
        # Their own constructor takes twice as long.
        brackets = map(tuple.__new__, repeat(Bracket), zip(lo.tolist(), hi.tolist(), strict=True))
        for g, (bracket, is_near) in enumerate(zip(brackets, near.tolist(), strict=True)):
            if is_near and dtypes[g] == dtype:
                found[g] = bracket
    return found


def without_far_below(bracket: Bracket, previous: Threshold | None, dtype: torch.dtype) -> Bracket:
    """Leave out what lies well below the previous threshold: unpruned weights are rare there, but keys are many."""
    lo = 0 if previous is None else bracket_near(previous, dtype).lo
    if not bracket.lo < lo <= bracket.hi:
        return bracket
    # As far below it as costs nothing: the keys of a bracket are counted in a power of two.
    bits = max(FEW_BITS, (bracket.hi - lo).bit_length())
    return Bracket(max(bracket.lo, bracket.hi - (1 << bits) + 1), bracket.hi)


@cache
def _drift(dtype: torch.dtype) -> int:
    return max(1, int((key_of(2.0, dtype) - key_of(1.0, dtype)) * DRIFT))
