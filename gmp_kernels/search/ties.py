"""Ties that stay: those of lowest flat index. The last one is found as thresholds are, with the index as the key."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from gmp_kernels.backends.keys import bits_of, largest_key
from gmp_kernels.backends.types import Brackets, Implementation, Integers, Layer
from gmp_kernels.search.communicator import Communicator
from gmp_kernels.search.cutoffs import find_cutoffs
from gmp_kernels.search.placement import Region

__all__ = ["TiedPiece", "first_nonfinite", "piece_of", "tie_indices"]

CHUNK = 1 << 17  # weights that are searched for ties at a time
# Half the width of the window that is searched first for a tie, in standard deviations. A tie outside of it costs a
# search of the rest of the layer and another sum over the ranks.
SIGMAS = 4
SLOTS = 512  # into which a window of flat indices is divided to count ties


class TiedPiece(NamedTuple):
    """Piece of a layer some of whose ties stay while others do not.

    Attributes
    ----------
    layer : Layer
        Not used if there are no ties.
    key : int
        Key of the ties.
    num_ties : int
        Number of ties in the piece.
    region : Region
        Place of the piece in its layer.
    is_counted : bool
        Whether this rank counts the piece, rather than another one that holds the same.
    """

    layer: Layer
    key: int
    num_ties: int
    region: Region
    is_counted: bool


def tie_indices(
    communicator: Communicator,
    implementation: Implementation,
    pieces: Sequence[TiedPiece],
    num_ties: Sequence[int] | Integers,
    num_kept: Sequence[int] | Integers,
) -> Integers:
    """Return, for each piece, a flat index in it that separates the ties that stay from those that are pruned.

    Parameters
    ----------
    communicator : Communicator
    implementation : Implementation
    pieces : sequence of TiedPiece
        One of each layer.
    num_ties, num_kept : sequence of int
        Ties of each whole layer, and how many of them, not all, stay.

    Notes
    -----
    Reads a window and the shorter of the two parts beside it. Most windows take two or three sums over the ranks.
    """
    sizes = np.array([math.prod(p.region.shape) for p in pieces], np.int64)
    kept, ties = np.array(num_kept, np.int64), np.array(num_ties, np.int64)
    windows = _windows(kept, ties, sizes)
    is_first = True

    def count(groups: Integers, brackets: Brackets, most: int) -> tuple[Integers, Integers]:
        """Count the ties in slots of the brackets and, the first time, those before them."""
        nonlocal is_first
        steps = np.arange(SLOTS + 1) << brackets.shifts(SLOTS)[:, None]
        inner = brackets.lo[:, None] + np.minimum(steps, (brackets.hi - brackets.lo + 1)[:, None])
        own, ends = [pieces[g] for g in groups], sizes[groups, None]
        places = _local_places(own, np.concatenate((np.zeros_like(ends), inner, ends), axis=1))
        # Of the two parts beside the window the shorter one is read, and only the first time.
        is_before = places[:, 1] <= places[:, -1] - places[:, -2]
        places[:, 0] = np.where(is_first & is_before, places[:, 0], places[:, 1])
        places[:, -1] = np.where(is_first & ~is_before, places[:, -1], places[:, -2])
        here = np.zeros((len(own), SLOTS + 2), np.int64)
        read = [i for i, p in enumerate(own) if p.num_ties]
        here[read] = _count_slots(implementation, [own[i] for i in read], places[read])
        if is_first:
            rest = np.array([p.num_ties for p in own], np.int64) - here.sum(axis=1)
            here[:, 0] += np.where(is_before, 0, rest)
            is_first = False
        sent = here[:, :-1] * [[p.is_counted] for p in own]
        sums = communicator.total(torch.from_numpy(sent), most).numpy()
        nothing = np.zeros(len(own), np.int64)
        return np.stack((sums[:, 0], nothing, nothing), axis=1), sums[:, 1:]

    found = find_cutoffs(kept + 1, ties, sizes - 1, windows, count, separates=True).keys
    return _local_places(pieces, found[:, None])[:, 0]


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


def _local_places(pieces: Sequence[TiedPiece], indices: Integers) -> Integers:
    """Count the elements of each piece that come before some flat indices of its layer; most have equal regions."""
    alike: dict[Region, list[int]] = defaultdict(list)
    for i, p in enumerate(pieces):
        alike[p.region].append(i)
    places = np.empty_like(indices)
    for region, members in alike.items():
        places[members] = region.to_local(indices[members].reshape(-1)).reshape(len(members), -1)
    return places


def _unit_of(layer: Layer) -> int:
    """Return the fewest weights that are whole filters and whole bytes of the mask."""
    return math.lcm(8, layer.filter.size)


def _count_slots(implementation: Implementation, pieces: Sequence[TiedPiece], places: Integers) -> Integers:
    """Count the ties of each piece between neighbouring places; the inner ones are close to each other.

    The first place and the last are the ends of the piece, or the places next to them.
    """
    layers, keys = [p.layer for p in pieces], np.array([p.key for p in pieces], np.int64)
    if implementation.count_slots is not None:
        return implementation.count_slots(layers, keys, places)
    here = np.zeros((len(pieces), places.shape[1] - 1), np.int64)
    # Up to multiples of the unit, the weights before are the same in memory as in row-major order.
    units = np.array([_unit_of(layer) for layer in layers], np.int64)
    begins = places[:, 1] // units * units
    ends = np.minimum(-(-places[:, -2] // units) * units, [layer.weight.numel() for layer in layers])
    for slot, firsts, lasts in ((0, places[:, 0], begins), (-1, ends, places[:, -1])):
        read = np.flatnonzero(firsts < lasts).tolist()
        if read:
            parts = [piece_of(layers[i], firsts[i], lasts[i]) for i in read]
            here[read, slot] = implementation.count(parts, Brackets(keys[read], keys[read]), 1).inside
    for i, (layer, key) in enumerate(zip(layers, keys.tolist(), strict=True)):
        step = max(1, CHUNK // _unit_of(layer)) * _unit_of(layer)
        for start in range(begins[i], ends[i], step):
            indices = _indices_of(layer, start, min(start + step, ends[i]), key)
            here[i] += np.diff(indices.searchsorted(places[i]))
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
