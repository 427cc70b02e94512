"""Ties that stay: those of lowest flat index. The last one is found as thresholds are, with the index as the key."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from gmp_kernels.backends.keys import bits_of, largest_key
from gmp_kernels.backends.types import Brackets, Implementation, Integers, Layer
from gmp_kernels.search.communicator import Communicator
from gmp_kernels.search.cutoffs import find_cutoffs
from gmp_kernels.search.placement import Region

__all__ = ["TiedPieces", "first_nonfinite", "piece_of", "tie_indices"]

CHUNK = 1 << 17  # weights that are searched for ties at a time
# Half the width of the window that is searched first for a tie, in standard deviations. A tie outside of it costs a
# search of the rest of the layer and another sum over the ranks.
SIGMAS = 4
SLOTS = 512  # into which a window of flat indices is divided to count ties
MOST_LISTED = 1 << 20  # bytes of lists of ties, of all ranks together


class ChunkTies(NamedTuple):
    """Ties that a first read has counted in chunks of pieces.

    Attributes
    ----------
    size : int
        Weights in a chunk.
    before : numpy.ndarray
        Ties before each chunk, for chunks of many pieces one after the other.
    firsts : numpy.ndarray
        Per piece, the position of its first chunk among these; -1 if it is not known.
    """

    size: int
    before: Integers
    firsts: Integers


class TiedPieces(NamedTuple):
    """Pieces of layers some of whose ties stay while others do not, one of each layer, as columns.

    Attributes
    ----------
    rows : numpy.ndarray
        Positions of the pieces among the layers of this rank; not used of a piece without ties.
    keys : numpy.ndarray
        Keys of the ties.
    num_ties : numpy.ndarray
        Number of ties in each piece.
    is_counted : numpy.ndarray
        Whether this rank counts the piece, rather than another one that holds the same.
    largest : numpy.ndarray
        Number of weights of the largest piece of each layer, on any rank.
    regions : sequence of Region
        Places of the pieces in their layers.
    chunks : ChunkTies, optional
        They spare a read of what lies before the places where ties are searched.
    """

    rows: Integers
    keys: Integers
    num_ties: Integers
    is_counted: npt.NDArray[np.bool_]
    largest: Integers
    regions: Sequence[Region]
    chunks: ChunkTies | None = None


def tie_indices(
    communicator: Communicator,
    implementation: Implementation,
    layers: Sequence[Layer],
    pieces: TiedPieces,
    num_ties: Integers,
    num_kept: Integers,
) -> Integers:
    """Return, for each piece, a flat index in it that separates the ties that stay from those that are pruned.

    Parameters
    ----------
    communicator : Communicator
    implementation : Implementation
    layers : sequence of Layer
        All that this rank holds.
    pieces : TiedPieces
    num_ties, num_kept : numpy.ndarray
        Ties of each whole layer, and how many of them, not all, stay.

    Notes
    -----
    Reads a window and the shorter of the two parts beside it. Most calls take one collective. Where windows hold other
    ties than expected, sums over the ranks follow.
    """
    around = _Around(implementation, layers, pieces)
    windows = _windows(num_kept, num_ties, around.sizes)
    found = _listed(communicator, around, windows, num_ties, num_kept)
    left = np.flatnonzero(found < 0)
    if len(left):
        found[left] = _counted(communicator, around, left, windows, num_ties, num_kept)
    return _local_places(pieces.regions, found[:, None])[:, 0]


class _Around:
    """Counts of the ties in and beside brackets of flat indices.

    Attributes
    ----------
    pieces : TiedPieces
    sizes : numpy.ndarray
        Number of weights of each whole layer.
    """

    def __init__(self, implementation: Implementation, layers: Sequence[Layer], pieces: TiedPieces) -> None:
        self.pieces = pieces
        self.sizes = np.array([math.prod(region.shape) for region in pieces.regions], np.int64)
        self._numels = np.array([region.numel for region in pieces.regions], np.int64)
        self._count = partial(implementation.count_slots or partial(_count_slots, implementation), layers)

    def count(
        self,
        groups: Integers,
        brackets: Brackets,
        num_slots: int,
        *,
        with_before: bool,
        indices: Integers | None = None,
    ) -> Integers:
        """Return, per piece, the ties before its bracket, if they are wanted, and those in slots of it.

        ``indices`` receives those in the bracket, less its first, as far as they fit.
        """
        pieces = self.pieces
        regions = [pieces.regions[g] for g in groups.tolist()]
        inner = _local_places(regions, np.stack((brackets.lo, brackets.hi + 1), axis=1))
        places = inner[:, [0, 0, 1, 1]]
        own_ties, is_counted = pieces.num_ties[groups], pieces.is_counted[groups]
        earlier, is_before = np.zeros(len(groups), np.int64), np.ones(len(groups), bool)
        if with_before:
            # Of the two parts beside the bracket the shorter one is read.
            numels = self._numels[groups]
            is_before = inner[:, 0] <= numels - inner[:, 1]
            places[:, 0] = np.where(is_before, 0, inner[:, 0])
            places[:, 3] = np.where(is_before, inner[:, 1], numels)
        if with_before and pieces.chunks is not None:
            # Of the part before, only what lies in the same chunk is read.
            size, before, firsts = pieces.chunks
            known = np.flatnonzero((firsts[groups] >= 0) & is_counted)
            first, chunk = firsts[groups[known]], inner[known, 0] // size
            earlier[known] = before[first + chunk] - before[first]
            is_before[known] = True
            places[known, 0], places[known, 3] = chunk * size, inner[known, 1]
        here = np.zeros((len(groups), num_slots + 2), np.int64)
        read = np.flatnonzero(own_ties * is_counted)
        own = groups[read]
        asked = pieces.rows[own], pieces.keys[own], places[read]
        rows = None if indices is None else indices[read]
        slots = Brackets(brackets.lo[read], brackets.hi[read]), [regions[i] for i in read.tolist()], num_slots
        here[read] = self._count(*asked, *slots, rows)
        if indices is not None and rows is not None:
            indices[read] = rows
        here[:, 0] += earlier
        is_after = ~is_before & is_counted
        here[is_after, 0] = (own_ties - here.sum(axis=1))[is_after]
        return here[:, :-1]


def _listed(
    communicator: Communicator, around: _Around, windows: Brackets, num_ties: Integers, num_kept: Integers
) -> Integers:
    """Return the flat index of each first tie that is pruned: lists of those in the windows are merged on one rank.

    -1 where the window holds other ties than expected.
    """
    found = np.full(len(num_kept), -1)
    spread = num_ties / around.sizes * (windows.hi - windows.lo + 1) / around.sizes * around.pieces.largest
    capacity = int((spread + 6 * np.sqrt(spread) + 8).max(initial=0))
    dtype = torch.int32 if around.sizes.max(initial=0) <= torch.iinfo(torch.int32).max else torch.int64
    if communicator.size * len(found) * (capacity + 2) * dtype.itemsize > MOST_LISTED:
        return found
    indices = np.full((len(found), capacity), torch.iinfo(dtype).max, np.int64)
    counts = around.count(np.arange(len(found)), windows, 1, with_before=True, indices=indices)

    def merge(stacked: torch.Tensor) -> torch.Tensor:
        numbers, lists = np.split(stacked.numpy(), [2], axis=2)
        before, inside = numbers.sum(axis=0, dtype=np.int64).T
        lists = np.concatenate(lists, axis=1)
        lists.sort(axis=1)
        rank = num_kept - before
        is_listed = (rank >= 0) & (rank < inside) & (numbers[:, :, 1] <= capacity).all(axis=0)
        at = lists[np.arange(len(lists)), np.where(is_listed, rank, 0)]
        return torch.from_numpy(np.where(is_listed, windows.lo + at, -1))

    return communicator.merged(torch.from_numpy(np.hstack((counts, indices))).to(dtype), merge).numpy()


def _counted(
    communicator: Communicator,
    around: _Around,
    chosen: Integers,
    windows: Brackets,
    num_ties: Integers,
    num_kept: Integers,
) -> Integers:
    """Return flat indices that separate the chosen ones: slots of their windows are counted until one is left."""
    is_first = True

    def count(groups: Integers, brackets: Brackets, most: int) -> tuple[Integers, Integers]:
        nonlocal is_first
        here = around.count(chosen[groups], brackets, SLOTS, with_before=is_first)
        is_first = False
        sums = communicator.total(torch.from_numpy(here), most).numpy()
        nothing = np.zeros(len(groups), np.int64)
        return np.stack((sums[:, 0], nothing, nothing), axis=1), sums[:, 1:]

    ends = Brackets(windows.lo[chosen], windows.hi[chosen])
    asked = num_kept[chosen] + 1, num_ties[chosen], around.sizes[chosen] - 1
    return find_cutoffs(*asked, ends, count, separates=True).keys


def piece_of(layer: Layer, begin: int, end: int) -> Layer:
    """Return the weights [begin, end) of a layer as one; both ends are multiples of 8, or the end of the layer."""
    mask = None if layer.mask is None else layer.mask[begin // 8 : -(-end // 8)]
    return Layer(layer.weight.reshape(-1)[begin:end], mask)


def _windows(rank: Integers, num_ties: Integers, size: Integers) -> Brackets:
    """Return the flat indices between which tie number ``rank`` (from 0) lies if ties are spread at random."""
    share = (rank + 0.5) / num_ties
    # Near the ends the distribution is Poisson; the last term makes up for its longer tail.
    half = SIGMAS * np.sqrt(share * (1 - share) / num_ties) + SIGMAS**2 / 2 / num_ties
    begin, end = size * np.maximum(0, share - half), np.ceil(size * np.minimum(1, share + half))
    return Brackets(begin.astype(np.int64), np.minimum(end.astype(np.int64), size - 1))


def _local_places(regions: Sequence[Region], indices: Integers) -> Integers:
    """Count the elements of each region that come before some flat indices of its layer; most are equal."""
    alike: dict[Region, list[int]] = defaultdict(list)
    for i, region in enumerate(regions):
        alike[region].append(i)
    if len(alike) == 1:
        return regions[0].to_local(indices)
    places = np.empty_like(indices)
    for region, members in alike.items():
        places[members] = region.to_local(indices[members])
    return places


def _unit_of(layer: Layer) -> int:
    """Return the fewest weights that are whole filters and whole bytes of the mask."""
    return math.lcm(8, layer.filter.size)


def _count_slots(
    implementation: Implementation,
    layers: Sequence[Layer],
    rows: Integers,
    keys: Integers,
    places: Integers,
    brackets: Brackets,
    regions: Sequence[Region],
    num_slots: int,
    indices: Integers | None = None,
) -> Integers:
    """Do as ``Implementation.count_slots`` with the other operations."""
    here = np.zeros((len(rows), num_slots + 2), np.int64)
    own = [layers[row] for row in rows.tolist()]
    # Up to multiples of the unit, the weights before are the same in memory as in row-major order.
    units = np.array([_unit_of(layer) for layer in own], np.int64)
    first, begin, end, last = places.T
    begins, ends = begin // units * units, np.minimum(-(-end // units) * units, [layer.weight.numel() for layer in own])
    for slot, firsts, lasts in ((0, first, begins), (-1, ends, last)):
        read = np.flatnonzero(firsts < lasts).tolist()
        if read:
            parts = [piece_of(own[i], firsts[i], lasts[i]) for i in read]
            here[read, slot] = implementation.count(parts, Brackets(keys[read], keys[read]), 1).inside
    shifts = brackets.shifts(num_slots)
    for i, (layer, key, region) in enumerate(zip(own, keys.tolist(), regions, strict=True)):
        step = max(1, CHUNK // _unit_of(layer)) * _unit_of(layer)
        for start in range(begins[i], ends[i], step):
            own_indices = _indices_of(layer, start, min(start + step, ends[i]), key)
            limits = own_indices.searchsorted(places[i])
            here[i, [0, -1]] += limits[[1, 3]] - limits[[0, 2]]
            inside = region.to_global(own_indices[limits[1] : limits[2]]) - brackets.lo[i]
            if indices is not None:
                row = indices[i, here[i, 1] :]
                row[: len(inside)] = inside[: len(row)]
            here[i, 1:-1] += np.bincount(inside >> shifts[i], minlength=num_slots)
    return here


def first_nonfinite(layer: Layer, place: int) -> int:
    """Return the flat index of the first unpruned NaN or Inf, given the place in memory of the first one there."""
    unit = _unit_of(layer)
    begin = place // unit * unit
    end = min(begin + unit, layer.weight.numel())
    infinity = largest_key(layer.weight.dtype) - 1
    return min(int(found[0]) for key in (infinity, infinity + 1) if len(found := _indices_of(layer, begin, end, key)))


def _indices_of(layer: Layer, begin: int, end: int, key: int) -> np.ndarray:
    """Return the sorted flat indices of the unpruned weights with this key in [begin, end), which are whole units."""
    bits, largest = bits_of(layer.weight).view(-1), largest_key(layer.weight.dtype)
    # numpy is several times faster than torch at this.
    keys = bits[begin:end].cpu().numpy() & torch.iinfo(bits.dtype).max
    # NaN has many bit patterns.
    places = np.flatnonzero(keys == key if key < largest else keys >= largest)
    if layer.mask is not None:
        of_bytes = layer.mask[begin // 8 : -(-end // 8)].cpu().numpy()
        places = places[(of_bytes[places >> 3] >> (places & 7) & 1).astype(bool)]
    places += begin
    channels, positions = layer.filter
    if channels * positions == 1:
        return places
    first, place = places // (channels * positions) * (channels * positions), places % (channels * positions)
    indices: np.ndarray = first + place % channels * positions + place // channels
    indices.sort()
    return indices
