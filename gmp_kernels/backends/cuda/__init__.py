"""The CUDA kernels (csrc/cuda) on NVIDIA GPUs and, for the tests, the same kernels run on the host (csrc/simt).

A call is a few tables of rows in device memory and a fixed number of launches on torch's current stream. Results stay
on the device until they are needed. Workspace comes from torch's allocator.
"""

from __future__ import annotations

import importlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from itertools import groupby, starmap
from types import ModuleType
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch

from gmp_kernels.backends import devices
from gmp_kernels.backends.addresses import address, array_address, bits_address, element_address
from gmp_kernels.backends.at_once import at_once
from gmp_kernels.backends.compactions import compactions_of
from gmp_kernels.backends.cuda.patterns import PatternTable, Ranked, RankedSelection, needs_ranking, settles_weights
from gmp_kernels.backends.cuda.selection_tables import DTYPE_CODES, NO_INDEX, Rows, SelectionTables, fill_chunks
from gmp_kernels.backends.devices import on_device, refuse_capture, stream_of
from gmp_kernels.backends.layers import Layers, are_plain, by_dtype, device_of, prepared
from gmp_kernels.backends.ranking import sources
from gmp_kernels.backends.registry import Backend, register, why_not_built
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
from gmp_kernels.backends.uploads import Recent, put, upload
from gmp_kernels.errors import LayoutError

_modules: dict[str, ModuleType] = {}
_missing: dict[str, str] = {}
for _name in ("cuda", "simt"):
    try:
        _modules[_name] = importlib.import_module(f"gmp_kernels._{_name}")
    except ImportError as error:
        _missing[_name] = str(error)

LOWEST_CAPABILITY = (8, 0)  # what csrc/cuda is compiled for
_MOST_BINS = 2048  # per layer in one call of count


