"""Host side of a selection by Triton kernels: its layers as tables, and its numbers once they are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from gmp_kernels.backends import Layer, Threshold
from gmp_kernels.backends.addresses import address, element_address, on_device
from gmp_kernels.backends.keys import key_of, largest_key, magnitudes_of_keys
from gmp_kernels.backends.layers import Columns, Selections, merged, thresholds_of
from gmp_kernels.backends.triton.tables import BLOCK, INTERPRETED, Table, table_of
from gmp_kernels.backends.uploads import upload

__all__ = [
    "COUNTERS",
    "HEADER",
    "LAYER_FIELDS",
    "MAX_CAPACITY",
    "MAX_SLOTS",
    "NO_INDEX",
    "FoundSelections",
    "Part",
    "counts_of",
    "parts_of",
    "taken",
]

T = TypeVar("T")
Numbers: TypeAlias = npt.NDArray[np.int64]

MAX_BIN_BITS = 11  # 2048 bins: each pass narrows a key by so many bits
MAX_BINS = 1 << 18  # of all groups together: 2 MB
MAX_CAPACITY = BLOCK // 16  # candidates kept per chunk
# Programs that share a read of all weights: so many more than a GPU holds that the last ones keep few of the others
# waiting, and yet each has enough to do. Under the interpreter so few that each gets a run of chunks too.
PROGRAMS = 3 if INTERPRETED else 4096
MEMORY_BYTES, MEMORY_SHARE = 4_000_000, 0.05  # for all that a selection allocates, and a share of the largest layer
MAX_SLOTS = 32  # that neighbouring chunks add to in turn
NO_INDEX = (1 << 63) - 1
# As in _triton_select.py.
HEADER, STATE_FIELDS, KEY, LAYER_FIELDS, COUNTERS = 2, 10, 6, 2, 4


def _slots(number: int, most_chunks: int) -> int:
    """Slots of each of so many sums: many where there are few of them, for then each is added to often."""
    return max(1, min(MAX_SLOTS, 4096 // number, most_chunks))


def taken(column: Sequence[T], positions: Sequence[int]) -> Sequence[T]:
    """Return the entries of one part in a column of all layers; most calls have one part."""
    return [column[i] for i in positions] if len(positions) < len(column) else column


class Part(NamedTuple):
    """The layers of one dtype in a selection, and what the kernels get of it."""

    positions: list[int]  # of its layers
    groups: list[int]  # of its entries in num_prune
    members: list[list[int]]  # the layers of each group, as indices into positions
    numels: list[int]
    dtype: torch.dtype
    device: torch.device
    aligned: bool
    masked: bool  # some layer has a mask
    table: Table
    run: int  # chunks per program that reads all weights
    group_table: torch.Tensor
    group_slots: int
    layer_slots: int
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
        return self.counts_start + self.num_layers * self.layer_slots * COUNTERS

    @property
    def num_runs(self) -> int:
        """Programs that share a read of all weights."""
        return -(-self.table.num_chunks // self.run)

    @property
    def table_bytes(self) -> int:
        """Of what was uploaded, and stays."""
        return int(self.table.rows.nbytes + self.table.owners.nbytes + self.group_table.nbytes)

    @property
    def work_size(self) -> int:
        """Numbers that a selection adds up: bins and counters of each group, and the ties of each segment."""
        bins = len(self.groups) * ((1 << self.bin_bits) + COUNTERS * self.group_slots)
        return bins + self.num_runs + self.num_layers


def parts_of(layers: Sequence[Layer], *, is_global: bool) -> list[Part]:
    """Split layers by dtype, and upload what of them stays as long as their addresses do."""
    by_dtype: dict[torch.dtype, list[int]] = {}
    for i, layer in enumerate(layers):
        by_dtype.setdefault(layer.weight.dtype, []).append(i)
    num_groups = len(by_dtype) if is_global else len(layers)
    parts: list[Part] = []
    for positions in by_dtype.values():
        own = [layers[i] for i in positions]
        parts.append(_part(own, positions, is_global, num_groups, parts[-1].end if parts else 1))
    # Lists get what memory the rest leaves; one part after the other has them.
    left = int(MEMORY_SHARE * max(layer.weight.nbytes for layer in layers)) + MEMORY_BYTES - 32 * len(layers)
    left -= 8 * (parts[-1].end + sum(part.work_size for part in parts)) + sum(part.table_bytes for part in parts)
    return [part._replace(capacity=_capacity(part, left)) for part in parts]


def _capacity(part: Part, memory: int) -> int:
    """Keys that the list of a chunk has room for."""
    chunks = part.table.num_chunks
    return max(0, min(MAX_CAPACITY, (memory - 4 * chunks) // (chunks * part.dtype.itemsize)))


def _part(layers: Sequence[Layer], positions: list[int], is_global: bool, num_groups: int, start: int) -> Part:
    """Lay out a part of a call that has so many groups in all, but for its lists."""
    weights = [layer.weight for layer in layers]
    device, dtype = weights[0].device, weights[0].dtype
    numels = [weight.numel() for weight in weights]
    members = [list(range(len(layers)))] if is_global else [[i] for i in range(len(layers))]
    fields, group_rows, first_chunk = [], [], 0
    for g, indices in enumerate(members):
        offset, chunks = 0, 0
        for i in indices:
            fields.append([element_address(weights[i]), address(layers[i].mask), g, offset])
            offset += numels[i]
            chunks += -(-numels[i] // BLOCK)
        row_bits = (len(indices) - 1).bit_length()
        group_rows.append([offset, indices[0], len(indices), row_bits, first_chunk, chunks])
        first_chunk += chunks
    table = table_of(numels, fields, device)
    bin_bits = max(2, min(MAX_BIN_BITS, (MAX_BINS // num_groups).bit_length() - 1))
    return Part(
        positions,
        [0] if is_global else positions,
        members,
        numels,
        dtype,
        device,
        all(weight.data_ptr() % 16 == 0 for weight in weights),
        any(layer.mask is not None for layer in layers),
        table,
        -(-table.num_chunks // PROGRAMS),
        upload(group_rows, torch.int64, device),
        _slots(len(members), max(row[-1] for row in group_rows)),
        _slots(len(layers), -(-max(numels) // BLOCK)),
        bin_bits,
        0,
        start,
    )


class FoundSelections(Selections):
    """Selections whose numbers stay on the device; the first access synchronizes, and reads them all.

    Parameters
    ----------
    layers
        As for ``Implementation.select``.
    parts : list of Part
        Of these layers.
    """

    is_lazy = True

    def __init__(self, layers: Sequence[Layer], parts: list[Part]) -> None:
        self.layers, self.parts = layers, parts
        # At once with what the parts add up, which is not read: for a GPU, memory costs a launch to set to zero.
        sizes = [parts[-1].end, *(part.work_size for part in parts)]
        zeros = torch.zeros(sum(sizes), dtype=torch.int64, device=parts[0].device)
        # Set once a NaN or Inf is found; then the state of the parts.
        self.buffer, *self.works = torch.split(zeros, sizes)
        self.states = [self.buffer[part.start : part.end] for part in parts]
        self._values: Numbers | None = None
        self._found: Columns | None = None

    @classmethod
    def of(cls, layers: Sequence[Layer], parts: list[Part], columns: Columns) -> FoundSelections:
        """Bring selections that were made elsewhere to the device."""
        result = cls(layers, parts)
        result._found = columns
        for part in parts:
            groups = len(part.groups)
            keys = [key_of(columns.thresholds[g].value, part.dtype) for g in part.groups]
            uploaded = upload([*keys, *(columns.cuts[i] for i in part.positions)], torch.int64, part.device)
            first = part.start + HEADER + KEY * groups
            result.buffer[first : first + groups] = uploaded[:groups]
            result.buffer[part.layers_start : part.counts_start : LAYER_FIELDS] = uploaded[groups:]
        return result

    def read(self) -> Numbers:
        """Read the buffer as it is now; waits for the device."""
        with on_device(self.buffer.device, "select"):
            self._values = values = self.buffer.cpu().numpy()
        return values

    @property
    def columns(self) -> Columns:
        """All there is to know of them."""
        if self._found is None:
            values = self.read() if self._values is None else self._values
            thresholds, cuts, nonfinite = zip(*(_columns(part, values) for part in self.parts), strict=True)
            groups, positions = ([getattr(part, name) for part in self.parts] for name in ("groups", "positions"))
            self._found = Columns(merged(groups, thresholds), merged(positions, cuts), merged(positions, nonfinite))
        return self._found

    def __len__(self) -> int:
        return sum(len(part.groups) for part in self.parts)


def counts_of(part: Part, values: Numbers) -> tuple[list[int], list[int]]:
    """Weights kept before and after ``apply``, of each layer, in the buffer as read."""
    slots = values[part.counts_start : part.end].reshape(part.num_layers, -1, COUNTERS)
    before, after, *_ = slots.sum(1).T.tolist()
    return before, after


def _columns(part: Part, values: Numbers) -> tuple[list[Threshold], list[int], list[int]]:
    state = values[part.start + HEADER : part.layers_start].reshape(STATE_FIELDS, -1)
    cuts, nonfinite = values[part.layers_start : part.counts_start].reshape(-1, LAYER_FIELDS).T
    thresholds = thresholds_of(magnitudes_of_keys(state[KEY], part.dtype).tolist(), *state[KEY + 1 :].tolist())
    return thresholds, cuts.tolist(), np.where(nonfinite, NO_INDEX - nonfinite, -1).tolist()
