"""Many layers as one object, which ``ops`` hands to backends in one call.

A backend takes any sequence of layers. This one saves the time to make an object per layer, for which a GPU would wait
if there are hundreds of small layers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from itertools import accumulate
from typing import TypeVar, overload

import torch

from gmp_kernels.backends.dtypes import NAMES
from gmp_kernels.backends.types import Layer

__all__ = ["Layers", "by_dtype", "device_of", "group_positions", "prepared"]

T = TypeVar("T")


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
    sizes : list of int
    dtypes : list of torch.dtype
    device : torch.device
    prepared : dict
        Made by backends from addresses, shapes, strides and dtypes: rows, templates of tables. Never memory that a call
        writes, because calls may run in several threads or on several streams.
    """

    __slots__ = ("device", "dtypes", "masks", "prepared", "sizes", "weights")

    def __init__(
        self, weights: Sequence[torch.Tensor], masks: Sequence[torch.Tensor] | None, known: Layers | None = None
    ) -> None:
        self.weights, self.masks = weights, masks
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
        return Layer.of(self.weights[index].detach(), None if self.masks is None else self.masks[index])


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
