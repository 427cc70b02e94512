"""Triton kernels: the GPU path where no CUDA compiler was at hand, and for AMD.

A call is a few tables of rows in device memory, which most calls find as the last one left them, and a fixed number of
launches on torch's current stream, for every dtype there is. What it finds stays on the device until it is needed.
With ``TRITON_INTERPRET=1`` in the environment the same kernels run on the host, for the tests: milliseconds for 16384
weights.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

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
    Written,
    capture,
    register,
)
from gmp_kernels.backends.addresses import address, element_address, on_device
from gmp_kernels.backends.at_once import at_once
from gmp_kernels.backends.dtypes import DTYPES
from gmp_kernels.backends.keys import largest_key
from gmp_kernels.backends.layers import Layers, PruneCounts, columns_of, device_of, merged, prepared
from gmp_kernels.backends.triton.search import (
    COUNTERS,
    HEADER,
    LAYER_FIELDS,
    MAX_SLOTS,
    NO_INDEX,
    FoundSelections,
    Part,
    counts_of,
    parts_of,
    taken,
)
from gmp_kernels.backends.triton.steps import ConstantTables, Rows, StepPart, row_of, step_parts
from gmp_kernels.backends.triton.tables import BLOCK, INTERPRETED, Recent, Uploads, stream_of, table_of
from gmp_kernels.backends.uploads import upload
from gmp_kernels.errors import CaptureError

# Contraction would round once what csrc/optim/update_rule.h rounds twice.
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
# Of the kernels that read all weights, and count them in columns of as many as a warp has threads: fewer warps leave
# more weights to the column, and the sums over columns are what takes the time.
COUNT_OPTIONS = OPTIONS | {"num_warps": 4}
THREADS = 32 * COUNT_OPTIONS["num_warps"]
SAMPLED_EIGHTS = 256 if INTERPRETED else 2048  # per group, at most: 16384 keys on a GPU
SCANNED = 1024  # at a time, of segments, keys and chunks, for the first tie that does not stay


def options_of(name: str) -> dict[str, Any]:
    """Return what a kernel is compiled with."""
    return COUNT_OPTIONS if name in ("count", "recount", "count_ties") else OPTIONS


@contextmanager
def _on(device: torch.device, what: str) -> Iterator[None]:
    """Make the device current and name its errors; refuse what no CUDA graph could replay."""
    if capture.is_capturing(device):
        raise CaptureError(
            f"{what}: expected an operation that a CUDA graph can hold, got one of backend 'triton', which makes its "
            "tables on the host; call it outside of the capture, or use backend 'cuda'"
        )
    with on_device(device, what):
        yield


class Triton:
    """Implementation by launches of kernels."""

    capturable = False

    def __init__(self) -> None:
        # Not before somebody wants it: importing triton takes longer than importing all of this package.
        from gmp_kernels.backends.triton import kernels

        if INTERPRETED:
            from gmp_kernels.backends.triton import interpreter

            interpreter.put_right()
        self._kernels: Any = kernels
        self._uploads = Uploads()
        self._constants = ConstantTables()
        self._parts_of: Recent[list[Part]] = Recent()
        self._step_parts: Recent[list[StepPart]] = Recent()

    def _launch(self, name: str, num_programs: int, *args: Any, **constants: Any) -> None:
        if num_programs == 0:
            return
        getattr(self._kernels, name)[(num_programs,)](*args, **constants, **options_of(name))

    # -- selections --------------------------------------------------------------------------------------------------

    def _parts(self, layers: Sequence[Layer], *, is_global: bool = False) -> list[Part]:
        """Layers in groups of one or all together, as tables; made when their addresses change."""
        device = device_of(layers)
        stream = stream_of(device)
        make = partial(parts_of, layers, is_global=is_global)
        if isinstance(layers, Layers):
            return prepared(layers, ("triton", is_global, stream), make)
        addresses = [(element_address(weight), address(mask)) for weight, mask in layers]
        shapes = [(weight.dtype, weight.numel()) for weight, _ in layers]
        return self._parts_of.get((is_global, device, stream, addresses, shapes), make)

    def _tile(self, part: Part) -> dict[str, Any]:
        return {
            "BITS": self._kernels.INTEGERS[part.dtype.itemsize],
            "INFINITY": largest_key(part.dtype) - 1,
            "BLOCK": BLOCK,
        }

    def _bracket(self, part: Part, state: torch.Tensor, wanted: torch.Tensor) -> None:
        tile = self._tile(part)
        del tile["BLOCK"]
        constants = {"KEY_BITS": part.key_bits, "BIN_BITS": part.bin_bits, "EIGHTS": SAMPLED_EIGHTS}
        groups = len(part.groups)
        self._launch("begin", groups, part.table.rows, part.group_table, wanted, state, groups, **tile, **constants)

    def select(
        self,
        layers: Sequence[Layer],
        num_prune: Sequence[int],
        hints: Sequence[Threshold | None],
        *,
        prunes: bool = False,
    ) -> FoundSelections:
        with _on(device_of(layers), "select"):
            parts = self._parts(layers, is_global=len(num_prune) != len(layers))
            found = FoundSelections(layers, parts)
            for part, state, work in zip(parts, found.states, found.works, strict=True):
                self._select(part, taken(num_prune, part.groups), state, found.buffer, work)
        return found

    def _select(
        self, part: Part, num_prune: Sequence[int], state: torch.Tensor, stop: torch.Tensor, work: torch.Tensor
    ) -> None:
        """Bracket each group's threshold by a sample, and count until the bracket has shrunk to one key.

        However wrong the brackets are, so many passes do; those of groups that are done cost next to nothing, where
        asking which are would cost a wait for the GPU.
        """
        table, device, groups, bits = part.table, part.device, len(part.groups), part.bin_bits
        slots, run = part.group_slots, part.run
        wanted = self._uploads.at(num_prune, torch.int64, device)
        lists = torch.empty(table.num_chunks * part.capacity, dtype=DTYPES[part.dtype].integer, device=device)
        ends = torch.empty(table.num_chunks, dtype=torch.int32, device=device)
        tile = self._tile(part)
        chunks, listed = (table.rows, table.owners, table.num_chunks, run, state, groups), (lists, part.capacity, ends)
        binned = (*chunks, work, 1 << bits, slots, *listed)
        narrowed = (part.group_table, wanted, state, groups, work, slots)
        constants = {"KEY_BITS": part.key_bits, "LARGEST": largest_key(part.dtype), "BIN_BITS": bits}
        constants["MAX_SLOTS"] = MAX_SLOTS
        shared = {**tile, "THREADS": THREADS, "MASKED": part.masked}

        self._bracket(part, state, wanted)
        self._launch("count", part.num_runs, *chunks, stop, *binned[len(chunks) :], **shared, LISTS=True)
        self._launch("narrow", groups, *narrowed, **constants, AFTER_COUNT=True)
        for _ in range(-(-part.key_bits // bits)):
            self._launch("recount", part.num_runs, *binned, **shared)
            self._launch("narrow", groups, *narrowed, **constants, AFTER_COUNT=False)
        self._launch("count_ties", part.num_runs, *binned, **shared)
        arguments = (table.rows, part.group_table, run, state, groups, *binned[len(chunks) :])
        self._launch("place_cuts", groups, *arguments, **tile, SCAN=SCANNED)

    def sample(self, layers: Sequence[Layer], shares: Sequence[float]) -> list[Bracket]:
        device = device_of(layers)
        found: dict[int, Bracket] = {}
        with _on(device, "sample"):
            for part in self._parts(layers, is_global=len(shares) != len(layers)):
                groups = len(part.groups)
                sizes = [sum(part.numels[i] for i in members) for members in part.members]
                wanted = [round(shares[g] * n) for g, n in zip(part.groups, sizes, strict=True)]
                state = torch.zeros(part.end - part.start, dtype=torch.int64, device=device)
                self._bracket(part, state, upload(wanted, torch.int64, device))
                lo, hi = state[HEADER : HEADER + 2 * groups].view(2, -1).tolist()
                found.update(zip(part.groups, map(Bracket, lo, hi), strict=True))
        return [found[g] for g in range(len(shares))]

    def count(
        self,
        layers: Sequence[Layer],
        brackets: Sequence[Bracket],
        num_bins: int,
        rooms: Sequence[torch.Tensor | None] | None = None,
    ) -> list[Census]:
        found: dict[int, Census] = {}
        with _on(device_of(layers), "count"):
            for part in self._parts(layers):
                given = [brackets[i] for i in part.positions]
                counted, state = self._count(part, given, num_bins)
                if rooms is not None:
                    fits = [
                        room if room is not None and census.inside <= room.numel() else None
                        for room, census in zip([rooms[i] for i in part.positions], counted, strict=True)
                    ]
                    self._collect(part, state, fits)
                found.update(zip(part.positions, counted, strict=True))
        return [found[i] for i in range(len(layers))]

    def _count(self, part: Part, brackets: Sequence[Bracket], num_bins: int) -> tuple[list[Census], torch.Tensor]:
        """Counts of each layer, and the state with its bracket."""
        table, device, groups = part.table, part.device, len(part.groups)
        slots = part.group_slots
        columns = *zip(*brackets, strict=True), [bracket.shift(num_bins) for bracket in brackets]
        width = num_bins + COUNTERS * slots
        # A word for the flag that selections look at, the state, and what is counted: read back in one piece.
        buffer = torch.zeros(part.counts_start - part.start + 1 + groups * width, dtype=torch.int64, device=device)
        state, work = buffer[1:], buffer[part.counts_start - part.start + 1 :]
        state[HEADER : HEADER + 3 * groups] = upload(list(chain(*columns)), torch.int64, device)
        none = torch.empty(0, dtype=torch.int32, device=device)  # no lists
        chunks = (table.rows, table.owners, table.num_chunks, part.run, state, groups)
        shared = {**self._tile(part), "THREADS": THREADS, "MASKED": part.masked}
        self._launch(
            "count", part.num_runs, *chunks, buffer, work, num_bins, slots, none, 0, none, **shared, LISTS=False
        )
        values = buffer.cpu()
        first = 1 + part.layers_start - part.start
        nonfinite = values[first : first + LAYER_FIELDS * groups].view(-1, LAYER_FIELDS)[:, 1].tolist()
        counted = values[-groups * width :].view(groups, width)
        bins, counters = counted[:, :num_bins], counted[:, num_bins:]
        sums = counters.reshape(groups, slots, COUNTERS).sum(1)[:, :2].tolist()
        inside = bins.sum(1).tolist()
        rows = zip(sums, inside, nonfinite, bins, strict=True)
        return [
            Census(below, within, pruned, NO_INDEX - index if index else -1, row)
            for (below, pruned), within, index, row in rows
        ], state

    def _collect(self, part: Part, state: torch.Tensor, rooms: Sequence[torch.Tensor | None]) -> None:
        """Write the magnitudes inside the brackets to the rooms."""
        if not any(room is not None and room.numel() for room in rooms):
            return
        outs = upload([address(room) for room in rooms], torch.int64, part.device)
        cursors = torch.zeros(part.num_layers, dtype=torch.int64, device=part.device)
        arguments = (part.table.rows, part.table.owners, outs, state, part.num_layers, cursors)
        self._launch("collect", part.table.num_chunks, *arguments, **self._tile(part))

    def prune(
        self,
        layers: Sequence[Layer],
        selections: Sequence[Selection],
        out: Sequence[torch.Tensor],
        *,
        finite: bool = False,
    ) -> Sequence[Written]:
        with _on(device_of(layers), "prune"):
            if isinstance(selections, FoundSelections) and selections.layers is layers:
                found = selections
            else:
                columns = columns_of(selections)
                if finite and max(columns.nonfinite) >= 0:
                    return []
                parts = self._parts(layers, is_global=len(selections) != len(layers))
                found = FoundSelections.of(layers, parts, columns)
            addresses = list(map(torch.Tensor.data_ptr, out))
            outs = [
                self._uploads.at(taken(addresses, part.positions), torch.int64, part.device) for part in found.parts
            ]
            # Everything there has to be memory for is there: from here on weights are written.
            for part, own, state in zip(found.parts, outs, found.states, strict=True):
                self._apply(part, own, state, found.buffer, SELECTED=True, STOPS=finite)
            values = found.read()
        if finite and values[0]:
            return []
        counts = [counts_of(part, values) for part in found.parts]
        positions = [part.positions for part in found.parts]
        sizes = merged(positions, [part.numels for part in found.parts])
        before, after = (merged(positions, list(column)) for column in zip(*counts, strict=True))
        return PruneCounts.from_kept(sizes, before, after)

    def _apply(
        self, part: Part, outs: torch.Tensor, state: torch.Tensor, stop: torch.Tensor, **constants: bool
    ) -> None:
        table, layers = part.table, part.num_layers
        arguments = (outs, state, len(part.groups), layers, part.layer_slots, stop)
        constants["ALIGNED"] = part.aligned
        self._launch("apply", table.num_chunks, table.rows, table.owners, *arguments, **self._tile(part), **constants)

    def apply(self, layers: Sequence[Layer]) -> None:
        with _on(device_of(layers), "apply_masks_"):
            for part in self._parts(layers):
                nothing = part.group_table  # for the masks say it all
                self._apply(part, nothing, nothing, nothing, SELECTED=False, STOPS=False)

    # -- optimizers --------------------------------------------------------------------------------------------------

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
        if not batch.tensors:
            at_once(after)
            return
        k, device = self._kernels, batch.tensors[0].weight.device
        with _on(device, "update"):
            if not isinstance(batch.prepared, Rows):
                batch.prepared = Rows(map(row_of, batch.tensors))
            addresses = list(map(torch.Tensor.data_ptr, gradients))
            # Few gradients are not aligned; those that are not get launches of their own.
            unaligned = [i for i, pointer in enumerate(addresses) if pointer & 15]
            key = (device, stream_of(device), unaligned, batch.prepared)
            parts = self._step_parts.get(key, partial(step_parts, batch.prepared, unaligned, device))
            values = self._constants.at(constants, device)
            columns = [
                self._uploads.at([*taken(addresses, own), *taken(rows, own)], torch.int64, device)
                for _, own, _ in parts
            ]
            # Everything there has to be memory for is there: from here on weights are written.
            for (kind, positions, table), column in zip(parts, columns, strict=True):
                self._launch(
                    "update",
                    table.num_chunks,
                    table.rows,
                    table.owners,
                    column,
                    len(positions),
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
            at_once(after)

    def sum_squares(self, gradients: Sequence[Layer]) -> float | torch.Tensor:
        if not gradients:
            return 0.0
        device = device_of(gradients)
        totals = []
        with _on(device, "sum_squares"):
            for part in self._parts(gradients):
                sums = torch.empty(part.table.num_chunks, dtype=torch.float64, device=device)
                tile = self._tile(part)
                del tile["INFINITY"]
                constants = {"dtype": self._kernels.FLOATS[part.dtype], **tile, "ALIGNED": part.aligned}
                self._launch("sum_squares", len(sums), part.table.rows, part.table.owners, sums, **constants)
                totals.append(sums.sum())
            return sum(totals[1:], totals[0])

    def compactions(self, masks: Sequence[tuple[torch.Tensor, int]]) -> list[Compaction]:
        """Address compact state by these packed bits; waits for the device once."""
        if not masks:
            return []
        device = masks[0][0].device
        with _on(device, "compactions"):
            sizes = [numel for _, numel in masks]
            table = table_of(sizes, [(0, mask.data_ptr()) for mask, _ in masks], device)
            counts = torch.empty(table.num_chunks, dtype=torch.int64, device=device)
            self._launch("count_kept", table.num_chunks, table.rows, table.owners, counts, BLOCK=BLOCK)
            chunks = [-(-n // BLOCK) for n in sizes]
            running = counts.cumsum(0)
            firsts = table.rows[:, 1]
            kept = torch.zeros(len(masks), dtype=torch.int64, device=device).index_add_(0, table.owners, counts)
            running -= counts
            running -= running[firsts][table.owners]
            ranks = torch.split(running, chunks)
            return [Compaction(m, r, n) for (m, _), r, n in zip(masks, ranks, kept.tolist(), strict=True)]

    def move_state(self, moves: Sequence[StateMove]) -> None:
        by_size: dict[int, list[StateMove]] = {}
        for move in moves:
            by_size.setdefault(move.source.element_size(), []).append(move)
        if not moves:
            return
        device = moves[0].source.device
        with _on(device, "move_state"):
            tables = []
            for alike in by_size.values():
                fields = [
                    [
                        *(move.source.data_ptr(), *_layout(move.source_layout)),
                        *(move.target.data_ptr(), *_layout(move.target_layout)),
                    ]
                    for move in alike
                ]
                tables.append(table_of([move.numel for move in alike], fields, device))
            for size, table in zip(by_size, tables, strict=True):
                constants = {"BITS": self._kernels.INTEGERS[size], "BLOCK": BLOCK}
                self._launch("repack", table.num_chunks, table.rows, table.owners, **constants)


def _layout(compaction: Compaction | None) -> tuple[int, int]:
    return (0, 0) if compaction is None else (compaction.mask.data_ptr(), compaction.ranks.data_ptr())


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
