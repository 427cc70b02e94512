"""The thresholds of layers of which each rank holds a piece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gmp_kernels.backends import Bracket, Census, Implementation, Layer, Selection, Threshold
from gmp_kernels.distributed.guesses import Question, guess
from gmp_kernels.distributed.ranks import Ranks
from gmp_kernels.keys import keys_of, largest_key
from gmp_kernels.selection import Counted, Cut, cut_index, find_cuts, near, piece
from gmp_kernels.sharding import Holding

__all__ = ["Piece", "Search"]

# Bits of the key by which a round narrows an interval. Counts are sent as int32 at first, 8 KB for each layer at most,
# and soon as uint8, when few weights are left inside.
FEW_BITS, MOST_BITS = 8, 11
SLOTS = 1024  # that a range of flat indices is divided into to count ties in
CHUNK = 1 << 18  # weights that are searched for ties at a time
NO_BRACKET = Bracket(0, -1)
# The weights inside the first interval are remembered, up to ROOM_BYTES and another 1 / ROOM_PART of the largest piece:
# within the memory that a prune step may take.
ROOM_BYTES, ROOM_PART = 3 << 20, 40


@dataclass(slots=True, eq=False)
class Piece:
    """What this rank holds of a layer, and what is known of it in the search for the layer's threshold.

    Attributes
    ----------
    layer : Layer or None
        None where this rank holds nothing: a layer may have fewer rows than there are ranks.
    dtype : torch.dtype
    holding : Holding
    num_pruned, num_below, num_ties, num_kept : int
        Pruned already; unpruned and below the bracket, or the threshold; tied at it; those of the ties that stay.
    cut : int
        Flat index in the piece from which on ties are pruned.
    nonfinite : int
        Flat index in the piece of the first unpruned NaN or Inf, -1 if there is none.
    density : float
        About how much of the piece lies on each key around the threshold.
    """

    layer: Layer | None
    dtype: torch.dtype
    holding: Holding
    num_pruned: int = 0
    num_below: int = 0
    num_ties: int = 0
    num_kept: int = 0
    cut: int = 0
    nonfinite: int = -1
    density: float = 0.0
    # Magnitudes inside the first bracket.
    room: torch.Tensor | None = None
    # The last bracket, and how many keys lie up to the end of each of its bins.
    bracket: Bracket = NO_BRACKET
    until: np.ndarray | None = None

    def narrow(self, bracket: Bracket) -> Layer | None:
        """Go over to a bracket inside or beside the last one; return what is to be counted against it."""
        if self.until is None:
            self.bracket = bracket
            return self.layer
        last = self.bracket
        if bracket.lo < last.lo:
            self.num_below = 0
        elif bracket.lo > last.hi:
            self.num_below += int(self.until[-1])
        else:
            self.num_below += _before(self.until, (bracket.lo - last.lo) >> last.shift(len(self.until)))
        if bracket.lo < last.lo or bracket.hi > last.hi:
            self.room = None
        self.bracket = bracket
        if self.layer is None or self.room is None:
            return self.layer
        return Layer(self.room, None) if self.room.numel() else None

    def start(self, census: Census) -> None:
        """Note what the first round has found."""
        self.num_pruned, self.num_below, self.nonfinite = census.pruned, census.below, census.nonfinite
        if self.room is not None:
            self.room = self.room[: census.inside] if census.inside <= self.room.numel() else None

    def settle(self, cut: Cut) -> None:
        """Note what lies below the threshold here and what ties with it; the last round had a bin for its key."""
        assert self.until is not None
        if cut.threshold.num_ties:
            slot = cut.key - self.bracket.lo
            self.num_ties = int(self.until[slot]) - _before(self.until, slot)
            self.narrow(Bracket(cut.key, cut.key))
        else:
            self.num_below, self.cut = 0, self.holding.region.numel

    def selection(self, value: float) -> Selection:
        """Return what ``Implementation.prune`` is told."""
        threshold = Threshold(value, self.num_pruned + self.num_below, self.num_ties, self.num_kept)
        return Selection(threshold, (self.cut,), (-1,))

    def count_ties(self, key: int, bounds: np.ndarray) -> np.ndarray:
        """Count the ties between each two of these flat indices of the layer."""
        counts = np.zeros(len(bounds) - 1, dtype=np.int64)
        if self.layer is None:
            return counts
        places = self.holding.region.to_local(bounds)
        for start in range(int(places[0]) // 8 * 8, int(places[-1]), CHUNK):
            chunk = piece(self.layer, start, min(start + CHUNK, self.holding.region.numel))
            tied = keys_of(chunk.weight) == key
            if chunk.mask is not None:
                bits = chunk.mask.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=chunk.mask.device)
                tied &= bits.bitwise_and_(1).view(-1)[: len(tied)].bool()
            counts += np.diff(np.searchsorted(tied.nonzero().view(-1).cpu().numpy() + start, places))
        return counts


@dataclass(frozen=True, eq=False)
class _TieCount:
    """One layer in one round of dividing ties: how many lie between which flat indices.

    Where every rank holds a run of flat indices, the bounds are those of the runs and the first round is the last.
    """

    piece: Piece
    key: int
    quota: int  # which of the quotas it takes from; the layers of a group take from one, in their order
    bounds: np.ndarray
    are_runs: bool

    def here(self) -> np.ndarray:
        """Ties between these bounds in this rank's piece."""
        if not self.are_runs:
            return self.piece.count_ties(self.key, self.bounds)
        counts = np.zeros(len(self.bounds) - 1, dtype=np.int64)
        counts[self.piece.holding.slot] = self.piece.num_ties
        return counts


