"""Tables in device memory that the Triton kernels read; most steps reuse those of the last one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch

from gmp_kernels.backends.addresses import address, element_address
from gmp_kernels.backends.devices import stream_of
from gmp_kernels.backends.dtypes import NAMES
from gmp_kernels.backends.layers import Layer
from gmp_kernels.backends.types import Constants, UpdateTensor
from gmp_kernels.backends.uploads import Recent, upload

if TYPE_CHECKING:
    from gmp_kernels.backends.triton.patterns import Form

__all__ = [
    "BLOCK",
    "INTERPRETED",
    "LARGE",
    "Kind",
    "Part",
    "Table",
    "constant_table",
    "parts_of",
    "row_of",
    "table_of",
    "tables_by_kind",
]

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
# Weights per chunk: as many as registers hold. Under the interpreter a program of any size takes milliseconds, and the
# tests' sizes lie around this one.
BLOCK = 16384 if INTERPRETED else 2048
# From this size on, the places of weights take 64 bits, whose divisions take several times as long.
LARGE = (1 << 31) - BLOCK
# Programs that share a read of all weights. There are many more than a GPU runs at once, so that the last ones delay
# the end little, yet few enough that each has work. Under the interpreter each has to get a run of chunks too.
PROGRAMS = 3 if INTERPRETED else 4096
MAX_SLOTS = 32  # to which neighbouring chunks add in turn
FIELDS = 11  # of a table's rows, as in tiles.py

# Rows in device memory, and whose row each chunk is; chunks of all rows are numbered through.
Table: TypeAlias = tuple[torch.Tensor, torch.Tensor]
# Tensors that one launch serves together have the same dtype, dtype and number of states, compact state or not, master
# weights or not, and lie on 16 bytes or not.
Kind: TypeAlias = tuple[torch.dtype, torch.dtype, int, bool, bool, bool]
# A tensor's row of the table, less its gradient and constants, which may change with every step: kind, number of
# weights, fields.
Row: TypeAlias = tuple[Kind, int, tuple[int, ...]]


class Part(NamedTuple):
    """The layers of one dtype and form, as the kernels get them."""

    positions: list[int]
    numels: list[int]
    dtype: torch.dtype
    device: torch.device
    aligned: bool
    masked: bool  # some layer has a mask
    permuted: bool  # the memory of some layer is not in row-major order
    table: Table
    run: int  # chunks per program that reads all weights
    form: Form | None  # None if they are plain
    num_units: list[int]  # of those that have numbers: the blocks or rows of each layer
    units: Table | None

    @property
    def slots(self) -> int:
        """Slots of each of a layer's sums. Fewer layers get more slots, because each is then added to more often."""
        return max(1, min(MAX_SLOTS, 4096 // len(self.numels), -(-max(self.numels) // BLOCK)))


def table_of(
    sizes: Sequence[int], fields: Sequence[Sequence[int]], device: torch.device, chunk: int | None = None
) -> Table:
    """Upload the table of tensors of these sizes; a row holds the size, the first chunk and then ``fields``.

    Chunks are of BLOCK weights if nothing else is given.
    """
    size = BLOCK if chunk is None else chunk
    rows, chunks, total = [], [], 0
    for n, given in zip(sizes, fields, strict=True):
        rows.append([n, total, *given, *[0] * (FIELDS - 2 - len(given))])
        chunks.append(-(-n // size))
        total += chunks[-1]
    counts = upload(chunks, torch.int32, device)
    return upload(rows, torch.int64, device), torch.repeat_interleave(counts, output_size=total)


def parts_of(layers: Sequence[Layer]) -> list[Part]:
    """Split layers by dtype and form, and upload what of them stays as long as their addresses do."""
    from gmp_kernels.backends.triton import patterns  # imports triton

    positions_of: dict[tuple[str, Form | None], list[int]] = {}
    for i, layer in enumerate(layers):
        positions_of.setdefault((NAMES[layer.weight.dtype], patterns.form_of(layer)), []).append(i)
    parts = []
    for (_, form), positions in positions_of.items():
        own = [layers[i] for i in positions]
        numels = [layer.weight.numel() for layer in own]
        dtype, device = own[0].weight.dtype, own[0].weight.device
        fields: list[tuple[int, ...]] = []
        num_units: list[int] = []
        first_unit = 0
        for layer in own:
            of_pattern, number = patterns.fields_of(layer, form, first_unit)
            fields.append((element_address(layer.weight), address(layer.mask), *layer.filter, *of_pattern))
            num_units.append(number)
            first_unit += number
        table, units = table_of(numels, fields, device), None
        if form is not None and form.kernel is not None:
            units = table_of(num_units, fields, device, form.kernel[1])
        aligned = all(t.data_ptr() % 16 == 0 for layer in own for t in (layer.weight, layer.source))
        masked, permuted = any(layer.mask is not None for layer in own), any(layer.is_channels_last for layer in own)
        run = -(-len(table[1]) // PROGRAMS)
        facts = aligned, masked, permuted
        parts.append(Part(positions, numels, dtype, device, *facts, table, run, form, num_units, units))
    return parts


def row_of(t: UpdateTensor) -> Row:
    """Return the tensor's row."""
    state = list(map(element_address, t.state))
    pointers = [t.weight.data_ptr(), address(t.master), *([] if t.compaction else state)]
    is_compact = t.compaction is not None and bool(state)
    aligned = all(pointer % 16 == 0 for pointer in pointers)
    kind = t.weight.dtype, t.state_dtype, len(state), is_compact, t.master is not None, aligned
    chunk_offsets = None if t.compaction is None else t.compaction.chunk_offsets
    fields = (
        element_address(t.weight),
        address(t.mask),
        element_address(t.master),
        *[*state, 0, 0, 0][:3],
        address(chunk_offsets),
    )
    return kind, t.weight.numel(), fields


def tables_by_kind(
    rows: Sequence[Row], unaligned: Iterable[int], device: torch.device
) -> list[tuple[Kind, list[int], Table]]:
    """Split a step by the kinds for which launches are compiled; return each with the positions and table of its rows.

    ``unaligned`` are the positions of gradients that are not aligned to 16 bytes.
    """
    positions: dict[Kind, list[int]] = {}
    unaligned = set(unaligned)
    for i, (kind, *_) in enumerate(rows):
        positions.setdefault((*kind[:-1], kind[-1] and i not in unaligned), []).append(i)
    return [
        (kind, own, table_of([rows[i][1] for i in own], [rows[i][2] for i in own], device))
        for kind, own in positions.items()
    ]


def constant_table(
    constants: Constants, absent: Mapping[str, float], device: torch.device, recent: Recent[torch.Tensor]
) -> torch.Tensor:
    """Return a step's constants on the device, row after row, without reading those that are there already.

    ``absent`` has the names in the order of the columns, with the values of constants that are not given. ``recent``
    keeps uploads for steps with the same numbers.
    """

    def numbers() -> torch.Tensor:
        rows = [([given.get(name, value) for name, value in absent.items()], n) for given, n in constants.blocks]
        return upload([row for row, n in rows for _ in range(n)], torch.float64, device)

    table = recent.get((device, stream_of(device), constants.blocks), numbers)
    if constants.on_device:
        table = table.clone()  # other steps use the uploaded one
    for name, first, end, values in constants.on_device:
        table[first:end, list(absent).index(name)] = values
    return table
