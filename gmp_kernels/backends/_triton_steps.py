"""What an optimizer step by Triton kernels needs besides them: rows of its tensors, and its constants."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from gmp_kernels.backends import UpdateTensor
from gmp_kernels.backends._rows import address
from gmp_kernels.backends._triton_tables import Table, Uploads, table_of

__all__ = ["Batch", "ConstantTables", "Row", "batches_of", "prepared_row"]

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
_ABSENT = list(CONSTANTS.values())
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


class Batch(NamedTuple):
    """Tensors of one launch, by their positions in the step, and their table."""

    kind: Kind
    positions: list[int]
    table: Table


def prepared_row(t: UpdateTensor) -> Row:
    """Make the tensor's row, once."""
    state = [s.data_ptr() for s in t.state]
    pointers = [t.weight.data_ptr(), address(t.master), *([] if t.compaction else state)]
    kind = Kind(
        t.weight.dtype,
        len(t.state),
        t.compaction is not None and bool(state),
        t.master is not None,
        all(pointer % 16 == 0 for pointer in pointers),
    )
    ranks = None if t.compaction is None else t.compaction.ranks
    fields = (t.weight.data_ptr(), address(t.mask), address(t.master), *[*state, 0, 0, 0][:3], address(ranks))
    t.row = row = Row(kind, t.weight.numel(), fields)
    return row


def batches_of(rows: Sequence[Row], unaligned: Iterable[int], device: torch.device) -> list[Batch]:
    positions: dict[Kind, list[int]] = {}
    unaligned = set(unaligned)
    for i, row in enumerate(rows):
        kind = row.kind._replace(aligned=False) if i in unaligned else row.kind
        positions.setdefault(kind, []).append(i)
    return [
        Batch(kind, own, table_of([rows[i].numel for i in own], [rows[i].fields for i in own], device))
        for kind, own in positions.items()
    ]


class ConstantTables:
    """Tables of a step's constants, a row to each set of them."""

    def __init__(self, uploads: Uploads) -> None:
        self._uploads = uploads

    def at(self, constants: Sequence[Mapping[str, float | torch.Tensor]], device: torch.device) -> torch.Tensor:
        """Return the table. Tensors among the constants are copied on their device, each once, and not looked at."""
        numbers: list[float] = []
        places: list[int] = []
        sources: list[int] = []  # of the places, in ``tensors``
        tensors: list[torch.Tensor] = []
        numbering: dict[int, int] = {}
        for given in constants:
            row = _ABSENT.copy()
            for name, value in given.items():
                if isinstance(value, torch.Tensor):
                    source = numbering.setdefault(id(value), len(tensors))
                    if source == len(tensors):
                        tensors.append(value)
                    places.append(len(numbers) + _COLUMNS[name])
                    sources.append(source)
                else:
                    row[_COLUMNS[name]] = value
            numbers += row
        table = self._uploads.at(numbers, torch.float64, device)
        if not places:
            return table
        found = torch.stack(tensors)
        if sources != list(range(len(tensors))):
            found = found[self._uploads.at(sources, torch.int64, device)]
        return table.index_copy(0, self._uploads.at(places, torch.int64, device), found)
