"""Ties that stay, divided among the pieces: those of lowest flat index in the whole layer or group."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from gmp_kernels.backends import Implementation, Layer
from gmp_kernels.distributed.communicator import Communicator
from gmp_kernels.distributed.pieces import Piece
from gmp_kernels.distributed.placement import Region
from gmp_kernels.search.cutoffs import Cut, cut_indices, tied, ties_around, window_of_tie

__all__ = ["divide"]

# That a range of flat indices is divided into to count ties in: 1 KB as int32 or, where the counts are small, as uint8.
SLOTS, SMALL, MOST_SLOTS = 256, 255, 1024
SIGMAS = 4  # a tie outside its window costs every layer another sum over the ranks


@dataclass(frozen=True, eq=False, slots=True)
class _Count:
    """A layer whose ties are to be counted, between which of its flat indices.

    What is known, because every rank holds a run of flat indices ("runs") or because it is the count of the whole layer
    ("whole"), need only be added up. Otherwise the slots lie around the place where the last tie that stays is
    expected, the first and the last being all that is left of the layer ("window"), or in a part of it ("part").
    """

    piece: Piece
    key: int
    bounds: np.ndarray
    kind: Literal["runs", "whole", "window", "part"]

    def known(self) -> np.ndarray:
        counts = np.zeros(len(self.bounds) - 1, np.int64)
        counts[self.piece.holding.slot if self.kind == "runs" else 0] = self.piece.num_ties
        return counts


@dataclass(frozen=True, slots=True)
class _Open:
    """A range of flat indices of a layer, of whose ties the first few stay."""

    piece: Piece
    key: int
    begin: int
    end: int
    num_ties: int
    num_kept: int


def divide(
    ranks: Communicator, implementation: Implementation, groups: Sequence[Sequence[Piece]], cuts: Sequence[Cut]
) -> None:
    """Set ``num_kept`` and ``cut`` of each piece, given the cut of each group.

    One sum over the ranks where they hold runs of flat indices, nearly always two where they do not, and one before
    those for groups of several layers.
    """
    quotas, members = [], []
    opened = []
    for group, cut in zip(groups, cuts, strict=True):
        num_ties, num_kept = cut.threshold.num_ties, cut.threshold.num_ties_kept
        # Without one that stays, all of them are pruned, from flat index 0 on.
        if not num_kept:
            continue
        if len(group) == 1 and group[0].holding.starts is None:
            opened.append(_Open(group[0], cut.key, 0, group[0].holding.size, num_ties, num_kept))
        else:
            quotas.append(num_kept)
            members.append([_first_count(p, cut.key) for p in group])
    bound = max((cut.threshold.num_ties for cut in cuts if cut.threshold.num_ties_kept), default=0)
    while members or opened:
        members += [[count] for count in _closer(opened, bound)]
        quotas += [part.num_kept for part in opened]
        opened = _take(ranks, implementation, members, quotas, bound)
        quotas, members = [], []
        bound = max((part.num_ties for part in opened), default=0)


def _first_count(p: Piece, key: int) -> _Count:
    if p.holding.starts is None:
        return _Count(p, key, np.array([0, p.holding.size]), "whole")
    return _Count(p, key, np.array([*p.holding.starts, p.holding.size]), "runs")


def _closer(opened: Sequence[_Open], bound: int) -> list[_Count]:
    """Divide each range into slots; no count exceeds ``bound``."""
    if not opened:
        return []
    begins, ends, num_ties, num_kept = np.array([(o.begin, o.end, o.num_ties, o.num_kept) for o in opened]).T
    whole = np.array([o.begin == 0 and o.end == o.piece.holding.size for o in opened])
    first, last = window_of_tie(num_kept, num_ties, ends, SIGMAS)
    first, last = np.where(whole, first, begins), np.where(whole, last, ends)
    num_slots = min(MOST_SLOTS if bound <= SMALL else SLOTS, int((last - first).max()))
    slots = first[:, None] + (last - first)[:, None] * np.arange(num_slots + 1) // num_slots
    return [
        _Count(o.piece, o.key, np.concatenate(([0], row, [o.end])), "window")
        if is_whole
        else _Count(o.piece, o.key, row, "part")
        for o, row, is_whole in zip(opened, slots, whole, strict=True)
    ]


def _take(
    ranks: Communicator,
    implementation: Implementation,
    members: Sequence[Sequence[_Count]],
    quotas: Sequence[int],
    bound: int,
) -> list[_Open]:
    """Count, add up, and let stay what may; return the ranges in which that is not decided yet.

    The layers of each group take from one quota, in their order. No count exceeds ``bound``.
    """
    counts = [count for group in members for count in group]
    here = _counted(implementation, counts)
    spoken = [
        ties if count.piece.holding.speaks else np.zeros_like(ties) for count, ties in zip(counts, here, strict=True)
    ]
    totals = ranks.total(torch.from_numpy(np.concatenate(spoken)), bound).numpy()
    sizes = [len(ties) for ties in here]
    starts = np.cumsum([0, *sizes])
    before = totals.cumsum() - totals
    groups = starts[np.cumsum([0, *map(len, members)])]
    left = np.repeat(np.array(quotas) + before[groups[:-1]], np.diff(groups)) - before
    kept = np.clip(left, 0, totals)
    # In each layer the first slot that loses one; past its slots where none does.
    loses = np.append(np.flatnonzero(kept < totals), starts[-1])
    slots = np.minimum(loses[np.searchsorted(loses, starts[:-1])], starts[1:])
    sums = np.append(0, np.concatenate(here).cumsum())
    stays = sums[slots] - sums[starts[:-1]]
    opened, settled, partial = [], [], []
    for count, start, slot, size, own in zip(
        counts, starts[:-1].tolist(), slots.tolist(), sizes, stays.tolist(), strict=True
    ):
        p = count.piece
        if count.kind == "runs":
            p.num_kept = int(kept[start + p.holding.slot]) if p.layer is not None else 0
            p.cut = p.holding.region.numel if p.num_kept == p.num_ties else 0
            if 0 < p.num_kept < p.num_ties:
                partial.append((p, count.key))
            continue
        p.num_kept += own
        if slot < start + size and kept[slot]:
            begin, end = count.bounds[slot - start : slot - start + 2].tolist()
            opened.append(_Open(p, count.key, begin, end, int(totals[slot]), int(kept[slot])))
        else:
            settled.append((p, count.bounds[slot - start : slot - start + 1]))
    for (p, _), place in zip(settled, _places(settled), strict=True):
        p.cut = int(place[0])
    layers = [p.layer for p, _ in partial if p.layer is not None]
    if layers:
        keys, num_ties, num_kept = zip(*[(key, p.num_ties, p.num_kept) for p, key in partial], strict=True)
        for (p, _), cut in zip(partial, cut_indices(implementation, layers, keys, num_ties, num_kept), strict=True):
            p.cut = cut
    return opened


def _counted(implementation: Implementation, counts: Sequence[_Count]) -> list[np.ndarray]:
    """Per layer, the ties of this rank's piece between the bounds."""
    here = [count.known() for count in counts]
    looked = [i for i, count in enumerate(counts) if count.kind in ("window", "part") and count.piece.num_ties]
    places = dict(zip(looked, _places([(counts[i].piece, counts[i].bounds) for i in looked]), strict=True))
    windows, parts = ([i for i in looked if counts[i].kind == kind] for kind in ("window", "part"))
    around = ties_around(
        implementation,
        _layers(counts[i] for i in windows),
        [counts[i].key for i in windows],
        [counts[i].piece.num_ties for i in windows],
        [(int(places[i][1]) // 8 * 8, int(places[i][-2])) for i in windows],
    )
    for i, (num_before, inside) in zip(windows, around, strict=True):
        until = num_before + inside.searchsorted(places[i])
        until[0], until[-1] = 0, counts[i].piece.num_ties
        here[i] = until[1:] - until[:-1]
    for i, layer in zip(parts, _layers(counts[i] for i in parts), strict=True):
        here[i] = np.zeros(len(places[i]) - 1, np.int64)
        for inside in tied(layer, counts[i].key, int(places[i][0]) // 8 * 8, int(places[i][-1])):
            until = inside.searchsorted(places[i])
            here[i] += until[1:] - until[:-1]
    return here


def _layers(counts: Iterable[_Count]) -> list[Layer]:
    return [count.piece.layer for count in counts if count.piece.layer is not None]


def _places(asked: Sequence[tuple[Piece, np.ndarray]]) -> list[np.ndarray]:
    """Count the elements of each piece that come before some flat indices of its layer: most pieces are alike."""
    alike: dict[Region, list[int]] = defaultdict(list)
    for i, (p, _) in enumerate(asked):
        alike[p.holding.region].append(i)
    found: dict[int, np.ndarray] = {}
    for region, members in alike.items():
        places = region.to_local(np.concatenate([asked[i][1] for i in members]))
        ends = np.cumsum([len(asked[i][1]) for i in members]).tolist()
        found.update((i, places[end - len(asked[i][1]) : end]) for i, end in zip(members, ends, strict=True))
    return [found[i] for i in range(len(asked))]
