"""The compiled CPU kernels (csrc/cpu): AVX-512, AVX2 or portable C++, on torch's number of threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

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
from gmp_kernels.backends._at_once import at_once
from gmp_kernels.backends._layers import (
    Columns,
    Layers,
    PruneCounts,
    Selections,
    columns_of,
    merged,
    prepared,
    thresholds_of,
)
from gmp_kernels.backends._rows import address, by_dtype, dtype_name
from gmp_kernels.backends._rows import parts as split

try:
    from gmp_kernels import _C
except ImportError as error:
    _C = None  # type: ignore[assignment]
    _import_error = str(error)


T = TypeVar("T")


def _row(layer: Layer) -> tuple[int, int, int]:
    return layer.weight.data_ptr(), layer.weight.numel(), address(layer.mask)


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
            found.append(_Part(_C.Rows(dtype, rows), positions, [n for _, n, _ in rows]))
        return found

    return prepared(layers, "cpu", make)


def _taken(column: Sequence[T], positions: Sequence[int]) -> Sequence[T]:
    """The entries of one part in a column of all layers; a column of none, or of one for all, stays as it is."""
    return [column[i] for i in positions] if len(positions) < len(column) else column


def _prepared(t: UpdateTensor) -> _C.UpdateRow:
    """Make the tensor's row, once."""
    state = [address(s) for s in t.state] + [0] * (3 - len(t.state))
    ranks = None if t.compaction is None else t.compaction.ranks
    row = _C.UpdateRow(
        dtype_name(t.weight),
        t.weight.numel(),
        t.weight.data_ptr(),
        address(t.master),
        state,
        address(t.mask),
        address(ranks),
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
                [(0, 0) if room is None else (room.data_ptr(), room.numel()) for room in given],
                bins.data_ptr(),
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
        out_rows = [] if isinstance(layers, Layers) and out is layers.masks else [bits.data_ptr() for bits in out]
        parts, num_threads = _parts(layers), torch.get_num_threads()
        kept = []
        for rows, positions, _ in parts:
            columns = _taken(values, positions), _taken(cuts, positions), _taken(out_rows, positions)
            kept.append(_C.prune(rows, *columns, num_threads))
        all_positions = [part.positions for part in parts]
        before, now, sizes = (
            merged(all_positions, c) for c in (*zip(*kept, strict=True), [part.sizes for part in parts])
        )
        return PruneCounts.from_kept(sizes, before, now)

    def apply(self, layers: Sequence[Layer]) -> None:
        for rows, _, _ in _parts(layers):
            _C.apply_masks(rows, torch.get_num_threads())

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
            batch.prepared = _C.UpdateBatch(
                [t.row if isinstance(t.row, _C.UpdateRow) else _prepared(t) for t in batch.tensors]
            )
        addresses = [gradient.data_ptr() for gradient in gradients]
        arguments = rule, batch.prepared, addresses, rows, constants.on_host(), torch.get_num_threads()
        at_once([partial(_C.update, *arguments), *after])

    def sum_squares(self, gradients: Sequence[Layer]) -> float:
        rows = [(dtype_name(g.weight), g.weight.data_ptr(), g.weight.numel(), address(g.mask)) for g in gradients]
        return _C.sum_squares(rows, torch.get_num_threads())

    def compactions(self, masks: Sequence[tuple[torch.Tensor, int]]) -> list[Compaction]:
        found = []
        for mask, numel in masks:
            ranks = torch.tensor(_C.ranks(mask.data_ptr(), numel), dtype=torch.int64, device="cpu")
            found.append(Compaction(mask, ranks, int(ranks[-1])))
        return found

    def move_state(self, moves: Sequence[StateMove]) -> None:
        rows = []
        for move in moves:
            layouts = [
                (0, 0) if layout is None else (layout.mask.data_ptr(), layout.ranks.data_ptr())
                for layout in (move.source_layout, move.target_layout)
            ]
            rows.append(
                (
                    move.source.data_ptr(),
                    *layouts[0],
                    move.target.data_ptr(),
                    *layouts[1],
                    move.numel,
                    move.source.element_size(),
                )
            )
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