class Launches:
    """Implementation by launches of one of the two modules."""

    capturable = True
    selects_patterns = True
    skips_pruned_blocks = True
    chunk = 0
    draw = None
    count_slots = None

    def __init__(self, module: ModuleType) -> None:
        self._module: Any = module
        # The multiprocessors of a device. The first call for a device loads the kernels.
        self._size: Callable[[int], int] = cache(module.load_kernels)

    def _launch(self, device: torch.device) -> Any:
        index = device.index or 0
        return self._module.launch_on(stream_of(device), index, self._size(index))

    @contextmanager
    def _on(self, device: torch.device, what: str) -> Iterator[Any]:
        """Make the device current, name its errors, and yield what launches need; no CUDA graph may be captured."""
        with on_device(device, what):
            refuse_capture(device)
            yield self._launch(device)

    def _tables(
        self,
        layers: Sequence[Layer],
        group_sizes: Sequence[int] | None = None,
        *,
        selects: bool = True,
        prunes: bool = False,
    ) -> SelectionTables:
        """Return the tables of these groups, by default of one layer each, laid out but without memory."""
        sizes = [1] * len(layers) if group_sizes is None else group_sizes

        def make() -> SelectionTables:
            multiprocessors = self._size(layers[0].weight.device.index or 0)
            return SelectionTables(self._module, multiprocessors, layers, sizes, selects=selects, prunes=prunes)

        return prepared(layers, (self, *sizes, selects, prunes), make)

    def select(
        self,
        layers: Sequence[Layer],
        num_prune: Sequence[int],
        group_sizes: Sequence[int],
        brackets: Brackets | None = None,
        prunes: bool = False,
    ) -> Selection:
        if not are_plain(layers):
            return self._select_ranked(layers, num_prune, group_sizes, brackets)
        with self._on(device_of(layers), "select") as launch:
            found = self._tables(layers, group_sizes, prunes=prunes).filled(launch, layers, num_prune, brackets)
            self._module.select(launch, found.tables)
        return found

    def ranked(self, layers: Sequence[Layer]) -> Sequence[Layer]:
        with self._on(device_of(layers), "select") as launch:
            return Ranked(self._module, launch, list(layers)).layers

    def _select_ranked(
        self,
        layers: Sequence[Layer],
        num_prune: Sequence[int],
        group_sizes: Sequence[int],
        brackets: Brackets | None,
    ) -> Selection:
        """Do what ``select`` does, for layers with patterns or scores."""
        given = list(layers)

        def nonfinite_in() -> list[int]:
            return self.select(sources(given), [0] * len(given), [1] * len(given)).cutoffs.nonfinite

        with self._on(device_of(layers), "select") as launch:
            ranked = Ranked(self._module, launch, given)
            found = self._tables(ranked.layers, group_sizes).filled(launch, ranked.layers, num_prune, brackets)
            selection = RankedSelection(layers, ranked, found, nonfinite_in)
            self._module.select(launch, found.tables)
        return selection

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
        places = [None] * len(layers) if candidates is None else candidates
        with self._on(device, "count") as launch:
            for positions in by_dtype(layers).values():
                own = [layers[i] for i in positions]
                bins = torch.zeros(len(own), num_bins, dtype=torch.int64, device=device)
                rows = np.zeros(len(own), self._module.COUNT_ROW)
                num_chunks = fill_chunks(rows, [layer.weight.numel() for layer in own], self._module.CHUNK)
                rows["weights"] = [element_address(layer.weight) for layer in own]
                rows["mask"] = [bits_address(layer.mask, layer.weight.numel()) for layer in own]
                asked = (*brackets, brackets.shifts(num_bins))
                rows["lo"], rows["hi"], rows["shift"] = (column[positions] for column in asked)
                rows["candidates"] = [address(places[i]) for i in positions]
                rows["capacity"] = [0 if (place := places[i]) is None else place.numel() for i in positions]
                rows["bins"] = bins.data_ptr() + np.arange(len(own)) * (bins.itemsize * num_bins)
                rows["num_bins"] = num_bins
                rows["nonfinite"] = NO_INDEX
                table = upload(_words(rows), torch.int64, device)
                dtype = DTYPE_CODES[own[0].weight.dtype]
                self._module.count(launch, dtype, table.data_ptr(), len(rows), num_chunks)
                rows = table.cpu().numpy().view(self._module.COUNT_ROW)
                nonfinite = np.where(rows["nonfinite"] == NO_INDEX, -1, rows["nonfinite"])
                counts = (rows["below"], rows["inside"], rows["pruned"], nonfinite, bins.cpu().numpy())
                found.put(positions, counts)
        return found

    def prune(
        self, layers: Sequence[Layer], selection: Selection, out: Sequence[torch.Tensor], *, finite: bool = False
    ) -> PruneCounts | None:
        if not are_plain(layers):
            return self._settle(layers, selection, out, finite=finite)
        with self._on(device_of(layers), "prune") as launch:
            if isinstance(selection, SelectionTables) and selection.layers is layers:
                found = selection
            else:
                cutoffs = selection.cutoffs
                if finite and max(cutoffs.nonfinite) >= 0:
                    return None
                found = self._tables(layers, selects=False).filled(launch, found=cutoffs)
            is_in_place = isinstance(layers, Layers) and out is layers.masks
            tables = found.to_write(launch, None if is_in_place else out, finite=finite)
            self._module.apply(launch, tables)
            return None if finite and not found.is_finite else found.counts()

    def _settle(
        self, layers: Sequence[Layer], selection: Selection, out: Sequence[torch.Tensor], *, finite: bool
    ) -> PruneCounts | None:
        """Do what ``prune`` does, for layers with patterns or scores."""
        given = list(layers)
        is_own = isinstance(selection, RankedSelection) and selection.layers is layers
        if not is_own and finite and max(selection.cutoffs.nonfinite) >= 0:
            return None
        with self._on(device_of(layers), "prune") as launch:
            ranked: list[Layer | None] = [None] * len(given)
            stops_at = 0
            if isinstance(selection, RankedSelection) and is_own:
                ranked[:] = selection.ranked.layers
                stops_at = selection.flag if finite else 0
            else:
                selection = Selection(selection.cutoffs)
                needed = [i for i, layer in enumerate(given) if needs_ranking(self._module, layer)]
                made = Ranked(self._module, launch, [given[i] for i in needed]).layers
                for i, own in zip(needed, made, strict=True):
                    ranked[i] = own
            table = PatternTable(self._module, given, ranked)
            writes = [table.to_settle(launch, out, selection, stops_at=stops_at)]
            masked = [
                Layer(layer.weight, bits, layer.is_channels_last)
                for layer, bits in zip(given, out, strict=True)
                if not settles_weights(layer)
            ]
            if masked:
                tables = self._tables(masked, selects=False).filled(launch)
                if stops_at:
                    tables.set_flag(stops_at)
                writes.append(partial(self._module.apply, launch, tables.tables))
            # All memory is allocated.
            at_once(writes)
            if isinstance(selection, RankedSelection) and finite and not selection.is_finite:
                return None
            return table.counts()

    def apply(self, layers: Sequence[Layer]) -> None:
        with self._on(device_of(layers), "apply_masks_") as launch:
            # Without `out`, apply writes nothing to the tables, so the next call on this stream can use them again.
            found = prepared(
                layers,
                (self, "apply", launch.stream),
                lambda: self._tables(layers, selects=False).filled(launch),
            )
            self._module.apply(launch, found.tables)

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
        with on_device(device, "update"):
            launch = self._launch(device)
            if not isinstance(batch.prepared, tuple):
                batch.prepared = self._steps(batch.tensors)
            order, parts, on_host, table, values = cast("_Steps", batch.prepared)
            sizes, addresses = (list(map(get, gradients)) for get in (torch.Tensor.numel, torch.Tensor.data_ptr))
            if not all(addresses):
                raise LayoutError("update: expected gradients in memory, got one whose storage was freed; gather it")

            def fill() -> npt.NDArray[np.int64]:
                if (on_host["n"] != np.array(sizes)[order]).any():
                    raise ValueError("update: expected gradients of the sizes of their weights")
                on_host["grads"] = np.array(addresses)[order]
                on_host["constants"] = np.array(rows)[order]
                return _words(on_host)

            at = self._uploaded(table, (addresses, sizes, rows), fill, device, launch).data_ptr()
            given, uploaded = self._constants(constants, values, device, launch)
            # All memory is allocated. This writes weights: all of them or none.
            at_once([partial(self._module.update, launch, rule, at, parts, address(uploaded), given), *after])

    def _steps(self, tensors: Sequence[UpdateTensor]) -> _Steps:
        """Return the data that all steps of these tensors share."""
        kinds = [(DTYPE_CODES[t.weight.dtype], DTYPE_CODES[t.state_dtype]) for t in tensors]
        order = np.array(sorted(range(len(kinds)), key=kinds.__getitem__))
        rows = np.array([self._row_of(tensors[i]) for i in order], self._module.TENSOR_ROW)
        parts, first = [], 0
        for kind, own in groupby(sorted(kinds)):
            last = first + len(list(own))
            num_chunks = fill_chunks(rows[first:last], rows["n"][first:last], self._module.CHUNK)
            parts.append((*kind, first, last - first, num_chunks))
            first = last
        return order, parts, rows, Recent(1), Recent(1)

    def _row_of(self, t: UpdateTensor) -> Rows:
        """Return the tensor's row; fields that change with every step, or with the batch, are 0."""
        n = t.weight.numel()
        row = self._state_row(n, t.state, t.compaction)
        row["dtype"] = DTYPE_CODES[t.weight.dtype]
        row["weights"] = element_address(t.weight)
        row["master"] = array_address(t.master, n, "master weights")
        row["mask"] = bits_address(t.mask, n)
        return row

    def _state_row(self, n: int, state: Sequence[torch.Tensor], layout: Compaction | None) -> Rows:
        """Return a row with the addresses of the state of ``n`` weights and, for compact state, of its layout."""
        row: Rows = np.zeros((), self._module.TENSOR_ROW)
        row["n"] = num_values = n
        if layout is not None:
            num_values = layout.num_kept
            row["mask"] = bits_address(layout.mask, n)
            num_chunks = -(-n // self._module.CHUNK)
            row["chunk_offsets"] = array_address(layout.chunk_offsets, num_chunks + 1, "chunk offsets")
        row["state"][: len(state)] = [array_address(values, num_values, "state") for values in state]
        return row

    def _uploaded(
        self, recent: _Table, contents: object, make: Callable[[], Rows], device: torch.device, launch: Any
    ) -> torch.Tensor:
        """Return the table that ``make`` returns on the host, and that is the same for as long as ``contents`` is."""

        def uploaded() -> torch.Tensor:
            host = make()
            table = torch.from_numpy(host).new_empty(host.shape, device=device)
            put(self._module, launch, host, table)
            return table

        # A graph has a table of its own, even if nothing has changed: what another graph stores is there after its
        # replays only, and what the caller writes to the table of other steps has to stay out of the graph.
        if devices.is_capturing(device):
            return uploaded()
        # Another stream gets another table, because freed memory is reused in the order of its own stream.
        return recent.get((contents, launch.stream), uploaded)

    def _constants(
        self, constants: Constants, table: _Table, device: torch.device, launch: Any
    ) -> tuple[bytes, torch.Tensor | None]:
        """Return the constants as an argument of the launch or, if they are too many or on the device, as a table.

        Constants on the device do not leave it.
        """
        names: Mapping[str, float] = self._module.CONSTANTS

        def make() -> bytes:
            rows = [[given.get(name, absent) for name, absent in names.items()] for given, _ in constants.blocks]
            counts = [count for _, count in constants.blocks]
            return b"".join(array("d", row).tobytes() * count for row, count in zip(rows, counts, strict=True))

        num_rows = sum(count for _, count in constants.blocks)
        if not constants.on_device and num_rows <= self._module.MAX_ARGUMENT_CONSTANTS:
            return make(), None
        filled = [where for *where, _ in constants.on_device]
        contents = constants.blocks, filled
        result = self._uploaded(table, contents, lambda: np.frombuffer(bytearray(make())), device, launch)
        result = result.view(-1, len(names))
        columns = {name: i for i, name in enumerate(names)}
        for name, first, end, values in constants.on_device:
            result[first:end, columns[name]] = values
        return b"", result

    def sum_squares(self, gradients: Sequence[Layer]) -> float | torch.Tensor:
        if not gradients:
            return 0.0
        device = gradients[0].weight.device
        rows = np.zeros(len(gradients), self._module.TENSOR_ROW)
        num_chunks = fill_chunks(rows, [g.weight.numel() for g in gradients], self._module.CHUNK)
        rows["dtype"] = [DTYPE_CODES[g.weight.dtype] for g in gradients]
        rows["grads"] = [element_address(g.weight) for g in gradients]
        rows["mask"] = [bits_address(g.mask, g.weight.numel()) for g in gradients]
        with self._on(device, "sum_squares") as launch:
            table = upload(_words(rows), torch.int64, device)
            sums = torch.empty(num_chunks, dtype=torch.float64, device=device)
            self._module.sum_squares(launch, table.data_ptr(), len(rows), num_chunks, sums.data_ptr())
            return sums.sum()

    def compactions(self, masks: Sequence[tuple[torch.Tensor, int]]) -> list[Compaction]:
        if not masks:
            return []
        device = masks[0][0].device
        with self._on(device, "compactions") as launch:
            present = [(mask, numel) for mask, numel in masks if numel]
            rows = np.zeros(len(present), self._module.TENSOR_ROW)
            num_chunks = fill_chunks(rows, [numel for _, numel in present], self._module.CHUNK)
            rows["mask"] = list(starmap(bits_address, present))
            counts = torch.empty(num_chunks, dtype=torch.int64, device=device)
            if present:
                table = upload(_words(rows), torch.int64, device)
                self._module.count_kept(launch, table.data_ptr(), len(rows), num_chunks, counts.data_ptr())
            return compactions_of(masks, counts, self._module.CHUNK)

    def move_state(self, moves: Sequence[StateMove]) -> None:
        if not any(move.numel for move in moves):
            return
        device = moves[0].source.device
        sources = [self._state_row(move.numel, [move.source], move.source_layout) for move in moves]
        targets = [self._state_row(move.numel, [move.target], move.target_layout) for move in moves]
        rows = np.array([sources, targets])
        rows["dtype"] = [DTYPE_CODES[move.source.dtype] for move in moves]
        num_chunks = fill_chunks(rows[0], rows["n"][0], self._module.CHUNK)
        with self._on(device, "move_state") as launch:
            table = upload(_words(rows), torch.int64, device)
            self._module.move_state(launch, table.data_ptr(), len(moves), num_chunks)


def _words(rows: Rows) -> npt.NDArray[np.int64]:
    """Return rows of csrc/cuda/tables.h as the integers that are uploaded."""
    return rows.reshape(-1).view(np.int64)


# Data of a batch: the tensor that each row is for, with those of the same dtypes together; per such group the codes of
# both dtypes, first row, number of rows and number of chunks; the rows; and both tables of a step, as it was last
# uploaded.
_Table: TypeAlias = Recent[torch.Tensor]
_Steps: TypeAlias = tuple[npt.NDArray[np.int64], list[tuple[int, int, int, int, int]], Rows, _Table, _Table]


def _probe() -> str | None:
    if "cuda" not in _modules:
        return why_not_built(_missing["cuda"], "with nvcc on the PATH run pip install again")
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
# Its priority is below that of the reference, so that it runs only if it is named.
register(
    Backend("simt", priority=-10, probe=_probe_simt, supports=_supports_simt, load=lambda: Launches(_modules["simt"]))
)
