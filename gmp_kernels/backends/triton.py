"""Triton kernels: the GPU path where no CUDA compiler was at hand, and for AMD.

A step is one table of rows in device memory and one launch per phase on torch's current stream, for every dtype there
is; what is done once per layer and not per weight is torch's. With ``TRITON_INTERPRET=1`` in the environment the same
kernels run on the host, for the tests: milliseconds for 16384 weights.
"""

from __future__ import annotations

import importlib.util
import os
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

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
from gmp_kernels.backends._rows import INTEGERS, address, by_dtype, on_device, parts
from gmp_kernels.backends._triton_search import (
    BIN_BITS,
    DONE,
    READ_LISTS,
    READ_WEIGHTS,
    Search,
    bracket,
    sample_places,
)
from gmp_kernels.keys import key_of, largest_key, magnitude_of

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
# Weights per program: as many as registers hold; under the interpreter a program takes milliseconds of whatever size,
# and the tests' sizes lie around this one.
BLOCK = 16384 if INTERPRETED else 2048
# Contraction would round once what csrc/update_rule.h rounds twice.
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
CAPACITY = BLOCK // 32  # candidates kept per chunk: 3 % of the bytes of the weights
LISTS_PER_PROGRAM = 16
NO_INDEX = (1 << 63) - 1
# Constants of an optimizer step in the order of _triton_kernels.py, and the values that change nothing.
CONSTANTS = {
    "grad_factor": 1.0,
    "decay": 1.0,
    "weight_decay": 0.0,
    "lr": 0.0,
    "momentum": 0.0,
    "one_minus_dampening": 1.0,
    "nesterov": 0.0,
    "first_step": 0.0,
    "one_minus_beta1": 0.0,
    "beta2": 0.0,
    "one_minus_beta2": 0.0,
    "bias_correction2_sqrt": 1.0,
    "eps": 0.0,
    "step_size": 0.0,
}


class _Table(NamedTuple):
    """Rows in device memory, and whose row each chunk is; chunks of all rows are numbered through."""

    rows: torch.Tensor
    owners: torch.Tensor
    num_chunks: int


class _Batch(NamedTuple):
    """Layers of one dtype that are ranked, and what kernels that read their weights are compiled for."""

    table: _Table
    numels: list[int]
    sizes: list[int]  # of the groups
    dtype: torch.dtype
    device: torch.device
    kernel: dict[str, Any]


def _aligned(layers: Sequence[Layer]) -> bool:
    """Whether all weights can be read in vectors."""
    return all(layer.weight.data_ptr() % 16 == 0 for layer in layers)


