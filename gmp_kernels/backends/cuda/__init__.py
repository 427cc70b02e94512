"""The CUDA kernels (csrc/cuda) on NVIDIA GPUs; and, for the tests, the same kernels run on the host (csrc/simt).

A call is a few tables of rows in device memory and a fixed number of launches on torch's current stream. What it finds
stays on the device until it is needed. Workspace comes from torch's allocator.
"""

from __future__ import annotations

import itertools
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch

from gmp_kernels.backends.addresses import address, array_address, bits_address, by_dtype, dtype_name, element_address
from gmp_kernels.backends.at_once import at_once
from gmp_kernels.backends.cuda.selection_tables import SelectionTables, Template
from gmp_kernels.backends.dtypes import DTYPES
from gmp_kernels.backends.layers import Layers, device_of, prepared
from gmp_kernels.backends.registry import Backend, register
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
    UpdateTensor,
)
from gmp_kernels.backends.uploads import Table, current, num_chunks_of, put, refuse_capture, upload
from gmp_kernels.errors import CaptureError, DeviceError, LayoutError

_modules: dict[str, ModuleType] = {}
_missing: dict[str, str] = {}
try:
    from gmp_kernels import _cuda

    _modules["cuda"] = _cuda
except ImportError as error:
    _missing["cuda"] = str(error)
try:
    from gmp_kernels import _simt

    _modules["simt"] = _simt
except ImportError as error:
    _missing["simt"] = str(error)

LOWEST_CAPABILITY = (8, 0)  # what csrc/cuda is compiled for
_DTYPE_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}
_COUNTS_FOUND = 11  # the first field of a CountRow of csrc/cuda/tables.h that receives an answer
_MOST_BINS = 2048  # that layers are counted in at once
_NO_INDEX = (1 << 63) - 1


