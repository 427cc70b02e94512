"""Exact cutoffs from counts alone, for layers that no single call sees whole: shards, pieces of a file.

Each round counts every piece against one bracket per group of layers, and the counts are added up. The sums prove in
which bin of the bracket the wanted key lies; the next round looks at that bin only, until it holds one key. Whatever
the pieces are, the answer is that of a backend's ``select`` on the whole. Of ties, the flat index is found in the
same way, as if it were a key.

Source: Floyd and Rivest, CACM 18(3), 1975, for the first bracket; then radix selection on what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from gmp_kernels.backends.types import Brackets, Integers
from gmp_kernels.errors import StateError

__all__ = ["Count", "GroupCutoffs", "find_cutoffs"]

# Counts some groups, summed over all their pieces, given their positions, their brackets and the most that a bin can
# hold. Returns a row per group, (below, pruned, nonfinite), which is used in the first round only, and a row of bins,
# whose number is a power of two. From the second round on, weights outside of all earlier brackets may be left out.
Count: TypeAlias = Callable[[Integers, Brackets, int], tuple[Integers, Integers]]


class GroupCutoffs(NamedTuple):
    """Keys and counts of thresholds, as columns of ``Cutoffs``; weights pruned before; groups that hold NaN or Inf."""

    keys: Integers
    num_below: Integers
    num_ties: Integers
    num_ties_kept: Integers
    num_pruned: Integers
    has_nonfinite: npt.NDArray[np.bool_]


def find_cutoffs(
    num_prune: Sequence[int] | Integers,
    sizes: Sequence[int] | Integers,
    largest_keys: Sequence[int] | Integers,
    brackets: Brackets,
    count: Count,
    *,
    separates: bool = False,
) -> GroupCutoffs:
    """Find the threshold of each group of layers.

    Parameters
    ----------
    num_prune, sizes, largest_keys : sequence of int
        Per group, over all its pieces: number of weights to prune, number of all weights, the key of NaN.
    brackets : Brackets
        Expected places of the thresholds. They save rounds and never change the answer.
    count : Count
    separates : bool
        Find no more than a key that separates the wanted one from those before it: above them, and at most the wanted.
        A round is saved where a bin holds none of them.

    Raises
    ------
    StateError
        Weights or masks have changed meanwhile.
    """
    wanted, largest = np.array(num_prune, np.int64), np.array(largest_keys, np.int64)
    lo, hi = brackets.lo.copy(), brackets.hi.copy()
    lower, pruned, has_nonfinite, num_ties = np.zeros((4, len(wanted)), np.int64)
    largest_size = max(sizes, default=0)
    groups, most, is_first = np.arange(len(wanted)), largest_size, True
    while len(groups):
        at, to = lo[groups], hi[groups]
        numbers, bins = count(groups, Brackets(at, to), int(most))
        if is_first:
            lower, pruned, has_nonfinite = numbers.T.copy()
            is_first = False
        until = bins.cumsum(axis=1)
        inside, ranks = until[:, -1], (wanted - pruned - lower)[groups]
        # The bin of the wanted key, if the key is inside the bracket.
        crossing = np.minimum((until < ranks[:, None]).sum(axis=1), bins.shape[1] - 1)
        rows = np.arange(len(groups))
        ties, shifts = bins[rows, crossing], Brackets(at, to).shifts(bins.shape[1])
        is_none = wanted[groups] <= pruned[groups]
        is_lower, is_higher = ranks <= 0, ranks > inside
        after = np.maximum(at, to + 1)
        if (~is_none & is_higher & (after > largest[groups])).any():
            raise StateError(
                "expected weights and masks that stay as they are while thresholds are found, got counts that do "
                "not add up; let no other thread or stream write to them meanwhile"
            )
        first = at + (crossing << shifts)
        lo[groups] = np.select([is_none | is_lower, is_higher], [0, after], first)
        last = first + np.minimum(to - first, (1 << shifts) - 1)
        hi[groups] = np.select([is_lower, is_higher], [at - 1, largest[groups]], last)
        skipped = np.select([is_lower, is_higher], [0, inside], until[rows, crossing] - ties)
        lower[groups] = np.where(is_lower, 0, lower[groups] + skipped)
        is_inside = ~(is_lower | is_higher)
        num_ties[groups] = np.where(is_none, 0, ties)
        is_found = (shifts == 0) | (separates & (lower[groups] + 1 == (wanted - pruned)[groups]))
        is_open = ~is_none & ~(is_inside & is_found)
        most = largest_size if (is_open & ~is_inside).any() else ties[is_open].max(initial=0)
        groups = groups[is_open]
    is_none = wanted <= pruned
    below = pruned + np.where(is_none, 0, lower)
    kept = np.where(is_none, 0, below + num_ties - wanted)
    return GroupCutoffs(np.where(is_none, 0, lo), below, num_ties, kept, pruned, has_nonfinite > 0)
