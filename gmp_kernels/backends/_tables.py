"""Tables of rows in a device's memory: uploaded without waiting for the device, and read back in one piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, overload

import torch

from gmp_kernels import capture
from gmp_kernels.backends import Layer, Selection, Threshold
from gmp_kernels.backends._rows import address, parts
from gmp_kernels.errors import CaptureError
from gmp_kernels.keys import key_of, largest_key, magnitude_of

__all__ = ["MEMORY_BYTES", "LayerField", "Part", "SelectionTables", "Table", "num_chunks_of", "upload"]

_NO_INDEX = (1 << 63) - 1
MEMORY_BYTES = 4 << 20  # for the workspace of a selection, and a share of the largest layer
MEMORY_SHARE = 0.05
DRIFT_BITS = 6  # a threshold is expected within 1/64 of an octave of the last one


class LayerField:
    """Positions of what is read back, in a LayerRow of csrc/cuda/tables.h."""

    CUT, NONFINITE, KEPT_BEFORE, KEPT = range(5, 9)
    COUNT = 9


_GROUP_FIELDS = 20


def num_chunks_of(n: int, chunk: int) -> int:
    """Chunks of a tensor of ``n`` elements."""
    return -(-n // chunk)


def upload(values: Sequence[Any] | torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Copy numbers to a device without waiting for it. Torch keeps the memory copied from until that is done."""
    if capture.is_capturing(device):
        raise CaptureError(
            "expected an operation that a CUDA graph can hold, got one that uploads numbers of this call; call it "
            "outside of the capture"
        )
    # The host whatever torch's default device is.
    host = values if isinstance(values, torch.Tensor) else torch.tensor(values, dtype=dtype, device="cpu")
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def pinned_like(table: torch.Tensor) -> torch.Tensor:
    """Host memory for a table, from which its device copies without the host waiting."""
    return torch.empty_like(table, device="cpu", pin_memory=table.device.type == "cuda")


class Table:
    """A table that is uploaded only when it changes, so that most steps upload nothing.

    A CUDA graph uploads its own at every replay, from memory that stays as long as ``captured``. While one is captured
    no memory can be pinned: uploads before set it aside, for ``SPARES`` captures without a step between them.
    """

    SPARES = 2

    def __init__(self) -> None:
        self._contents: object = None
        self._table: torch.Tensor | None = None
        self._spares: list[torch.Tensor] = []

    def at(
        self, contents: object, make: Callable[[], torch.Tensor], device: torch.device, captured: list[torch.Tensor]
    ) -> torch.Tensor:
        """Return the table that ``make`` returns on the host, and that is the same for as long as ``contents`` is."""
        if capture.is_capturing(device):
            # Even if nothing has changed: what another graph uploads is there after its replays only, and what the
            # caller writes to the table of other steps has to stay out of the graph.
            host = make()
            spare = next((spare for spare in self._spares if spare.shape == host.shape), None)
            if spare is None:
                raise CaptureError(
                    "expected a step outside of CUDA graphs, with these parameters, before one is captured, and after "
                    f"every {self.SPARES} captures; take one"
                )
            self._spares = [other for other in self._spares if other is not spare]
            captured.append(spare.copy_(host))
            return spare.to(device, non_blocking=True)
        # Another stream gets another table: freed memory is used again in the order of its own stream.
        contents = (contents, device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)
        if self._table is None or self._contents != contents:
            host = make()
            self._table = upload(host, host.dtype, device)
            self._contents = contents
            self._spares = [spare for spare in self._spares if spare.shape == host.shape]
        while len(self._spares) < self.SPARES:
            self._spares.append(pinned_like(self._table))
        return self._table


class Part(NamedTuple):
    """The layers of one dtype in a selection, and what the kernels get of it."""

    dtype: str
    positions: list[int]  # of its layers
    groups: list[int]  # of its entries in num_prune
    members: list[list[int]]  # the layers of each group, as indices into positions
    start: int  # of its rows in the buffer
    num_chunks: int
    tables: Any
    workspace: list[torch.Tensor]  # kept alive


