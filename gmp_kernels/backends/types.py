"""Types that go into a backend and come out of it, and the operations that it has to offer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import sub
from typing import ClassVar, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

__all__ = [
    "BracketCounts",
    "Brackets",
    "Compaction",
    "Constants",
    "Cutoffs",
    "Implementation",
    "Layer",
    "PruneCounts",
    "Selection",
    "StateMove",
    "Threshold",
    "UpdateBatch",
    "UpdateTensor",
]


class Layer(NamedTuple):
    """One weight as every backend gets it: validated, detached, contiguous, not empty.

    ``mask`` holds the packed bits on the weight's device, or is None where nothing is pruned yet.
    """

    weight: torch.Tensor
    mask: torch.Tensor | None


class Threshold(NamedTuple):
    """The cut between pruned and kept weights.

    Attributes
    ----------
    value : float
        The num_prune-th smallest magnitude; 0.0 when nothing more has to be pruned (num_prune is 0, or not above the
        number already pruned).
    num_below : int
        Weights ordered before all those that tie at ``value``: the already pruned ones and the smaller magnitudes.
    num_ties : int
        Unpruned weights of exactly that magnitude (0 when nothing more has to be pruned).
    num_ties_kept : int
        How many of them stay: those of lowest flat index.
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

    Pruned are a layer's weights of keys below its entry in ``keys`` (see ``keys.py``), and of those whose key it is the
    ones at flat index >= its entry in ``tie_indices``.

    Attributes
    ----------
    keys, num_below, num_ties, num_ties_kept : list of int
        The key of a threshold and its counts; those of all layers together where these are ranked together. The key is
        0 where nothing more has to be pruned.
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
    """Intervals of keys (see ``keys.py``), both ends included, column by column; empty where lo > hi.

    Attributes
    ----------
    lo, hi : numpy.ndarray
        int64.
    """

    lo: npt.NDArray[np.int64]
    hi: npt.NDArray[np.int64]

    @classmethod
    def of(cls, lo: Sequence[int], hi: Sequence[int]) -> Brackets:
        """Return the columns of plain numbers."""
        return cls(np.array(lo, np.int64), np.array(hi, np.int64))

    def shifts(self, num_bins: int) -> npt.NDArray[np.int64]:
        """Return the smallest shift that maps each interval into so many bins, a power of two."""
        bits = [width.bit_length() if width > 0 else 0 for width in (self.hi - self.lo).tolist()]
        return np.maximum(0, np.array(bits, np.int64) - (num_bins.bit_length() - 1))


class BracketCounts(NamedTuple):
    """Counts of layers or shards relative to their brackets, column by column; counts of disjoint shards sum.

    Attributes
    ----------
    below : numpy.ndarray
        int64: unpruned keys below the bracket.
    inside : numpy.ndarray
        int64: unpruned keys in it.
    pruned : numpy.ndarray
        int64: mask bits that are 0.
    nonfinite : numpy.ndarray
        int64: flat index of the first unpruned NaN or Inf, -1 if there is none.
    bins : numpy.ndarray
        int64, a row per layer: of the keys inside, how many have which ``(key - lo) >> shift``.
    """

    below: npt.NDArray[np.int64]
    inside: npt.NDArray[np.int64]
    pruned: npt.NDArray[np.int64]
    nonfinite: npt.NDArray[np.int64]
    bins: npt.NDArray[np.int64]

    @classmethod
    def nothing(cls, num_layers: int, num_bins: int) -> BracketCounts:
        """Return the counts of layers without weights."""
        below, inside, pruned = np.zeros((3, num_layers), np.int64)
        return cls(below, inside, pruned, np.full(num_layers, -1), np.zeros((num_layers, num_bins), np.int64))

    def put(self, rows: Sequence[int] | int, counts: Iterable[object]) -> None:
        """Replace some rows, or one, by other columns."""
        for column, part in zip(self, counts, strict=True):
            column[rows] = part  # type: ignore[call-overload]


class PruneCounts(NamedTuple):
    """Per layer, zeros in its mask after ``prune``, and those among them that are new."""

    num_pruned: list[int]
    num_newly_pruned: list[int]

    @classmethod
    def from_kept(cls, sizes: Sequence[int], before: Sequence[int], now: Sequence[int]) -> PruneCounts:
        """Return them for layers of these sizes, given how many weights each kept before, and keeps now."""
        return cls(list(map(sub, sizes, now)), list(map(sub, before, now)))


class Compaction(NamedTuple):
    """Layout of compact state: the values of the kept weights only, in the order of the weights.

    Attributes
    ----------
    mask : torch.Tensor
        Packed bits; never written while state is laid out by it.
    chunk_offsets : torch.Tensor
        int64: kept weights before each chunk, in a chunk size that the backend knows.
    num_kept : int
    """

    mask: torch.Tensor
    chunk_offsets: torch.Tensor
    num_kept: int


class StateMove(NamedTuple):
    """One tensor of optimizer state on its way from one layout to another; a layout of None is dense.

    Values kept before but not after are dropped, those kept after but not before become zero.
    """

    source: torch.Tensor
    source_layout: Compaction | None
    target: torch.Tensor
    target_layout: Compaction | None
    numel: int


