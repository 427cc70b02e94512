"""Many layers as one thing: what ``ops`` hands to backends in one call, and what a selection found, column by column.

A backend takes any sequence of layers and may return any sequence of selections. These save the time that 291 small
layers take as objects of their own: a GPU would wait for it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import chain, repeat
from operator import sub
from typing import ClassVar, NamedTuple, TypeVar, overload

import torch

from gmp_kernels.backends import Layer, Selection, Threshold, Written

__all__ = [
    "Columns",
    "Facts",
    "Layers",
    "PruneCounts",
    "Selections",
    "columns_of",
    "device_of",
    "is_lazy",
    "merged",
    "prepared",
    "thresholds_of",
]

T = TypeVar("T")


class ByColumn(Sequence[T]):
    """Rows that are kept as columns, and made when somebody wants one."""

    @abstractmethod
    def _row(self, index: int) -> T:
        """Make one of them."""

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        found = range(len(self))[index]
        return self._row(found) if isinstance(found, int) else [self._row(i) for i in found]


class Facts:
    """Facts that follow from the addresses, shapes and dtypes of a call's tensors alone; holds none of them.

    Attributes
    ----------
    sizes : list of int
    dtypes : list of torch.dtype
    device : torch.device
    prepared : dict
        What backends make of the same: rows, templates of tables. Never memory that a call writes, as calls may run in
        several threads or on several streams.
    """

    __slots__ = ("device", "dtypes", "prepared", "sizes")

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.sizes = [layer.weight.numel() for layer in layers]
        self.dtypes = [layer.weight.dtype for layer in layers]
        self.device = layers[0].weight.device
        self.prepared: dict[Hashable, object] = {}


class Layers(ByColumn[Layer]):
    """Validated layers of one call.

    Attributes
    ----------
    weights : sequence of torch.Tensor
        Not detached yet: a kernel that gets their addresses never asks.
    masks : sequence of torch.Tensor or None
        Packed bits; None where nothing is pruned yet.
    facts : Facts
        Those of earlier calls, if there were any on the same addresses, shapes and dtypes.
    """

    __slots__ = ("facts", "masks", "weights")

    def __init__(self, weights: Sequence[torch.Tensor], masks: Sequence[torch.Tensor] | None, facts: Facts) -> None:
        self.weights, self.masks, self.facts = weights, masks, facts

    def __len__(self) -> int:
        return len(self.weights)

    def _row(self, index: int) -> Layer:
        return Layer(self.weights[index].detach(), None if self.masks is None else self.masks[index])


def device_of(layers: Sequence[Layer]) -> torch.device:
    """Return the device that all of them are on."""
    return layers.facts.device if isinstance(layers, Layers) else layers[0].weight.device


def prepared(layers: Sequence[Layer], key: Hashable, make: Callable[[], T]) -> T:
    """Return what ``make`` makes of the layers' addresses, sizes and dtypes: made once for as long as these stay."""
    if not isinstance(layers, Layers):
        return make()
    known = layers.facts.prepared
    if key not in known:
        known[key] = make()
    return known[key]  # type: ignore[return-value]


class Columns(NamedTuple):
    """Selections by column: one threshold per selection, and per layer what ``Selection`` keeps per layer."""

    thresholds: list[Threshold]
    cuts: list[int]
    nonfinite: list[int]


class Selections(ByColumn[Selection]):
    """Selections kept as columns.

    Attributes
    ----------
    is_lazy : bool
        Whether a look at them waits for a device.
    """

    is_lazy: ClassVar[bool] = False

    def __init__(self, columns: Columns) -> None:
        self._columns = columns

    @property
    def columns(self) -> Columns:
        """All there is to know of them."""
        return self._columns

    def __len__(self) -> int:
        return len(self.columns.thresholds)

    def _row(self, index: int) -> Selection:
        thresholds, cuts, nonfinite = self.columns
        own = slice(None) if len(thresholds) == 1 else slice(index, index + 1)
        return Selection(thresholds[index], tuple(cuts[own]), tuple(nonfinite[own]))


class PruneCounts(ByColumn[Written]):
    """Counts of a prune step, kept as columns."""

    def __init__(self, num_pruned: list[int], num_newly_pruned: list[int]) -> None:
        self.num_pruned, self.num_newly_pruned = num_pruned, num_newly_pruned

    @classmethod
    def of(cls, written: Sequence[Written]) -> PruneCounts:
        """Return them by column, however they are kept."""
        if isinstance(written, PruneCounts):
            return written
        return cls([count.num_pruned for count in written], [count.num_newly_pruned for count in written])

    @classmethod
    def from_kept(cls, sizes: Sequence[int], before: Sequence[int], now: Sequence[int]) -> PruneCounts:
        """Return them for layers of these sizes, given how many weights each kept before, and keeps now."""
        return cls(list(map(sub, sizes, now)), list(map(sub, before, now)))

    def __len__(self) -> int:
        return len(self.num_pruned)

    def _row(self, index: int) -> Written:
        return Written(self.num_pruned[index], self.num_newly_pruned[index])


def columns_of(selections: Sequence[Selection]) -> Columns:
    """Return selections by column, however they are kept."""
    if isinstance(selections, Selections):
        return selections.columns
    return Columns(
        [selection.threshold for selection in selections],
        [cut for selection in selections for cut in selection.cuts],
        [index for selection in selections for index in selection.nonfinite],
    )


def is_lazy(selections: Sequence[Selection]) -> bool:
    """Whether a look at them waits for a device."""
    return isinstance(selections, Selections) and selections.is_lazy


def thresholds_of(*columns: Iterable[float]) -> list[Threshold]:
    """Return the thresholds that have these columns; their own constructor takes twice as long."""
    return list(map(tuple.__new__, repeat(Threshold), zip(*columns, strict=True)))


def merged(positions: Sequence[Sequence[int]], pieces: Sequence[list[T]]) -> list[T]:
    """Return a column of all layers, given that of each part and the positions of its layers."""
    if len(pieces) == 1:
        return pieces[0]
    found = dict(zip(chain.from_iterable(positions), chain.from_iterable(pieces), strict=True))
    return [found[i] for i in range(len(found))]