class Launches:
    """Implementation by launches of one of the two modules."""

    capturable = True

    def __init__(self, module: ModuleType) -> None:
        self._module: Any = module
        self._multiprocessors: dict[torch.device, int] = {}

    @contextmanager
    def _on(self, device: torch.device, what: str) -> Iterator[Any]:
        """Have ``device`` current, and give what launches need of it. Errors get a name."""
        try:
            with current(device):
                yield self._launch(device)
        except torch.OutOfMemoryError as error:
            raise DeviceError(
                f"{what}: no memory left on {device} for the workspace, nothing was changed ({error}); free some, or "
                "prune fewer layers at a time"
            ) from error
        except CaptureError as error:
            raise CaptureError(f"{what}: {error}") from None
        except RuntimeError as error:
            raise DeviceError(
                f"{what}: {device} reports an error, of this call or of an earlier one ({error}); run again with "
                "CUDA_LAUNCH_BLOCKING=1 to see which"
            ) from error

    def _launch(self, device: torch.device) -> Any:
        if device.type == "cpu":
            return self._module.launch_on(0, 0, self._size(device))
        return self._module.launch_on(torch.cuda.current_stream(device).cuda_stream, device.index, self._size(device))

    def _size(self, device: torch.device) -> int:
        if device not in self._multiprocessors:
            index = device.index or 0
            self._multiprocessors[device] = self._module.multiprocessors_of(index)
            self._module.load_kernels(self._module.launch_on(0, index, self._multiprocessors[device]))
        return self._multiprocessors[device]

    def _template(
        self,
        layers: Sequence[Layer],
        group_sizes: Sequence[int] | None = None,
        *,
        selects: bool = True,
        prunes: bool = False,
    ) -> Template:
        """Return the template for these groups, or for layers on their own."""
        sizes = [1] * len(layers) if group_sizes is None else group_sizes

        def make() -> Template:
            multiprocessors = self._size(layers[0].weight.device)
            return Template(self._module, multiprocessors, layers, sizes, selects=selects, prunes=prunes)

        return prepared(layers, (self, *sizes, selects, prunes), make)

    def select(
        self,
        layers: Sequence[Layer],
        num_prune: Sequence[int],
        group_sizes: Sequence[int],
        brackets: Brackets | None = None,
        *,
        prunes: bool = False,
    ) -> Selection:
        with self._on(device_of(layers), "select") as launch:
            template = self._template(layers, group_sizes, prunes=prunes)
            found = SelectionTables(self._module, launch, template, layers, num_prune, brackets)
            for dtype, tables in found.tables:
                self._module.begin(launch, dtype, tables)
                self._module.select(launch, dtype, tables)
        return found

    def count(
        self,
        layers: Sequence[Layer],
        brackets: Brackets,
        num_bins: int,
        candidates: Sequence[torch.Tensor | None] | None = None,
    ) -> BracketCounts:
        if num_bins > _MOST_BINS:
            raise ValueError(f"count: expected at most {_MOST_BINS} bins, got {num_bins}")
        device = layers[0].weight.device
        found = BracketCounts.nothing(len(layers), num_bins)
        ends = np.stack((*brackets, brackets.shifts(num_bins)), axis=1).tolist()
        with self._on(device, "count") as launch:
            for dtype, positions in by_dtype(layers).items():
                bins = torch.zeros(len(positions), num_bins, dtype=torch.int64, device=device)
                rows, first_chunk = [], 0
                for i, own in zip(positions, bins, strict=True):
                    weight, mask = layers[i]
                    place = None if candidates is None else candidates[i]
                    rows.append(
                        [
                            *(element_address(weight), bits_address(mask, weight.numel()), weight.numel(), first_chunk),
                            *ends[i],
                            *(address(place), 0 if place is None else place.numel(), own.data_ptr(), num_bins),
                            *(0, 0, 0, _NO_INDEX),
                        ]
                    )
                    first_chunk += num_chunks_of(weight.numel(), self._module.CHUNK)
                table = upload(rows, torch.int64, device)
                self._module.count(launch, dtype, table.data_ptr(), len(rows), first_chunk)
                *counts, nonfinite = table.cpu().numpy()[:, _COUNTS_FOUND:].T
                nonfinite = np.where(nonfinite == _NO_INDEX, -1, nonfinite)
                found.put(positions, (*counts, nonfinite, bins.cpu().numpy()))
        return found

    def prune(
        self, layers: Sequence[Layer], selection: Selection, out: Sequence[torch.Tensor], *, finite: bool = False
    ) -> PruneCounts | None:
        device = device_of(layers)
        with self._on(device, "prune") as launch:
            if isinstance(selection, SelectionTables) and selection.layers is layers:
                found = selection
            else:
                cutoffs = selection.cutoffs
                if finite and max(cutoffs.nonfinite) >= 0:
                    return None
                template = self._template(layers, selects=False)
                found = SelectionTables(self._module, launch, template, layers, found=cutoffs)
            stop = found.address if finite else 0
            if isinstance(layers, Layers) and out is layers.masks:
                first = found.address + 8 * found.template.out_start
            else:
                sizes = found.template.sizes
                places = [bits_address(out[i], sizes[i]) for part in found.template.parts for i in part.positions]
                addresses = torch.empty(len(places), dtype=torch.int64, device=device)
                put(self._module, launch, np.array(places, np.int64), addresses)
                first = addresses.data_ptr()
            parts = []
            for (dtype, tables), part in zip(found.tables, found.template.parts, strict=True):
                parts.append((dtype, tables, first))
                first += 8 * len(part.positions)
            found.forget(launch)
            self._module.apply(launch, parts, stop)
            return None if finite and not found.is_finite else found.counts()

    def apply(self, layers: Sequence[Layer]) -> None:
        device = device_of(layers)
        with self._on(device, "apply_masks_") as launch:
            refuse_capture(device)

            def make() -> SelectionTables:
                return SelectionTables(self._module, launch, self._template(layers, selects=False))

            # Without `out` apply writes nothing to them, so the next call on this stream needs no others.
            found = prepared(layers, (self, "apply", launch.stream), make)
            self._module.apply(launch, [(dtype, tables, 0) for dtype, tables in found.tables], 0)

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
        device = batch.tensors[0].weight.device
        with self._on(device, "update") as launch:
            if not isinstance(batch.prepared, _Steps):
                batch.prepared = _Steps(batch.tensors, self._module.CHUNK)
            steps = batch.prepared
            argument = self._argument(constants)
            upload_to = device, batch.captured, self._module, launch
            values = None if argument else self._constants(steps, constants, *upload_to)
            if list(map(torch.Tensor.numel, gradients)) != steps.sizes:
                raise ValueError("update: expected gradients of the sizes of their weights")
            addresses = list(map(torch.Tensor.data_ptr, gradients))
            if not all(addresses):
                raise LayoutError("update: expected gradients in memory, got one whose storage was freed; gather it")
            tables = [
                part.table.at((addresses, rows), partial(part.rows_with, addresses, rows), *upload_to)
                for part in steps.parts
            ]
            # Everything there has to be memory for is there: this writes weights, all of them or none.
            parts = [
                (part.dtype, table.data_ptr(), len(part.positions), part.num_chunks)
                for part, table in zip(steps.parts, tables, strict=True)
            ]
            at_once([partial(self._module.update, launch, rule, parts, address(values), argument), *after])

    def _rows_of_constants(self, constants: Constants) -> list[list[float]]:
        """One row per block, in the order of the kernels."""
        names: Mapping[str, float] = self._module.CONSTANTS
        return [[given.get(name, absent) for name, absent in names.items()] for given, _ in constants.blocks]

    def _argument(self, constants: Constants) -> bytes:
        """The constants as an argument of the launch; empty where there are too many, or some are on the device."""
        if constants.on_device or sum(count for _, count in constants.blocks) > self._module.MAX_ARGUMENT_CONSTANTS:
            return b""
        blocks = zip(self._rows_of_constants(constants), constants.blocks, strict=True)
        return b"".join(array("d", row).tobytes() * count for row, (_, count) in blocks)

    def _constants(self, steps: _Steps, constants: Constants, *upload_to: Any) -> torch.Tensor:
        """The constants as the kernels read them; those that are on the device do not leave it."""

        def make() -> torch.Tensor:
            counts = [count for _, count in constants.blocks]
            values = torch.tensor(self._rows_of_constants(constants), dtype=torch.float64, device="cpu")
            return values.repeat_interleave(torch.tensor(counts, device="cpu"), 0)

        filled = [where for *where, _ in constants.on_device]
        result = steps.constants.at((constants.blocks, filled), make, *upload_to)
        columns = {name: i for i, name in enumerate(self._module.CONSTANTS)}
        for name, first, end, values in constants.on_device:
            result[first:end, columns[name]] = values
        return result

    def sum_squares(self, gradients: Sequence[Layer]) -> float | torch.Tensor:
        if not gradients:
            return 0.0
        device = gradients[0].weight.device
        rows, first_chunk = [], 0
        for g in gradients:
            n = g.weight.numel()
            rows.append(
                [_DTYPE_CODES[g.weight.dtype], element_address(g.weight), bits_address(g.mask, n), n, first_chunk]
            )
            first_chunk += num_chunks_of(n, self._module.CHUNK)
        with self._on(device, "sum_squares") as launch:
            table = upload(rows, torch.int64, device)
            sums = torch.empty(first_chunk + 1, dtype=torch.float64, device=device)
            self._module.sum_squares(launch, table.data_ptr(), len(rows), first_chunk, sums.data_ptr())
        return sums[-1]

    def compactions(self, masks: Sequence[tuple[torch.Tensor, int]]) -> list[Compaction]:
        if not masks:
            return []
        device = masks[0][0].device
        with self._on(device, "compactions") as launch:
            chunks = [num_chunks_of(numel, self._module.CHUNK) for _, numel in masks]
            # What each mask keeps in all, then the chunk offsets of one mask after the other. Of empty ones all is 0.
            buffer = torch.zeros(len(masks) + sum(chunks) + len(masks), dtype=torch.int64, device=device)
            offsets = torch.split(buffer[len(masks) :], [n + 1 for n in chunks])
            order = sorted(range(len(masks)), key=lambda i: chunks[i] == 0)  # those that have rows come first
            rows, first_chunk = [], 0
            for i in order[: sum(n > 0 for n in chunks)]:
                rows.append([bits_address(*masks[i]), masks[i][1], first_chunk, offsets[i].data_ptr()])
                first_chunk += chunks[i]
            if rows:
                table = upload(rows, torch.int64, device)
                self._module.chunk_offsets(launch, table.data_ptr(), len(rows), first_chunk, buffer.data_ptr())
            totals = buffer[: len(masks)].tolist()
        kept = dict(zip(order, totals, strict=True))
        return [Compaction(mask, offsets[i], kept[i]) for i, (mask, _) in enumerate(masks)]

    def move_state(self, moves: Sequence[StateMove]) -> None:
        rows, first_chunk = [], 0
        for move in moves:
            num_chunks = num_chunks_of(move.numel, self._module.CHUNK)
            source = _state(move.source, move.source_layout, move.numel, num_chunks)
            target = _state(move.target, move.target_layout, move.numel, num_chunks)
            rows.append([*source, *target, move.numel, first_chunk, move.source.element_size()])
            first_chunk += num_chunks
        if not first_chunk:
            return
        with self._on(moves[0].source.device, "move_state") as launch:
            table = upload(rows, torch.int64, moves[0].source.device)
            self._module.move_state(launch, table.data_ptr(), len(rows), first_chunk)


