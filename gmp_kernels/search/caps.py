"""Layers that are ranked together, none of which may lose more than its cap.

The order is that of all layers together, and layers at their cap are passed over: what a cap withholds falls to the
others. So the layers that one common cutoff would take over their caps are set to these, each in its own order, and the
others are ranked anew, until none is over. A cutoff only rises by that, and who is over stays over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from gmp_kernels.backends.layers import are_plain
from gmp_kernels.backends.types import Brackets, Cutoffs, Implementation, Integers, Layer, Selection
from gmp_kernels.search.driver import nonfinite_in, select_with

__all__ = ["KeyCounts", "divide", "merged", "select_capped"]


class KeyCounts(NamedTuple):
    """Counts of layers relative to one key, per layer: unpruned weights below it, those of that key, pruned weights."""

    below: Integers
    ties: Integers
    pruned: Integers

    def losses(self, num_ties: int, num_ties_kept: int) -> Integers:
        """Return how many weights of each layer are pruned by a cutoff at the key, whose ties the first layers keep.

        Without ties nothing more is pruned.
        """
        if not num_ties:
            return self.pruned
        kept = np.clip(num_ties_kept - (self.ties.cumsum() - self.ties), 0, self.ties)
        return self.pruned + self.below + self.ties - kept


# Returns how many weights of each of some layers a common cutoff for so many would leave pruned.
Losses: TypeAlias = Callable[[Sequence[int], int], Integers]


def divide(
    num_prune: int, caps: Sequence[int], num_pruned: Sequence[int], losses: Losses
) -> tuple[list[int], dict[int, int]]:
    """Divide layers into those that are ranked together and those at their caps.

    Parameters
    ----------
    num_prune : int
        Of all layers, not more than the caps together.
    caps : sequence of int
    num_pruned : sequence of int
        How many weights of each layer are pruned already.
    losses : callable

    Returns
    -------
    list of int
        Positions of the layers that are ranked together, for which ``losses`` was called last.
    dict of int to int
        Positions of the others, with their counts: their caps, unless more was pruned before.
    """
    full = {i: n for i, (cap, n) in enumerate(zip(caps, num_pruned, strict=True)) if n >= cap}
    while rest := [i for i in range(len(caps)) if i not in full]:
        lost = losses(rest, max(0, num_prune - sum(full.values())))
        over = {i: caps[i] for i, n in zip(rest, lost.tolist(), strict=True) if n > caps[i]}
        if not over:
            break
        full |= over
    return rest, full


def select_capped(
    implementation: Implementation,
    layers: Sequence[Layer],
    num_prune: int,
    caps: Sequence[int],
    num_pruned: Sequence[int],
) -> tuple[Selection, Mapping[int, int]]:
    """Select among layers that are ranked together, none of which loses more than its cap.

    Counts are those of what is ranked, as in ``Implementation.select``.

    Returns
    -------
    Selection
        Cutoffs of layers at their caps are their own; all others share theirs, whose counts run over these only.
    mapping of int to int
        As the second of ``divide``.
    """
    plain = layers if are_plain(layers) else implementation.ranked(layers)
    select = select_with(implementation)
    found = Cutoffs.of([])

    def losses(rest: Sequence[int], count: int) -> Integers:
        nonlocal found
        own = plain if len(rest) == len(plain) else [plain[i] for i in rest]
        found = select(own, [count], [len(rest)]).cutoffs
        key = found.keys[:1] * len(rest)
        counts = implementation.count(own, Brackets.of(key, key), 1)
        at_key = KeyCounts(counts.below, counts.inside, counts.pruned)
        return at_key.losses(found.num_ties[0], found.num_ties_kept[0])

    rest, full = divide(num_prune, caps, num_pruned, losses)
    parts = [(rest, found)]
    if full:
        alone = select([plain[i] for i in full], list(full.values()), [1] * len(full)).cutoffs
        parts.append((list(full), alone))
    cutoffs = merged(parts)
    if plain is not layers:
        cutoffs = cutoffs._replace(nonfinite=nonfinite_in(implementation, layers))
    return Selection(cutoffs), full


def merged(parts: Sequence[tuple[Sequence[int], Cutoffs]]) -> Cutoffs:
    """Return the cutoffs of all layers, given those of the layers at some positions, and of those at others."""
    rows: dict[int, tuple[int, ...]] = {}
    for places, found in parts:
        if places:
            rows |= zip(places, zip(*found, strict=True), strict=True)
    return Cutoffs.of([rows[i] for i in range(len(rows))])
