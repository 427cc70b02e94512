"""The compiled CPU kernels (csrc/cpu): AVX-512, AVX2 or portable C++, on torch's number of threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np

# Before _C: the process then has one OpenMP runtime, torch's, and our loops run on the threads torch keeps warm.
import torch

from gmp_kernels.backends.addresses import by_dtype, dtype_name, group_positions
from gmp_kernels.backends.at_once import at_once
from gmp_kernels.backends.layers import Layers, merged, prepared
from gmp_kernels.backends.registry import Backend, register
from gmp_kernels.backends.types import (
    BracketCounts,
    Brackets,
    Compaction,
    Constants,
    Cutoffs,
    Layer,
    PruneCounts,
    Selection,
    StateMove,
    UpdateBatch,
    UpdateTensor,
)

try:
    from gmp_kernels import _C
except ImportError as error:
    _C = None  # type: ignore[assignment]
    _import_error = str(error)


T = TypeVar("T")


Array: TypeAlias = tuple[int, int]
State: TypeAlias = tuple[Array, Array, Array]


def _array(tensor: torch.Tensor | None) -> Array:
    """Address and number of elements, which C++ holds against each other; zeros for None."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), tensor.numel())


def _row(layer: Layer) -> tuple[Array, Array]:
    return _array(layer.weight), _array(layer.mask)


def _state(values: torch.Tensor, layout: Compaction | None) -> State:
    return (
        _array(values),
        _array(None if layout is None else layout.mask),
        _array(None if layout is None else layout.ranks),
    )


class _Part(NamedTuple):
    """The layers of one dtype."""

    rows: _C.Rows
    positions: list[int]
    sizes: list[int]


def _parts(layers: Sequence[Layer]) -> list[_Part]:
    def make() -> list[_Part]:
        found = []
        for dtype, positions in by_dtype(layers).items():
            rows = [_row(layers[i]) for i in positions]
            found.append(_Part(_C.rows(dtype, rows), positions, [n for (_, n), _ in rows]))
        return found

    return prepared(layers, "cpu", make)


def _taken(column: Sequence[T], positions: Sequence[int]) -> Sequence[T]:
    """Return the entries of one part in a column of all; an empty column stays as it is."""
    return [column[i] for i in positions] if len(positions) < len(column) else column


def _prepared(t: UpdateTensor) -> _C.UpdateTensor:
    """Make the tensor's row, once."""
    row = _C.update_tensor(
        dtype_name(t.weight),
        _array(t.weight),
        _array(t.master),
        list(map(_array, t.state)),
        _array(t.mask),
        _array(None if t.compaction is None else t.compaction.ranks),
        0 if t.compaction is None else t.compaction.num_kept,
    )
    t.row = row
    return row


class Cpu:
    """Implementation with one call per dtype at most, which nearly always means one call."""

    capturable = False

    def select(
        self,
        layers: Sequence[Layer],
        num_prune: Sequence[int],
        group_sizes: Sequence[int],
        brackets: Brackets | None = None,
        *,
        prunes: bool = False,
    ) -> Selection:
        parts, found = _parts(layers), []
        ends = [] if brackets is None else [*zip(brackets.lo.tolist(), brackets.hi.tolist(), strict=True)]
        expected = [bracket if bracket[0] <= bracket[1] else None for bracket in ends]
        for rows, positions, _ in parts:
            own = group_positions(positions, group_sizes)
            given = _taken(num_prune, own), _taken(group_sizes, own), _taken(expected, own)
            found.append(_C.select(rows, *given, torch.get_num_threads()))
        all_positions = [part.positions for part in parts]
        return Selection(Cutoffs(*(merged(all_positions, list(pieces)) for pieces in zip(*found, strict=True))))

    def count(
        self,
        layers: Sequence[Layer],
        brackets: Brackets,
        num_bins: int,
        candidates: Sequence[torch.Tensor | None] | None = None,
    ) -> BracketCounts:
        found = BracketCounts.nothing(len(layers), num_bins)
        ends = [*zip(brackets.lo.tolist(), brackets.hi.tolist(), strict=True)]
        places = [(0, 0)] * len(layers) if candidates is None else list(map(_array, candidates))
        for rows, positions, _ in _parts(layers):
            bins = np.zeros((len(positions), num_bins), np.int64)
            asked = [ends[i] for i in positions], [places[i] for i in positions], (bins.ctypes.data, bins.size)
            counts = np.array(_C.count(rows, *asked, num_bins, torch.get_num_threads()), np.int64)
            found.put(positions, (*counts.T, bins))
        return found

    def prune(
        self, layers: Sequence[Layer], selection: Selection, out: Sequence[torch.Tensor], *, finite: bool = False
    ) -> PruneCounts | None:
        cutoffs = selection.cutoffs
        if finite and max(cutoffs.nonfinite) >= 0:
            return None
        out_rows = [] if isinstance(layers, Layers) and out is layers.masks else list(map(_array, out))
        parts = _parts(layers)
        requests = [
            (rows, _taken(cutoffs.keys, own), _taken(cutoffs.tie_indices, own), _taken(out_rows, own))
            for rows, own, _ in parts
        ]
        counts = [iter(column) for column in _C.prune(requests, torch.get_num_threads())]
        all_positions, sizes = [part.positions for part in parts], [part.sizes for part in parts]
        # Those of one part come after those of the other.
        before, now = ([list(islice(column, len(own))) for own in all_positions] for column in counts)
        return PruneCounts.from_kept(*(merged(all_positions, pieces) for pieces in (sizes, before, now)))

    def apply(self, layers: Sequence[Layer]) -> None:
        _C.apply_masks([part.rows for part in _parts(layers)], torch.get_num_threads())

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
        if not isinstance(batch.prepared, _C.UpdateBatch):
            batch.prepared = _C.update_batch(
                [t.row if isinstance(t.row, _C.UpdateTensor) else _prepared(t) for t in batch.tensors]
            )
        arrays = list(map(torch.Tensor.data_ptr, gradients)), list(map(torch.Tensor.numel, gradients))
        arguments = rule, batch.prepared, *arrays, rows, constants.on_host(), torch.get_num_threads()
        at_once([partial(_C.update, *arguments), *after])

    def sum_squares(self, gradients: Sequence[Layer]) -> float:
        rows = [(dtype_name(g.weight), *_row(g)) for g in gradients]
        return _C.sum_squares(rows, torch.get_num_threads())

    def compactions(self, masks: Sequence[tuple[torch.Tensor, int]]) -> list[Compaction]:
        found = []
        for mask, numel in masks:
            ranks = torch.tensor(_C.chunk_offsets(_array(mask), numel), dtype=torch.int64, device="cpu")
            found.append(Compaction(mask, ranks, int(ranks[-1])))
        return found

    def move_state(self, moves: Sequence[StateMove]) -> None:
        rows = []
        for source, source_layout, target, target_layout, numel in moves:
            states = _state(source, source_layout), _state(target, target_layout)
            rows.append((*states, numel, source.element_size()))
        _C.move_state(rows, torch.get_num_threads())


def _probe() -> str | None:
    if _C is None:
        return f"its extension was not built ({_import_error}); install a C++ compiler and run pip install again"
    try:
        _C.isa()
    except ValueError as error:
        return str(error)
    return None


def _supports(device: torch.device) -> str | None:
    return None if device.type == "cpu" else f"it takes CPU tensors, got {device}; move them with .cpu()"


register(Backend("cpu", priority=10, probe=_probe, supports=_supports, load=Cpu))
