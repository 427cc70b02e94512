"""Host side of an optimizer step by Triton kernels: rows of its tensors, and its constants."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch

from gmp_kernels.backends import Constants, UpdateTensor
from gmp_kernels.backends.addresses import address, element_address
from gmp_kernels.backends.triton.tables import Recent, Table, stream_of, table_of
from gmp_kernels.backends.uploads import upload

__all__ = ["Kind", "Row", "constant_table", "row_of", "tables_by_kind"]


class Kind(NamedTuple):
    """Tensors that one launch of the update may serve together."""

    dtype: torch.dtype
    num_states: int
    is_compact: bool
    has_master: bool
    aligned: bool


# A tensor's row of the table (kind, number of weights, fields), without gradient and constants, which may change with
# every step.
Row: TypeAlias = tuple[Kind, int, tuple[int, ...]]


def row_of(t: UpdateTensor) -> Row:
    """Return the tensor's row, made once."""
    if isinstance(t.row, tuple):
        return t.row
    state = list(map(element_address, t.state))
    pointers = [t.weight.data_ptr(), address(t.master), *([] if t.compaction else state)]
    kind = Kind(
        t.weight.dtype,
        len(t.state),
        t.compaction is not None and bool(state),
        t.master is not None,
        all(pointer % 16 == 0 for pointer in pointers),
    )
    chunk_offsets = None if t.compaction is None else t.compaction.chunk_offsets
    fields = (
        element_address(t.weight),
        address(t.mask),
        element_address(t.master),
        *[*state, 0, 0, 0][:3],
        address(chunk_offsets),
    )
    t.row = row = kind, t.weight.numel(), fields
    return row


def tables_by_kind(
    rows: Sequence[Row], unaligned: Iterable[int], device: torch.device
) -> list[tuple[Kind, list[int], Table]]:
    """Split a step by the kinds for which launches are compiled; return each with the positions and table of its rows.

    ``unaligned`` are the positions of gradients that are not aligned to 16 bytes.
    """
    positions: dict[Kind, list[int]] = {}
    unaligned = set(unaligned)
    for i, (kind, *_) in enumerate(rows):
        positions.setdefault(kind._replace(aligned=False) if i in unaligned else kind, []).append(i)
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
    where = (device, stream_of(device))

    def numbers() -> torch.Tensor:
        rows = [([given.get(name, value) for name, value in absent.items()], n) for given, n in constants.blocks]
        return upload([number for row, n in rows for number in row * n], torch.float64, device)

    table = recent.get((where, "numbers", constants.blocks), numbers)
    if not constants.on_device:
        return table
    spans = [(name, first, end) for name, first, end, _ in constants.on_device]

    def places() -> torch.Tensor:
        columns = {name: column for column, name in enumerate(absent)}
        taken = [row * len(absent) + columns[name] for name, first, end in spans for row in range(first, end)]
        return upload(taken, torch.int64, device)

    found = [values.expand(end - first) for _, first, end, values in constants.on_device]
    return table.index_copy(0, recent.get((where, "places", spans), places), torch.cat(found))
