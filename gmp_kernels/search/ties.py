"""Ties that stay: those of lowest flat index in the whole layer or group, divided among the pieces of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from gmp_kernels.backends.keys import bits_of, largest_key
from gmp_kernels.backends.types import Bracket, Implementation, Layer
from gmp_kernels.search.communicator import Communicator
from gmp_kernels.search.cutoffs import GroupCutoff
from gmp_kernels.search.placement import Region

if TYPE_CHECKING:
    from gmp_kernels.search.driver import Piece

__all__ = ["locate_ties", "piece_of", "share_ties", "tie_indices"]

CHUNK = 1 << 17  # weights that are searched for ties at a time
# Half the width of the window in which a tie is looked for first, in standard deviations. A tie outside of it costs a
# look at the whole layer or, where several ranks are asked, another sum over them for every layer.
SIGMAS, SIGMAS_OF_RANKS = 2, 4
# A range of flat indices is divided into so many slots to count ties in: 1 KB as int32 or, where counts are small, as
# uint8.
SLOTS, SMALL, MOST_SLOTS = 256, 255, 1024


@dataclass(frozen=True, slots=True)
class OpenRange:
    """Range [begin, end) of flat indices of a layer whose pieces interleave; of its ties the first few stay."""

    piece: Piece
    key: int
    begin: int
    end: int
    num_ties: int
    num_kept: int


def share_ties(
    communicator: Communicator, groups: Sequence[Sequence[Piece]], cutoffs: Sequence[GroupCutoff]
) -> list[OpenRange]:
    """Set ``num_ties_kept`` of each piece, and ``tie_index`` where none or all of its ties stay.

    Returns the layers of which this is not known yet, because their pieces are no runs of the flat index. One sum over
    the ranks, if any ties have to be told apart and pieces that are runs, or groups of several layers, hold them.
    """
    open_ranges, pieces, quotas = [], [], []
    for group, cutoff in zip(groups, cutoffs, strict=True):
        for p in group:
            p.num_ties_kept, p.tie_index = 0, 0 if cutoff.num_ties else p.placement.region.numel
        if not cutoff.num_ties_kept:
            continue
        if len(group) == 1 and group[0].placement.starts is None:
            size = group[0].placement.size
            open_ranges.append(OpenRange(group[0], cutoff.key, 0, size, cutoff.num_ties, cutoff.num_ties_kept))
            continue
        pieces += [(p, cutoff.key, p is group[0]) for p in group]
        quotas.append(cutoff.num_ties_kept)
    if not pieces:
        return open_ranges
    # A slot for each run; a single one for a layer without runs.
    sizes = [len(p.placement.starts or [0]) for p, *_ in pieces]
    starts = np.cumsum([0, *sizes])
    here = np.zeros(starts[-1], np.int64)
    for (p, *_), start in zip(pieces, starts.tolist(), strict=False):
        here[start + p.placement.slot] = p.num_ties if p.placement.is_primary else 0
    bound = max(cutoff.num_ties for cutoff in cutoffs)
    totals = communicator.total(torch.from_numpy(here), bound).numpy()
    before = totals.cumsum() - totals
    firsts = [start for (*_, is_first), start in zip(pieces, starts.tolist(), strict=False) if is_first]
    num_slots = np.diff([*firsts, starts[-1]])
    kept = np.clip((np.array(quotas) + before[firsts]).repeat(num_slots) - before, 0, totals)
    for (p, key, _), start in zip(pieces, starts.tolist(), strict=False):
        stay, ties = int(kept[start + p.placement.slot]), int(totals[start + p.placement.slot])
        if p.placement.starts is None and 0 < stay < ties:
            open_ranges.append(OpenRange(p, key, 0, p.placement.size, ties, stay))
            continue
        p.num_ties_kept = min(stay, p.num_ties)
        p.tie_index = p.placement.region.numel if p.num_ties_kept == p.num_ties else 0
    return open_ranges


def locate_ties(
    communicator: Communicator,
    implementation: Implementation,
    groups: Sequence[Sequence[Piece]],
    cutoffs: Sequence[GroupCutoff],
    open_ranges: Sequence[OpenRange],
) -> None:
    """Set ``tie_index`` of each piece, and ``num_ties_kept`` where that was open. Nearly always two sums for ranges."""
    some = [
        (p, cutoff.key)
        for group, cutoff in zip(groups, cutoffs, strict=True)
        for p in group
        if 0 < p.num_ties_kept < p.num_ties
    ]
    if some:
        layers, keys = [p.layer for p, _ in some], [key for _, key in some]
        counts = [p.num_ties for p, _ in some], [p.num_ties_kept for p, _ in some]
        for (p, _), index in zip(some, tie_indices(implementation, layers, keys, *counts), strict=True):
            p.tie_index = index
    while open_ranges:
        open_ranges = _narrow_ranges(communicator, implementation, open_ranges)


def tie_indices(
    implementation: Implementation,
    layers: Sequence[Layer],
    keys: Sequence[int],
    num_ties: Sequence[int],
    num_kept: Sequence[int],
) -> list[int]:
    """Return per layer the flat index from which on ties are pruned if ``num_kept`` of ``num_ties``, not all, stay."""
    sizes = np.array([layer.weight.numel() for layer in layers])
    begins, ends = _windows(np.array(num_kept), np.array(num_ties), sizes, SIGMAS)
    windows = list(zip((begins // 8 * 8).tolist(), ends.tolist(), strict=True))
    found = []
    around = _ties_around(implementation, layers, keys, num_ties, windows)
    for layer, key, kept, (before, inside) in zip(layers, keys, num_kept, around, strict=True):
        if 0 <= kept - before < len(inside):
            found.append(int(inside[kept - before]))
            continue
        left = kept
        for places in _ties(layer, key, 0, layer.weight.numel()):
            if left < len(places):
                found.append(int(places[left]))
                break
            left -= len(places)
    return found


def piece_of(layer: Layer, begin: int, end: int) -> Layer:
    """Return the weights [begin, end) of a layer as one; both ends are multiples of 8, or the end of the layer."""
    mask = None if layer.mask is None else layer.mask[begin // 8 : -(-end // 8)]
    return Layer(layer.weight.reshape(-1)[begin:end], mask)


def _ties(layer: Layer, key: int, begin: int, end: int) -> Iterator[np.ndarray]:
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


def _windows(rank: np.ndarray, num_ties: np.ndarray, size: np.ndarray, sigmas: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the flat indices between which tie number ``rank``, from 0, lies if chance has spread them."""
    share = (rank + 0.5) / num_ties
    # Near the ends ties are spread like Poisson's: the last term makes up for their longer tail.
    half = sigmas * np.sqrt(share * (1 - share) / num_ties) + sigmas**2 / 2 / num_ties
    begin, end = size * np.maximum(0, share - half), size * np.minimum(1, share + half)
    return begin.astype(np.int64), np.ceil(end).astype(np.int64)


