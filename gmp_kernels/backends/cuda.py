"""The CUDA kernels (csrc/cuda) on NVIDIA GPUs; and, for the tests, the same kernels run on the host (csrc/simt).

A step is one table of rows in device memory and a fixed number of launches on torch's current stream. Workspace comes
from torch's allocator: for a selection 1/32 of the bytes of the weights that are selected from.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch

from gmp_kernels.backends import (
    Backend,
    Compaction,
    Gradient,
    Layer,
    Selection,
    StateMove,
    Tally,
    Threshold,
    UpdateTensor,
    Written,
    register,
)
from gmp_kernels.backends._rows import address, by_dtype, dtype_name, parts
from gmp_kernels.errors import DeviceError

_modules: dict[str, ModuleType] = {}
_missing: dict[str, str] = {}
try:
    from gmp_kernels import _cuda  # type: ignore[attr-defined]

    _modules["cuda"] = _cuda
except ImportError as error:
    _missing["cuda"] = str(error)
try:
    from gmp_kernels import _simt  # type: ignore[attr-defined]

    _modules["simt"] = _simt
except ImportError as error:
    _missing["simt"] = str(error)

BLOCKS_PER_MULTIPROCESSOR = 8  # of 256 threads: all that one holds
LOWEST_CAPABILITY = (8, 0)  # what csrc/cuda is compiled for
_NO_INDEX = (1 << 63) - 1
_KEY_DTYPES = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}  # as in csrc/dtypes.h
_LAYER_FIELDS, _GROUP_FIELDS = 11, 20  # of csrc/cuda/tables.h
_KEPT_BEFORE, _KEPT = 9, 10
_NONFINITE, _CUT = 8, 7


def _key(value: float, dtype: torch.dtype) -> int:
    """Key of a magnitude that is a value of ``dtype``."""
    tensor = torch.tensor(value, dtype=dtype)
    if value != value:  # every NaN has the one key above Inf
        tensor = torch.tensor(float("inf"), dtype=dtype)
        return int(tensor.view(_KEY_DTYPES[tensor.element_size()])) + 1
    return int(tensor.view(_KEY_DTYPES[tensor.element_size()]))


def _magnitude(key: int, dtype: torch.dtype) -> float:
    integer = _KEY_DTYPES[torch.empty((), dtype=dtype).element_size()]
    return float(torch.tensor(key, dtype=integer).view(dtype))


def _num_chunks(n: int, chunk: int) -> int:
    return -(-n // chunk)


class Launches:
    """Implementation by launches of one of the two modules."""

    def __init__(self, module: ModuleType) -> None:
        self._module: Any = module
        self._num_blocks: dict[torch.device, int] = {}

    @contextmanager
    def _on(self, device: torch.device, what: str) -> Iterator[tuple[int, int]]:
        """Make ``device`` current; give its stream and the size of a persistent grid. Errors get a name."""
        try:
            if device.type == "cpu":
                yield 0, self._blocks(device)
            else:
                with torch.cuda.device(device):
                    yield torch.cuda.current_stream().cuda_stream, self._blocks(device)
        except torch.OutOfMemoryError as error:
            raise DeviceError(f"{what}: no memory left on {device} for the workspace ({error}); free some") from error
        except RuntimeError as error:
            raise DeviceError(
                f"{what}: {device} reports an error, of this kernel or an earlier one ({error}); run again with "
                "CUDA_LAUNCH_BLOCKING=1 to see which"
            ) from error

    def _blocks(self, device: torch.device) -> int:
        if device not in self._num_blocks:
            reason, multiprocessors, _, _ = self._module.device_info()
            if reason:
                raise RuntimeError(reason)
            self._num_blocks[device] = multiprocessors * BLOCKS_PER_MULTIPROCESSOR
        return self._num_blocks[device]

    def _layer_rows(self, layers: Sequence[Layer], group_of: Sequence[int]) -> tuple[list[list[int]], int]:
        rows, first_chunk = [], 0
        for layer, group in zip(layers, group_of, strict=True):
            n = layer.weight.numel()
            rows.append(
                [layer.weight.data_ptr(), address(layer.mask), 0, n, first_chunk, group, *[0] * (_LAYER_FIELDS - 6)]
            )
            first_chunk += _num_chunks(n, self._module.CHUNK)
        return rows, first_chunk

    def select(
        self, layers: Sequence[Layer], num_prune: Sequence[int], hints: Sequence[Threshold | None]
    ) -> list[Selection]:
        found: dict[int, Selection] = {}
        for dtype, positions, groups in parts(layers, num_prune):
            selections = self._select(dtype, [layers[i] for i in positions], [num_prune[g] for g in groups])
            found.update(zip(groups, selections, strict=True))
        return [found[g] for g in range(len(num_prune))]

    def _select(self, dtype: str, layers: Sequence[Layer], num_prune: Sequence[int]) -> list[Selection]:
        is_global = len(num_prune) != len(layers)
        device, torch_dtype = layers[0].weight.device, layers[0].weight.dtype
        rows, num_chunks = self._layer_rows(layers, [0] * len(layers) if is_global else range(len(layers)))
        members = [list(range(len(layers)))] if is_global else [[i] for i in range(len(layers))]
        ends = [row[4] for row in rows[1:]] + [num_chunks]
        group_rows = []
        for indices, count in zip(members, num_prune, strict=True):
            first, last = indices[0], indices[-1]
            n = sum(rows[i][3] for i in indices)
            group_rows.append(
                [first, len(indices), n, count, rows[first][4], ends[last] - rows[first][4], *[0] * (_GROUP_FIELDS - 6)]
            )
        with self._on(device, "select") as (stream, num_blocks):
            table = torch.tensor(rows, dtype=torch.int64).to(device)
            groups = torch.tensor(group_rows, dtype=torch.int64).to(device)
            bins = torch.zeros(len(group_rows) * self._module.BINS, dtype=torch.int64, device=device)
            key_dtype = _KEY_DTYPES[layers[0].weight.element_size()]
            lists = torch.empty(num_chunks * self._module.LIST_CAPACITY, dtype=key_dtype, device=device)
            counts = torch.empty(2, num_chunks, dtype=torch.int32, device=device)
            self._module.select(
                stream,
                num_blocks,
                dtype,
                table.data_ptr(),
                len(rows),
                groups.data_ptr(),
                len(group_rows),
                num_chunks,
                bins.data_ptr(),
                lists.data_ptr(),
                counts[0].data_ptr(),
                counts[1].data_ptr(),
            )
            answers, layer_answers = groups.tolist(), table.tolist()
        selections = []
        for indices, (key, num_below, num_ties, num_ties_kept) in zip(members, (a[-4:] for a in answers), strict=True):
            value = _magnitude(key, torch_dtype) if num_ties else 0.0
            nonfinite = [layer_answers[i][_NONFINITE] for i in indices]
            selections.append(
                Selection(
                    Threshold(value, num_below, num_ties, num_ties_kept),
                    tuple(layer_answers[i][_CUT] for i in indices),
                    tuple(-1 if index == _NO_INDEX else index for index in nonfinite),
                )
            )
        return selections

    def _apply(
        self, layers: Sequence[Layer], cuts: Sequence[tuple[float, int]], out: Sequence[torch.Tensor | None]
    ) -> list[tuple[int, int]]:
        """Launch apply for each dtype; return (kept before, kept) per layer once they are needed."""
        tables: list[tuple[list[int], torch.Tensor]] = []
        for dtype, positions in by_dtype(layers).items():
            rows, num_chunks = self._layer_rows([layers[i] for i in positions], [0] * len(positions))
            for row, i in zip(rows, positions, strict=True):
                value, cut = cuts[i]
                row[2], row[6], row[_CUT] = address(out[i]), _key(value, layers[i].weight.dtype), cut
            device = layers[0].weight.device
            with self._on(device, "prune") as (stream, num_blocks):
                table = torch.tensor(rows, dtype=torch.int64).to(device)
                self._module.apply(stream, num_blocks, dtype, table.data_ptr(), len(rows), num_chunks)
            tables.append((positions, table))
        if all(packed is None for packed in out):
            return []
        counts: dict[int, tuple[int, int]] = {}
        for positions, table in tables:
            counts.update(
                (i, (row[_KEPT_BEFORE], row[_KEPT])) for i, row in zip(positions, table.tolist(), strict=True)
            )
        return [counts[i] for i in range(len(layers))]

    def prune(
        self, layers: Sequence[Layer], selections: Sequence[Selection], out: Sequence[torch.Tensor]
    ) -> list[Written]:
        cuts = [(selection.threshold.value, cut) for selection in selections for cut in selection.cuts]
        return [
            Written(layer.weight.numel() - kept, kept_before - kept)
            for layer, (kept_before, kept) in zip(layers, self._apply(layers, cuts, out), strict=True)
        ]

    def apply(self, layers: Sequence[Layer]) -> None:
        self._apply(layers, [(0.0, layer.weight.numel()) for layer in layers], [None] * len(layers))

    def update(
        self,
        rule: str,
        tensors: Sequence[UpdateTensor],
        gradients: Sequence[Gradient],
        constants: Sequence[dict[str, float]],
        tally: Tally | None = None,
    ) -> list[Selection | None]:
        if not tensors:
            return []
        rows: dict[str, list[list[int]]] = defaultdict(list)
        num_chunks: dict[str, int] = defaultdict(int)
        for t, gradient in zip(tensors, gradients, strict=True):
            dtype, weight, others = t.row if isinstance(t.row, _Row) else _prepared(t)
            rows[dtype].append([weight, gradient.tensor.data_ptr(), *others, num_chunks[dtype], gradient.constants])
            num_chunks[dtype] += _num_chunks(others[-1], self._module.CHUNK)
        device = tensors[0].weight.device
        packed = bytearray(b"".join(self._module.pack_constants(c) for c in constants))
        with self._on(device, "update") as (stream, num_blocks):
            values = torch.frombuffer(packed, dtype=torch.uint8).to(device, non_blocking=True)
            for dtype, table_rows in rows.items():
                table = torch.tensor(table_rows, dtype=torch.int64).to(device, non_blocking=True)
                self._module.update(
                    stream,
                    num_blocks,
                    dtype,
                    rule,
                    table.data_ptr(),
                    len(table_rows),
                    num_chunks[dtype],
                    values.data_ptr(),
                )
        # Reading thresholds back would make the step wait for the device.
        return [] if tally is None else [None] * len(tally.num_prune)

    def fingerprints(self, layers: Sequence[Layer]) -> list[int]:
        hashes = []
        for layer in layers:
            weight = layer.weight.view(-1)
            sample = weight[:: max(1, weight.numel() // 1024)].view(_KEY_DTYPES[weight.element_size()])
            hashes.append(zlib.crc32(sample.cpu().numpy().tobytes()))
        return hashes

    def sum_squares(self, gradients: Sequence[Layer]) -> float:
        rows, first_chunk = [], 0
        for g in gradients:
            n = g.weight.numel()
            rows.append([_DTYPE_CODES[g.weight.dtype], g.weight.data_ptr(), address(g.mask), n, first_chunk])
            first_chunk += _num_chunks(n, self._module.CHUNK)
        device = gradients[0].weight.device
        with self._on(device, "sum_squares") as (stream, num_blocks):
            table = torch.tensor(rows, dtype=torch.int64).to(device)
            sums = torch.empty(first_chunk + 1, dtype=torch.float64, device=device)
            self._module.sum_squares(stream, num_blocks, table.data_ptr(), len(rows), first_chunk, sums.data_ptr())
            return float(sums[-1])

    def compaction(self, mask: torch.Tensor, numel: int) -> Compaction:
        with self._on(mask.device, "compaction") as (stream, _):
            ranks = torch.empty(_num_chunks(numel, self._module.CHUNK) + 1, dtype=torch.int64, device=mask.device)
            self._module.ranks(stream, mask.data_ptr(), numel, ranks.data_ptr())
            return Compaction(mask, ranks, int(ranks[-1]))

    def move_state(self, moves: Sequence[StateMove]) -> None:
        if not moves:
            return
        rows, first_chunk = [], 0
        for move in moves:
            layouts = [
                (0, 0) if layout is None else (layout.mask.data_ptr(), layout.ranks.data_ptr())
                for layout in (move.source_layout, move.target_layout)
            ]
            rows.append(
                [
                    move.source.data_ptr(),
                    *layouts[0],
                    move.target.data_ptr(),
                    *layouts[1],
                    move.numel,
                    first_chunk,
                    move.source.element_size(),
                ]
            )
            first_chunk += _num_chunks(move.numel, self._module.CHUNK)
        with self._on(moves[0].source.device, "move_state") as (stream, num_blocks):
            table = torch.tensor(rows, dtype=torch.int64).to(moves[0].source.device)
            self._module.repack(stream, num_blocks, table.data_ptr(), len(rows), first_chunk)


class _Row(NamedTuple):
    """A tensor's row of csrc/cuda/tables.h less what changes with every step."""

    dtype: str
    weight: int
    others: tuple[int, ...]


def _prepared(t: UpdateTensor) -> _Row:
    """Make the tensor's row, once."""
    state = [*(s.data_ptr() for s in t.state), 0, 0, 0][:3]
    ranks = None if t.compaction is None else t.compaction.ranks
    row = _Row(
        dtype_name(t.weight),
        t.weight.data_ptr(),
        (address(t.master), *state, address(t.mask), address(ranks), t.weight.numel()),
    )
    t.row = row
    return row


def _probe() -> str | None:
    if "cuda" not in _modules:
        return f"its extension was not built ({_missing['cuda']}); with nvcc on the PATH run pip install again"
    if torch.version.hip is not None:
        return "this torch is for AMD GPUs; use backend 'triton'"
    if not torch.cuda.is_available():
        return "torch sees no GPU; check nvidia-smi and that torch is a CUDA build"
    capability = torch.cuda.get_device_capability()
    if capability < LOWEST_CAPABILITY:
        return f"it needs compute capability {LOWEST_CAPABILITY} or newer, got {capability}; use backend 'triton'"
    return None


def _supports(device: torch.device) -> str | None:
    return None if device.type == "cuda" else f"it takes CUDA tensors, got {device}; move them with .cuda()"


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
