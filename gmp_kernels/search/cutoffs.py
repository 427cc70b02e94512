"""Exact selection from counts alone, for layers that no single call sees whole: shards on ranks, pieces of a file.

Each round counts every piece against one interval of keys per group of layers; whoever calls adds the counts up. The
sums prove in which interval the wanted key lies, and the next round looks at that one only, until it holds one key.
Whatever the pieces are, the answer is that of ``Implementation.select`` on the whole.

Source: Floyd and Rivest, CACM 18(3), 1975, for the first interval; then radix selection on what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch

from gmp_kernels.backends import Bracket, Implementation, Layer, Threshold
from gmp_kernels.backends.keys import bits_of, key_of, largest_key, magnitude_of

__all__ = [
    "Counted",
    "Cut",
    "cut_indices",
    "divide_ties",
    "find_cuts",
    "near",
    "piece",
    "tied",
    "ties_around",
    "window_of_tie",
]

DRIFT = 1 / 64  # of an octave to each side, that a threshold is expected to move between two updates
CHUNK = 1 << 17  # weights that are searched for ties at a time
SIGMAS = 2  # a tie outside its window, one in twenty, costs a look at the whole layer


class Counted(NamedTuple):
    """Counts that a round has found of one group of layers, all its pieces added up.

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
    """Cut of a group of layers.

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
    key, drift = key_of(threshold.value, dtype), _drift(dtype)
    return Bracket(max(0, key - drift), min(largest_key(dtype), key + drift))


@cache
def _drift(dtype: torch.dtype) -> int:
    return max(1, int((key_of(2.0, dtype) - key_of(1.0, dtype)) * DRIFT))


def divide_ties(num_ties: Sequence[int], num_kept: int) -> list[int]:
    """Say how many ties stay in each of the pieces, which follow one another: the first ``num_kept`` of all."""
    before = np.cumsum([0, *num_ties])[:-1]
    return [int(kept) for kept in np.clip(num_kept - before, 0, num_ties)]


def tied(layer: Layer, key: int, begin: int, end: int) -> Iterator[np.ndarray]:
    """Yield the flat indices of the unpruned weights of this key, chunk by chunk; ``begin`` is a multiple of 8."""
    bits, largest = bits_of(layer.weight).view(-1), largest_key(layer.weight.dtype)
    magnitude = torch.iinfo(bits.dtype).max
    for start in range(begin, end, CHUNK):
        # numpy is several times faster than torch at this.
        keys = bits[start : min(start + CHUNK, end)].cpu().numpy() & magnitude
        # NaN has many bit patterns.
        places = np.flatnonzero(keys == key if key < largest else keys >= key)
        if layer.mask is not None:
            of_bytes = layer.mask[start // 8 : -(-end // 8)].cpu().numpy()
            places = places[(of_bytes[places >> 3] >> (places & 7) & 1).astype(bool)]
        yield places + start


def window_of_tie(
    rank: np.ndarray, num_ties: np.ndarray, size: np.ndarray, sigmas: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the flat indices between which tie number ``rank``, from 0, lies if chance has spread them.

    ``sigmas``: half the width, in standard deviations.
    """
    share = (rank + 0.5) / num_ties
    # Near the ends ties are spread like Poisson's: the last term makes up for their longer tail.
    half = sigmas * np.sqrt(share * (1 - share) / num_ties) + sigmas**2 / 2 / num_ties
    begin, end = size * np.maximum(0, share - half), size * np.minimum(1, share + half)
    return begin.astype(np.int64), np.ceil(end).astype(np.int64)


def ties_around(
    implementation: Implementation,
    layers: Sequence[Layer],
    keys: Sequence[int],
    num_ties: Sequence[int],
    windows: Iterable[tuple[int, int]],
) -> list[tuple[int, np.ndarray]]:
    """Find the ties in a window of each layer and count those before it, knowing how many there are.

    The window begins at a multiple of 8. Reads it, and of what lies to its sides the shorter part.

    Returns
    -------
    list of (int, numpy.ndarray)
        How many ties come before the window, and the flat indices of those inside.
    """
    before, inside = [0] * len(layers), []
    shorter: dict[int, Layer] = {}
    for i, (layer, key, (begin, end)) in enumerate(zip(layers, keys, windows, strict=True)):
        n = layer.weight.numel()
        end = min(-(-end // 8) * 8, n)
        inside.append(np.concatenate([np.zeros(0, np.int64), *tied(layer, key, begin, end)]))
        if 0 < begin <= n - end:
            shorter[i] = piece(layer, 0, begin)
        elif begin:
            before[i] = num_ties[i] - len(inside[i])
            if end < n:
                shorter[i] = piece(layer, end, n)
    if shorter:
        counts = implementation.count(list(shorter.values()), [Bracket(keys[i], keys[i]) for i in shorter], 1)
        for i, census in zip(shorter, counts, strict=True):
            before[i] = abs(before[i] - census.inside)
    return list(zip(before, inside, strict=True))


def cut_indices(
    implementation: Implementation,
    layers: Sequence[Layer],
    keys: Sequence[int],
    num_ties: Sequence[int],
    num_kept: Sequence[int],
) -> list[int]:
    """Return per layer the flat index from which on ties are pruned if ``num_kept`` of ``num_ties``, not all, stay."""
    sizes = np.array([layer.weight.numel() for layer in layers])
    begins, ends = window_of_tie(np.array(num_kept), np.array(num_ties), sizes, SIGMAS)
    windows = zip((begins // 8 * 8).tolist(), ends.tolist(), strict=True)
    cuts = []
    around = ties_around(implementation, layers, keys, num_ties, windows)
    for layer, key, kept, (before, inside) in zip(layers, keys, num_kept, around, strict=True):
        if 0 <= kept - before < len(inside):
            cuts.append(int(inside[kept - before]))
            continue
        left = kept
        for places in tied(layer, key, 0, layer.weight.numel()):
            if left < len(places):
                cuts.append(int(places[left]))
                break
            left -= len(places)
    return cuts


def piece(layer: Layer, begin: int, end: int) -> Layer:
    """Return the weights [begin, end) of a layer as one; both ends are multiples of 8, or the end of the layer."""
    mask = None if layer.mask is None else layer.mask[begin // 8 : -(-end // 8)]
    return Layer(layer.weight.reshape(-1)[begin:end], mask)
