"""Triton kernels: the GPU path for AMD, and for installations without a CUDA compiler.

A call is a few tables of rows in device memory, which most calls can reuse from the last one, and a launch per dtype on
torch's current stream. Thresholds come from counts (see ``gmp_kernels.search``), for which the host waits.
With ``TRITON_INTERPRET=1`` in the environment the same kernels run on the host, for the tests. They then take
milliseconds for 16384 weights.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from gmp_kernels.backends import devices
from gmp_kernels.backends.addresses import address, element_address
from gmp_kernels.backends.at_once import at_once
from gmp_kernels.backends.compactions import compactions_of
from gmp_kernels.backends.devices import on_device, stream_of
from gmp_kernels.backends.keys import largest_key
from gmp_kernels.backends.layers import Layers, are_plain, device_of, prepared
from gmp_kernels.backends.registry import Backend, register
from gmp_kernels.backends.triton.tables import (
    BLOCK,
    INTERPRETED,
    LARGE,
    Kind,
    Part,
    Table,
    constant_table,
    parts_of,
    row_of,
    table_of,
    tables_by_kind,
)
from gmp_kernels.backends.types import (
    BracketCounts,
    Brackets,
    Compaction,
    Constants,
    Layer,
    PruneCounts,
    Selection,
    StateMove,
    UpdateBatch,
)
from gmp_kernels.backends.uploads import Recent, upload
from gmp_kernels.errors import CaptureError

if TYPE_CHECKING:
    from gmp_kernels.backends.triton.patterns import Form

T = TypeVar("T")

# Contraction would round once what csrc/optim/update_rule.h rounds twice.
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
# For the kernels that read all weights and count them by columns, one per thread: with fewer warps there are fewer
# columns, and the sums over columns take most of the time.
COUNT_OPTIONS = OPTIONS | {"num_warps": 4}
THREADS = 32 * COUNT_OPTIONS["num_warps"]
# For the kernels that find a number per block or row: what a program takes is a warp's work.
UNIT_OPTIONS = OPTIONS | {"num_warps": 1}
NAMED_OPTIONS = {"count": COUNT_OPTIONS, "find_protected": UNIT_OPTIONS, "sum_blocks": UNIT_OPTIONS}
COUNTERS, ANSWER_FIELDS = 4, 2  # of the kernels
NO_INDEX = (1 << 63) - 1


def options_of(name: str) -> dict[str, Any]:
    """Return the options with which a kernel is compiled."""
    return NAMED_OPTIONS.get(name, OPTIONS)


def _on(device: torch.device, what: str) -> AbstractContextManager[None]:
    """Make the device current and name its errors; refuse what no CUDA graph could replay."""
    if devices.is_capturing(device):
        raise CaptureError(
            f"{what}: expected an operation that a CUDA graph can hold, got one of backend 'triton', which makes its "
            "tables on the host; call it outside of the capture, or use backend 'cuda'"
        )
    return on_device(device, what)


def taken(column: Sequence[T], positions: Sequence[int]) -> Sequence[T]:
    """Return the entries of one part in a column of all layers; most calls have one part."""
    return [column[i] for i in positions] if len(positions) < len(column) else column


class Triton:
    """Implementation by launches of the functions in kernels.py."""

    capturable = False
    selects_patterns = False
    skips_pruned_blocks = True
    chunk = 0
    select = None
    draw = None
    count_slots = None

    def __init__(self) -> None:
        # Imported on first use, because importing triton takes longer than importing all of this package.
        from gmp_kernels.backends.triton import kernels
        from gmp_kernels.backends.triton.update import CONSTANTS

        if INTERPRETED:
            from gmp_kernels.backends.triton import interpreter

            interpreter.put_right()
        self._kernels: Any = kernels
        self._columns: Recent[torch.Tensor] = Recent(16)
        self._parts_of: Recent[list[Part]] = Recent()
        self._absent_constants = CONSTANTS
        self._constants: Recent[torch.Tensor] = Recent(16)
        self._step_tables: Recent[list[tuple[Kind, list[int], Table]]] = Recent()

    def _launch(self, name: str, num_programs: int, *args: Any, **constants: Any) -> None:
        if num_programs == 0:
            return
        getattr(self._kernels, name)[(num_programs,)](*args, **constants, **options_of(name))

    def _parts(self, layers: Sequence[Layer]) -> list[Part]:
        """Return layers as tables, which are made when their addresses change."""
        device = device_of(layers)
        stream, make = stream_of(device), partial(parts_of, layers)
        if isinstance(layers, Layers):
            return prepared(layers, ("triton", stream), make)
        addresses = [(element_address(layer.weight), address(layer.mask)) for layer in layers]
        shapes = [(layer.weight.dtype, layer.weight.numel(), layer.filter) for layer in layers]
        forms = None
        if not are_plain(layers):
            forms = [(layer.pattern, layer.weight.shape, address(layer.scores), layer.source.dtype) for layer in layers]
        return self._parts_of.get((device, stream, addresses, shapes, forms), make)

    def _tile(self, part: Part) -> dict[str, Any]:
        return {
            "BITS": self._kernels.INTEGERS[part.dtype.itemsize],
            "INFINITY": largest_key(part.dtype) - 1,
            "BLOCK": BLOCK,
        }

    def ranked(self, layers: Sequence[Layer]) -> Sequence[Layer]:
        if are_plain(layers):
            return layers
        ranked = [*layers]
        with _on(device_of(layers), "ranked"):
            for part in self._parts(layers):
                if part.form is not None:
                    own = self._ranked(part, part.form, [ranked[i] for i in part.positions])
                    for i, layer in zip(part.positions, own, strict=True):
                        ranked[i] = layer
        return ranked

    def _ranked(self, part: Part, form: Form, layers: Sequence[Layer]) -> list[Layer]:
        if not form.has_pattern:
            return [Layer(layer.source, layer.mask, layer.is_channels_last) for layer in layers]
        sizes = [-(-n // 8) for n in (part.num_units if form.is_summed else part.numels)]
        bits = torch.empty(sum(sizes), dtype=torch.uint8, device=part.device).split_with_sizes(sizes)
        asked = upload(list(map(torch.Tensor.data_ptr, bits)), torch.int64, part.device)
        numbers = self._numbers(part, form, asked if form.is_summed else None)
        if form.is_summed:
            return [Layer(own, mask) for own, mask in zip(numbers.split_with_sizes(part.num_units), bits, strict=True)]
        arguments = (*part.table, asked, numbers)
        self._launch("mark_eligible", len(part.table[1]), *arguments, **self._form_tile(part, form))
        return [Layer(layer.source, mask, layer.is_channels_last) for layer, mask in zip(layers, bits, strict=True)]

    def _numbers(self, part: Part, form: Form, bits: torch.Tensor | None = None) -> torch.Tensor:
        """Return the numbers of the units of a part, if it has any; write the units' own bits if given addresses."""
        nothing, _ = part.table
        if part.units is None or form.kernel is None:
            return nothing
        size, dtype = form.numbers
        numbers = torch.empty(size * sum(part.num_units), dtype=dtype, device=part.device)
        arguments = (*part.units, nothing if bits is None else bits, numbers)
        constants = {
            "DTYPE": self._kernels.FLOATS[form.source],
            "SOURCE": self._kernels.INTEGERS[form.source.itemsize],
            "COLS": form.cols,
            "MARKED": bits is not None,
        }
        self._launch(form.kernel[0], len(part.units[1]), *arguments, **constants, **self._order(part, form))
        return numbers

    def _order(self, part: Part, form: Form) -> dict[str, Any]:
        is_large = max(part.numels) >= LARGE
        index = self._kernels.INTEGERS[8 if is_large else 4]
        return {"INFINITY": largest_key(form.ranked) - 1, "PERMUTED": part.permuted, "INDEX": index}

    def _form_tile(self, part: Part, form: Form) -> dict[str, Any]:
        source = self._kernels.INTEGERS[form.ranked.itemsize]
        tile = {"SOURCE": source, "BLOCK": BLOCK, "ALIGNED": part.aligned, "KIND": form.kind}
        return tile | self._order(part, form)

    def count(
        self,
        layers: Sequence[Layer],
        brackets: Brackets,
        num_bins: int,
        candidates: Sequence[torch.Tensor | None] | None = None,
    ) -> BracketCounts:
        found = BracketCounts.nothing(len(layers), num_bins)
        given = [None] * len(layers) if candidates is None else candidates
        places = [(address(place), 0 if place is None else place.numel()) for place in given]
        asked = np.stack((*brackets, brackets.shifts(num_bins), *np.array(places).T))
        with _on(device_of(layers), "count"):
            for part in self._parts(layers):
                found.put(part.positions, self._count(part, asked[:, part.positions], num_bins))
        return found

    def _count(self, part: Part, asked: npt.NDArray[np.int64], num_bins: int) -> BracketCounts:
        (rows, owners), device, num_layers, slots = part.table, part.device, len(part.numels), part.slots
        width = num_bins + COUNTERS * slots + ANSWER_FIELDS
        answers = torch.zeros(num_layers * width, dtype=torch.int64, device=device)
        columns = upload(asked.reshape(-1), torch.int64, device)
        self._launch(
            "count",
            -(-len(owners) // part.run),
            *(rows, owners, len(owners), part.run, columns, num_layers, answers, num_bins, slots),
            **self._tile(part),
            THREADS=THREADS,
            MASKED=part.masked,
        )
        found = answers.cpu().numpy().reshape(num_layers, width)
        bins, counters, last = found[:, :num_bins], found[:, num_bins:-ANSWER_FIELDS], found[:, -1]
        below, pruned = counters.reshape(num_layers, slots, COUNTERS).sum(axis=1).T[:2]
        return BracketCounts(below, bins.sum(axis=1), pruned, np.where(last, NO_INDEX - last, -1), bins)

    def prune(
        self, layers: Sequence[Layer], selection: Selection, out: Sequence[torch.Tensor], *, finite: bool = False
    ) -> PruneCounts | None:
        cutoffs = selection.cutoffs
        if finite and max(cutoffs.nonfinite) >= 0:
            return None
        columns = cutoffs.keys, cutoffs.tie_indices, list(map(torch.Tensor.data_ptr, out))
        with _on(device_of(layers), "prune"):
            parts = self._parts(layers)
            requests = []
            for part in parts:
                asked = list(chain(*(taken(column, part.positions) for column in columns)))
                size = len(part.numels) * part.slots * COUNTERS
                counts = torch.zeros(size, dtype=torch.int64, device=part.device)
                numbers = None if part.form is None else self._numbers(part, part.form)
                requests.append((upload(asked, torch.int64, part.device), counts, numbers))
            # All memory is allocated; from here on weights are written.
            for part, request in zip(parts, requests, strict=True):
                self._apply(part, *request, SELECTED=True)
            found = np.zeros((3, len(layers)), np.int64)  # sizes, weights kept before, weights kept now
            for part, (_, counts, _) in zip(parts, requests, strict=True):
                kept = counts.cpu().numpy().reshape(len(part.numels), part.slots, COUNTERS).sum(axis=1).T
                found[:, part.positions] = part.numels, *kept[:2]
        return PruneCounts.from_kept(*found.tolist())

    def _apply(
        self,
        part: Part,
        asked: torch.Tensor,
        counts: torch.Tensor,
        numbers: torch.Tensor | None = None,
        *,
        SELECTED: bool,
    ) -> None:
        rows, owners = part.table
        arguments = (rows, owners, asked, len(part.numels), counts, part.slots)
        if SELECTED and part.form is not None:
            bits = self._kernels.INTEGERS[part.dtype.itemsize]
            constants = {**self._form_tile(part, part.form), "BITS": bits, "SCORED": part.form.is_scored}
            self._launch("settle", len(owners), *arguments, numbers, **constants)
            return
        permuted = SELECTED and part.permuted  # masks alone ask for no order
        constants = {**self._tile(part), "ALIGNED": part.aligned, "PERMUTED": permuted, "SELECTED": SELECTED}
        self._launch("apply", len(owners), *arguments, **constants)

    def apply(self, layers: Sequence[Layer]) -> None:
        with _on(device_of(layers), "apply_masks_"):
            for part in self._parts(layers):
                nothing, _ = part.table  # for the masks say it all
                self._apply(part, nothing, nothing, SELECTED=False)

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
            if not isinstance(batch.prepared, list):
                batch.prepared = [row_of(t) for t in batch.tensors]
            addresses = list(map(torch.Tensor.data_ptr, gradients))
            # The few gradients that are not aligned get launches of their own.
            unaligned = [i for i, pointer in enumerate(addresses) if pointer & 15]
            key = (device, stream_of(device), unaligned, batch.prepared)
            tables = self._step_tables.get(key, partial(tables_by_kind, batch.prepared, unaligned, device))
            values = constant_table(constants, self._absent_constants, device, self._constants)
            columns = []
            for _, own, _ in tables:
                asked = [*taken(addresses, own), *taken(rows, own)]
                columns.append(self._columns.get((*key[:2], asked), partial(upload, asked, torch.int64, device)))
            # Everything there has to be memory for is there: from here on weights are written.
            for (kind, positions, (table, owners)), column in zip(tables, columns, strict=True):
                dtype, state_dtype, num_states, is_compact, has_master, aligned = kind
                self._launch(
                    "update",
                    len(owners),
                    table,
                    owners,
                    column,
                    len(positions),
                    values,
                    RULE=rule,
                    STATES=num_states,
                    COMPACT=is_compact,
                    HAS_MASTER=has_master,
                    dtype=k.FLOATS[dtype],
                    BITS=k.INTEGERS[dtype.itemsize],
                    T=k.FLOATS[torch.float64 if dtype == torch.float64 else torch.float32],
                    STATE_TYPE=k.FLOATS[state_dtype],
                    STATE_BITS=k.INTEGERS[state_dtype.itemsize],
                    BLOCK=BLOCK,
                    ALIGNED=aligned,
                )
            at_once(after)

    def sum_squares(self, gradients: Sequence[Layer]) -> float | torch.Tensor:
        if not gradients:
            return 0.0
        device = device_of(gradients)
        totals = []
        with _on(device, "sum_squares"):
            for part in self._parts(gradients):
                rows, owners = part.table
                sums = torch.empty(len(owners), dtype=torch.float64, device=device)
                bits, dtype = self._kernels.INTEGERS[part.dtype.itemsize], self._kernels.FLOATS[part.dtype]
                constants = {"dtype": dtype, "BITS": bits, "BLOCK": BLOCK, "ALIGNED": part.aligned}
                self._launch("sum_squares", len(sums), rows, owners, sums, **constants)
                totals.append(sums.sum())
            return sum(totals[1:], totals[0])

    def compactions(self, masks: Sequence[tuple[torch.Tensor, int]]) -> list[Compaction]:
        if not masks:
            return []
        device = masks[0][0].device
        with _on(device, "compactions"):
            fields = [(0, mask.data_ptr()) for mask, _ in masks]
            rows, owners = table_of([numel for _, numel in masks], fields, device)
            counts = torch.empty(len(owners), dtype=torch.int64, device=device)
            self._launch("count_kept", len(owners), rows, owners, counts, BLOCK=BLOCK)
            return compactions_of(masks, counts, BLOCK)

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
            for size, (rows, owners) in zip(by_size, tables, strict=True):
                constants = {"BITS": self._kernels.INTEGERS[size], "BLOCK": BLOCK}
                self._launch("move_state", len(owners), rows, owners, **constants)


def _layout(compaction: Compaction | None) -> tuple[int, int]:
    return (0, 0) if compaction is None else (compaction.mask.data_ptr(), compaction.chunk_offsets.data_ptr())


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


# Under the interpreter, which is for tests, it runs only if it is named.
register(Backend("triton", priority=-5 if INTERPRETED else 20, probe=_probe, supports=_supports, load=Triton))
