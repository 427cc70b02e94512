"""What a selection by Triton kernels needs besides them: its layers as tables, and its numbers once they are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import torch

from gmp_kernels.backends import Layer, Selection, Threshold
from gmp_kernels.backends._rows import address
from gmp_kernels.backends._tables import upload
from gmp_kernels.backends._triton_tables import BLOCK, Table, table_of
from gmp_kernels.keys import key_of, largest_key, magnitude_of

__all__ = ["MAX_SLOTS", "Part", "Selections", "parts_of", "slots_for"]

MAX_BIN_BITS = 11  # 2048 bins: each pass narrows a key by so many bits
MAX_BINS = 1 << 18  # of all groups together: 2 MB
MAX_CAPACITY = BLOCK // 16  # candidates kept per chunk
MEMORY_BYTES, MEMORY_SHARE = 4_000_000, 0.05  # for all that a selection allocates, and a share of the largest layer
MAX_SLOTS = 32  # that neighbouring chunks add to in turn
NO_INDEX = (1 << 63) - 1
# As in _triton_select.py.
HEADER, STATE_FIELDS, KEY, LAYER_FIELDS, COUNTERS = 2, 10, 6, 2, 4


def slots_for(number: int) -> int:
    """Slots of each of so many sums: many where there are few of them, for then each is added to often."""
    return max(1, min(MAX_SLOTS, 4096 // number))


class Part(NamedTuple):
    """The layers of one dtype in a selection, and what the kernels get of it."""

    positions: list[int]  # of its layers
    groups: list[int]  # of its entries in num_prune
    members: list[list[int]]  # the layers of each group, as indices into positions
    numels: list[int]
    dtype: torch.dtype
    device: torch.device
    aligned: bool
    table: Table
    group_table: torch.Tensor
    bin_bits: int
    capacity: int
    start: int  # of its state in the buffer

    @property
    def num_layers(self) -> int:
        """Layers of all groups."""
        return len(self.numels)

    @property
    def key_bits(self) -> int:
        """Length of a key."""
        return largest_key(self.dtype).bit_length()

    @property
    def layers_start(self) -> int:
        """Start of the layers' state in the buffer; counts of kept weights follow it."""
        return self.start + HEADER + STATE_FIELDS * len(self.groups)

    @property
    def counts_start(self) -> int:
        """Start of the counts that ``apply`` leaves."""
        return self.layers_start + LAYER_FIELDS * self.num_layers

    @property
    def end(self) -> int:
        """End of its state in the buffer."""
        return self.counts_start + self.num_layers * slots_for(self.num_layers) * COUNTERS


def parts_of(layers: Sequence[Layer], *, is_global: bool) -> list[Part]:
    """Split layers by dtype, and upload what of them stays as long as their addresses do."""
    by_dtype: dict[torch.dtype, list[int]] = {}
    for i, layer in enumerate(layers):
        by_dtype.setdefault(layer.weight.dtype, []).append(i)
    largest = max(layer.weight.nbytes for layer in layers)
    parts: list[Part] = []
    for positions in by_dtype.values():
        part = _part([layers[i] for i in positions], positions, is_global, largest, parts[-1].end if parts else 1)
        parts.append(part)
    return parts


