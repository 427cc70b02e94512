"""The driver in Python: thresholds of layers whose pieces lie on several ranks, or that a backend can only count.

All layers share each round: a bracket from samples, counts against it until it holds one key, then ties. All ranks get
the same sums, and so come to the same results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import compress
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from gmp_kernels.backends.keys import largest_key
from gmp_kernels.backends.layers import are_plain, ranked_dtype
from gmp_kernels.backends.ranking import sources
from gmp_kernels.backends.types import (
    BracketCounts,
    Brackets,
    Cutoffs,
    Implementation,
    Integers,
    Layer,
    Select,
    Selection,
)
from gmp_kernels.search.brackets import FEW_BITS
from gmp_kernels.search.communicator import Communicator
from gmp_kernels.search.cutoffs import GroupCutoffs, find_cutoffs
from gmp_kernels.search.placement import Placement, Region
from gmp_kernels.search.sample import estimate
from gmp_kernels.search.ties import ChunkTies, TiedPieces, first_nonfinite, tie_indices

__all__ = ["Search", "nonfinite_in", "select_most", "select_with"]

# Most bits of the key by which a round narrows a bracket. Counts are sent as int32 at first, at most 8 KB per layer,
# and soon as uint8, when few weights are left inside.
MOST_BITS = 11
# Memory of a selection, within the limit of a prune step: the bins of all pieces together, and the candidates of the
# first bracket, to which 1 / CANDIDATE_PART of the largest piece is added.
BIN_BYTES, CANDIDATE_BYTES, CANDIDATE_PART = 1 << 20, 2 << 20, 40
CHUNK_BIN_BYTES = 1 << 19  # the bins of all chunks together

T = TypeVar("T")
Read = Callable[..., BracketCounts]


class Search:
    """Search for the thresholds of groups of layers, of which this process holds pieces.

    Parameters
    ----------
    communicator : Communicator
    implementation : Implementation
    layers : sequence of Layer or None
        The local pieces, one of each layer; None if this rank holds nothing of a layer, which may have fewer rows than
        there are ranks. If ``read`` is given, any objects that it reads.
    dtypes : sequence of torch.dtype
    placements : sequence of Placement
    group_sizes : sequence of int
        Number of layers of each group, which follow each other. The layers of a group are ranked together, and the flat
        index runs through them.
    num_prune : sequence of int
        Per group, of the whole layers.
    read : callable, optional
        Counts pieces as ``Implementation.count`` (the default) counts layers. It may fail on one rank alone, and may
        put candidates of its own in the list that it gets in the first round.
    present : sequence of Layer, optional
        The layers that are not None, in a form that backends take faster.

    Attributes
    ----------
    num_ties, num_ties_kept : numpy.ndarray
        Per piece: weights in it that tie at the threshold, and how many of them stay.
    tie_indices : numpy.ndarray
        Per piece: flat index in it from which on ties are pruned.
    nonfinite : numpy.ndarray
        Per piece: place in its memory of the first unpruned NaN or Inf, -1 if there is none.
    """

    def __init__(
        self,
        communicator: Communicator,
        implementation: Implementation,
        layers: Sequence[Any],
        dtypes: Sequence[torch.dtype],
        placements: Sequence[Placement],
        group_sizes: Sequence[int],
        num_prune: Sequence[int],
        read: Read | None = None,
        present: Sequence[Layer] | None = None,
    ) -> None:
        self._communicator = communicator
        self._implementation = implementation
        self._read: Read = implementation.count if read is None else read
        # Every rank takes part in every round, whether it has anything to read or not.
        self._together = _alone if read is None else communicator.together
        self._layers, self._dtypes, self._placements = list(layers), dtypes, placements
        is_present = [layer is not None for layer in self._layers]
        self._present: Sequence[Any] = [*compress(self._layers, is_present)] if present is None else present
        self._rows = np.cumsum(is_present) - 1  # of each piece, among those present
        self._num_prune = num_prune
        self._firsts = np.cumsum([0, *group_sizes])[:-1]
        self._group_of = np.repeat(np.arange(len(group_sizes)), group_sizes)
        self._sizes = np.add.reduceat([placement.size for placement in placements], self._firsts)
        self._is_run = np.array([placement.starts is not None for placement in placements])
        self._slots = np.array([placement.slot for placement in placements])
        self._num_slots = np.array([len(placement.starts or [0]) for placement in placements])
        self._largest = np.array([placement.largest_part for placement in placements])
        self._is_primary = np.array([placement.is_primary for placement in placements])
        # The bracket of each group from which its candidates come, and its latest bracket.
        self._held: Brackets | None = None
        self._last = Brackets(*np.zeros((2, len(group_sizes)), np.int64))
        self._bins: list[Integers | None] = [None] * len(layers)  # of each piece, in the last round
        self._densities = np.zeros(len(layers))
        # Bins of chunks in the first round, and the first chunk of each piece, if there was memory for them.
        self._counts_chunks = read is None and implementation.chunk > 0
        self._chunk_bins: npt.NDArray[np.uint16] | None = None
        self._pieces_of_chunks = np.zeros(0, np.int64)
        self._first_chunks = np.full(len(layers), -1)
        # Per piece: magnitudes inside the first bracket, if there was memory for them.
        self._candidates: list[torch.Tensor | None] = [None] * len(layers)
        self.num_ties, self.num_ties_kept, self.tie_indices = np.zeros((3, len(layers)), np.int64)
        self.nonfinite = np.full(len(layers), -1)

    def estimate(self, num_pruned: Sequence[int | None]) -> Brackets:
        """Bracket the thresholds by a sample of the local pieces; brackets of groups without any are empty.

        ``num_pruned`` has the number of weights of the whole layers that are pruned already, per group; None if not
        known.
        """
        pieces = [i for i, layer in enumerate(self._layers) if layer is not None]
        groups, firsts, counts = np.unique(self._group_of[pieces], return_index=True, return_counts=True)
        members = [own.tolist() for own in np.split(pieces, firsts)[1:]]
        layers = [[self._layers[i] for i in own] for own in members]
        num_parts = [min(self._placements[i].num_parts for i in own) for own in members]
        own_counts = [self._num_prune[g] for g in groups], [num_pruned[g] for g in groups]
        drawing = self._implementation.draw, self._present
        found, densities = estimate(layers, *own_counts, self._sizes[groups].tolist(), num_parts, *drawing)
        brackets = Brackets(self._largest_keys(), np.zeros(len(self._firsts), np.int64))
        brackets.lo[groups], brackets.hi[groups] = found
        self._densities[pieces] = np.repeat(densities, counts)
        return brackets

    def find(self, brackets: Brackets) -> GroupCutoffs:
        """Find the thresholds, and how many weights of each piece tie with them."""
        cutoffs = find_cutoffs(self._num_prune, self._sizes, self._largest_keys(), brackets, self._count)
        bins_of_keys = (cutoffs.keys - self._last.lo)[self._group_of].tolist()
        has_ties = cutoffs.num_ties[self._group_of] > 0
        for i in np.flatnonzero(has_ties).tolist():
            # The last round had one bin per key.
            bins = self._bins[i]
            self.num_ties[i] = 0 if bins is None else bins[bins_of_keys[i]]
        return cutoffs

    def share_ties(self, cutoffs: GroupCutoffs) -> tuple[Integers, Integers]:
        """Find how many ties stay in which piece.

        Returns, per piece, how many ties there are and how many of them stay. If the piece is a run of flat indices
        these are its own, else those of its whole layer. Takes one sum over the ranks, if some ties stay and others do
        not that runs, or groups of several layers, hold.
        """
        group_of = self._group_of
        ties, stay = cutoffs.num_ties[group_of], cutoffs.num_ties_kept[group_of]
        is_alone = np.bincount(group_of)[group_of] == 1
        divided = np.flatnonzero((stay > 0) & (self._is_run | ~is_alone))
        if len(divided):
            # One slot per run; a single one for a layer without runs.
            counts = self._num_slots[divided]
            firsts = counts.cumsum() - counts
            own = firsts + self._slots[divided]
            here = np.zeros(counts.sum(), np.int64)
            here[own] = (self.num_ties * self._is_primary)[divided]
            totals = self._communicator.total(torch.from_numpy(here), int(cutoffs.num_ties.max())).numpy()
            before = totals.cumsum() - totals
            _, first, group = np.unique(group_of[divided], return_index=True, return_inverse=True)
            ties[divided] = totals[own]
            stay[divided] = np.clip(stay[divided] - (before[own] - before[firsts[first]][group]), 0, totals[own])
        self.num_ties_kept = np.minimum(stay, self.num_ties)
        return ties, stay

    def locate_ties(self, cutoffs: GroupCutoffs) -> None:
        """Find how many ties stay in which piece, and the flat index in it from which on they are pruned."""
        ties, stay = self.share_ties(cutoffs)
        keys = cutoffs.keys[self._group_of]
        numels = np.array([placement.region.numel for placement in self._placements])
        self.tie_indices = np.where(stay == ties, numels, 0)
        is_open = (stay > 0) & (stay < ties)
        chunks = self._chunk_ties(keys) if is_open.any() else None
        for is_run, communicator in ((True, Communicator(None)), (False, self._communicator)):
            chosen = np.flatnonzero(is_open & (self._is_run == is_run) & ((numels > 0) | (not is_run)))
            if not len(chosen):
                continue
            pieces = TiedPieces(
                self._rows[chosen],
                keys[chosen],
                self.num_ties[chosen],
                is_run | self._is_primary[chosen],
                numels[chosen] if is_run else self._largest[chosen],
                [_whole(int(numels[i])).region if is_run else self._placements[i].region for i in chosen.tolist()],
            )
            if chunks is not None:
                pieces = pieces._replace(chunks=chunks._replace(firsts=chunks.firsts[chosen]))
            own = ties[chosen], stay[chosen]
            self.tie_indices[chosen] = tie_indices(communicator, self._implementation, self._present, pieces, *own)

    def first_nonfinite(self) -> list[int]:
        """Return per layer the flat index of the first unpruned NaN or Inf in it, -1 if there is none."""
        none = torch.iinfo(torch.int64).max
        found = [
            none if index < 0 else placement.region.to_global(index)
            for placement, index in zip(self._placements, self._nonfinite_indices(), strict=True)
        ]
        first = (-self._communicator.largest(-torch.tensor(found, device="cpu"))).tolist()
        return [-1 if index == none else index for index in first]

    def cutoffs(self, found: GroupCutoffs) -> Cutoffs:
        """Return the cutoff of every local piece."""
        keys, below, ties, kept = (column[self._group_of].tolist() for column in found[:4])
        return Cutoffs(keys, below, ties, kept, self.tie_indices.tolist(), self._nonfinite_indices())

    def _nonfinite_indices(self) -> list[int]:
        """Return ``nonfinite`` as flat indices in the pieces, which are row-major."""
        places: list[int] = self.nonfinite.tolist()
        return [
            place if place < 0 else first_nonfinite(layer, place)
            for layer, place in zip(self._layers, places, strict=True)
        ]

    def _largest_keys(self) -> Integers:
        return np.array([largest_key(self._dtypes[first]) for first in self._firsts])

    def _count(self, groups: Integers, brackets: Brackets, most: int) -> tuple[Integers, Integers]:
        """Count one round: every open group against its bracket, summed over layers and ranks."""
        is_first = self._held is None
        self._last.lo[groups], self._last.hi[groups] = brackets
        if self._held is None:
            self._held = Brackets(*(column.copy() for column in self._last))
        pieces = np.flatnonzero(np.isin(self._group_of, groups))
        group = self._group_of[pieces]
        own = Brackets(self._last.lo[group], self._last.hi[group])
        most_bits = max(1, (BIN_BYTES // (8 * len(pieces))).bit_length() - 1)
        num_bins = 1 << min(most_bits, _bits(int((brackets.hi - brackets.lo).max())))
        if is_first:
            self._make_candidates(pieces, own, num_bins)
        outside = (own.lo < self._held.lo[group]) | (own.hi > self._held.hi[group])
        for i in pieces[outside].tolist():
            self._candidates[i] = None
        counts = self._together(lambda: self._counted(pieces.tolist(), own, num_bins, is_first))
        numbers, bins = np.stack((counts.below, counts.pruned, counts.nonfinite >= 0), axis=1), counts.bins
        for i, row in zip(pieces.tolist(), bins, strict=True):
            self._bins[i] = row
        if is_first:
            self.nonfinite = counts.nonfinite
            for i, inside in zip(pieces.tolist(), counts.inside.tolist(), strict=True):
                place = self._candidates[i]
                self._candidates[i] = place[:inside] if place is not None and inside <= len(place) else None
        # Every rank that holds a NaN reports it, even for a copy.
        copies = np.flatnonzero(~self._is_primary[pieces])
        numbers[copies, :2] = 0
        sent = np.concatenate((numbers, bins), axis=1) if is_first else bins.copy() if len(copies) else bins
        sent[copies, sent.shape[1] - num_bins :] = 0
        if len(groups) < len(pieces):
            sent = np.add.reduceat(sent, np.searchsorted(group, groups))
        bound = most + len(pieces) * self._communicator.size if is_first else most
        sums = self._communicator.total(torch.from_numpy(sent), bound).numpy()
        return sums[:, :-num_bins], sums[:, -num_bins:]

    def _counted(self, pieces: Sequence[int], brackets: Brackets, num_bins: int, is_first: bool) -> BracketCounts:
        """Count the local pieces, from their candidates if these suffice."""
        found = BracketCounts.nothing(len(pieces), num_bins)
        lists = {row: place for row, i in enumerate(pieces) if (place := self._candidates[i]) is not None}
        read = [row for row, i in enumerate(pieces) if self._layers[i] is not None and (is_first or row not in lists)]
        listed = [] if is_first else [row for row, place in lists.items() if len(place)]
        if read:
            places = [lists.get(row) for row in read] if is_first else None
            own = Brackets(brackets.lo[read], brackets.hi[read])
            is_all = len(read) == len(self._present)
            layers = self._present if is_all else [self._layers[pieces[row]] for row in read]
            if is_first and self._counts_chunks and not own.shifts(num_bins).all():
                self._make_chunk_bins([pieces[row] for row in read], num_bins)
            with_chunks = (self._chunk_bins,) if is_first and self._chunk_bins is not None else ()
            found.put(read, self._read(layers, own, num_bins, places, *with_chunks))
            for row, place in zip(read, places or (), strict=False):
                self._candidates[pieces[row]] = place
        if listed:
            own = Brackets(brackets.lo[listed], brackets.hi[listed])
            found.put(listed, self._implementation.count([Layer(lists[row], None) for row in listed], own, num_bins))
        return found

    def _make_chunk_bins(self, pieces: Sequence[int], num_bins: int) -> None:
        """Make room for the bins of each chunk, if they tell keys apart."""
        sizes = np.array([self._placements[i].region.numel for i in pieces], np.int64)
        counts = -(-sizes // self._implementation.chunk)
        if 2 * num_bins * counts.sum() <= CHUNK_BIN_BYTES:
            self._chunk_bins = np.zeros((counts.sum(), num_bins), np.uint16)
            self._pieces_of_chunks = np.repeat(pieces, counts)
            self._first_chunks[pieces] = counts.cumsum() - counts

    def _chunk_ties(self, keys: Integers) -> ChunkTies | None:
        """Return the ties of each chunk, for pieces whose thresholds the first round has found."""
        if self._chunk_bins is None or self._held is None:
            return None
        held, last = self._held, self._last
        is_known = ((held.lo == last.lo) & (held.hi == last.hi))[self._group_of]
        # A threshold is outside if nothing more has to be pruned.
        is_known &= (keys >= held.lo[self._group_of]) & (keys <= held.hi[self._group_of])
        # Their order is that of flat indices.
        is_known &= [layer is not None and not layer.is_channels_last for layer in self._layers]
        bins = np.where(is_known, keys - held.lo[self._group_of], 0)[self._pieces_of_chunks]
        ties = self._chunk_bins[np.arange(len(bins)), bins]
        before = np.concatenate(([0], ties.cumsum(dtype=np.int64)))
        return ChunkTies(self._implementation.chunk, before, np.where(is_known, self._first_chunks, -1))

    def _make_candidates(self, pieces: Integers, brackets: Brackets, num_bins: int) -> None:
        """Make room for a quarter more weights than are expected inside, if there will be another round."""
        expected = self._densities[pieces] * (brackets.hi - brackets.lo + 1.0)
        left = -1
        for i, share, shift in zip(pieces.tolist(), expected.tolist(), brackets.shifts(num_bins).tolist(), strict=True):
            if not (shift and share and self._layers[i] is not None):
                continue
            if left < 0:
                largest = max(layer.weight.nbytes for layer in self._layers if layer is not None)
                left = max(0, CANDIDATE_BYTES + largest // CANDIDATE_PART)
            weight = self._layers[i].weight
            size = min(weight.numel(), int(1.25 * share * weight.numel()) + 64)
            if size * weight.itemsize <= left:
                left -= size * weight.itemsize
                self._candidates[i] = torch.empty(size, dtype=weight.dtype, device=weight.device)


def select_with(implementation: Implementation) -> Select:
    """Return the ``select`` of a backend, for all layers; if it only counts, one that waits for it in each round."""
    select = implementation.select or partial(_select, implementation)
    return select if implementation.selects_patterns else partial(_select_ranked, implementation, select)


def _select_ranked(
    implementation: Implementation, select: Select, layers: Sequence[Layer], *args: Any, **options: Any
) -> Selection:
    """Select among what is ranked of layers, in which the first NaN is looked for in all that is not pruned."""
    if are_plain(layers):
        return select(layers, *args, **options)
    found = select(implementation.ranked(layers), *args, **options).cutoffs
    return Selection(found._replace(nonfinite=nonfinite_in(implementation, layers)))


def select_most(
    implementation: Implementation,
    layers: Sequence[Layer],
    num_prune: Sequence[int],
    group_sizes: Sequence[int],
    *,
    finite: bool,
) -> Selection:
    """Return the cutoffs that prune all that is not protected. With ``finite`` it takes one read, for NaN and Inf."""
    numbers = np.repeat(num_prune, group_sizes).tolist()
    nothing = [0] * len(layers)
    keys = [largest_key(ranked_dtype(layer)) for layer in layers]
    nonfinite = nonfinite_in(implementation, layers) if finite else [-1] * len(layers)
    return Selection(Cutoffs(keys, numbers, nothing, nothing, nothing, nonfinite))


def nonfinite_in(implementation: Implementation, layers: Sequence[Layer]) -> list[int]:
    """Return per layer the flat index of the first unpruned NaN or Inf among what ranks it, -1 if there is none."""
    own = sources(layers)
    everything = Brackets.of([1] * len(own), [0] * len(own))
    places = implementation.count(own, everything, 1).nonfinite.tolist()
    return [p if p < 0 else first_nonfinite(layer, p) for layer, p in zip(own, places, strict=True)]


def _select(
    implementation: Implementation,
    layers: Sequence[Layer],
    num_prune: Sequence[int],
    group_sizes: Sequence[int],
    brackets: Brackets | None = None,
    prunes: bool = False,
) -> Selection:
    placements = [_whole(layer.weight.numel()) for layer in layers]
    dtypes = [layer.weight.dtype for layer in layers]
    own = placements, group_sizes, num_prune
    search = Search(Communicator(None), implementation, layers, dtypes, *own, present=layers)
    aims = search.estimate([None] * len(group_sizes))
    if brackets is not None:
        is_known = brackets.lo <= brackets.hi
        aims = Brackets(*(np.where(is_known, *ends) for ends in zip(brackets, aims, strict=True)))
    found = search.find(aims)
    search.locate_ties(found)
    return Selection(search.cutoffs(found))


@cache
def _whole(n: int) -> Placement:
    return Placement("layer", [Region((n,), (0,), (n,))], 0)


def _alone(work: Callable[[], T]) -> T:
    return work()


def _bits(width: int) -> int:
    """Return by how many bits of the key to narrow a bracket: few rounds, of which the first narrows least."""
    bits = max(0, width).bit_length()
    rounds = max(1, -(-bits // MOST_BITS))
    return min(bits, max(FEW_BITS, bits - (rounds - 1) * MOST_BITS))
