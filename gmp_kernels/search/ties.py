"""Ties that stay: those of lowest flat index. The last one is found as thresholds are, with the index as the key."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from gmp_kernels.backends.keys import bits_of, largest_key
from gmp_kernels.backends.types import Brackets, Implementation, Layer
from gmp_kernels.search.communicator import Communicator
from gmp_kernels.search.cutoffs import Integers, find_cutoffs
from gmp_kernels.search.placement import Region

__all__ = ["TiedPiece", "first_nonfinite", "piece_of", "tie_indices"]

CHUNK = 1 << 17  # weights that are searched for ties at a time
MOST_HELD = 1 << 14  # flat indices of ties that are kept between rounds, for each piece
# Half the width of the window that is searched first for a tie, in standard deviations. A tie outside of it costs a
# search of the rest of the layer and another sum over the ranks.
SIGMAS = 4
# Number of slots into which a window of flat indices is divided to count ties: 1 KB as int32 or, if counts are small,
# as uint8.
SLOTS, SMALL, MOST_SLOTS = 256, 255, 1024


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
    held: list[np.ndarray | None] | None = None

    def count(groups: Integers, brackets: Brackets, most: int) -> tuple[Integers, Integers]:
        """Count the ties in slots of the brackets and, the first time, those before them."""
        nonlocal held
        num_slots = MOST_SLOTS if most <= SMALL else SLOTS
        steps = np.arange(num_slots + 1) << brackets.shifts(num_slots)[:, None]
        inner = brackets.lo[:, None] + np.minimum(steps, (brackets.hi - brackets.lo + 1)[:, None])
        own, ends = [pieces[g] for g in groups], sizes[groups, None]
        places = _local_places(own, np.concatenate((np.zeros_like(ends), inner, ends), axis=1))
        here = np.zeros((len(own), num_slots + 2), np.int64)
        is_inside = (windows.lo[groups] <= brackets.lo) & (brackets.hi <= windows.hi[groups])
        read = []
        for i, (g, p) in enumerate(zip(groups.tolist(), own, strict=True)):
            known = held[g] if held is not None and is_inside[i] else None
            if known is not None:
                here[i] = np.diff(known.searchsorted(places[i]))
            elif p.num_ties:
                read.append(i)
        here[read], found = _count_between([own[i] for i in read], places[read])
        if held is None:
            here[read] += _count_beside(implementation, [own[i] for i in read], places[read], here[read].sum(axis=1))
            held = [None] * len(pieces)
            for i, indices in zip(read, found, strict=True):
                held[i] = indices
        else:
            here[:, 0] = 0  # known since the first time
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


def _window_of(pieces: Sequence[TiedPiece], places: Integers) -> tuple[Integers, Integers]:
    """Return where to begin and end reading each piece, to cover all that lies between its inner places.

    Both are multiples of the unit, where the weights before are the same in memory as in row-major order, or the end.
    """
    units = np.array([_unit_of(p.layer) for p in pieces], np.int64)
    return places[:, 1] // units * units, np.minimum(-(-places[:, -2] // units) * units, places[:, -1])


def _count_between(pieces: Sequence[TiedPiece], places: Integers) -> tuple[Integers, list[np.ndarray | None]]:
    """Count the ties of each piece between neighbouring places; return also their flat indices if these are few.

    The first and last place are the ends of the piece. Ties before and after the inner places are not counted.
    """
    here = np.zeros((len(pieces), places.shape[1] - 1), np.int64)
    found: list[np.ndarray | None] = [np.zeros(0, np.int64)] * len(pieces)
    for i, indices in _ties(pieces, *_window_of(pieces, places)):
        here[i] += np.diff(indices.searchsorted(places[i]))
        known = found[i]
        if known is not None:
            found[i] = np.concatenate((known, indices)) if len(known) + len(indices) <= MOST_HELD else None
    return here, found


def _count_beside(
    implementation: Implementation, pieces: Sequence[TiedPiece], places: Integers, num_inside: Integers
) -> Integers:
    """Count the ties of each piece before and after its window, and read only the shorter of the two parts."""
    here = np.zeros((len(pieces), places.shape[1] - 1), np.int64)
    begins, ends = _window_of(pieces, places)
    sizes = places[:, -1]
    is_first = begins <= sizes - ends
    shorter = np.where(is_first, begins, sizes - ends)
    read = np.flatnonzero(shorter).tolist()
    counted = np.zeros(len(pieces), np.int64)
    if read:
        sides = [(0, begins[i]) if is_first[i] else (ends[i], sizes[i]) for i in read]
        layers = [piece_of(pieces[i].layer, *side) for i, side in zip(read, sides, strict=True)]
        keys = np.array([pieces[i].key for i in read])
        counted[read] = implementation.count(layers, Brackets(keys, keys), 1).inside
    rest = np.array([p.num_ties for p in pieces], np.int64) - num_inside - counted
    here[:, 0], here[:, -1] = np.where(is_first, (counted, rest), (rest, counted))
    return here


def _ties(pieces: Sequence[TiedPiece], begins: Integers, ends: Integers) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the ties of each piece in [begin, end), some units at a time. Both are multiples of the unit, or the end.

    Yields the position of the piece, and flat indices in it.
    """
    for i, (p, begin, end) in enumerate(zip(pieces, begins.tolist(), ends.tolist(), strict=True)):
        step = max(1, CHUNK // _unit_of(p.layer)) * _unit_of(p.layer)
        for start in range(begin, end, step):
            yield i, _indices_of(p.layer, start, min(start + step, end), p.key)


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
