"""THE driver in Python: thresholds of layers of which each rank holds a piece, or that a backend only counts.

All layers share each round: a bracket from samples, counts against it until it holds one key, then ties. Ranks draw the
same conclusions from the same sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np
import torch

from gmp_kernels.backends.keys import largest_key
from gmp_kernels.backends.types import (
    Bracket,
    BracketCounts,
    Cutoffs,
    Implementation,
    Layer,
    Selection,
)
from gmp_kernels.search.brackets import FEW_BITS
from gmp_kernels.search.communicator import Communicator
from gmp_kernels.search.cutoffs import GroupCutoff, find_cutoffs
from gmp_kernels.search.placement import Placement, Region
from gmp_kernels.search.sample import estimate
from gmp_kernels.search.ties import locate_ties, share_ties

__all__ = ["Piece", "Search", "select"]

# Bits of the key by which a round narrows a bracket, at most. Counts are sent as int32 at first, 8 KB for each layer at
# most, and soon as uint8, when few weights are left inside.
MOST_BITS = 11
# Memory of a selection, within what a prune step may take: bins of all pieces together, and the candidates of the first
# bracket, which get another 1 / CANDIDATE_PART of the largest piece.
BIN_BYTES, CANDIDATE_BYTES, CANDIDATE_PART = 1 << 20, 2 << 20, 40


@dataclass(slots=True, eq=False)
class Piece:
    """Part of a layer that is counted here, and what is known of it.

    Attributes
    ----------
    layer : Layer or None
        None where this rank holds nothing: a layer may have fewer rows than there are ranks. Where ``Search`` is given
        ``read``, whatever that reads.
    dtype : torch.dtype
    placement : Placement
    candidates : torch.Tensor or None
        Magnitudes inside the first bracket, if there was memory for them.
    bins : numpy.ndarray
        Counts of the last round.
    num_ties, num_ties_kept : int
        Weights here that tie at the threshold, and those of them that stay.
    tie_index : int
        Flat index in the piece from which on ties are pruned.
    nonfinite : int
        Flat index in the piece of the first unpruned NaN or Inf, -1 if there is none.
    density : float
        About how much of the piece lies on each key around the threshold.
    """

    layer: Any
    dtype: torch.dtype
    placement: Placement
    candidates: torch.Tensor | None = None
    bins: np.ndarray | None = None
    num_ties: int = 0
    num_ties_kept: int = 0
    tie_index: int = 0
    nonfinite: int = -1
    density: float = 0.0


T = TypeVar("T")
Read = Callable[..., Sequence[BracketCounts]]


class Search:
    """The search for the thresholds of groups of layers.

    Parameters
    ----------
    communicator : Communicator
    implementation : Implementation
    groups : sequence of sequences of Piece
        Layers that are ranked together; in each the flat index runs through them in order.
    num_prune : sequence of int
        Per group, of the whole layers.
    read : callable, optional
        Counts pieces as ``Implementation.count`` counts layers, which is the default. It may fail on one rank alone.
    """

    def __init__(
        self,
        communicator: Communicator,
        implementation: Implementation,
        groups: Sequence[Sequence[Piece]],
        num_prune: Sequence[int],
        read: Read | None = None,
    ) -> None:
        self._communicator = communicator
        self._implementation = implementation
        self._read: Read = implementation.count if read is None else read
        # Every rank takes part in every round, whether it has anything to read or not.
        self._together = _alone if read is None else communicator.together
        self._groups = groups
        self._num_prune = num_prune
        self._sizes = [sum(p.placement.size for p in group) for group in groups]
        # Of each group, the bracket that its candidates are from, and the last one.
        self._held: dict[int, Bracket] = {}
        self._last: dict[int, Bracket] = {}

    def estimate(self, num_pruned: Sequence[int | None]) -> list[Bracket]:
        """Bracket the thresholds by a sample of the pieces here; empty brackets where there are none.

        ``num_pruned``: weights of the whole layers that are pruned already, per group; None where that is not known.
        """
        brackets = [Bracket(largest_key(group[0].dtype), 0) for group in self._groups]
        present = {g: [p for p in group if p.layer is not None] for g, group in enumerate(self._groups)}
        present = {g: pieces for g, pieces in present.items() if pieces}
        layers = [[p.layer for p in pieces] for pieces in present.values()]
        num_prune, known, sizes = (
            [self._num_prune[g] for g in present],
            [num_pruned[g] for g in present],
            [self._sizes[g] for g in present],
        )
        num_parts = [min(p.placement.num_parts for p in pieces) for pieces in present.values()]
        for (g, pieces), (bracket, density) in zip(
            present.items(), estimate(layers, num_prune, known, sizes, num_parts), strict=True
        ):
            brackets[g] = bracket
            for p in pieces:
                p.density = density
        return brackets

    def find(self, brackets: Sequence[Bracket]) -> list[GroupCutoff]:
        """Find the thresholds, and how many weights of each piece tie with them."""
        largest = [largest_key(group[0].dtype) for group in self._groups]
        cutoffs = find_cutoffs(self._num_prune, self._sizes, largest, brackets, self._count)
        for g, (group, cutoff) in enumerate(zip(self._groups, cutoffs, strict=True)):
            for p in group:
                # The last round had a bin for each key.
                if cutoff.num_ties and p.bins is not None:
                    p.num_ties = int(p.bins[cutoff.key - self._last[g].lo])
        return cutoffs

    def share_ties(self, cutoffs: Sequence[GroupCutoff]) -> None:
        """Find how many ties stay in which piece."""
        share_ties(self._communicator, self._groups, cutoffs)

    def locate_ties(self, cutoffs: Sequence[GroupCutoff]) -> None:
        """Find how many ties stay in which piece, and the flat index in it from which on they go."""
        open_ranges = share_ties(self._communicator, self._groups, cutoffs)
        locate_ties(self._communicator, self._implementation, self._groups, cutoffs, open_ranges)

    def first_nonfinite(self) -> list[int]:
        """Return per layer the flat index of the first unpruned NaN or Inf in it, -1 if there is none."""
        pieces = [p for group in self._groups for p in group]
        none = torch.iinfo(torch.int64).max
        found = [none if p.nonfinite < 0 else p.placement.region.to_global(p.nonfinite) for p in pieces]
        first = (-self._communicator.largest(-torch.tensor(found, device="cpu"))).tolist()
        return [-1 if index == none else index for index in first]

    def _count(self, groups: Sequence[int], brackets: Sequence[Bracket], most: int) -> tuple[np.ndarray, np.ndarray]:
        """Count one round: every open group against its bracket, summed over layers and ranks."""
        is_first = not self._last
        pieces = [(p, bracket) for g, bracket in zip(groups, brackets, strict=True) for p in self._groups[g]]
        most_bits = max(1, (BIN_BYTES // (8 * len(pieces))).bit_length() - 1)
        num_bins = 1 << min(most_bits, _bits(max(bracket.hi - bracket.lo for bracket in brackets)))
        self._last.update(zip(groups, brackets, strict=True))
        if is_first:
            self._held.update(self._last)
            _make_candidates(pieces, num_bins)
        counted = self._together(lambda: self._counted(groups, pieces, num_bins, is_first))
        nothing = np.zeros(num_bins, np.int64)
        bins = np.stack([counted[i].bins.numpy() if i in counted else nothing for i in range(len(pieces))])
        numbers = np.zeros((len(pieces), 3), np.int64)
        for i, counts in counted.items() if is_first else ():
            numbers[i] = counts.below, counts.pruned, counts.nonfinite >= 0
            p = pieces[i][0]
            p.nonfinite = counts.nonfinite
            if p.candidates is not None:
                p.candidates = p.candidates[: counts.inside] if counts.inside <= p.candidates.numel() else None
        for (p, _), row in zip(pieces, bins, strict=True):
            p.bins = row
        copies = [i for i, (p, _) in enumerate(pieces) if not p.placement.is_primary]
        # All that hold a NaN say so, also copies.
        numbers[copies, :2] = 0
        sent = np.concatenate((numbers, bins), axis=1) if is_first else bins.copy() if copies else bins
        sent[copies, sent.shape[1] - num_bins :] = 0
        if len(groups) < len(pieces):
            sent = np.add.reduceat(sent, [0, *accumulate(len(self._groups[g]) for g in groups)][:-1])
        bound = most + len(pieces) * self._communicator.size if is_first else most
        sums = self._communicator.total(torch.from_numpy(sent), bound).numpy()
        return sums[:, :-num_bins], sums[:, -num_bins:]

    def _counted(
        self, groups: Sequence[int], pieces: Sequence[tuple[Piece, Bracket]], num_bins: int, is_first: bool
    ) -> dict[int, BracketCounts]:
        """Count the pieces here, by position, from their candidates where these suffice."""
        for g in groups:
            held, last = self._held[g], self._last[g]
            if last.lo < held.lo or last.hi > held.hi:
                for p in self._groups[g]:
                    p.candidates = None
        found: dict[int, BracketCounts] = {}
        read = [i for i, (p, _) in enumerate(pieces) if p.layer is not None and (is_first or p.candidates is None)]
        listed = [
            (i, Layer(p.candidates, None), bracket)
            for i, (p, bracket) in enumerate(pieces)
            if p.candidates is not None and p.candidates.numel()
        ]
        if read:
            candidates = [pieces[i][0].candidates for i in read] if is_first else None
            layers, brackets = zip(*((pieces[i][0].layer, pieces[i][1]) for i in read), strict=True)
            found.update(zip(read, self._read(layers, brackets, num_bins, candidates), strict=True))
        if listed and not is_first:
            positions, layers, brackets = zip(*listed, strict=True)
            found.update(zip(positions, self._implementation.count(layers, brackets, num_bins), strict=True))
        return found


def select(
    implementation: Implementation,
    layers: Sequence[Layer],
    num_prune: Sequence[int],
    group_sizes: Sequence[int],
    brackets: Sequence[Bracket | None] | None = None,
    *,
    prunes: bool = False,
) -> Selection:
    """Find the cutoff of every layer, as ``backends.types.Select`` says: by the backend, or if it only counts, here.

    Here, the host waits for the device in every round.
    """
    if implementation.select is not None:
        return implementation.select(layers, num_prune, group_sizes, brackets, prunes=prunes)
    pieces = [Piece(layer, layer.weight.dtype, _whole(layer.weight.numel())) for layer in layers]
    firsts = [0, *accumulate(group_sizes)]
    groups = [pieces[first : first + size] for first, size in zip(firsts, group_sizes, strict=False)]
    search = Search(Communicator(None), implementation, groups, num_prune)
    aims = search.estimate([None] * len(groups))
    if brackets is not None:
        aims = [given or sampled for given, sampled in zip(brackets, aims, strict=True)]
    found = search.find(aims)
    search.locate_ties(found)
    rows = [(*cutoff[:4], p.tie_index, p.nonfinite) for g, cutoff in zip(groups, found, strict=True) for p in g]
    return Selection(Cutoffs.of(rows))


@cache
def _whole(n: int) -> Placement:
    return Placement("layer", [Region((n,), (0,), (n,))], 0)


def _alone(work: Callable[[], T]) -> T:
    return work()


def _bits(width: int) -> int:
    """Return by how many bits of the key to narrow a bracket: in as few rounds as possible, the first the smallest."""
    bits = max(0, width).bit_length()
    rounds = max(1, -(-bits // MOST_BITS))
    return min(bits, max(FEW_BITS, bits - (rounds - 1) * MOST_BITS))


def _make_candidates(pieces: Sequence[tuple[Piece, Bracket]], num_bins: int) -> None:
    """Make room for a quarter more weights than are expected inside, where there will be another round."""
    here = [(p, bracket) for p, bracket in pieces if p.layer is not None and p.density]
    left = CANDIDATE_BYTES + max((p.layer.weight.nbytes for p, _ in here), default=0) // CANDIDATE_PART
    for p, bracket in here:
        if not bracket.shift(num_bins):
            continue
        n, itemsize = p.layer.weight.numel(), p.layer.weight.itemsize
        size = min(n, int(1.25 * p.density * (bracket.hi - bracket.lo + 1) * n) + 64)
        if size * itemsize <= left:
            left -= size * itemsize
            p.candidates = torch.empty(size, dtype=p.dtype, device=p.layer.weight.device)
