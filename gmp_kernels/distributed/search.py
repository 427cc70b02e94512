"""The thresholds of layers of which each rank holds a piece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from gmp_kernels.backends import Bracket, Implementation, Threshold
from gmp_kernels.backends.keys import largest_key
from gmp_kernels.distributed.communicator import Communicator
from gmp_kernels.distributed.guesses import Question, guess
from gmp_kernels.distributed.pieces import NO_BRACKET, Piece
from gmp_kernels.distributed.ties import divide
from gmp_kernels.search.cutoffs import Counted, Cut, find_cuts, near

__all__ = ["Search"]

# Bits of the key by which a round narrows an interval. Counts are sent as int32 at first, 8 KB for each layer at most,
# and soon as uint8, when few weights are left inside.
FEW_BITS, MOST_BITS = 9, 11
# The weights inside the first interval are remembered, up to ROOM_BYTES and another 1 / ROOM_PART of the largest piece:
# within the memory that a prune step may take.
ROOM_BYTES, ROOM_PART = 3 << 20, 40


class Search:
    """The search for the thresholds of groups of layers.

    Parameters
    ----------
    ranks : Communicator
    implementation : Implementation
    groups : sequence of sequences of Piece
        Layers that are ranked together; in each the flat index runs through them in order.
    num_prune : sequence of int
        Per group, of the whole layers.
    previous : sequence of Threshold or None
        Per group, of the last update, if there was one.

    Attributes
    ----------
    num_pruned : list of int
        Per group, what was pruned before.
    """

    def __init__(
        self,
        ranks: Communicator,
        implementation: Implementation,
        groups: Sequence[Sequence[Piece]],
        num_prune: Sequence[int],
        previous: Sequence[Threshold | None],
    ) -> None:
        self._ranks = ranks
        self._implementation = implementation
        self._groups = groups
        self._num_prune = num_prune
        self._previous = previous
        self._sizes = [sum(p.holding.size for p in group) for group in groups]
        # By group: the last bracket, and how many keys lie up to the end of each of its bins.
        self._counted: dict[int, tuple[Bracket, np.ndarray]] = {}
        self.num_pruned = [0] * len(groups)

    def guess(self) -> list[Bracket]:
        """Guess where the thresholds may lie, from the pieces here alone; an empty bracket where there are none."""
        brackets = [Bracket(largest_key(group[0].dtype), 0) for group in self._groups]
        present = {g: [p for p in group if p.layer is not None] for g, group in enumerate(self._groups)}
        present = {g: pieces for g, pieces in present.items() if pieces}
        questions = [
            Question([p.layer for p in pieces if p.layer], self._share(g), min(p.holding.num_pieces for p in pieces))
            for g, pieces in present.items()
        ]
        for (g, pieces), (bracket, density) in zip(present.items(), guess(questions), strict=True):
            brackets[g] = bracket
            for p in pieces:
                p.density = density
        return brackets

    def cuts(self, brackets: Sequence[Bracket]) -> list[Cut]:
        """Find the thresholds, and how many ties stay in which piece; ``brackets``: the union of all ranks' guesses."""
        dtypes = [group[0].dtype for group in self._groups]
        nearer = [_nearer(*row) for row in zip(brackets, self._previous, dtypes, strict=True)]
        cuts = find_cuts(self._num_prune, dtypes, nearer, self._count)
        for group, cut in zip(self._groups, cuts, strict=True):
            for p in group:
                p.settle(cut)
        divide(self._ranks, self._implementation, self._groups, cuts)
        return cuts

    def first_nonfinite(self) -> list[int]:
        """Per layer, the flat index of the first unpruned NaN or Inf in it, -1 if there is none."""
        pieces = [p for group in self._groups for p in group]
        none = torch.iinfo(torch.int64).max
        found = [none if p.nonfinite < 0 else p.holding.region.to_global(p.nonfinite) for p in pieces]
        first = (-self._ranks.largest(-torch.tensor(found, device="cpu"))).tolist()
        return [-1 if index == none else index for index in first]

    def _share(self, g: int) -> float:
        """Of the unpruned weights of a group, the part that is to be pruned."""
        previous = self._previous[g]
        num_pruned = 0 if previous is None else previous.num_pruned
        unpruned = max(1, self._sizes[g] - num_pruned)
        return min(max(0.0, (self._num_prune[g] - num_pruned) / unpruned), 1.0)

    def _count(self, brackets: Mapping[int, Bracket]) -> dict[int, Counted]:
        """One round: every open group against its bracket, summed over layers and ranks."""
        is_first = not self._counted
        num_bins = 1 << _bits(max(bracket.hi - bracket.lo for bracket in brackets.values()))
        pieces = [p for g in brackets for p in self._groups[g]]
        targets = [p.narrow(brackets[g]) for g in brackets for p in self._groups[g]]
        present = [(i, target) for i, target in enumerate(targets) if target is not None]
        if is_first:
            _make_rooms([pieces[i] for i, _ in present], num_bins)
        rows = [torch.zeros(num_bins, dtype=torch.int64, device="cpu")] * len(pieces)
        numbers = np.zeros((len(pieces), 3), np.int64)
        if present:
            found = self._implementation.count(
                [target for _, target in present],
                [pieces[i].bracket for i, _ in present],
                num_bins,
                [pieces[i].room for i, _ in present] if is_first else None,
            )
            for (i, _), census in zip(present, found, strict=True):
                rows[i] = census.bins
                if is_first:
                    numbers[i] = census.below, census.pruned, census.nonfinite >= 0
                    pieces[i].start(census)
        bins = torch.stack(rows).numpy()
        for p, row in zip(pieces, bins, strict=True):
            p.bins = row
        # Later rounds count what is left of the first one.
        bound = max(self._sizes) + len(pieces) * self._ranks.size if is_first else self._inside(brackets)
        silent = [i for i, p in enumerate(pieces) if not p.holding.speaks]
        if is_first:
            # All that hold a NaN say so, also copies.
            numbers[silent, :2] = 0
            sent = np.concatenate((numbers, bins), axis=1)
            sent[silent, 3:] = 0
        else:
            sent = bins.copy() if silent else bins
            sent[silent] = 0
        if len(brackets) < len(pieces):
            firsts = np.cumsum([0, *(len(self._groups[g]) for g in brackets)])[:-1]
            sent = np.add.reduceat(sent, firsts)
        sums = self._ranks.total(torch.from_numpy(sent), bound).numpy()
        whole = sums[:, :-num_bins].tolist() if is_first else [(0, 0, 0)] * len(brackets)
        counted = {}
        untils = sums[:, -num_bins:].cumsum(axis=1)
        for g, (below, pruned, nonfinite), until in zip(brackets, whole, untils, strict=True):
            counted[g] = Counted(below, pruned, nonfinite or -1, until)
            if is_first:
                self.num_pruned[g] = pruned
            self._counted[g] = brackets[g], until
        return counted

    def _inside(self, brackets: Mapping[int, Bracket]) -> int:
        """Return what no count of this round can exceed, by the sums of the last one."""
        bound = 0
        for g, bracket in brackets.items():
            last, until = self._counted.get(g, (NO_BRACKET, None))
            if until is None or bracket.lo < last.lo or bracket.hi > last.hi:
                return max(self._sizes)
            slot = (bracket.lo - last.lo) >> last.shift(len(until))
            bound = max(bound, int(until[slot]) - (int(until[slot - 1]) if slot else 0))
        return bound


