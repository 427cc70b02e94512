"""The compiled CPU kernels (csrc/cpu): AVX-512, AVX2 or portable C++, on torch's number of threads."""

from __future__ import annotations

from collections.abc import Sequence

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
    has_nonfinite,
    register,
)
from gmp_kernels.backends._rows import address, by_dtype, dtype_name, parts

try:
    from gmp_kernels import _C
except ImportError as error:
    _C = None  # type: ignore[assignment]
    _import_error = str(error)


def _row(layer: Layer) -> tuple[int, int, int]:
    return layer.weight.data_ptr(), layer.weight.numel(), address(layer.mask)


def _selection(found: tuple[tuple[float, int, int, int], list[int], list[int]]) -> Selection:
    threshold, cuts, nonfinite = found
    return Selection(Threshold(*threshold), tuple(cuts), tuple(nonfinite))


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
    ) -> list[Selection]:
        found: dict[int, Selection] = {}
        for dtype, positions, groups in parts(layers, num_prune):
            selections = _C.select(
                dtype,
                [_row(layers[i]) for i in positions],
                [num_prune[g] for g in groups],
                [hints[g] for g in groups],
                torch.get_num_threads(),
            )
            found.update(zip(groups, map(_selection, selections), strict=True))
        return [found[g] for g in range(len(num_prune))]

    def sample(self, layers: Sequence[Layer], shares: Sequence[float]) -> list[Bracket]:
        found: dict[int, Bracket] = {}
        for dtype, positions, groups in parts(layers, shares):
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
            bins = torch.zeros(len(positions), num_bins, dtype=torch.int64)
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
    ) -> list[Written]:
        if finite and has_nonfinite(selections):
            return []
        cuts = [(selection.threshold.value, cut) for selection in selections for cut in selection.cuts]
        written: dict[int, Written] = {}
        for dtype, positions in by_dtype(layers).items():
            counts = _C.apply(
                dtype,
                [_row(layers[i]) for i in positions],
                [cuts[i] for i in positions],
                [out[i].data_ptr() for i in positions],
                torch.get_num_threads(),
            )
            for i, (kept_before, kept) in zip(positions, counts, strict=True):
                written[i] = Written(layers[i].weight.numel() - kept, kept_before - kept)
        return [written[i] for i in range(len(layers))]

    def apply(self, layers: Sequence[Layer]) -> None:
        for dtype, positions in by_dtype(layers).items():
            _C.apply(dtype, [_row(layers[i]) for i in positions], [], [], torch.get_num_threads())

    def update(
        self,
        rule: str,
        batch: UpdateBatch,
        gradients: Sequence[torch.Tensor],
        rows: Sequence[int],
        constants: Constants,
    ) -> None:
        if not isinstance(batch.prepared, _C.UpdateBatch):
            batch.prepared = _C.UpdateBatch(
                [t.row if isinstance(t.row, _C.UpdateRow) else _prepared(t) for t in batch.tensors]
            )
        addresses = [gradient.data_ptr() for gradient in gradients]
        _C.update(rule, batch.prepared, addresses, rows, constants.on_host(), torch.get_num_threads())

    def sum_squares(self, gradients: Sequence[Layer]) -> float:
        rows = [(dtype_name(g.weight), g.weight.data_ptr(), g.weight.numel(), address(g.mask)) for g in gradients]
        return _C.sum_squares(rows, torch.get_num_threads())

    def compactions(self, masks: Sequence[tuple[torch.Tensor, int]]) -> list[Compaction]:
        found = []
        for mask, numel in masks:
            ranks = torch.tensor(_C.ranks(mask.data_ptr(), numel), dtype=torch.int64)
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