def _ties_around(
    implementation: Implementation,
    layers: Sequence[Layer],
    keys: Sequence[int],
    num_ties: Sequence[int],
    windows: Sequence[tuple[int, int]],
) -> list[tuple[int, np.ndarray]]:
    """Return per layer how many of its ``num_ties`` come before a window, and the flat indices of those inside.

    The window begins at a multiple of 8. Reads it, and of what lies to its sides the shorter part.
    """
    before, inside = [0] * len(layers), []
    shorter: dict[int, Layer] = {}
    for i, (layer, key, (begin, end)) in enumerate(zip(layers, keys, windows, strict=True)):
        n = layer.weight.numel()
        end = min(-(-end // 8) * 8, n)
        inside.append(np.concatenate([np.zeros(0, np.int64), *_ties(layer, key, begin, end)]))
        if 0 < begin <= n - end:
            shorter[i] = piece_of(layer, 0, begin)
        elif begin:
            before[i] = num_ties[i] - len(inside[i])
            if end < n:
                shorter[i] = piece_of(layer, end, n)
    if shorter:
        counts = implementation.count(list(shorter.values()), [Bracket(keys[i], keys[i]) for i in shorter], 1)
        for i, found in zip(shorter, counts, strict=True):
            before[i] = abs(before[i] - found.inside)
    return list(zip(before, inside, strict=True))


def _narrow_ranges(
    communicator: Communicator, implementation: Implementation, ranges: Sequence[OpenRange]
) -> list[OpenRange]:
    """Count the ties of each range in slots, let stay what may, and return what is still open of it.

    The first time, slots lie around the place where the last tie that stays is expected, the first slot and the last
    one being all that is left of the layer; then in that part of it.
    """
    begins, ends, num_ties, num_kept = np.array([(r.begin, r.end, r.num_ties, r.num_kept) for r in ranges]).T
    whole = [r.begin == 0 and r.end == r.piece.placement.size for r in ranges]
    first, last = _windows(num_kept, num_ties, ends, SIGMAS_OF_RANKS)
    first, last = np.where(whole, first, begins), np.where(whole, last, ends)
    bound = int(num_ties.max())
    num_slots = min(MOST_SLOTS if bound <= SMALL else SLOTS, int((last - first).max()))
    inner = first[:, None] + (last - first)[:, None] * np.arange(num_slots + 1) // num_slots
    bounds = np.concatenate((begins[:, None], inner, ends[:, None]), axis=1)
    places = _local_places(ranges, bounds)
    here = _ties_between(implementation, ranges, places)
    primary = np.array([r.piece.placement.is_primary for r in ranges])
    totals = communicator.total(torch.from_numpy(here * primary[:, None]), bound).numpy()
    kept = np.clip(num_kept[:, None] - (totals.cumsum(axis=1) - totals), 0, totals)
    # In each layer the first slot that loses one: there always is, since not all ties of the range stay.
    slots = (kept < totals).argmax(axis=1)
    still_open = []
    for i, (r, slot) in enumerate(zip(ranges, slots.tolist(), strict=True)):
        r.piece.num_ties_kept += int(here[i, :slot].sum())
        r.piece.tie_index = int(places[i, slot])
        if kept[i, slot]:
            begin, end = bounds[i, slot : slot + 2].tolist()
            still_open.append(OpenRange(r.piece, r.key, begin, end, int(totals[i, slot]), int(kept[i, slot])))
    return still_open


def _ties_between(implementation: Implementation, ranges: Sequence[OpenRange], places: np.ndarray) -> np.ndarray:
    """Count the ties of each piece between neighbouring places in it."""
    here = np.zeros((len(ranges), places.shape[1] - 1), np.int64)
    looked = [i for i, r in enumerate(ranges) if r.piece.num_ties and places[i, 0] < places[i, -1]]
    # Of a whole layer only the slots are looked at, and what comes before or after them.
    whole = [i for i in looked if places[i, 0] == 0 and places[i, -1] == ranges[i].piece.placement.region.numel]
    around = _ties_around(
        implementation,
        [ranges[i].piece.layer for i in whole],
        [ranges[i].key for i in whole],
        [ranges[i].piece.num_ties for i in whole],
        [(int(places[i, 1]) // 8 * 8, int(places[i, -2])) for i in whole],
    )
    for i, (num_before, inside) in zip(whole, around, strict=True):
        until = num_before + inside.searchsorted(places[i])
        until[0], until[-1] = 0, ranges[i].piece.num_ties
        here[i] = np.diff(until)
    for i in set(looked) - set(whole):
        begin, end = int(places[i, 0]) // 8 * 8, int(places[i, -1])
        for inside in _ties(ranges[i].piece.layer, ranges[i].key, begin, end):
            here[i] += np.diff(inside.searchsorted(places[i]))
    return here


def _local_places(ranges: Sequence[OpenRange], bounds: np.ndarray) -> np.ndarray:
    """Count the elements of each piece that come before some flat indices of its layer: most pieces are alike."""
    alike: dict[Region, list[int]] = defaultdict(list)
    for i, r in enumerate(ranges):
        alike[r.piece.placement.region].append(i)
    places = np.empty_like(bounds)
    for region, members in alike.items():
        places[members] = region.to_local(bounds[members].reshape(-1)).reshape(len(members), -1)
    return places