@dataclass(eq=False, slots=True)
class UpdateTensor:
    """One parameter as optimizer steps see it, for as long as its tensors stay. All fill memory in the same order.

    Attributes
    ----------
    weight : torch.Tensor
        Written.
    master : torch.Tensor or None
        float32 copy that the arithmetic runs on, written too.
    state : tuple of torch.Tensor
        What the rule keeps per weight, float32 (float64 for float64 weights); compact if ``compaction`` is given.
    mask : torch.Tensor or None
        Packed bits. Weight and state are zero already wherever a bit is 0.
    compaction : Compaction or None
    row : object
        What a backend makes of the others and would rather not make again.
    """

    weight: torch.Tensor
    master: torch.Tensor | None = None
    state: tuple[torch.Tensor, ...] = ()
    mask: torch.Tensor | None = None
    compaction: Compaction | None = None
    row: object = None


@dataclass(eq=False, slots=True)
class UpdateBatch:
    """Parameters that step together, for as long as their tensors stay.

    Attributes
    ----------
    tensors : list of UpdateTensor
    captured : list
        Receives what CUDA graphs of a step read at every replay. It lives as long as the tensors have an owner, which
        is as long as a replay makes sense.
    prepared : object
        What a backend makes of the tensors and would rather not make again.
    """

    tensors: list[UpdateTensor]
    captured: list[torch.Tensor] = field(default_factory=list)
    prepared: object = None


class Constants(NamedTuple):
    """Numbers of a step, in rows; each tensor uses one of them.

    Attributes
    ----------
    blocks : list of (mapping of str to float, int)
        Runs of that many equal rows. Absent constants change nothing.
    on_device : list of (str, int, int, torch.Tensor)
        Name, first row, row after the last, and float64 values (0-d, or one per row) that replace what the blocks say
        and that the host does not look at.
    """

    blocks: list[tuple[Mapping[str, float], int]]
    on_device: list[tuple[str, int, int, torch.Tensor]]

    def on_host(self) -> list[Mapping[str, float]]:
        """Return one mapping per row, for kernels on the host; waits for what is on a device."""
        if not self.on_device:
            return [given for given, count in self.blocks for _ in range(count)]
        rows = [dict(given) for given, count in self.blocks for _ in range(count)]
        for name, first, end, values in self.on_device:
            for row, value in zip(rows[first:end], values.expand(end - first).tolist(), strict=True):
                row[name] = value
        return [*rows]


Select: TypeAlias = Callable[..., Selection]  # with the parameters of ``Implementation.select``


class Implementation(Protocol):
    """The operations of a backend. None of them validates; none of them may fail halfway through a write.

    Attributes
    ----------
    capturable : bool
        Whether a CUDA graph can hold an ``update``.
    """

    capturable: bool

    @property
    def select(self) -> Select | None:
        """Operation that finds the cutoff of every layer. It only reads; None where ``search.driver`` uses ``count``.

        Parameters
        ----------
        layers : sequence of Layer
        num_prune : sequence of int
            One per group.
        group_sizes : sequence of int
            How many layers each group has: the next ones in order, of one dtype. They are ranked together, the flat
            index running through them.
        brackets : Brackets, optional
            One per group: where its threshold is expected, empty where that is not known. They may save work and never
            change the answer.
        prunes : bool, optional
            ``prune`` follows, which may be spared weights that it would find unchanged.
        """
        ...

    def count(
        self,
        layers: Sequence[Layer],
        brackets: Brackets,
        num_bins: int,
        candidates: Sequence[torch.Tensor | None] | None = None,
    ) -> BracketCounts:
        """Count each layer against its bracket. Reads only.

        ``num_bins`` is a power of two. Where ``candidates``, 1-d and of the layer's dtype and device, have place for
        all of them, they receive the magnitudes inside, in any order.
        """
        ...

    def prune(
        self, layers: Sequence[Layer], selection: Selection, out: Sequence[torch.Tensor], *, finite: bool = False
    ) -> PruneCounts | None:
        """Zero what lies below the cutoffs and write the new packed bits, zeros after the last weight, to ``out``.

        ``out[i]`` may be ``layers[i].mask`` itself. With ``finite``, nothing is written if a NaN or Inf was found, and
        the answer is None. A selection made of these very ``layers`` need not have been looked at.
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
        its weight is. "skip" not 0: nothing is written. ``after`` are C functions called once all is written or
        launched, with no Python between the two where a step is one call.

        Pruned weights and their state stay zero whatever their gradient; the arithmetic is that of torch.optim.
        """
        ...

    def sum_squares(self, gradients: Sequence[Layer]) -> float | torch.Tensor:
        """Sum of the squares of the kept elements of all tensors, in float64; on a GPU a 0-d tensor."""
        ...

    def compactions(self, masks: Sequence[tuple[torch.Tensor, int]]) -> list[Compaction]:
        """Address compact state by packed bits, each of so many weights. A GPU is waited for once."""
        ...

    def move_state(self, moves: Sequence[StateMove]) -> None:
        """Copy state from layout to layout."""
        ...
