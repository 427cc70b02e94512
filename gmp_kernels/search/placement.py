"""Placement of a divided layer: boxes of a tensor, and the part that this rank holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from gmp_kernels.errors import LayoutError

__all__ = ["Placement", "Region"]


IndexOrIndices = TypeVar("IndexOrIndices", int, np.ndarray)


class Region(NamedTuple):
    """A box of a tensor, as ``DTensor`` cuts them: on any mesh, it is one range of each dimension.

    The elements have the same row-major order in the box as in the whole tensor. So ordering by flat index means the
    same in both, and a cut at a flat index of one is a cut at a flat index of the other.

    Attributes
    ----------
    shape : tuple of int
        Shape of the whole tensor.
    offsets, sizes : tuple of int
        First index and length of the box, per dimension.
    """

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements of the box."""
        return math.prod(self.sizes)

    @property
    def flat_range(self) -> tuple[int, int] | None:
        """First flat index in the whole tensor and the one after the last; None if the box is no single run."""
        if self.numel == 0:
            return 0, 0
        start, end = self.to_global(0), self.to_global(self.numel - 1) + 1
        return (start, end) if end - start == self.numel else None

    def to_global(self, index: IndexOrIndices) -> IndexOrIndices:
        """Convert a flat index of the box, or an array of them, to those of the whole tensor."""
        result, stride = index * 0, 1
        for whole, offset, size in zip(*map(reversed, (self.shape, self.offsets, self.sizes)), strict=True):
            index, place = divmod(index, size)
            result += (place + offset) * stride
            stride *= whole
        return result

    def to_local(self, indices: np.ndarray) -> np.ndarray:
        """Count the elements of the box that come before each of these flat indices of the whole tensor."""
        rest, outer = indices, math.prod(self.shape)
        inner = self.numel
        before = np.where(rest >= outer, inner, 0)
        is_open = (rest < outer) & (inner > 0)
        for whole, offset, size in zip(self.shape, self.offsets, self.sizes, strict=True):
            inner, outer = inner // max(size, 1), outer // whole
            place, rest = np.divmod(rest, outer) if outer > 1 else (rest, np.zeros_like(rest))
            place = place - offset
            before += np.where(is_open, np.clip(place, 0, size) * inner, 0)
            # The next dimensions decide only inside the range of this one.
            is_open &= (place >= 0) & (place < size)
        return before


class Placement:
    """Partition of a layer over ranks, and this rank's part of it.

    Attributes
    ----------
    region : Region
        This rank's part.
    size : int
        Number of weights of the whole layer.
    num_parts : int
        Number of distinct parts of it.
    largest_part : int
        Number of weights of the largest part.
    num_copies : int
        Number of other ranks that hold the same part.
    is_primary : bool
        Whether this is the lowest rank that holds the part; it counts the part for all of them.
    has_copies : bool
        Whether any part of the layer is held more than once.
    starts : list of int or None
        Flat indices at which the parts begin, if each part is a run of flat indices; else None.
    slot : int
        Position of this rank's part in ``starts``.

    Raises
    ------
    LayoutError
        The parts do not make up the layer, or they overlap.
    """

    def __init__(self, name: str, regions: Sequence[Region], rank: int) -> None:
        self.region, self.size = regions[rank], math.prod(regions[rank].shape)
        held = {region for region in regions if region.numel}
        if sum(region.numel for region in held) != self.size:
            raise LayoutError(
                f"GMPScheduler.step: expected the ranks to hold the {self.size} weights of '{name}' between them, got "
                f"{sum(region.numel for region in held)}; shard it over the ranks of one mesh"
            )
        self.num_parts = len(held)
        self.largest_part = max((region.numel for region in held), default=0)
        self.num_copies = regions.count(self.region) - 1
        self.is_primary = regions.index(self.region) == rank
        self.has_copies = sum(region.numel for region in regions) > self.size
        runs = [region.flat_range for region in held]
        self.starts = sorted(run[0] for run in runs if run is not None) if None not in runs else None
        here = self.region.flat_range
        self.slot = self.starts.index(here[0]) if self.starts and here and self.region.numel else 0
