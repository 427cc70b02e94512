"""The thresholds of layers of which each rank holds a piece."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from gmp_kernels.backends import Bracket, Census, Implementation, Layer, Selection, Threshold
from gmp_kernels.distributed.ranks import Ranks
from gmp_kernels.keys import keys_of, largest_key
from gmp_kernels.selection import Cut, cut_index, divide_ties, find_cuts, piece
from gmp_kernels.sharding import Region

__all__ = ["Piece", "Search"]

BITS_PER_ROUND = 10  # 4 KB for each layer, as long as its weights are fewer than 2^31
SLOTS = 512  # that a range of flat indices is divided into to count ties in
NO_BRACKET = Bracket(0, -1)
CHUNK = 1 << 18  # weights that are searched for ties at a time
# The weights inside the first interval are remembered, if they are no more than one in ROOM_SHARE, up to ROOM_BYTES and
# another 1 / ROOM_PART of the largest piece: within the memory that a prune step may take.
ROOM_SHARE, ROOM_BYTES, ROOM_PART = 24, 3 << 20, 40


@dataclass(slots=True, eq=False)
class Piece:
    """What this rank holds of a layer, and what is known of it in the search for the layer's threshold.

    Attributes
    ----------
    layer : Layer or None
        None where this rank holds nothing: a layer may have fewer rows than there are ranks.
    dtype : torch.dtype
    region : Region
        Where the piece lies in the layer.
    regions : list of Region
        Of all ranks.
    rank : int
    num_pruned, num_below, num_ties, num_kept : int
        Pruned already; unpruned and below the bracket, or the threshold; tied at it; those of the ties that stay.
    cut : int
        Flat index in the piece from which on ties are pruned.
    nonfinite : int
        Flat index in the piece of the first unpruned NaN or Inf, -1 if there is none.
    """

    layer: Layer | None
    dtype: torch.dtype
    region: Region
    regions: list[Region]
    rank: int
    num_pruned: int = 0
    num_below: int = 0
    num_ties: int = 0
    num_kept: int = 0
    cut: int = 0
    nonfinite: int = -1
    room: torch.Tensor | None = None
    bracket: Bracket = NO_BRACKET
    census: Census | None = None

    @property
    def counts(self) -> bool:
        """Whether this rank speaks for its region: the lowest of those that have it does."""
        return self.regions.index(self.region) == self.rank

    @property
    def starts(self) -> list[int] | None:
        """Flat indices of the layer at which the ranks' pieces begin, if each of them is one run."""
        runs = {region.flat_range for region in self.regions if region.numel}
        return sorted(run[0] for run in runs if run is not None) if None not in runs else None

    def narrow(self, bracket: Bracket) -> Layer | None:
        """Go over to a bracket inside or beside the last one; return what is to be counted against it."""
        if self.census is not None:
            last, bins = self.bracket, self.census.bins
            if bracket.lo < last.lo:
                self.num_below = 0
            elif bracket.lo > last.hi:
                self.num_below += self.census.inside
            else:
                self.num_below += int(bins[: (bracket.lo - last.lo) >> last.shift(len(bins))].sum())
            if bracket.lo < last.lo or bracket.hi > last.hi:
                self.room = None
        self.bracket = bracket
        if self.layer is None or (self.census is not None and self.room is not None and not len(self.room)):
            return None
        return self.layer if self.census is None or self.room is None else Layer(self.room, None)

    def take(self, census: Census) -> None:
        """Note what was counted against the bracket."""
        if self.census is None:
            self.num_pruned, self.num_below, self.nonfinite = census.pruned, census.below, census.nonfinite
            self.room = None if self.room is None or census.inside > len(self.room) else self.room[: census.inside]
        self.census = census

    def settle(self, cut: Cut) -> None:
        """Note what lies below the threshold here and what ties with it; the last round had a bin for its key."""
        assert self.census is not None
        if cut.threshold.num_ties:
            self.num_ties = int(self.census.bins[cut.key - self.bracket.lo])
            self.narrow(Bracket(cut.key, cut.key))
        else:
            self.num_below, self.cut = 0, self.region.numel

    def selection(self, value: float) -> Selection:
        """Return what ``Implementation.prune`` is told."""
        threshold = Threshold(value, self.num_pruned + self.num_below, self.num_ties, self.num_kept)
        return Selection(threshold, (self.cut,), (-1,))

    def ties(self, key: int, begin: int, end: int) -> Iterator[torch.Tensor]:
        """Yield, chunk by chunk, where in the layer ties of flat indices [begin, end) lie."""
        if self.layer is None:
            return
        first, last = self.region.to_local(begin), self.region.to_local(end)
        for start in range(first // 8 * 8, last, CHUNK):
            chunk = piece(self.layer, start, min(start + CHUNK, self.region.numel))
            tied = keys_of(chunk.weight) == key
            if chunk.mask is not None:
                bits = chunk.mask.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=chunk.mask.device)
                tied &= bits.bitwise_and_(1).view(-1)[: len(tied)].bool()
            found = tied.nonzero().view(-1).cpu() + start
            yield self.region.to_global(found[(first <= found) & (found < last)])


