"""Layers as backends get them, one by one or as one object.

A backend takes any sequence of layers. ``Layers`` saves the time to make an object per layer, for which a GPU would
wait if there are hundreds of small layers.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from itertools import accumulate
from typing import NamedTuple, TypeVar, overload

import torch

from gmp_kernels.backends.dtypes import NAMES
from gmp_kernels.patterns import Pattern

__all__ = [
    "Filter",
    "Layer",
    "Layers",
    "are_plain",
    "by_dtype",
    "device_of",
    "group_positions",
    "prepared",
    "ranked_dtype",
]

T = TypeVar("T")


class Filter(NamedTuple):
    """The weights of an output channel, which memory may hold in another order than the row-major one of the tensor.

    In row-major order the positions of a channel lie side by side, in memory the channels of a position. The filters of
    a layer follow each other in the same order in both; in a layer whose memory is row-major each is one weight.
    """

    channels: int = 1
    positions: int = 1

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.channels * self.positions


ONE_WEIGHT = Filter()  # of every layer whose memory is row-major; models have thousands of these


class Layer(NamedTuple):
    """One weight as every backend gets it: validated, detached, not empty, in the order of its memory.

    Attributes
    ----------
    weight : torch.Tensor
        Contiguous. If ``is_channels_last``, it is a view with the second dimension of the tensor moved to the end.
    mask : torch.Tensor or None
        Packed bits in the order of memory, on the weight's device; None if nothing is pruned yet.
    is_channels_last : bool
    pattern : Pattern or None
        What of it is ranked, and what is protected; None if every weight may be pruned.
    scores : torch.Tensor or None
        Ranked instead of the weights: not negative, laid out as they are, of any of the dtypes.
    """

    weight: torch.Tensor
    mask: torch.Tensor | None
    is_channels_last: bool = False
    pattern: Pattern | None = None
    scores: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        tensor: torch.Tensor,
        mask: torch.Tensor | None,
        pattern: Pattern | None = None,
        scores: torch.Tensor | None = None,
    ) -> Layer:
        """Return the layer of a tensor that is contiguous or in channels_last, as its scores are."""
        if tensor.is_contiguous():
            return cls(tensor, mask, False, pattern, scores)
        return cls(tensor.movedim(1, -1), mask, True, pattern, None if scores is None else scores.movedim(1, -1))

    @property
    def source(self) -> torch.Tensor:
        """The tensor that ranks it: its scores or the weight itself."""
        return self.weight if self.scores is None else self.scores

    @property
    def is_plain(self) -> bool:
        """Whether each weight is ranked by its own magnitude, as ``Implementation.ranked`` layers are."""
        return self.pattern is None and self.scores is None

    @property
    def tensor(self) -> torch.Tensor:
        """The weight with its own order of dimensions."""
        return self.weight.movedim(-1, 1) if self.is_channels_last else self.weight

    @property
    def filter(self) -> Filter:
        """The filters in which memory has an order of its own."""
        if not self.is_channels_last:
            return ONE_WEIGHT
        _, *positions, channels = self.weight.shape
        return Filter(channels, math.prod(positions))


class Layers(Sequence[Layer]):
    """Validated layers of one call, and data derived from their addresses, shapes, strides and dtypes alone.

    ``known`` are the layers of an earlier call with the same addresses, shapes, strides and dtypes; they share that
    data.

    Attributes
    ----------
    weights : sequence of torch.Tensor
        Not detached yet, which kernels that get addresses do not need; their dimensions in the tensors' own order.
    masks : sequence of torch.Tensor or None
        Packed bits in the order of memory; None if nothing is pruned yet.
    patterns, scores : sequence or None
        As in ``Layer``; None if no layer has any.
    sizes : list of int
    dtypes : list of torch.dtype
    device : torch.device
    prepared : dict
        Made by backends from addresses, shapes, strides and dtypes: rows, templates of tables. Never memory that a call
        writes, because calls may run in several threads or on several streams.
    """

    __slots__ = ("device", "dtypes", "masks", "patterns", "prepared", "scores", "sizes", "weights")

    def __init__(
        self,
        weights: Sequence[torch.Tensor],
        masks: Sequence[torch.Tensor] | None,
        known: Layers | None = None,
        patterns: Sequence[Pattern | None] | None = None,
        scores: Sequence[torch.Tensor | None] | None = None,
    ) -> None:
        self.weights, self.masks, self.patterns, self.scores = weights, masks, patterns, scores
        self.prepared: dict[Hashable, object] = {} if known is None else known.prepared
        self.device: torch.device = weights[0].device if known is None else known.device
        self.sizes: list[int] = [weight.numel() for weight in weights] if known is None else known.sizes
        self.dtypes: list[torch.dtype] = [weight.dtype for weight in weights] if known is None else known.dtypes

    def __len__(self) -> int:
        return len(self.weights)

    @overload
    def __getitem__(self, index: int) -> Layer: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Layer]: ...
    def __getitem__(self, index: int | slice) -> Layer | Sequence[Layer]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        return Layer.of(
            self.weights[index].detach(),
            None if self.masks is None else self.masks[index],
            None if self.patterns is None else self.patterns[index],
            None if self.scores is None else self.scores[index],
        )

    def unmasked(self) -> Layers:
        """Return the same layers with all weights unpruned, and their own prepared data, which stays as long."""
        bare = Layers(self.weights, None, self, self.patterns, self.scores)
        bare.prepared = prepared(self, "unmasked", dict)
        return bare

    @property
    def are_plain(self) -> bool:
        """Whether each weight is ranked by its own magnitude."""
        return self.patterns is None and self.scores is None

    @property
    def ranked_dtypes(self) -> list[torch.dtype]:
        """The dtypes of what ``Implementation.ranked`` returns, whose keys cutoffs have."""
        if self.are_plain:
            return self.dtypes
        return [ranked_dtype(layer) for layer in self]


def are_plain(layers: Sequence[Layer]) -> bool:
    """Whether each weight of each layer is ranked by its own magnitude."""
    return layers.are_plain if isinstance(layers, Layers) else all(layer.is_plain for layer in layers)


def ranked_dtype(layer: Layer) -> torch.dtype:
    """Return the dtype of what is ranked of a layer."""
    dtype = layer.source.dtype
    is_sum = layer.pattern is not None and layer.pattern.unit > 1
    return dtype if not is_sum or dtype == torch.float64 else torch.float32


def device_of(layers: Sequence[Layer]) -> torch.device:
    """Return the device of the layers, which is one."""
    return layers.device if isinstance(layers, Layers) else layers[0].weight.device


def prepared(layers: Sequence[Layer], key: Hashable, make: Callable[[], T]) -> T:
    """Return the result of ``make``, called once as long as the layers' addresses, layouts and dtypes stay."""
    if not isinstance(layers, Layers):
        return make()
    known = layers.prepared
    if key not in known:
        known[key] = make()
    return known[key]  # type: ignore[return-value]


def by_dtype(layers: Sequence[Layer]) -> dict[str, list[int]]:
    """Positions of the layers of each dtype: one call per dtype nearly always means one call."""
    positions: dict[str, list[int]] = defaultdict(list)
    for i, layer in enumerate(layers):
        positions[NAMES[layer.weight.dtype]].append(i)
    return positions


def group_positions(positions: Sequence[int], group_sizes: Sequence[int]) -> Sequence[int]:
    """Return which groups the layers at these positions make up; each has layers of one dtype."""
    if len(group_sizes) == 1 or max(group_sizes) == 1:
        return range(1) if len(group_sizes) == 1 else positions
    firsts, wanted = accumulate(group_sizes[:-1], initial=0), set(positions)
    return [g for g, first in enumerate(firsts) if first in wanted]