class Search:
    """The search for the thresholds of groups of layers.

    Parameters
    ----------
    ranks : Ranks
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
        ranks: Ranks,
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
        """Where the thresholds may lie, judging by the pieces here alone; an empty bracket where there are none."""
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
        counts: list[_TieCount] = []
        for g, (group, cut) in enumerate(zip(self._groups, cuts, strict=True)):
            for p in group:
                p.settle(cut)
                # Without one that stays, all of them are pruned, from flat index 0 on.
                if cut.threshold.num_ties_kept:
                    size, starts = p.holding.size, p.holding.starts
                    bounds = _even(0, size) if starts is None else np.array([*starts, size])
                    counts.append(_TieCount(p, cut.key, g, bounds, starts is not None))
        quotas = {g: cut.threshold.num_ties_kept for g, cut in enumerate(cuts)}
        bound = max(self._sizes)
        while counts:
            counts, quotas, bound = self._divide(counts, quotas, bound)
        return cuts

    def first_nonfinite(self) -> list[int]:
        """Per layer, the flat index of the first unpruned NaN or Inf in it, -1 if there is none."""
        pieces = [p for group in self._groups for p in group]
        none = torch.iinfo(torch.int64).max
        found = [none if p.nonfinite < 0 else p.holding.region.to_global(p.nonfinite) for p in pieces]
        first = (-self._ranks.largest(-torch.tensor(found))).tolist()
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
        rows = [torch.zeros(num_bins, dtype=torch.int64)] * len(pieces)
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
        for p, until in zip(pieces, bins.cumsum(axis=1), strict=True):
            p.until = until
        # All that hold a NaN say so, also copies.
        silent = [i for i, p in enumerate(pieces) if not p.holding.speaks]
        numbers[silent, :2] = bins[silent] = 0
        # Later rounds count what is left of the first one.
        bound = max(self._sizes) + len(pieces) * self._ranks.size if is_first else self._inside(brackets)
        sent = np.concatenate((numbers, bins), axis=1) if is_first else bins
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
        """What no count of this round can exceed, by the sums of the last one."""
        bound = 0
        for g, bracket in brackets.items():
            last, until = self._counted.get(g, (NO_BRACKET, None))
            if until is None or bracket.lo < last.lo or bracket.hi > last.hi:
                return max(self._sizes)
            slot = (bracket.lo - last.lo) >> last.shift(len(until))
            bound = max(bound, int(until[slot]) - _before(until, slot))
        return bound

    def _divide(
        self, counts: Sequence[_TieCount], quotas: Mapping[int, int], bound: int
    ) -> tuple[list[_TieCount], dict[int, int], int]:
        """Divide the ties that stay among the slots of the counts; return what has to be looked at more closely.

        ``bound`` is what no count can exceed.
        """
        here = [count.here() for count in counts]
        spoken = [ties * count.piece.holding.speaks for count, ties in zip(counts, here, strict=True)]
        sums = self._ranks.total(torch.from_numpy(np.concatenate(spoken)), bound).numpy()
        totals = np.split(sums, np.cumsum([len(ties) for ties in here])[:-1])
        left = dict(quotas)
        closer: list[_TieCount] = []
        most = 0
        more: dict[int, int] = {}
        for i, (count, total) in enumerate(zip(counts, totals, strict=True)):
            kept = np.clip(left[count.quota] - (total.cumsum() - total), 0, total)
            left[count.quota] -= int(kept.sum())
            p = count.piece
            if count.are_runs:
                p.num_kept = int(kept[p.holding.slot]) if p.layer is not None else 0
                p.cut = p.holding.region.numel if p.num_kept == p.num_ties else 0
                if 0 < p.num_kept < p.num_ties and p.layer is not None:
                    p.cut = cut_index(self._implementation, p.layer, count.key, p.num_kept)
                continue
            loses = np.flatnonzero(kept < total)
            slot = int(loses[0]) if len(loses) else len(total)
            p.num_kept += int(here[i][:slot].sum())
            if len(loses) and kept[slot]:
                bounds = _even(int(count.bounds[slot]), int(count.bounds[slot + 1]))
                closer.append(_TieCount(p, count.key, i, bounds, are_runs=False))
                more[i], most = int(kept[slot]), max(most, int(total[slot]))
            else:
                p.cut = int(p.holding.region.to_local(count.bounds[slot : slot + 1])[0])
        return closer, more, most


def _bits(width: int) -> int:
    """By how many bits of the key to narrow an interval: in as few rounds as there can be, of equal size."""
    bits = width.bit_length()
    rounds = max(1, -(-bits // MOST_BITS))
    return -(-bits // rounds)


def _nearer(bracket: Bracket, previous: Threshold | None, dtype: torch.dtype) -> Bracket:
    """Leave out what lies well below the previous threshold: unpruned weights are rare there, but keys are many."""
    lo = 0 if previous is None else near(previous, dtype).lo
    if not bracket.lo < lo <= bracket.hi:
        return bracket
    # As far below it as costs nothing: the keys of an interval are counted in a power of two.
    bits = max(FEW_BITS, (bracket.hi - lo).bit_length())
    return Bracket(max(bracket.lo, bracket.hi - (1 << bits) + 1), bracket.hi)


def _before(until: np.ndarray, slot: int) -> int:
    """Sum of the bins before one of them, given the sums up to the end of each."""
    return int(until[slot - 1]) if slot else 0


def _even(begin: int, end: int) -> np.ndarray:
    slots = min(SLOTS, end - begin)
    return begin + (end - begin) * np.arange(slots + 1) // slots


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
