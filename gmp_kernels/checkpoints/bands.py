"""Bands of a tensor with a pattern: the shortest runs of flat indices that can be ranked by themselves.

A piece of a file holds whole bands, so that it is a layer with a pattern, whose ranking is that of the whole tensor.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from gmp_kernels.backends.keys import largest_key
from gmp_kernels.backends.layers import ranked_dtype
from gmp_kernels.backends.types import Cutoffs, Implementation, Layer, Selection
from gmp_kernels.checkpoints.files import DTYPES, Span, TensorInfo
from gmp_kernels.patterns import Block, Pattern
from gmp_kernels.search.driver import nonfinite_in

__all__ = ["Bands", "first_nonfinite_of", "ranked"]


class Bands(NamedTuple):
    """Division of a tensor into bands.

    Attributes
    ----------
    tensor : TensorInfo
    pattern : Pattern or None
        Pattern of each band, and of any run of them.
    shape : tuple of int
        Shape of a band. A run of them is longer along the first dimension.
    """

    tensor: TensorInfo
    pattern: Pattern | None
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: TensorInfo, pattern: Pattern | None) -> Bands:
        """Return the bands of a tensor with this pattern; None if any weight may be pruned."""
        return cls(tensor, None, (1,)) if pattern is None else cls(tensor, *pattern.band(tensor.shape))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return DTYPES[self.tensor.dtype]

    @property
    def ranked_dtype(self) -> torch.dtype:
        """The dtype of what is ranked."""
        return ranked_dtype(self.layer(torch.empty(self.shape, dtype=self.dtype, device="meta")))

    @property
    def largest_key(self) -> int:
        """The key of NaN among what is ranked. If it is a threshold, all is pruned that the pattern allows."""
        return largest_key(self.ranked_dtype)

    @property
    def num_ranked(self) -> int:
        """Number of weights, or blocks of them."""
        return self.tensor.numel if self.pattern is None else self.tensor.numel // self.pattern.unit

    @property
    def num_protected(self) -> int:
        """Number of weights that are kept whatever their rank."""
        run = (self.tensor.numel // math.prod(self.shape[1:]), *self.shape[1:])
        return 0 if self.pattern is None else self.pattern.num_protected(run)

    @property
    def span(self) -> Span:
        """Bytes of the file that the tensor takes, to be read in whole bands and whole bytes of a packed mask."""
        if self.pattern is None:
            return self.tensor.span
        unit = math.lcm(math.prod(self.shape), 8) * self.dtype.itemsize
        return self.tensor.span._replace(unit=min(unit, self.tensor.nbytes))

    def layer(self, weights: torch.Tensor) -> Layer:
        """Return whole bands as a layer."""
        return Layer(weights.view(-1, *self.shape[1:]), None, pattern=self.pattern)

    def sample(self, place: int, most: int) -> tuple[list[range], tuple[int, ...]]:
        """Return byte ranges of the tensor near a place in it, about ``most`` bytes in all, that make up a layer.

        Also return the shape of this layer. A band that is longer than that is cut: of each of its rows a part is
        taken, which has the same pattern.
        """
        *_, height, width = (1, *self.shape)
        itemsize = self.dtype.itemsize
        band = height * width * itemsize
        begin, offset = place // band * band, place % band
        if band <= most:
            end = min(begin + most // band * band, self.tensor.nbytes)
            return [range(begin, end)], ((end - begin) // band * self.shape[0], *self.shape[1:])
        step = self.pattern.cols if isinstance(self.pattern, Block) else 1
        length = min(width, max(1, most // (height * itemsize) // step) * step)
        first = min(offset // (height * itemsize) // step * step, width - length)
        starts = [begin + (row * width + first) * itemsize for row in range(height)]
        return [range(start, start + length * itemsize) for start in starts], (*self.shape[:-1], length)


def first_nonfinite_of(implementation: Implementation, layer: Layer) -> int:
    """Return the flat index of the first NaN or Inf, -1 if there is none."""
    return nonfinite_in(implementation, [layer])[0]


def ranked(implementation: Implementation, layer: Layer) -> Layer:
    """Return a plain layer of what is ranked of one without a mask, as ``Implementation.ranked`` does, but sooner.

    Temporary memory: a copy of the layer.
    """
    pattern = layer.pattern
    if pattern is None:
        return layer
    if pattern.unit > 1:
        return Layer(pattern.ranked(layer.weight), None)
    # What is left of a copy that loses all it can is protected.
    copy, bits = layer.weight.clone(), torch.empty(-(-layer.weight.numel() // 8), dtype=torch.uint8, device="cpu")
    everything = Selection(Cutoffs.of([(largest_key(copy.dtype), 0, 0, 0, 0, -1)]))
    implementation.prune([layer._replace(weight=copy)], everything, [bits])
    bits.bitwise_not_()
    if used := layer.weight.numel() % 8:
        bits[-1] &= (1 << used) - 1
    return Layer(layer.weight, bits)