def _state(values: torch.Tensor, layout: Compaction | None, numel: int, num_chunks: int) -> tuple[int, int, int]:
    """Addresses of state, and if it is compact of its mask and ranks."""
    if layout is None:
        return array_address(values, numel, "state"), 0, 0
    ranks = array_address(layout.ranks, num_chunks + 1, "chunk offsets")
    return array_address(values, layout.num_kept, "state"), bits_address(layout.mask, numel), ranks


class _Row(NamedTuple):
    """A tensor's row of csrc/cuda/tables.h; what changes with every step, and where it lies in the table, is 0."""

    dtype: str
    values: tuple[int, ...]
    numel: int


def _row(t: UpdateTensor, chunk: int) -> _Row:
    """Make the tensor's row, once."""
    if isinstance(t.row, _Row):
        return t.row
    n = t.weight.numel()
    states = [_state(values, t.compaction, n, num_chunks_of(n, chunk)) for values in t.state]
    state = [*(values for values, _, _ in states), 0, 0, 0][:3]
    ranks = None if t.compaction is None else t.compaction.ranks
    master = array_address(t.master, n, "master weights")
    addresses = (element_address(t.weight), 0, master, *state, bits_address(t.mask, n), address(ranks))
    row = _Row(dtype_name(t.weight), (*addresses, n, 0, 0), n)
    t.row = row
    return row