def _part(layers: Sequence[Layer], positions: list[int], is_global: bool, largest: int, start: int) -> Part:
    weights = [layer.weight for layer in layers]
    device, dtype = weights[0].device, weights[0].dtype
    numels = [weight.numel() for weight in weights]
    members = [list(range(len(layers)))] if is_global else [[i] for i in range(len(layers))]
    fields, group_rows, first_chunk = [], [], 0
    for g, indices in enumerate(members):
        offset, chunks = 0, 0
        for i in indices:
            fields.append([weights[i].data_ptr(), address(layers[i].mask), g, offset])
            offset += numels[i]
            chunks += -(-numels[i] // BLOCK)
        row_bits = (len(indices) - 1).bit_length()
        group_rows.append([offset, indices[0], len(indices), row_bits, first_chunk, chunks])
        first_chunk += chunks
    table = table_of(numels, fields, device)
    bin_bits = max(2, min(MAX_BIN_BITS, (MAX_BINS // len(members)).bit_length() - 1))
    part = Part(
        positions,
        [0] if is_global else positions,
        members,
        numels,
        dtype,
        device,
        all(weight.data_ptr() % 16 == 0 for weight in weights),
        table,
        upload(group_rows, torch.int64, device),
        bin_bits,
        0,
        start,
    )
    # Lists get what memory the rest leaves.
    num_bins = len(members) * ((1 << bin_bits) + COUNTERS * slots_for(len(members)))
    tables = table.rows.nbytes + table.owners.nbytes + part.group_table.nbytes + 32 * len(layers)
    left = MEMORY_SHARE * largest + MEMORY_BYTES - 8 * (num_bins + part.end) - tables - 2 * table.num_chunks
    capacity = int(left) // (table.num_chunks * dtype.itemsize)
    return part._replace(capacity=max(0, min(MAX_CAPACITY, capacity)))


class Selections(Sequence[Selection]):
    """Selections whose numbers stay on the device; the first access synchronizes, and reads them all.

    Parameters
    ----------
    layers
        As for ``Implementation.select``.
    parts : list of Part
        Of these layers.
    """

    def __init__(self, layers: Sequence[Layer], parts: list[Part]) -> None:
        self.layers, self.parts = layers, parts
        # Set once a NaN or Inf is found; then the state of the parts.
        self.buffer = torch.zeros(parts[-1].end, dtype=torch.int64, device=parts[0].device)
        self._num_groups = sum(len(part.groups) for part in parts)
        self._values: torch.Tensor | None = None
        self._selections: list[Selection] | None = None

    @classmethod
    def given(cls, layers: Sequence[Layer], parts: list[Part], selections: Sequence[Selection]) -> Selections:
        """Bring selections that were made elsewhere to the device."""
        result = cls(layers, parts)
        for part in parts:
            chosen = [selections[g] for g in part.groups]
            keys = [key_of(selection.threshold.value, part.dtype) for selection in chosen]
            cuts = [cut for selection in chosen for cut in selection.cuts]
            first = part.start + HEADER + KEY * len(keys)
            uploaded = upload([*keys, *cuts], torch.int64, part.device)
            result.buffer[first : first + len(keys)] = uploaded[: len(keys)]
            result.buffer[part.layers_start : part.counts_start : LAYER_FIELDS] = uploaded[len(keys) :]
        return result

    def read(self) -> torch.Tensor:
        """Read the buffer as it is now; waits for the device."""
        self._values = self.buffer.cpu()
        return self._values

    def counts(self) -> list[list[list[int]]]:
        """Weights kept before and after ``apply``, of each layer of each part as last read."""
        values = self.read() if self._values is None else self._values
        return [
            values[part.counts_start : part.end].view(part.num_layers, -1, COUNTERS).sum(1)[:, :2].tolist()
            for part in self.parts
        ]

    def _found(self) -> list[Selection]:
        if self._selections is None:
            values = self.read() if self._values is None else self._values
            found: dict[int, Selection] = {}
            for part in self.parts:
                state = values[part.start + HEADER : part.layers_start].view(STATE_FIELDS, -1)
                layers = values[part.layers_start : part.counts_start].view(-1, LAYER_FIELDS)
                cuts, nonfinite = layers.t().tolist()
                nonfinite = [NO_INDEX - found if found else -1 for found in nonfinite]
                answers = zip(part.groups, part.members, *state[KEY:].tolist(), strict=True)
                for g, members, key, num_below, num_ties, num_ties_kept in answers:
                    value = magnitude_of(key, part.dtype) if num_ties else 0.0
                    found[g] = Selection(
                        Threshold(value, num_below, num_ties, num_ties_kept),
                        tuple([cuts[i] for i in members]),
                        tuple([nonfinite[i] for i in members]),
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
        return self._found()[index]
