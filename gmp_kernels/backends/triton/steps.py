"""Host side of an optimizer step by Triton kernels: rows of its tensors, and its constants."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from gmp_kernels.backends import Constants, UpdateTensor
from gmp_kernels.backends.addresses import address, element_address
from gmp_kernels.backends.triton.tables import Recent, Table, stream_of, table_of
from gmp_kernels.backends.uploads import upload

__all__ = ["ConstantTables", "Rows", "StepPart", "row_of", "step_parts"]

# In the order of _triton_update.py, with the values that change nothing.
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
    "skip": 0.0,
}
_COLUMNS = {name: column for column, name in enumerate(CONSTANTS)}


class Kind(NamedTuple):
    """Tensors that one launch of the update may serve together."""

    dtype: torch.dtype
    num_states: int
    is_compact: bool
    has_master: bool
    aligned: bool


class Row(NamedTuple):
    """A tensor's row of the table, less its gradient and constants: those may change with every step."""

    kind: Kind
    numel: int
    fields: tuple[int, ...]


class Rows(list[Row]):
    """Rows of a batch's tensors."""


class StepPart(NamedTuple):
    """Tensors of one launch, by their positions in the step, and their table."""

    kind: Kind
    positions: list[int]
    table: Table


def row_of(t: UpdateTensor) -> Row:
    """Make the tensor's row, once."""
    if isinstance(t.row, Row):
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
    ranks = None if t.compaction is None else t.compaction.ranks
    fields = (
        element_address(t.weight),
        address(t.mask),
        element_address(t.master),
        *[*state, 0, 0, 0][:3],
        address(ranks),
    )
    t.row = row = Row(kind, t.weight.numel(), fields)
    return row


def step_parts(rows: Sequence[Row], unaligned: Iterable[int], device: torch.device) -> list[StepPart]:
    """Split the rows of a step by what a launch is compiled for; ``unaligned`` are those of gradients."""
    positions: dict[Kind, list[int]] = {}
    unaligned = set(unaligned)
    for i, row in enumerate(rows):
        kind = row.kind._replace(aligned=False) if i in unaligned else row.kind
        positions.setdefault(kind, []).append(i)
    return [
        StepPart(kind, own, table_of([rows[i].numel for i in own], [rows[i].fields for i in own], device))
        for kind, own in positions.items()
    ]


class ConstantTables:
    """Tables of a step's constants; those of the same numbers are uploaded once."""

    def __init__(self) -> None:
        self._numbers: Recent[torch.Tensor] = Recent()
        self._places: Recent[torch.Tensor] = Recent()

    def at(self, constants: Constants, device: torch.device) -> torch.Tensor:
        """Return the table, row after row. Constants that are on the device stay there and are not looked at."""
        where = (device, stream_of(device))
        table = self._numbers.get((where, constants.blocks), partial(_upload_blocks, constants, device))
        if not constants.on_device:
            return table
        columns = [(_COLUMNS[name], first, end) for name, first, end, _ in constants.on_device]
        places = self._places.get((where, columns), partial(_upload_places, columns, device))
        found = [values.expand(end - first) for _, first, end, values in constants.on_device]
        return table.index_copy(0, places, torch.cat(found))


def _upload_blocks(constants: Constants, device: torch.device) -> torch.Tensor:
    numbers: list[float] = []
    for given, count in constants.blocks:
        numbers += [given.get(name, absent) for name, absent in CONSTANTS.items()] * count
    return upload(numbers, torch.float64, device)


def _upload_places(columns: Sequence[tuple[int, int, int]], device: torch.device) -> torch.Tensor:
    places = [row * len(CONSTANTS) + column for column, first, end in columns for row in range(first, end)]
    return upload(places, torch.int64, device)
