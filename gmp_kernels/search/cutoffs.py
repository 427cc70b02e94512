"""Exact thresholds from counts alone, for layers that no single call sees whole: shards, pieces of a file.

Each round counts every piece against one bracket per group of layers, and the counts are added up. The sums prove in
which bin of the bracket the wanted key lies; the next round looks at that bin only, until it holds one key. Whatever
the pieces are, the answer is that of ``Implementation.select`` on the whole.

Source: Floyd and Rivest, CACM 18(3), 1975, for the first bracket; then radix selection on what is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from gmp_kernels.backends.types import Bracket
from gmp_kernels.errors import StateError

__all__ = ["GroupCutoff", "find_cutoffs"]


class GroupCutoff(NamedTuple):
    """Key and counts of a group's threshold, as in ``Cutoffs``; what was pruned before; and whether there is a NaN."""

    key: int
    num_below: int
    num_ties: int
    num_ties_kept: int
    num_pruned: int
    has_nonfinite: bool


class Count(Protocol):
    """Counts of open groups, all their pieces added up."""

    def __call__(self, groups: Sequence[int], brackets: Sequence[Bracket], most: int) -> tuple[np.ndarray, np.ndarray]:
        """Count groups against their brackets.

        ``most`` is what no bin can exceed. Returns int64 arrays, a row per group: (below, pruned, nonfinite), which
        only matters in the first round; and bins. From the second round on, weights outside all earlier brackets may
        be left out.
        """
        ...


def find_cutoffs(
    num_prune: Sequence[int],
    sizes: Sequence[int],
    largest_keys: Sequence[int],
    brackets: Sequence[Bracket],
    count: Count,
) -> list[GroupCutoff]:
    """Find the threshold of each group of layers.

    Parameters
    ----------
    num_prune, sizes, largest_keys : sequence of int
        Per group, over all its pieces: weights to prune, weights there are, the key of NaN.
    brackets : sequence of Bracket
        Where the thresholds are expected: they save rounds and never change the answer.
    count : Count

    Raises
    ------
    StateError
        Weights or masks have changed meanwhile.
    """
    found: dict[int, GroupCutoff] = {}
    aims = dict(enumerate(brackets))
    lower, pruned, has_nonfinite = [0] * len(sizes), [0] * len(sizes), [0] * len(sizes)
    most, is_first = max(sizes, default=0), True
    while aims:
        groups = list(aims)
        numbers, bins = count(groups, list(aims.values()), most)
        if is_first:
            lower, pruned, has_nonfinite = numbers.T.tolist()
        is_first = False
        until = bins.cumsum(axis=1)
        ranks = [num_prune[g] - pruned[g] - lower[g] for g in groups]
        # The bin of the wanted key, if it is in any.
        crossing = np.minimum((until < np.array(ranks)[:, None]).sum(axis=1), until.shape[1] - 1)
        at = np.arange(len(groups)), crossing
        columns = until[:, -1], crossing, until[at], bins[at]
        rows = zip(groups, ranks, *(column.tolist() for column in columns), strict=True)
        most = 0
        for g, rank, inside, bin_, until_end, ties in rows:
            lo, hi = bracket = aims[g]
            shift = bracket.shift(until.shape[1])
            if num_prune[g] <= pruned[g]:
                found[g] = GroupCutoff(0, pruned[g], 0, 0, pruned[g], bool(has_nonfinite[g]))
            elif rank <= 0:
                aims[g], lower[g], most = Bracket(0, lo - 1), 0, max(sizes)
            elif rank > inside and max(lo, hi + 1) > largest_keys[g]:
                raise StateError(
                    "expected weights and masks that stay as they are while thresholds are found, got counts that do "
                    "not add up; let no other thread or stream write to them meanwhile"
                )
            elif rank > inside:
                aims[g], most = Bracket(max(lo, hi + 1), largest_keys[g]), max(sizes)
                lower[g] += inside
            else:
                first = lo + (bin_ << shift)
                lower[g] += until_end - ties
                if shift:
                    aims[g], most = Bracket(first, min(hi, first + (1 << shift) - 1)), max(most, ties)
                else:
                    below = pruned[g] + lower[g]
                    counts = below, ties, below + ties - num_prune[g]
                    found[g] = GroupCutoff(first, *counts, pruned[g], bool(has_nonfinite[g]))
            if g in found:
                del aims[g]
    return [found[g] for g in range(len(sizes))]