class SelectionTables(Sequence[Selection]):
    """Selections whose numbers stay on the device until somebody looks at them; then all are read at once.

    Parameters
    ----------
    module : module
        _cuda or _simt.
    multiprocessors : int
    layers, num_prune
        As for ``Implementation.select``.
    hints : sequence of Threshold or None
    found : sequence of Selection, optional
        Selections made elsewhere: their numbers are uploaded, and there is nothing to select.
    """

    def __init__(
        self,
        module: Any,
        multiprocessors: int,
        layers: Sequence[Layer],
        num_prune: Sequence[int],
        hints: Sequence[Threshold | None],
        *,
        found: Sequence[Selection] | None = None,
    ) -> None:
        self.layers = layers
        self._num_groups = len(num_prune)
        self._device = layers[0].weight.device
        self._dtypes = [layer.weight.dtype for layer in layers]
        self._rows: list[int] | None = None
        self._selections: list[Selection] | None = None
        values = [0]  # set once a NaN or Inf is found
        planned = []
        for dtype, positions, groups in parts(layers, num_prune):
            own = [layers[i] for i in positions]
            members = [list(range(len(own)))] if len(groups) != len(own) else [[i] for i in range(len(own))]
            start = len(values)
            layer_rows, num_chunks = _layer_rows(own, members, module.CHUNK)
            given = None if found is None else [found[g] for g in groups]
            group_rows = _group_rows(
                layer_rows, members, [num_prune[g] for g in groups], [hints[g] for g in groups], own, given, num_chunks
            )
            values += [value for row in (*layer_rows, *group_rows) for value in row]
            planned.append((dtype, positions, groups, members, start, num_chunks))
        self.buffer = upload(values, torch.int64, self._device)
        capacity = 0 if found is not None else self._capacity(module, multiprocessors, len(values))
        self.parts = [self._part(module, multiprocessors, *plan, capacity, found is None) for plan in planned]

    def _num_bins(self, module: Any, multiprocessors: int, num_chunks: int) -> int:
        return int(module.BINS * min(module.num_counting_blocks(multiprocessors), num_chunks))

    def _capacity(self, module: Any, multiprocessors: int, num_values: int) -> int:
        """Keys per chunk for which there is memory."""
        sizes = [layer.weight.nbytes for layer in self.layers]
        chunks = [num_chunks_of(layer.weight.numel(), module.CHUNK) for layer in self.layers]
        bins = 8 * self._num_bins(module, multiprocessors, sum(chunks))
        left = MEMORY_SHARE * max(sizes) + MEMORY_BYTES - bins - 8 * sum(chunks) - 8 * num_values
        key_bytes = sum(n * layer.weight.itemsize for n, layer in zip(chunks, self.layers, strict=True))
        return int(min(module.LIST_CAPACITY, max(0, left // key_bytes)))

    def _part(
        self,
        module: Any,
        multiprocessors: int,
        dtype: str,
        positions: list[int],
        groups: list[int],
        members: list[list[int]],
        start: int,
        num_chunks: int,
        capacity: int,
        selects: bool,
    ) -> Part:
        device, weight = self._device, self.layers[positions[0]].weight
        workspace = []
        if selects:
            num_bins = self._num_bins(module, multiprocessors, num_chunks)
            workspace = [
                torch.zeros(num_bins, dtype=torch.int64, device=device),
                torch.empty(num_chunks * capacity, dtype=weight.dtype, device=device),
                torch.empty(num_chunks, dtype=torch.int32, device=device),
                torch.empty(num_chunks, dtype=torch.int32, device=device),
            ]
        layers = self.buffer.data_ptr() + 8 * start
        tables = module.Tables(
            layers,
            len(positions),
            layers + 8 * LayerField.COUNT * len(positions),
            len(members),
            num_chunks,
            *([tensor.data_ptr() for tensor in workspace] or [0] * 4),
            capacity,
            self.buffer.data_ptr(),
        )
        return Part(dtype, positions, groups, members, start, num_chunks, tables, workspace)

    def rows(self) -> list[int]:
        """Read everything back; waits for the device the first time."""
        if self._rows is None:
            self._rows = self.buffer.tolist()
        return self._rows

    @property
    def is_finite(self) -> bool:
        """Whether no unpruned weight is NaN or Inf."""
        return self.rows()[0] == 0

    def layer_fields(self, field: int) -> list[int]:
        """One field of every layer's row."""
        rows = self.rows()
        values = {
            i: rows[part.start + LayerField.COUNT * index + field]
            for part in self.parts
            for index, i in enumerate(part.positions)
        }
        return [values[i] for i in range(len(self.layers))]

    def bracket(self, group: int) -> tuple[int, int]:
        """Lo and hi of a group."""
        rows = self.rows()
        for part in self.parts:
            if group in part.groups:
                start = part.start + LayerField.COUNT * len(part.positions) + _GROUP_FIELDS * part.groups.index(group)
                return rows[start + 6], rows[start + 7]
        raise IndexError(group)

    def _read(self) -> list[Selection]:
        if self._selections is None:
            cuts, nonfinite = self.layer_fields(LayerField.CUT), self.layer_fields(LayerField.NONFINITE)
            found: dict[int, Selection] = {}
            for part in self.parts:
                start = part.start + LayerField.COUNT * len(part.positions)
                for g, members in zip(part.groups, part.members, strict=True):
                    key, num_below, num_ties, num_ties_kept = self.rows()[start:][_GROUP_FIELDS - 4 : _GROUP_FIELDS]
                    start += _GROUP_FIELDS
                    positions = [part.positions[m] for m in members]
                    value = magnitude_of(key, self._dtypes[positions[0]]) if num_ties else 0.0
                    found[g] = Selection(
                        Threshold(value, num_below, num_ties, num_ties_kept),
                        tuple(cuts[i] for i in positions),
                        tuple(-1 if nonfinite[i] == _NO_INDEX else nonfinite[i] for i in positions),
                    )
            self._selections = [found[g] for g in range(self._num_groups)]
        return self._selections

    def __len__(self) -> int:
        return self._num_groups

    @overload
    def __getitem__(self, index: int) -> Selection: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Selection]: ...
    def __getitem__(self, index: int | slice) -> Selection | Sequence[Selection]:
        return self._read()[index]


def _layer_rows(layers: Sequence[Layer], members: list[list[int]], chunk: int) -> tuple[list[list[int]], int]:
    rows, first_chunk = [], 0
    group_of = {i: g for g, indices in enumerate(members) for i in indices}
    for i, layer in enumerate(layers):
        n = layer.weight.numel()
        rows.append([layer.weight.data_ptr(), address(layer.mask), n, first_chunk, group_of[i], n, _NO_INDEX, 0, 0])
        first_chunk += num_chunks_of(n, chunk)
    return rows, first_chunk


def _group_rows(
    layer_rows: list[list[int]],
    members: list[list[int]],
    num_prune: Sequence[int],
    hints: Sequence[Threshold | None],
    layers: Sequence[Layer],
    found: Sequence[Selection] | None,
    num_chunks: int,
) -> list[list[int]]:
    rows = []
    ends = [row[3] for row in layer_rows[1:]] + [num_chunks]
    for g, indices in enumerate(members):
        first, n = indices[0], sum(layer_rows[i][2] for i in indices)
        first_chunk, dtype = layer_rows[first][3], layers[first].weight.dtype
        lo, hi = _near(hints[g], num_prune[g], n, dtype)
        row = [first, len(indices), n, num_prune[g], first_chunk, ends[indices[-1]] - first_chunk, lo, hi]
        answer = [0, 0, 0, 0]
        if found is not None:
            answer[0] = key_of(found[g].threshold.value, dtype)
            for i, cut in zip(indices, found[g].cuts, strict=True):
                layer_rows[i][LayerField.CUT] = cut
        rows.append([*row, *[0] * (_GROUP_FIELDS - len(row) - len(answer)), *answer])
    return rows


def _near(hint: Threshold | None, num_prune: int, n: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bracket around an earlier threshold; (0, 0) where it is not worth trying, because a miss costs a read."""
    if hint is None or hint.num_ties == 0 or abs(hint.num_pruned - num_prune) > n // 1024:
        return 0, 0
    key, octave = key_of(hint.value, dtype), key_of(2.0, dtype) - key_of(1.0, dtype)
    drift = max(1, octave >> DRIFT_BITS)
    return max(0, key - drift), min(largest_key(dtype), key + drift)