@dataclass(frozen=True)
class _TieCount:
    """One layer in one round of dividing ties: how many lie between which flat indices.

    Where every rank's piece is a run of flat indices, the bounds are theirs and the first round is the last.
    """

    piece: Piece
    key: int
    quota: int  # which of the quotas it takes from; the layers of a group take from one, in their order
    bounds: list[int]
    are_runs: bool

    def here(self) -> torch.Tensor:
        """Ties between these bounds in this rank's piece."""
        counts = torch.zeros(len(self.bounds) - 1, dtype=torch.int64)
        if self.are_runs:
            if self.piece.region.numel:
                counts[self.slot] = self.piece.num_ties
            return counts
        bounds = torch.tensor(self.bounds)
        for ties in self.piece.ties(self.key, self.bounds[0], self.bounds[-1]):
            counts += torch.bincount(torch.searchsorted(bounds, ties, right=True) - 1, minlength=len(counts))
        return counts

    @property
    def slot(self) -> int:
        """Which of the runs is this rank's."""
        run = self.piece.region.flat_range
        return bisect_left(self.bounds, 0 if run is None else run[0])


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

    Attributes
    ----------
    num_pruned : list of int
        Per group, what was pruned before.
    """

    def __init__(
        self, ranks: Ranks, implementation: Implementation, groups: Sequence[Sequence[Piece]], num_prune: Sequence[int]
    ) -> None:
        self._ranks = ranks
        self._implementation = implementation
        self._groups = groups
        self._num_prune = num_prune
        self._sizes = [sum(math.prod(p.region.shape) for p in group) for group in groups]
        self._counted: dict[int, tuple[Bracket, Census]] = {}
        self.num_pruned = [0] * len(groups)

    def guess(self) -> list[Bracket]:
        """Where the thresholds may lie, judging by the pieces here alone; an empty bracket where there are none."""
        brackets = [Bracket(largest_key(group[0].dtype), 0) for group in self._groups]
        present = [g for g, group in enumerate(self._groups) if any(p.layer for p in group)]
        layers = [p.layer for g in present for p in self._groups[g] if p.layer is not None]
        if layers:
            shares = [self._num_prune[g] / self._sizes[g] for g in present]
            for g, bracket in zip(present, self._implementation.sample(layers, shares), strict=True):
                brackets[g] = bracket
        return brackets

    def cuts(self, brackets: Sequence[Bracket]) -> list[Cut]:
        """Find the thresholds, given the union of all ranks' guesses, and how many ties stay in which piece."""
        dtypes = [group[0].dtype for group in self._groups]
        cuts = find_cuts(self._num_prune, dtypes, brackets, self._count)
        counts: list[_TieCount] = []
        for g, (group, cut) in enumerate(zip(self._groups, cuts, strict=True)):
            for p in group:
                p.settle(cut)
                # Without one that stays, all of them are pruned, from flat index 0 on.
                if cut.threshold.num_ties_kept:
                    size, starts = math.prod(p.region.shape), p.starts
                    bounds = _even(0, size) if starts is None else [*starts, size]
                    counts.append(_TieCount(p, cut.key, g, bounds, starts is not None))
        quotas = {g: cut.threshold.num_ties_kept for g, cut in enumerate(cuts)}
        while counts:
            counts, quotas = self._divide(counts, quotas)
        return cuts

    def first_nonfinite(self) -> list[int]:
        """Per layer, the flat index of the first unpruned NaN or Inf in it, -1 if there is none."""
        pieces = [p for group in self._groups for p in group]
        none = torch.iinfo(torch.int64).max
        found = [none if p.nonfinite < 0 else int(p.region.to_global(torch.tensor(p.nonfinite))) for p in pieces]
        first = (-self._ranks.largest(-torch.tensor(found))).tolist()
        return [-1 if index == none else index for index in first]

    def _count(self, brackets: Mapping[int, Bracket]) -> dict[int, Census]:
        """One round: every open group against its bracket, summed over layers and ranks."""
        is_first = not self._counted
        num_bins = 1 << max(map(_bits, brackets.values()))
        pieces = [p for g in brackets for p in self._groups[g]]
        targets = [p.narrow(brackets[g]) for g in brackets for p in self._groups[g]]
        present = [(p, target) for p, target in zip(pieces, targets, strict=True) if target is not None]
        if is_first:
            _make_rooms([p for p, _ in present])
        found = self._implementation.count(
            [target for _, target in present],
            [p.bracket for p, _ in present],
            num_bins,
            [p.room for p, _ in present] if is_first else None,
        )
        censuses = dict(zip((p for p, _ in present), found, strict=True))
        nothing = Census(0, 0, 0, -1, torch.zeros(num_bins, dtype=torch.int64))
        rows = []
        for g in brackets:
            row = torch.zeros(3 + num_bins, dtype=torch.int64)
            for p in self._groups[g]:
                census = censuses.get(p, nothing)
                p.take(census)
                if p.counts:
                    row[0] += census.below
                    row[1] += census.pruned
                    row[3:] += census.bins
                row[2] += census.nonfinite >= 0
            rows.append(row)
        first, bound = (
            (0, max(self._sizes) + len(pieces) * self._ranks.size) if is_first else (3, self._inside(brackets))
        )
        sums = self._ranks.total(torch.stack(rows)[:, first:].reshape(-1), bound).view(len(rows), -1)
        merged = {}
        for g, row in zip(brackets, sums, strict=True):
            below, pruned, nonfinite = row[:3].tolist() if is_first else (0, 0, 0)
            bins = row[3 - first :]
            merged[g] = Census(below, int(bins.sum()), pruned, nonfinite or -1, bins)
            if is_first:
                self.num_pruned[g] = pruned
            self._counted[g] = brackets[g], merged[g]
        return merged

    def _inside(self, brackets: Mapping[int, Bracket]) -> int:
        """What no count of this round can exceed, by the sums of the last one."""
        bound = 0
        for g, bracket in brackets.items():
            last, census = self._counted[g]
            if bracket.lo < last.lo or bracket.hi > last.hi:
                return max(self._sizes)
            bound = max(bound, int(census.bins[(bracket.lo - last.lo) >> last.shift(len(census.bins))]))
        return bound

    def _divide(self, counts: list[_TieCount], quotas: Mapping[int, int]) -> tuple[list[_TieCount], dict[int, int]]:
        """Divide the ties that stay among the slots of the counts; return what has to be looked at more closely."""
        here = [count.here() for count in counts]
        spoken = [ties * count.piece.counts for count, ties in zip(counts, here, strict=True)]
        sums = self._ranks.total(torch.cat(spoken), max(self._sizes))
        totals = [row.tolist() for row in torch.split(sums, [len(ties) for ties in here])]
        kept: dict[int, list[int]] = {}
        for quota, number in quotas.items():
            taking = [i for i, count in enumerate(counts) if count.quota == quota]
            shares = iter(divide_ties([n for i in taking for n in totals[i]], number))
            kept |= {i: [next(shares) for _ in totals[i]] for i in taking}
        closer: list[_TieCount] = []
        left: dict[int, int] = {}
        for i, count in enumerate(counts):
            p = count.piece
            if count.are_runs:
                p.num_kept = kept[i][count.slot] if p.region.numel else 0
                p.cut = p.region.numel if p.num_kept == p.num_ties else 0
                if 0 < p.num_kept < p.num_ties and p.layer is not None:
                    p.cut = cut_index(self._implementation, p.layer, count.key, p.num_kept)
                continue
            loses = [j for j, (k, n) in enumerate(zip(kept[i], totals[i], strict=True)) if k < n]
            slot = loses[0] if loses else len(totals[i])
            p.num_kept += int(here[i][:slot].sum())
            if loses and kept[i][slot]:
                closer.append(
                    _TieCount(p, count.key, i, _even(count.bounds[slot], count.bounds[slot + 1]), are_runs=False)
                )
                left[i] = kept[i][slot]
            else:
                p.cut = p.region.to_local(count.bounds[slot])
        return closer, left


def _bits(bracket: Bracket) -> int:
    """By how many bits of the key to narrow an interval: the odd ones first, then as many as a round can."""
    bits = (bracket.hi - bracket.lo).bit_length()
    return (bits - 1) % BITS_PER_ROUND + 1 if bits else 0


def _even(begin: int, end: int) -> list[int]:
    slots = min(SLOTS, end - begin)
    return [begin + (end - begin) * slot // slots for slot in range(slots + 1)]


def _make_rooms(pieces: Sequence[Piece]) -> None:
    layers = [p.layer for p in pieces if p.layer is not None]
    left = ROOM_BYTES + max((layer.weight.nbytes for layer in layers), default=0) // ROOM_PART
    for p, layer in zip(pieces, layers, strict=True):
        size = layer.weight.numel() // ROOM_SHARE
        if 0 < size * layer.weight.itemsize <= left:
            left -= size * layer.weight.itemsize
            p.room = torch.empty(size, dtype=layer.weight.dtype, device=layer.weight.device)