class Triton:
    """Implementation by launches of _triton_kernels."""

    capturable = False

    def __init__(self) -> None:
        # Not before somebody wants it: importing triton takes longer than importing all of this package.
        from gmp_kernels.backends import _triton_kernels

        if INTERPRETED:
            from gmp_kernels.backends import _interpreter

            _interpreter.put_right()
        self._kernels: Any = _triton_kernels

    def _launch(self, name: str, num_programs: int, *args: Any, **constants: Any) -> None:
        if num_programs == 0:
            return
        getattr(self._kernels, name)[(num_programs,)](*args, **constants, **OPTIONS)

    def _table(self, rows: list[list[int]], device: torch.device) -> _Table:
        k = self._kernels
        chunks, total = [], 0
        for row in rows:
            row.extend([0] * (k.FIELDS.value - len(row)))
            row[k.FIRST.value] = total
            chunks.append(-(-row[k.N.value] // BLOCK))
            total += chunks[-1]
        table = torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)
        counts = torch.tensor(chunks, dtype=torch.int64).to(device, non_blocking=True)
        return _Table(table, torch.repeat_interleave(counts, output_size=total), total)

    def _tiles(self, dtype: torch.dtype) -> dict[str, Any]:
        return {"BITS": self._kernels.INTEGERS[dtype.itemsize], "BLOCK": BLOCK}

    def _batch(self, layers: Sequence[Layer], *, is_global: bool = False, out: Sequence[int] = ()) -> _Batch:
        """Layers of one dtype, in groups of one or all together, that are read to be ranked."""
        device, dtype = layers[0].weight.device, layers[0].weight.dtype
        numels = [layer.weight.numel() for layer in layers]
        rows = [
            [layer.weight.data_ptr(), address(layer.mask), out[i] if out else 0, numels[i], 0, 0 if is_global else i]
            for i, layer in enumerate(layers)
        ]
        kernel = {"INFINITY": largest_key(dtype) - 1, **self._tiles(dtype)}
        return _Batch(self._table(rows, device), numels, [sum(numels)] if is_global else numels, dtype, device, kernel)

    def _sample(self, batch: _Batch, wanted: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Brackets of the keys at these ranks."""
        ends = torch.tensor(batch.numels, device=batch.device).cumsum(0)
        sizes = torch.tensor(batch.sizes, device=batch.device)
        owners, places = sample_places(ends, sizes, max(batch.sizes))
        integer = torch.int64 if batch.dtype.itemsize == 8 else torch.int32
        keys = torch.empty(*places.shape, 8, dtype=integer, device=batch.device)
        arguments = (batch.table.rows, owners, places, places.numel(), keys)
        self._launch("sample", -(-places.numel() * 8 // BLOCK), *arguments, **batch.kernel)
        largest = largest_key(batch.dtype)
        return bracket(keys.flatten(1), torch.tensor(wanted, device=batch.device), sizes, largest)

    def select(
        self,
        layers: Sequence[Layer],
        num_prune: Sequence[int],
        hints: Sequence[Threshold | None],
        *,
        prunes: bool = False,
    ) -> list[Selection]:
        found: dict[int, Selection] = {}
        for _, positions, groups in parts(layers, num_prune):
            members = [layers[i] for i in positions]
            with on_device(members[0].weight.device, "select"):
                batch = self._batch(members, is_global=len(num_prune) != len(layers))
                selections = self._select(batch, [num_prune[g] for g in groups], _aligned(members))
            found.update(zip(groups, selections, strict=True))
        return [found[g] for g in range(len(num_prune))]

    def _select(self, batch: _Batch, num_prune: Sequence[int], aligned: bool) -> list[Selection]:
        """Bracket each group's threshold by a sample, and count until the bracket has shrunk to one key."""
        table, device, num_groups = batch.table, batch.device, len(num_prune)
        wanted, sizes = (torch.tensor(values, device=device) for values in (num_prune, batch.sizes))
        search = Search(*self._sample(batch, num_prune), wanted, sizes, largest_key(batch.dtype))
        nonfinite = torch.full((len(batch.numels),), NO_INDEX, device=device)
        lists = torch.empty(table.num_chunks, CAPACITY, dtype=INTEGERS[batch.dtype.itemsize], device=device)
        list_sizes, matches = (torch.empty(table.num_chunks, dtype=torch.int32, device=device) for _ in range(2))
        modes = {READ_WEIGHTS}
        while modes != {DONE}:
            bins = torch.zeros(num_groups, 1 << BIN_BITS, dtype=torch.int64, device=device)
            counters = torch.zeros(num_groups, 3, dtype=torch.int64, device=device)
            state = (search.state, num_groups, bins, 1 << BIN_BITS)
            listed = (lists, list_sizes, matches)
            if READ_WEIGHTS in modes:
                counted = (table.rows, table.owners, *state, counters, nonfinite, *listed)
                constants = {"CAPACITY": CAPACITY, "ALIGNED": aligned}
                self._launch("count", table.num_chunks, *counted, **batch.kernel, **constants)
            if READ_LISTS in modes:
                arguments = (table.rows, table.owners, table.num_chunks, *state, *listed)
                constants = {"CAPACITY": CAPACITY, "ROWS": LISTS_PER_PROGRAM}
                self._launch("recount", -(-table.num_chunks // LISTS_PER_PROGRAM), *arguments, **constants)
            modes = search.narrow(bins, counters, CAPACITY)

        answers = list(zip(*search.answers.tolist(), strict=True))
        ends = self._ends_of_ties(batch, matches, search.answers) if any(kept for *_, kept in answers) else []
        indices = [-1 if index == NO_INDEX else index for index in nonfinite.tolist()]
        selections = []
        for group, (key, num_below, num_ties, num_ties_kept) in enumerate(answers):
            members = range(len(batch.numels)) if num_groups == 1 else range(group, group + 1)
            layer, cut = ends[group] if num_ties_kept else (-1, 0)
            cuts = [batch.numels[i] if i < layer or num_ties == 0 else cut if i == layer else 0 for i in members]
            value = magnitude_of(key, batch.dtype) if num_ties else 0.0
            threshold = Threshold(value, num_below, num_ties, num_ties_kept)
            selections.append(Selection(threshold, tuple(cuts), tuple(indices[i] for i in members)))
        return selections

    def _ends_of_ties(self, batch: _Batch, matches: torch.Tensor, answers: torch.Tensor) -> list[tuple[int, int]]:
        """For each group the layer with the first tie that does not stay, and its index there."""
        table = batch.table
        key, _, _, kept = answers
        after = matches.cumsum(0, dtype=torch.int64)
        before = after - matches
        target = before[table.rows[: len(batch.sizes), self._kernels.FIRST.value]] + kept
        chunks = torch.searchsorted(after, target, right=True).clamp(max=table.num_chunks - 1)
        ranks = torch.where(kept > 0, target - before[chunks], -1)
        cuts = torch.zeros_like(ranks)
        arguments = (table.rows, table.owners, chunks, ranks, key, cuts)
        self._launch("place_cut", len(cuts), *arguments, **batch.kernel)
        return list(zip(table.owners[chunks].tolist(), cuts.tolist(), strict=True))

    def sample(self, layers: Sequence[Layer], shares: Sequence[float]) -> list[Bracket]:
        found: dict[int, Bracket] = {}
        for _, positions, groups in parts(layers, shares):
            members = [layers[i] for i in positions]
            with on_device(members[0].weight.device, "sample"):
                batch = self._batch(members, is_global=len(shares) != len(layers))
                wanted = [round(shares[g] * n) for g, n in zip(groups, batch.sizes, strict=True)]
                lo, hi = self._sample(batch, wanted)
                found.update(zip(groups, map(Bracket, lo.tolist(), hi.tolist()), strict=True))
        return [found[g] for g in range(len(shares))]

    def count(
        self,
        layers: Sequence[Layer],
        brackets: Sequence[Bracket],
        num_bins: int,
        rooms: Sequence[torch.Tensor | None] | None = None,
    ) -> list[Census]:
        found: dict[int, Census] = {}
        for positions in by_dtype(layers).values():
            members, given = [layers[i] for i in positions], [brackets[i] for i in positions]
            with on_device(members[0].weight.device, "count"):
                counted = self._count(members, given, num_bins)
                if rooms is not None:
                    fits = [rooms[i] for i in positions]
                    self._collect(
                        members,
                        given,
                        [
                            room if room is not None and census.inside <= room.numel() else None
                            for room, census in zip(fits, counted, strict=True)
                        ],
                    )
            found.update(zip(positions, counted, strict=True))
        return [found[i] for i in range(len(layers))]

    def _count(self, layers: Sequence[Layer], brackets: Sequence[Bracket], num_bins: int) -> list[Census]:
        batch = self._batch(layers)
        table, device = batch.table, batch.device
        shifts = [b.shift(num_bins) for b in brackets]
        columns = zip(*brackets, strict=True)
        state = torch.tensor([*columns, shifts, [READ_WEIGHTS] * len(layers)], device=device)
        bins = torch.zeros(len(layers), num_bins, dtype=torch.int64, device=device)
        counters = torch.zeros(len(layers), 3, dtype=torch.int64, device=device)
        nonfinite = torch.full((len(layers),), NO_INDEX, device=device)
        sizes = torch.empty(table.num_chunks, dtype=torch.int32, device=device)
        arguments = (table.rows, table.owners, state, len(layers), bins, num_bins, counters, nonfinite)
        constants = {"CAPACITY": 0, "ALIGNED": _aligned(layers)}  # no lists
        self._launch("count", table.num_chunks, *arguments, sizes, sizes, sizes, **batch.kernel, **constants)
        rows = zip(batch.numels, counters.tolist(), nonfinite.tolist(), bins.cpu(), strict=True)
        return [
            Census(below, int(row.sum()), n - kept, -1 if index == NO_INDEX else index, row)
            for n, (below, kept, _), index, row in rows
        ]

    def _collect(
        self, layers: Sequence[Layer], brackets: Sequence[Bracket], rooms: Sequence[torch.Tensor | None]
    ) -> None:
        """Write the magnitudes inside the brackets to the rooms."""
        if not any(room is not None and room.numel() for room in rooms):
            return
        batch = self._batch(layers, out=[address(room) for room in rooms])
        state = torch.tensor(list(zip(*brackets, strict=True)), device=batch.device)
        cursors = torch.zeros(len(layers), dtype=torch.int64, device=batch.device)
        arguments = (batch.table.rows, batch.table.owners, state, len(layers), cursors)
        self._launch("collect", batch.table.num_chunks, *arguments, **batch.kernel)

    def _apply(
        self, layers: Sequence[Layer], cuts: Sequence[tuple[float, int]], out: Sequence[torch.Tensor | None]
    ) -> list[tuple[list[int], torch.Tensor]]:
        """Launch apply for each dtype; return its layers and, on the device, their (kept before, kept)."""
        counts = []
        for positions in by_dtype(layers).values():
            members = [layers[i] for i in positions]
            device, dtype = members[0].weight.device, members[0].weight.dtype
            rows = [
                [
                    *(layers[i].weight.data_ptr(), address(layers[i].mask), address(out[i])),
                    *(layers[i].weight.numel(), 0, 0, key_of(cuts[i][0], dtype), cuts[i][1]),
                ]
                for i in positions
            ]
            with on_device(device, "prune"):
                table = self._table(rows, device)
                kept = torch.zeros(len(rows), 2, dtype=torch.int64, device=device)
                constants = {"INFINITY": largest_key(dtype) - 1, **self._tiles(dtype), "ALIGNED": _aligned(members)}
                self._launch("apply", table.num_chunks, table.rows, table.owners, kept, **constants)
            counts.append((positions, kept))
        return counts

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
        for positions, counts in self._apply(layers, cuts, out):
            for i, (before, after) in zip(positions, counts.tolist(), strict=True):
                written[i] = Written(layers[i].weight.numel() - after, before - after)
        return [written[i] for i in range(len(layers))]

    def apply(self, layers: Sequence[Layer]) -> None:
        self._apply(layers, [(0.0, layer.weight.numel()) for layer in layers], [None] * len(layers))

    def update(
        self,
        rule: str,
        batch: UpdateBatch,
        gradients: Sequence[torch.Tensor],
        rows: Sequence[int],
        constants: Constants,
    ) -> None:
        k = self._kernels
        given = constants.on_host()
        rows_of: dict[_Kind, list[list[int]]] = defaultdict(list)
        for t, gradient, index in zip(batch.tensors, gradients, rows, strict=True):
            if given[index].get("skip"):
                continue
            row = t.row if isinstance(t.row, _Row) else _prepared(t)
            grad = gradient.data_ptr()
            kind = row.kind._replace(aligned=row.kind.aligned and grad % 16 == 0)
            rows_of[kind].append([*row.before, grad, *row.after, index])
        if rows_of:
            device = batch.tensors[0].weight.device
            with on_device(device, "update"):
                ordered = [[c.get(name, otherwise) for name, otherwise in CONSTANTS.items()] for c in given]
                values = torch.tensor(ordered, dtype=torch.float64).to(device, non_blocking=True)
                for kind, kind_rows in rows_of.items():
                    table = self._table(kind_rows, device)
                    self._launch(
                        "update",
                        table.num_chunks,
                        table.rows,
                        table.owners,
                        values,
                        RULE=rule,
                        STATES=kind.num_states,
                        COMPACT=kind.is_compact,
                        HAS_MASTER=kind.has_master,
                        dtype=k.FLOATS[kind.dtype],
                        BITS=k.INTEGERS[kind.dtype.itemsize],
                        T=k.FLOATS[torch.float64 if kind.dtype == torch.float64 else torch.float32],
                        BLOCK=BLOCK,
                        ALIGNED=kind.aligned,
                    )

    def sum_squares(self, gradients: Sequence[Layer]) -> float:
        device = gradients[0].weight.device
        total = torch.zeros((), dtype=torch.float64, device=device)
        with on_device(device, "sum_squares"):
            for positions in by_dtype(gradients).values():
                members = [gradients[i] for i in positions]
                rows = [[g.weight.data_ptr(), address(g.mask), 0, g.weight.numel()] for g in members]
                table = self._table(rows, device)
                sums = torch.empty(table.num_chunks, dtype=torch.float64, device=device)
                dtype = members[0].weight.dtype
                constants = {"dtype": self._kernels.FLOATS[dtype], **self._tiles(dtype), "ALIGNED": _aligned(members)}
                self._launch("sum_squares", table.num_chunks, table.rows, table.owners, sums, **constants)
                total += sums.sum()
            return float(total)

    def compactions(self, masks: Sequence[tuple[torch.Tensor, int]]) -> list[Compaction]:
        if not masks:
            return []
        device = masks[0][0].device
        ranks = []
        with on_device(device, "compactions"):
            for mask, numel in masks:
                kept = torch.zeros(-(-numel // BLOCK) + 1, dtype=torch.int64, device=device)
                self._launch("count_kept", len(kept) - 1, mask, numel, kept, BLOCK=BLOCK)
                ranks.append(kept.cumsum(0) - kept)
            totals = torch.stack([own[-1] for own in ranks]).tolist()
        return [Compaction(mask, own, kept) for (mask, _), own, kept in zip(masks, ranks, totals, strict=True)]

    def move_state(self, moves: Sequence[StateMove]) -> None:
        rows: dict[int, list[list[int]]] = defaultdict(list)
        for move in moves:
            source, target = (
                (0, 0) if layout is None else (layout.mask.data_ptr(), layout.ranks.data_ptr())
                for layout in (move.source_layout, move.target_layout)
            )
            row = [move.source.data_ptr(), *source, move.numel, 0, move.target.data_ptr(), *target]
            rows[move.source.element_size()].append(row)
        for size, size_rows in rows.items():
            device = moves[0].source.device
            with on_device(device, "move_state"):
                table = self._table(size_rows, device)
                constants = {"BITS": self._kernels.INTEGERS[size], "BLOCK": BLOCK}
                self._launch("repack", table.num_chunks, table.rows, table.owners, **constants)


class _Kind(NamedTuple):
    """Tensors that one launch of the update may serve together."""

    dtype: torch.dtype
    num_states: int
    is_compact: bool
    has_master: bool
    aligned: bool


class _Row(NamedTuple):
    """A tensor's row less what changes with every step: the gradient comes between, the constants after it."""

    kind: _Kind
    before: tuple[int, ...]
    after: tuple[int, ...]


def _prepared(t: UpdateTensor) -> _Row:
    """Make the tensor's row, once."""
    state = [s.data_ptr() for s in t.state]
    pointers = [t.weight.data_ptr(), address(t.master), *([] if t.compaction else state)]
    row = _Row(
        _Kind(
            t.weight.dtype,
            len(t.state),
            t.compaction is not None and bool(state),
            t.master is not None,
            all(pointer % 16 == 0 for pointer in pointers),
        ),
        (t.weight.data_ptr(), address(t.mask)),
        (
            *(t.weight.numel(), 0, address(t.master), *[*state, 0, 0, 0][:3]),
            0 if t.compaction is None else t.compaction.ranks.data_ptr(),
        ),
    )
    t.row = row
    return row


def _probe() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install 'gmp-kernels[triton]' (Linux only)"
    if INTERPRETED or torch.cuda.is_available():
        return None
    return "torch sees no GPU; check nvidia-smi or rocm-smi, or set TRITON_INTERPRET=1 to run it on the host, for tests"


def _supports(device: torch.device) -> str | None:
    if device.type == "cuda" or (INTERPRETED and device.type == "cpu"):
        return None
    return f"it takes CUDA or ROCm tensors, got {device}; move them with .cuda()"


# Before cpu on a GPU; under the interpreter, which is for tests, nobody gets it without naming it.
register(Backend("triton", priority=-5 if INTERPRETED else 20, probe=_probe, supports=_supports, load=Triton))
