"""Tables in device memory that the Triton kernels read; most steps reuse those of the last one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import torch

from gmp_kernels.backends.addresses import address, element_address
from gmp_kernels.backends.devices import stream_of
from gmp_kernels.backends.types import Constants, UpdateTensor
from gmp_kernels.backends.uploads import Recent, upload

__all__ = ["BLOCK", "INTERPRETED", "Kind", "Table", "constant_table", "row_of", "table_of", "tables_by_kind"]

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
# Weights per chunk: as many as registers hold. Under the interpreter a program of any size takes milliseconds, and the
# tests' sizes lie around this one.
BLOCK = 16384 if INTERPRETED else 2048
FIELDS = 11  # of a table's rows, as in tiles.py

# Rows in device memory, and whose row each chunk is; chunks of all rows are numbered through.
Table: TypeAlias = tuple[torch.Tensor, torch.Tensor]
# Tensors that one launch serves together have the same dtype, dtype and number of states, compact state or not, master
# weights or not, and lie on 16 bytes or not.
Kind: TypeAlias = tuple[torch.dtype, torch.dtype, int, bool, bool, bool]
# A tensor's row of the table, less its gradient and constants, which may change with every step: kind, number of
# weights, fields.
Row: TypeAlias = tuple[Kind, int, tuple[int, ...]]


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
