"""Pieces of the layers to be pruned that a rank holds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from gmp_kernels.backends import Bracket, Census, Layer, Selection, Threshold
from gmp_kernels.distributed.placement import Holding
from gmp_kernels.search.cutoffs import Cut

__all__ = ["NO_BRACKET", "Piece"]

NO_BRACKET = Bracket(0, -1)


@dataclass(slots=True, eq=False)
class Piece:
    """Part of a layer that this rank holds, and what is known of it in the search for the layer's threshold.

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
    # The last bracket, and how many keys lie in each of its bins.
    bracket: Bracket = NO_BRACKET
    bins: np.ndarray | None = None

    def narrow(self, bracket: Bracket) -> Layer | None:
        """Go over to a bracket inside or beside the last one; return what is to be counted against it."""
        if self.bins is None:
            self.bracket = bracket
            return self.layer
        last = self.bracket
        if bracket.lo < last.lo:
            self.num_below = 0
        elif bracket.lo > last.hi:
            self.num_below += int(self.bins.sum())
        else:
            self.num_below += int(self.bins[: (bracket.lo - last.lo) >> last.shift(len(self.bins))].sum())
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
        assert self.bins is not None
        if cut.threshold.num_ties:
            self.num_ties = int(self.bins[cut.key - self.bracket.lo])
            self.narrow(Bracket(cut.key, cut.key))
        else:
            self.num_below, self.cut = 0, self.holding.region.numel

    def selection(self, value: float) -> Selection:
        """Return what ``Implementation.prune`` is told."""
        threshold = Threshold(value, self.num_pruned + self.num_below, self.num_ties, self.num_kept)
        return Selection(threshold, (self.cut,), (-1,))