class _Part:
    """The tensors of one dtype in a batch, and their table."""

    GRADIENT, FIRST_CHUNK, CONSTANTS = 1, 9, 10  # fields of a row

    def __init__(self, dtype: str, positions: list[int], rows: Sequence[_Row], chunk: int) -> None:
        self.dtype = dtype
        self.positions = positions
        chunks = [num_chunks_of(row.numel, chunk) for row in rows]
        self.num_chunks = sum(chunks)
        self.table = Table()
        self._rows = torch.tensor([row.values for row in rows], dtype=torch.int64, device="cpu")
        first_chunks = [0, *itertools.accumulate(chunks)][:-1]
        self._rows[:, self.FIRST_CHUNK] = torch.tensor(first_chunks, dtype=torch.int64, device="cpu")

    def rows_with(self, gradients: Sequence[int], constants: Sequence[int]) -> torch.Tensor:
        """Return the rows on the host, given addresses of gradients and rows of constants for the whole batch."""
        rows = self._rows.clone()
        for column, values in ((self.GRADIENT, gradients), (self.CONSTANTS, constants)):
            own = values if len(self.positions) == len(values) else [values[i] for i in self.positions]
            rows[:, column] = torch.tensor(own, dtype=torch.int64, device="cpu")
        return rows


class _Steps:
    """A batch as its steps are launched: one part per dtype, and the table of constants."""

    def __init__(self, tensors: Sequence[UpdateTensor], chunk: int) -> None:
        rows = [_row(t, chunk) for t in tensors]
        self.sizes = [row.numel for row in rows]
        positions_of: dict[str, list[int]] = defaultdict(list)
        for i, row in enumerate(rows):
            positions_of[row.dtype].append(i)
        self.parts = [
            _Part(dtype, positions, [rows[i] for i in positions], chunk) for dtype, positions in positions_of.items()
        ]
        self.constants = Table()


def _probe() -> str | None:
    if "cuda" not in _modules:
        return f"its extension was not built ({_missing['cuda']}); with nvcc on the PATH run pip install again"
    if torch.version.hip is not None:
        return "this torch is for AMD GPUs; use backend 'triton'"
    if not torch.cuda.is_available():
        return "torch sees no GPU; check nvidia-smi and that torch is a CUDA build"
    return None


def _supports(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it takes CUDA tensors, got {device}; move them with .cuda()"
    if _probe() is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < LOWEST_CAPABILITY:
            return f"it needs compute capability {LOWEST_CAPABILITY} or newer, got {capability}; use backend 'triton'"
    return None


def _probe_simt() -> str | None:
    if "simt" in _modules:
        return None
    return f"it is for tests only and was not built ({_missing['simt']}); see CONTRIBUTING.md"


def _supports_simt(device: torch.device) -> str | None:
    return None if device.type == "cpu" else f"it takes CPU tensors, got {device}; it runs CUDA kernels on the host"


register(Backend("cuda", priority=30, probe=_probe, supports=_supports, load=lambda: Launches(_modules["cuda"])))
# Behind the reference: nobody gets it without naming it.
register(
    Backend("simt", priority=-10, probe=_probe_simt, supports=_supports_simt, load=lambda: Launches(_modules["simt"]))
)
