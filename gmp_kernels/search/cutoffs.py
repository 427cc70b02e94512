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
    """
    found: dict[int, GroupCutoff] = {}
    aims = dict(enumerate(brackets))
    lower, known = np.zeros(len(sizes), np.int64), np.zeros((len(sizes), 2), np.int64)
    most, is_first = max(sizes, default=0), True
    while aims:
        groups = list(aims)
        numbers, bins = count(groups, list(aims.values()), most)
        if is_first:
            lower[:], known[:] = numbers[:, 0], numbers[:, 1:]
        is_first = False
        until = bins.cumsum(axis=1)
        wanted = np.array([num_prune[g] for g in groups]) - known[groups, 0] - lower[groups]
        crossing = np.minimum((until < wanted[:, None]).sum(axis=1), until.shape[1] - 1)
        most = 0
        for row, (g, rank, bin_) in enumerate(zip(groups, wanted.tolist(), crossing.tolist(), strict=True)):
            pruned, nonfinite = known[g].tolist()
            lo, hi = bracket = aims[g]
            inside, shift = int(until[row, -1]), bracket.shift(until.shape[1])
            if num_prune[g] <= pruned:
                found[g] = GroupCutoff(0, pruned, 0, 0, pruned, bool(nonfinite))
            elif rank <= 0:
                aims[g], lower[g], most = Bracket(0, lo - 1), 0, max(sizes)
            elif rank > inside:
                aims[g], most = Bracket(max(lo, hi + 1), largest_keys[g]), max(sizes)
                lower[g] += inside
            else:
                ties, first = int(bins[row, bin_]), lo + (bin_ << shift)
                lower[g] += int(until[row, bin_]) - ties
                if shift:
                    aims[g], most = Bracket(first, min(hi, first + (1 << shift) - 1)), max(most, ties)
                else:
                    below = pruned + int(lower[g])
                    found[g] = GroupCutoff(first, below, ties, below + ties - num_prune[g], pruned, bool(nonfinite))
            if g in found:
                del aims[g]
    return [found[g] for g in range(len(sizes))]
