"""Exact selection from counts alone, for layers that no single call sees whole: shards on ranks, pieces of a file.

Each round counts every piece against one interval of keys per group of layers; whoever calls adds the counts up. The
sums prove in which interval the wanted key lies, and the next round looks at that one only, until it holds one key.
Whatever the pieces are, the answer is that of ``Implementation.select`` on the whole.

Source: Floyd and Rivest, CACM 18(3), 1975, for the first interval; then radix selection on what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from gmp_kernels.backends import Bracket, Implementation, Layer, Threshold
from gmp_kernels.keys import key_of, keys_of, largest_key, magnitude_of

__all__ = ["Counted", "Cut", "cut_index", "divide_ties", "find_cuts", "near", "piece"]

DRIFT = 1 / 64  # of an octave to each side, that a threshold is expected to move between two updates
LEAVES = 4096  # weights among which a tie is looked for one by one


class Counted(NamedTuple):
    """What a round has found of one group of layers, all its pieces added up.

    Attributes
    ----------
    below, pruned, nonfinite : int
        As in ``Census``.
    until : numpy.ndarray
        Keys inside up to the end of each bin.
    """

    below: int
    pruned: int
    nonfinite: int
    until: np.ndarray


class Cut(NamedTuple):
    """Where a group of layers is cut.

    Attributes
    ----------
    key : int
        The threshold's.
    threshold : Threshold
    nonfinite : int
        As the merged counts of the first round had it.
    """

    key: int
    threshold: Threshold
    nonfinite: int


@dataclass(slots=True)
class _Search:
    """The interval in which the wanted key of one group lies, and what is known of the weights below it."""

    num_prune: int
    dtype: torch.dtype
    bracket: Bracket
    below: int | None = None
    pruned: int = 0
    nonfinite: int = -1

    def narrow(self, counted: Counted) -> Cut | None:
        """Take the sums of a round into account; return the answer once there is one."""
        if self.below is None:
            self.below, self.pruned, self.nonfinite = counted.below, counted.pruned, counted.nonfinite
        wanted = self.num_prune - self.pruned - self.below  # rank, from 1, among the keys from the interval on
        if wanted + self.below <= 0:
            return Cut(0, Threshold(0.0, self.pruned, 0, 0), self.nonfinite)
        lo, hi = self.bracket
        until = counted.until
        if wanted <= 0:
            self.bracket, self.below = Bracket(0, lo - 1), 0
            return None
        if wanted > until[-1]:
            self.bracket, self.below = Bracket(hi + 1, largest_key(self.dtype)), self.below + int(until[-1])
            return None
        found = int(until.searchsorted(wanted))
        before = int(until[found - 1]) if found else 0
        ties, shift = int(until[found]) - before, self.bracket.shift(len(until))
        self.below += before
        first = lo + (found << shift)
        if shift:
            self.bracket = Bracket(first, min(hi, first + (1 << shift) - 1))
            return None
        num_below = self.pruned + self.below
        value = magnitude_of(first, self.dtype)
        return Cut(first, Threshold(value, num_below, ties, num_below + ties - self.num_prune), self.nonfinite)


def find_cuts(
    num_prune: Sequence[int],
    dtypes: Sequence[torch.dtype],
    brackets: Sequence[Bracket],
    count: Callable[[Mapping[int, Bracket]], Mapping[int, Counted]],
) -> list[Cut]:
    """Find the threshold of each group of layers.

    Parameters
    ----------
    num_prune : sequence of int
        Per group, over all its pieces.
    dtypes : sequence of torch.dtype
        Of the groups.
    brackets : sequence of Bracket
        Guesses: they save rounds and never change the answer.
    count : callable
        {group: bracket} of the groups still open to {group: the counts of all its pieces, added up}. From the second
        round on only ``until`` matters, and weights outside all earlier brackets may be left out.

    Returns
    -------
    list of Cut
    """
    searches = {g: _Search(*row) for g, row in enumerate(zip(num_prune, dtypes, brackets, strict=True))}
    cuts: dict[int, Cut] = {}
    while len(cuts) < len(searches):
        for g, counted in count({g: search.bracket for g, search in searches.items() if g not in cuts}).items():
            cut = searches[g].narrow(counted)
            if cut is not None:
                cuts[g] = cut
    return [cuts[g] for g in range(len(searches))]


def near(threshold: Threshold, dtype: torch.dtype) -> Bracket:
    """Return the interval in which the threshold of the next update is likely to lie."""
    key, octave = key_of(threshold.value, dtype), key_of(2.0, dtype) - key_of(1.0, dtype)
    drift = max(1, int(octave * DRIFT))
    return Bracket(max(0, key - drift), min(largest_key(dtype), key + drift))


def divide_ties(num_ties: Sequence[int], num_kept: int) -> list[int]:
    """Say how many ties stay in each of the pieces, which follow one another: the first ``num_kept`` of all."""
    before = np.cumsum([0, *num_ties])[:-1]
    return [int(kept) for kept in np.clip(num_kept - before, 0, num_ties)]


def cut_index(implementation: Implementation, layer: Layer, key: int, num_kept: int) -> int:
    """Return the flat index from which on ties are pruned if ``num_kept`` of them stay; n if that is all of them.

    Reads the layer once, in halves.
    """
    begin, end, bracket = 0, layer.weight.numel(), Bracket(key, key)
    if implementation.count([layer], [bracket], 1)[0].inside <= num_kept:
        return end
    while end - begin > LEAVES:
        middle = begin + (end - begin) // 16 * 8
        inside = implementation.count([piece(layer, begin, middle)], [bracket], 1)[0].inside
        if num_kept < inside:
            end = middle
        else:
            begin, num_kept = middle, num_kept - inside
    leaf = piece(layer, begin, end)
    ties = keys_of(leaf.weight.cpu()).numpy() == key
    if leaf.mask is not None:
        ties &= np.unpackbits(leaf.mask.cpu().numpy(), count=ties.size, bitorder="little").astype(bool)
    return begin + int(np.flatnonzero(ties)[num_kept])


def piece(layer: Layer, begin: int, end: int) -> Layer:
    """Return the weights [begin, end) of a layer as one; both ends are multiples of 8, or the end of the layer."""
    mask = None if layer.mask is None else layer.mask[begin // 8 : -(-end // 8)]
    return Layer(layer.weight.reshape(-1)[begin:end], mask)
