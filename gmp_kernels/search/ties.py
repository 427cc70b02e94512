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
# Into which a window of flat indices, and what is left of it, are divided to count ties.
FIRST_SLOTS, SLOTS = 128, 512


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
    regions : sequence of Region
        Places of the pieces in their layers.
    """

    rows: Integers
    keys: Integers
    num_ties: Integers
    is_counted: npt.NDArray[np.bool_]
    regions: Sequence[Region]


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
    Reads a window and the shorter of the two parts beside it. Most windows take two or three sums over the ranks.
    """
    sizes = np.array([math.prod(region.shape) for region in pieces.regions], np.int64)
    numels = np.array([region.numel for region in pieces.regions], np.int64)
    windows = _windows(num_kept, num_ties, sizes)
    count_slots = implementation.count_slots or partial(_count_slots, implementation)
    is_first = True

    def count(groups: Integers, brackets: Brackets, most: int) -> tuple[Integers, Integers]:
        """Count the ties in slots of the brackets and, the first time, those before them."""
        nonlocal is_first
        num_slots = FIRST_SLOTS if is_first else SLOTS
        regions = [pieces.regions[g] for g in groups]
        inner = _local_places(regions, np.stack((brackets.lo, brackets.hi + 1), axis=1))
        places = inner[:, [0, 0, 1, 1]]
        own_ties, is_before = pieces.num_ties[groups], np.ones(len(groups), bool)
        if is_first:
            # Of the two parts beside the window the shorter one is read.
            is_before = inner[:, 0] <= numels - inner[:, 1]
            places[:, 0] = np.where(is_before, 0, inner[:, 0])
            places[:, 3] = np.where(is_before, inner[:, 1], numels)
        here = np.zeros((len(groups), num_slots + 2), np.int64)
        read = np.flatnonzero(own_ties)
        own = groups[read]
        asked = pieces.rows[own], pieces.keys[own], places[read], Brackets(brackets.lo[read], brackets.hi[read])
        here[read] = count_slots(layers, *asked, [regions[i] for i in read], num_slots)
        here[~is_before, 0] = (own_ties - here.sum(axis=1))[~is_before]
        here[~pieces.is_counted[groups]] = 0
        is_first = False
        sums = communicator.total(torch.from_numpy(here[:, :-1]), most).numpy()
        nothing = np.zeros(len(groups), np.int64)
        return np.stack((sums[:, 0], nothing, nothing), axis=1), sums[:, 1:]

    found = find_cutoffs(num_kept + 1, num_ties, sizes - 1, windows, count, separates=True).keys
    return _local_places(pieces.regions, found[:, None])[:, 0]


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
            indices = _indices_of(layer, start, min(start + step, ends[i]), key)
            limits = indices.searchsorted(places[i])
            here[i, [0, -1]] += limits[[1, 3]] - limits[[0, 2]]
            inside = region.to_global(indices[limits[1] : limits[2]]) - brackets.lo[i]
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
