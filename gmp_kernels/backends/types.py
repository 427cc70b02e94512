"""Types that go into a backend and come out of it, and the operations that it has to provide."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import sub
from typing import ClassVar, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from gmp_kernels.backends.layers import Filter, Layer

__all__ = [
    "BracketCounts",
    "Brackets",
    "Compaction",
    "Constants",
    "Cutoffs",
    "Filter",
    "Implementation",
    "Integers",
    "Layer",
    "PruneCounts",
    "Selection",
    "StateMove",
    "Threshold",
    "UpdateBatch",
    "UpdateTensor",
]

Integers: TypeAlias = npt.NDArray[np.int64]


class Threshold(NamedTuple):
    """The cut between pruned and kept weights.

    Attributes
    ----------
    value : float
        The num_prune-th smallest magnitude; 0.0 when nothing more has to be pruned (num_prune is 0, or not above the
        number already pruned).
    num_below : int
        Weights that come before the ties in the order: the already pruned ones and those of smaller magnitude.
    num_ties : int
        Unpruned weights of exactly that magnitude (0 when nothing more has to be pruned).
    num_ties_kept : int
        How many of the ties stay: those of lowest flat index.
    """

    value: float
    num_below: int
    num_ties: int
    num_ties_kept: int

    @property
    def num_pruned(self) -> int:
        """Weights pruned once this threshold is applied: max(num_prune, already pruned)."""
        return self.num_below + self.num_ties - self.num_ties_kept


class Cutoffs(NamedTuple):
    """Cutoffs of layers, column by column: every list has one entry per layer.

    A weight of a layer is pruned if its key (see ``keys.py``) is below the layer's entry in ``keys``, or equal to it
    while its flat index, which is row-major, is >= the layer's entry in ``tie_indices``.

    Attributes
    ----------
    keys, num_below, num_ties, num_ties_kept : list of int
        The key of a threshold and its counts; layers that are ranked together share them. The key is 0 if nothing more
        has to be pruned.
    tie_indices : list of int
    nonfinite : list of int
        Flat index of the first unpruned NaN or Inf, -1 if there is none.
    """

    keys: list[int]
    num_below: list[int]
    num_ties: list[int]
    num_ties_kept: list[int]
    tie_indices: list[int]
    nonfinite: list[int]

    @classmethod
    def of(cls, rows: Sequence[tuple[int, ...]]) -> Cutoffs:
        """Return the columns of a row per layer."""
        return cls(*(list(column) for column in zip(*rows, strict=True))) if rows else cls([], [], [], [], [], [])


class Selection:
    """Cutoffs that ``select`` has found. Those found on a GPU stay there: the first access synchronizes.

    Attributes
    ----------
    is_lazy : bool
        Whether an access waits for a device.
    """

    is_lazy: ClassVar[bool] = False

    def __init__(self, cutoffs: Cutoffs) -> None:
        self._cutoffs = cutoffs

    @property
    def cutoffs(self) -> Cutoffs:
        """The cutoffs on the host."""
        return self._cutoffs


class Brackets(NamedTuple):
    """Intervals of keys (see ``keys.py``), both ends included, as int64 columns; empty where lo > hi."""

    lo: Integers
    hi: Integers

    @classmethod
    def of(cls, lo: Sequence[int], hi: Sequence[int]) -> Brackets:
        """Return the columns of plain numbers."""
        return cls(np.array(lo, np.int64), np.array(hi, np.int64))

    def shifts(self, num_bins: int) -> Integers:
        """Return the smallest shift that maps each interval into so many bins, a power of two."""
        bits = [width.bit_length() if width > 0 else 0 for width in (self.hi - self.lo).tolist()]
        return np.maximum(0, np.array(bits, np.int64) - (num_bins.bit_length() - 1))


class BracketCounts(NamedTuple):
    """Counts of layers or shards relative to their brackets, column by column; counts of disjoint shards sum.

    Attributes
    ----------
    below, inside, pruned : numpy.ndarray
        int64: unpruned keys below the bracket, unpruned keys in it, mask bits that are 0.
    nonfinite : numpy.ndarray
        int64: index in memory of the first unpruned NaN or Inf, -1 if there is none.
    bins : numpy.ndarray
        int64, a row per layer: number of the keys inside for each ``(key - lo) >> shift``.
    """

    below: Integers
    inside: Integers
    pruned: Integers
    nonfinite: Integers
    bins: Integers

    @classmethod
    def nothing(cls, num_layers: int, num_bins: int) -> BracketCounts:
        """Return the counts of layers without weights."""
        below, inside, pruned = np.zeros((3, num_layers), np.int64)
        return cls(below, inside, pruned, np.full(num_layers, -1), np.zeros((num_layers, num_bins), np.int64))

    def put(self, rows: Sequence[int] | int, counts: Iterable[object]) -> None:
        """Replace some rows, or one, by these columns."""
        for column, part in zip(self, counts, strict=True):
            column[rows] = part  # type: ignore[call-overload]


class PruneCounts(NamedTuple):
    """Per layer, the number of zeros in its mask after ``prune``, and how many of them are new."""

    num_pruned: list[int]
    num_newly_pruned: list[int]

    @classmethod
    def from_kept(cls, sizes: Sequence[int], before: Sequence[int], now: Sequence[int]) -> PruneCounts:
        """Return the counts for layers of these sizes, given how many weights each kept before, and keeps now."""
        return cls(list(map(sub, sizes, now)), list(map(sub, before, now)))


class Compaction(NamedTuple):
    """Layout of compact state: the values of the kept weights only, in the order of the weights.

    Attributes
    ----------
    mask : torch.Tensor
        Packed bits; never written while state is laid out by it.
    chunk_offsets : torch.Tensor
        int64: kept weights before each chunk, whose size is the backend's choice.
    num_kept : int
    """

    mask: torch.Tensor
    chunk_offsets: torch.Tensor
    num_kept: int


class StateMove(NamedTuple):
    """A move of one tensor of optimizer state from one layout to another; a layout of None is dense.

    Values of weights that are kept before but not after are dropped; those kept after but not before become zero.
    """

    source: torch.Tensor
    source_layout: Compaction | None
    target: torch.Tensor
    target_layout: Compaction | None
    numel: int


@dataclass(eq=False, slots=True)
class UpdateTensor:
    """One parameter as optimizer steps see it, valid as long as its tensors stay, which all have one memory order.

    Attributes
    ----------
    weight : torch.Tensor
        Written by a step.
    master : torch.Tensor or None
        float32 copy that the arithmetic runs on, written by a step too.
    state : tuple of torch.Tensor
        Values of the rule per weight, compact if ``compaction`` is given: all float32, or all bfloat16, rounded as in
        csrc/optim/rules.h; float64 for float64 weights.
    mask : torch.Tensor or None
        Packed bits. Weight and state are zero already wherever a bit is 0.
    compaction : Compaction or None
    prepared : object
        Made by a backend from the others, and kept for other batches.
    """

    weight: torch.Tensor
    master: torch.Tensor | None = None
    state: tuple[torch.Tensor, ...] = ()
    mask: torch.Tensor | None = None
    compaction: Compaction | None = None
    prepared: object = None

    @property
    def state_dtype(self) -> torch.dtype:
        """The dtype of the state; without state, that of the arithmetic."""
        return self.state[0].dtype if self.state else torch.promote_types(self.weight.dtype, torch.float32)


@dataclass(eq=False, slots=True)
class UpdateBatch:
    """Parameters that step together, valid as long as their tensors stay.

    Attributes
    ----------
    tensors : list of UpdateTensor
    prepared : object
        Made by a backend from the tensors, and kept for the next step.
    """

    tensors: list[UpdateTensor]
    prepared: object = None


class Constants(NamedTuple):
    """Numbers of a step, in rows; each tensor uses one row.

    Attributes
    ----------
    blocks : list of (mapping of str to float, int)
        A row, and how many times it is repeated. Absent constants change nothing.
    on_device : list of (str, int, int, torch.Tensor)
        Name, first row, row after the last, and float64 values, 0-d or one per row, that the host must not read.
    """

    blocks: list[tuple[Mapping[str, float], int]]
    on_device: list[tuple[str, int, int, torch.Tensor]]

    def on_host(self) -> list[Mapping[str, float]]:
        """Return one mapping per row, for kernels on the host; waits for values that are on a device."""
        if not self.on_device:
            return [given for given, count in self.blocks for _ in range(count)]
        rows = [dict(given) for given, count in self.blocks for _ in range(count)]
        for name, first, end, values in self.on_device:
            for row, value in zip(rows[first:end], values.expand(end - first).tolist(), strict=True):
                row[name] = value
        return [*rows]


Select: TypeAlias = Callable[..., Selection]  # with the parameters of ``Implementation.select``
Draw: TypeAlias = Callable[..., tuple[npt.NDArray[np.signedinteger], Integers, Integers]]


class Implementation(Protocol):
    """The operations of a backend. None of them validates; none of them may fail halfway through a write.

    Attributes
    ----------
    capturable : bool
        Whether a CUDA graph can hold an ``update``.
    selects_patterns : bool
        Whether ``select`` takes layers that are not plain.
    skips_pruned_blocks : bool
        Whether an ``update`` by the rule "average" leaves blocks that are all pruned as they are.
    chunk : int
        Number of weights of a layer, in the order of memory, of which ``count`` adds the bins up in a row of their own,
        if it is given such rows, uint16 zeros, as another argument; 0 if it takes none.
    """

    capturable: bool
    selects_patterns: bool
    skips_pruned_blocks: bool
    chunk: int

    @property
    def select(self) -> Select | None:
        """Operation that finds the cutoff of every layer. It only reads; None where ``search.driver`` uses ``count``.

        Parameters
        ----------
        layers : sequence of Layer
        num_prune : sequence of int
            One per group, of what ``ranked`` returns: weights or blocks, those counted that are protected.
        group_sizes : sequence of int
            Number of layers of each group, which follow each other and have one dtype. The layers of a group are ranked
            together, and the flat index runs through them.
        brackets : Brackets, optional
            One per group, in which its threshold is expected, empty if that is not known. They only save work.
        prunes : bool, optional
            ``prune`` follows, which may be spared weights that it would find unchanged.
        """
        ...

    def ranked(self, layers: Sequence[Layer]) -> Sequence[Layer]:
        """Return plain layers of what is ranked of these: weights or scores, or sums of the magnitudes of blocks.

        Bits of their masks are 0 for what is pruned or protected. They are new, except for those of layers that are
        plain already. Memory: 1 bit per weight, and for blocks 4 bytes each (8 for float64).
        """
        ...

    def count(
        self,
        layers: Sequence[Layer],
        brackets: Brackets,
        num_bins: int,
        candidates: Sequence[torch.Tensor | None] | None = None,
    ) -> BracketCounts:
        """Count each plain layer against its bracket. Reads only.

        ``num_bins`` is a power of two. ``candidates`` are 1-d and of the layer's dtype and device. If they have room
        for all magnitudes inside the bracket, they receive these, in any order.
        """
        ...

    @property
    def draw(self) -> Draw | None:
        """Operation that samples groups of layers of one dtype; None where ``search.sample`` does it with torch.

        Takes the layers and, per group, its first layer, number of layers and sample size. Returns per group a row of
        unpruned keys and at least one NaN, and how many sampled weights are unpruned and pruned: none of tiny layers.
        """
        ...

    @property
    def count_slots(self) -> Callable[..., Integers] | None:
        """Operation that counts unpruned weights of one key; None where ``search.ties`` does it with numpy. Reads only.

        Takes layers, positions of those to count and, for each, a key, flat indices (first, begin, end, last), a
        bracket of flat indices of the whole layer, and its region of this; and into how many slots to divide a bracket.
        Returns for each how many lie from first to begin, in each slot, and from end to last.
        """
        ...

    def prune(
        self, layers: Sequence[Layer], selection: Selection, out: Sequence[torch.Tensor], *, finite: bool = False
    ) -> PruneCounts | None:
        """Zero the weights below the cutoffs and write the new packed bits, zeros after the last weight, to ``out``.

        Cutoffs are those of what is ranked; what is protected is kept.

        ``out[i]`` may be ``layers[i].mask`` itself. With ``finite``, nothing is written if a NaN or Inf was found, and
        the answer is None. A selection made from this same ``layers`` object may still be lazy.
        """
        ...

    def apply(self, layers: Sequence[Layer]) -> None:
        """Zero (+0.0) every weight whose mask bit is 0."""
        ...

    def update(
        self,
        rule: str,
        batch: UpdateBatch,
        gradients: Sequence[torch.Tensor],
        rows: Sequence[int],
        constants: Constants,
        *,
        after: Sequence[Callable[[], object]] = (),
    ) -> None:
        """Take one optimizer step. ``rule`` is "sgd", "adam" or "average".

        ``gradients`` and ``rows`` (of the constants) have one entry per tensor of the batch; a gradient is laid out as
        its weight is. If the constant "skip" is not 0, nothing is written. ``after`` are C functions that are called
        once all is written or launched, with no Python between the two if a step is one call.

        Pruned weights and their state stay zero whatever their gradient; the arithmetic is that of torch.optim.
        """
        ...

    def sum_squares(self, gradients: Sequence[Layer]) -> float | torch.Tensor:
        """Return the sum of the squares of the kept elements of all tensors, in float64; on a GPU a 0-d tensor."""
        ...

    def compactions(self, masks: Sequence[tuple[torch.Tensor, int]]) -> list[Compaction]:
        """Return layouts of compact state for packed bits and their numbers of weights. Waits for a GPU once."""
        ...

    def move_state(self, moves: Sequence[StateMove]) -> None:
        """Copy state from one layout to another."""
        ...