def _bits(width: int) -> int:
    """By how many bits of the key to narrow an interval: in as few rounds as there can be, the first the smallest."""
    bits = width.bit_length()
    rounds = max(1, -(-bits // MOST_BITS))
    return min(bits, max(FEW_BITS, bits - (rounds - 1) * MOST_BITS))


def _nearer(bracket: Bracket, previous: Threshold | None, dtype: torch.dtype) -> Bracket:
    """Leave out what lies well below the previous threshold: unpruned weights are rare there, but keys are many."""
    lo = 0 if previous is None else near(previous, dtype).lo
    if not bracket.lo < lo <= bracket.hi:
        return bracket
    # As far below it as costs nothing: the keys of an interval are counted in a power of two.
    bits = max(FEW_BITS, (bracket.hi - lo).bit_length())
    return Bracket(max(bracket.lo, bracket.hi - (1 << bits) + 1), bracket.hi)


def _make_rooms(pieces: Sequence[Piece], num_bins: int) -> None:
    """Room for a quarter more weights than are expected inside, where there will be another round."""
    layers = [p.layer for p in pieces if p.layer is not None]
    left = ROOM_BYTES + max((layer.weight.nbytes for layer in layers), default=0) // ROOM_PART
    for p, layer in zip(pieces, layers, strict=True):
        if not p.bracket.shift(num_bins):
            continue
        width = p.bracket.hi - p.bracket.lo + 1
        size = min(layer.weight.numel(), int(1.25 * p.density * width * layer.weight.numel()) + 64)
        if size * layer.weight.itemsize <= left:
            left -= size * layer.weight.itemsize
            p.room = torch.empty(size, dtype=layer.weight.dtype, device=layer.weight.device)
