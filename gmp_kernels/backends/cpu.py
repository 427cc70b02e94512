"""The compiled CPU kernels (csrc/cpu): AVX-512, AVX2 or portable C++, on torch's number of threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import NamedTuple, TypeAlias, TypeVar

# Before _C: the process then has one OpenMP runtime, torch's, and our loops run on the threads torch keeps warm.
import torch

from gmp_kernels.backends import (
    Backend,
    Bracket,
    Census,
    Compaction,
    Constants,
    Layer,
    Selection,
    StateMove,
    Threshold,
    UpdateBatch,
    UpdateTensor,
    Written,
    register,
)
from gmp_kernels.backends.addresses import by_dtype, dtype_name
from gmp_kernels.backends.addresses import parts as split
from gmp_kernels.backends.at_once import at_once
from gmp_kernels.backends.layers import (
    Columns,
    Layers,
    PruneCounts,
    Selections,
    columns_of,
    merged,
    prepared,
    thresholds_of,
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
    """The entries of one part in a column of all layers; a column of none, or of one for all, stays as it is."""
    return [column[i] for i in positions] if len(positions) < len(column) else column


def _prepared(t: UpdateTensor) -> _C.UpdateRow:
    """Make the tensor's row, once."""
    row = _C.update_row(
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
        hints: Sequence[Threshold | None],
        *,
        prunes: bool = False,
    ) -> Selections:
        hints = hints if any(hints) else []
        parts, num_threads = _parts(layers), torch.get_num_threads()
        found = []
        for rows, positions, _ in parts:
            columns = _C.select(rows, _taken(num_prune, positions), _taken(hints, positions), num_threads)
            found.append((thresholds_of(*columns[:4]), *columns[4:]))
        all_positions = [part.positions for part in parts]
        thresholds, cuts, nonfinite = (merged(all_positions, pieces) for pieces in zip(*found, strict=True))
        return Selections(Columns(thresholds, cuts, nonfinite))

    def sample(self, layers: Sequence[Layer], shares: Sequence[float]) -> list[Bracket]:
        found: dict[int, Bracket] = {}
        for dtype, positions, groups in split(layers, shares):
            sizes = [layers[i].weight.numel() for i in positions]
            sizes = sizes if len(groups) == len(sizes) else [sum(sizes)]
            num_prune = [round(shares[g] * n) for g, n in zip(groups, sizes, strict=True)]
            brackets = _C.sample(dtype, [_row(layers[i]) for i in positions], num_prune, torch.get_num_threads())
            found.update(zip(groups, (Bracket(*bracket) for bracket in brackets), strict=True))
        return [found[g] for g in range(len(shares))]

    def count(
        self,
        layers: Sequence[Layer],
        brackets: Sequence[Bracket],
        num_bins: int,
        rooms: Sequence[torch.Tensor | None] | None = None,
    ) -> list[Census]:
        found: dict[int, Census] = {}
        for dtype, positions in by_dtype(layers).items():
            bins = torch.zeros(len(positions), num_bins, dtype=torch.int64, device="cpu")
            given = [None if rooms is None else rooms[i] for i in positions]
            counts = _C.count(
                dtype,
                [_row(layers[i]) for i in positions],
                [brackets[i] for i in positions],
                list(map(_array, given)),
                _array(bins),
                num_bins,
                torch.get_num_threads(),
            )
            found.update((i, Census(*c, row)) for i, c, row in zip(positions, counts, bins, strict=True))
        return [found[i] for i in range(len(layers))]

    def prune(
        self,
        layers: Sequence[Layer],
        selections: Sequence[Selection],
        out: Sequence[torch.Tensor],
        *,
        finite: bool = False,
    ) -> Sequence[Written]:
        thresholds, cuts, nonfinite = columns_of(selections)
        if finite and max(nonfinite) >= 0:
            return PruneCounts([], [])
        values = [threshold.value for threshold in thresholds]
        values = values if len(values) == len(cuts) else values * len(cuts)
        out_rows = [] if isinstance(layers, Layers) and out is layers.masks else list(map(_array, out))
        parts = _parts(layers)
        columns = [
            (rows, _taken(values, positions), _taken(cuts, positions), _taken(out_rows, positions))
            for rows, positions, _ in parts
        ]
        counts = [iter(column) for column in _C.prune(columns, torch.get_num_threads())]
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
                [t.row if isinstance(t.row, _C.UpdateRow) else _prepared(t) for t in batch.tensors]
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
            ranks = torch.tensor(_C.ranks(_array(mask), numel), dtype=torch.int64, device="cpu")
            found.append(Compaction(mask, ranks, int(ranks[-1])))
        return found

    def move_state(self, moves: Sequence[StateMove]) -> None:
        rows = []
        for source, source_layout, target, target_layout, numel in moves:
            states = _state(source, source_layout), _state(target, target_layout)
            rows.append((*states, numel, source.element_size()))
        _C.repack(rows, torch.get_num_threads())


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
