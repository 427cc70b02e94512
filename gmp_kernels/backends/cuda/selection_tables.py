"""Tables of a selection on a device: filled in from a template that is made once, and read back in one piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from gmp_kernels.backends.addresses import bits_address, by_dtype, element_address, group_positions
from gmp_kernels.backends.layers import merged
from gmp_kernels.backends.types import Brackets, Cutoffs, Layer, PruneCounts, Selection
from gmp_kernels.backends.uploads import current, num_chunks_of, put

__all__ = ["SelectionTables", "Template"]

_NO_INDEX = (1 << 63) - 1
# For the workspace of a selection, and a share of the largest layer. Promised are 4e6 bytes and that share; with all of
# them planned for, an H200 used 1.00 to 1.04 of it, because torch's allocator rounds sizes up and leaves blocks unsplit
# that are up to 1 MB too large.
MEMORY_BYTES = 3 << 20
MEMORY_SHARE = 0.05
ALIGNMENT = 128  # bytes, of what follows the rows: a cache line
LEAST_CAPACITY = 256  # keys per chunk that come before the flags of what is touched: a list that overflows costs a read

Integers = npt.NDArray[np.int64]


class LayerField:
    """Positions in a LayerRow of csrc/cuda/tables.h."""

    WEIGHTS, MASK, N, FIRST_CHUNK, GROUP, TIE_INDEX, NONFINITE, KEPT_BEFORE, KEPT, TOUCHED, COUNT = range(11)


class GroupField:
    """Positions in a GroupRow of csrc/cuda/tables.h."""

    FIRST_LAYER, NUM_LAYERS, N, NUM_PRUNE, FIRST_CHUNK, NUM_CHUNKS, LO, HI = range(8)
    KEY, NUM_BELOW, NUM_TIES, NUM_TIES_KEPT, COUNT = range(16, 21)


class Part(NamedTuple):
    """The layers of one dtype, and where their rows are among all."""

    dtype: str
    positions: list[int]
    group_positions: Sequence[int]
    start: int
    num_chunks: int
    lists: tuple[int, int, int]  # where candidates and both counts per chunk begin in the buffer, in bytes

    @property
    def num_groups(self) -> int:
        """Groups of its layers."""
        return len(self.group_positions)

    def layers(self, rows: Integers) -> Integers:
        """The rows of its layers."""
        stop = self.start + LayerField.COUNT * len(self.positions)
        return rows[self.start : stop].reshape(-1, LayerField.COUNT)

    def groups(self, rows: Integers) -> Integers:
        """The rows of its groups."""
        start = self.start + LayerField.COUNT * len(self.positions)
        return rows[start : start + GroupField.COUNT * self.num_groups].reshape(-1, GroupField.COUNT)


class Template:
    """Contents of a selection's tables that follow from the addresses, sizes and dtypes of its layers.

    Parameters
    ----------
    module : module
        _cuda or _simt.
    multiprocessors : int
    layers : sequence of Layer
    group_sizes : sequence of int
        As for ``Implementation.select``.
    selects, prunes : bool
        Whether there is something to select, and whether that is applied afterwards: what this will not change is then
        noted down for it.
    """

    def __init__(
        self,
        module: Any,
        multiprocessors: int,
        layers: Sequence[Layer],
        group_sizes: Sequence[int],
        *,
        selects: bool,
        prunes: bool,
    ) -> None:
        self.device = layers[0].weight.device
        self.sizes = sizes = [layer.weight.numel() for layer in layers]
        item_sizes = [layer.weight.itemsize for layer in layers]
        chunks = [num_chunks_of(n, module.CHUNK) for n in sizes]
        masks = [bits_address(layer.mask, n) for layer, n in zip(layers, sizes, strict=True)]
        num_groups = len(group_sizes)
        num_values = 1 + (LayerField.COUNT + 1) * len(layers) + GroupField.COUNT * num_groups
        self._blocks = module.num_counting_blocks(multiprocessors)
        self._bins = module.BINS

        # What there is memory for: bins, a count per chunk in either list, the rows; then flags; then candidates.
        left = MEMORY_BYTES + int(MEMORY_SHARE * max(n * size for n, size in zip(sizes, item_sizes, strict=True)))
        front = -(-8 * num_values // ALIGNMENT) * ALIGNMENT  # what the rows take of the buffer, in bytes
        left -= 8 * self._num_bins(num_groups) + 8 * sum(chunks) + front
        key_bytes = sum(n * size for n, size in zip(chunks, item_sizes, strict=True))
        touched, used = {}, front
        if prunes:
            room = front + left - LEAST_CAPACITY * key_bytes
            for i, n in enumerate(sizes):
                flag_bytes = 4 * num_chunks_of(n, module.TOUCHED_BY)
                if masks[i] and used + flag_bytes <= room:
                    touched[i] = used
                    used += flag_bytes
        left -= used - front
        self.capacity = min(module.LIST_CAPACITY, max(0, left // key_bytes)) if selects else 0

        self.rows: Integers = np.zeros(num_values, np.int64)  # the first is set once a NaN or Inf is found
        self.parts: list[Part] = []
        start = 1
        for name, positions in by_dtype(layers).items():
            own_chunks = np.array([chunks[i] for i in positions])
            itemsize, num_chunks = item_sizes[positions[0]], int(own_chunks.sum())
            lists = -(-used // 8) * 8
            counts = lists + num_chunks * self.capacity * itemsize
            counts = -(-counts // 4) * 4
            own_groups = group_positions(positions, group_sizes)
            part = Part(name, positions, own_groups, start, num_chunks, (lists, counts, counts + 4 * num_chunks))
            if selects:
                used = counts + 8 * num_chunks
            rows, groups = part.layers(self.rows), part.groups(self.rows)
            rows[:, LayerField.WEIGHTS] = [element_address(layers[i].weight) for i in positions]
            rows[:, LayerField.MASK] = [masks[i] for i in positions]
            rows[:, LayerField.N] = rows[:, LayerField.TIE_INDEX] = [sizes[i] for i in positions]
            rows[:, LayerField.FIRST_CHUNK] = own_chunks.cumsum() - own_chunks
            rows[:, LayerField.NONFINITE] = _NO_INDEX
            num_layers = np.array([group_sizes[g] for g in own_groups])
            rows[:, LayerField.GROUP] = np.arange(part.num_groups).repeat(num_layers)
            groups[:, GroupField.NUM_LAYERS] = num_layers
            groups[:, GroupField.FIRST_LAYER] = firsts = num_layers.cumsum() - num_layers
            groups[:, GroupField.N] = np.add.reduceat(rows[:, LayerField.N], firsts)
            groups[:, GroupField.FIRST_CHUNK] = rows[firsts, LayerField.FIRST_CHUNK]
            groups[:, GroupField.NUM_CHUNKS] = np.add.reduceat(own_chunks, firsts)
            self.parts.append(part)
            start += rows.size + groups.size
        # One part after the other counts in these, and clears them first.
        self.bins = -(-used // 8) * 8
        self.num_words = self.bins // 8 + (self._num_bins(num_groups) if selects else 0)
        # Where the new bits go, part by part: to the masks, unless there are none.
        self.out_start = start
        self.rows[start:] = [masks[i] for part in self.parts for i in part.positions]
        # Places in the rows of what every call fills in: counts to prune, and addresses of flags, which `touched` gives
        # less that of the buffer.
        places = np.arange(num_values)
        self.num_prune_at = np.concatenate([part.groups(places)[:, GroupField.NUM_PRUNE] for part in self.parts])
        touched_at = np.concatenate([part.layers(places)[:, LayerField.TOUCHED] for part in self.parts])
        order = np.argsort([i for part in self.parts for i in part.positions])
        self.num_prune_at = self.num_prune_at[np.argsort([g for part in self.parts for g in part.group_positions])]
        self.touched_at = touched_at[order][list(touched)]
        self.touched = np.array(list(touched.values()), np.int64)

    def _num_bins(self, num_groups: int) -> int:
        """Return the number of bins that so many groups are counted in."""
        return int(self._bins * min(self._blocks, num_groups))


class SelectionTables(Selection):
    """Cutoffs whose numbers stay on the device until somebody looks at them; then all are read at once.

    Parameters
    ----------
    module : module
        _cuda or _simt.
    launch : Launch
        The stream that all of it happens on.
    template : Template
    layers : sequence of Layer, optional
        Those that ``prune`` may take these for, as they are.
    num_prune, brackets : sequence, optional
        As for ``Implementation.select``.
    found : Cutoffs, optional
        Those of a selection made elsewhere.
    """

    is_lazy = True

    def __init__(
        self,
        module: Any,
        launch: Any,
        template: Template,
        layers: Sequence[Layer] | None = None,
        num_prune: Sequence[int] = (),
        brackets: Brackets | None = None,
        found: Cutoffs | None = None,
    ) -> None:
        self.layers = layers
        self.template = template
        self._module, self._launch = module, launch
        self._rows: Integers | None = None
        self._read: Cutoffs | None = None
        self.buffer = torch.empty(template.num_words, dtype=torch.int64, device=template.device)
        self.address = self.buffer.data_ptr()
        rows = template.rows.copy()
        if template.touched.size:
            rows[template.touched_at] = template.touched + self.address
        if num_prune:
            rows[template.num_prune_at] = num_prune
        for part in template.parts:
            if brackets is not None:
                ends = np.stack(brackets, axis=1)[part.group_positions]
                ends[ends[:, 0] > ends[:, 1]] = 0  # a sample gives one
                part.groups(rows)[:, GroupField.LO : GroupField.HI + 1] = ends
            if found is not None:
                part.layers(rows)[:, LayerField.TIE_INDEX] = [found.tie_indices[i] for i in part.positions]
                part.groups(rows)[:, GroupField.KEY] = [found.keys[i] for i in part.positions]
        put(module, launch, rows, self.buffer)
        self.tables = [(part.dtype, self._tables(part)) for part in template.parts]

    def _tables(self, part: Part) -> Any:
        layers = self.address + 8 * part.start
        return self._module.tables(
            layers,
            len(part.positions),
            layers + 8 * LayerField.COUNT * len(part.positions),
            part.num_groups,
            part.num_chunks,
            *[self.address + place for place in (self.template.bins, *part.lists)],
            self.template.capacity,
            self.address,
        )

    def rows(self) -> Integers:
        """Read everything back; waits for the device the first time."""
        if self._rows is None:
            rows: Integers = np.empty(self.template.rows.size, np.int64)
            with current(self.template.device):
                self._module.fetch(self._launch, self.address, rows)
            self._rows = rows
        return self._rows

    def forget(self, launch: Any) -> None:
        """Read again next time, behind what has been launched now."""
        self._launch, self._rows = launch, None

    @property
    def is_finite(self) -> bool:
        """Whether no unpruned weight is NaN or Inf."""
        return bool(self.rows()[0] == 0)

    def counts(self) -> PruneCounts:
        """Return what pruning changed, once it is done."""
        n, before, now = self._columns(LayerField.N, LayerField.KEPT_BEFORE, LayerField.KEPT)
        return PruneCounts.from_kept(n, before, now)

    def _columns(self, *fields: int) -> list[list[int]]:
        """Return columns of the layers of all parts."""
        parts = self.template.parts
        pieces = [part.layers(self.rows())[:, fields].T.tolist() for part in parts]
        return [merged([part.positions for part in parts], list(column)) for column in zip(*pieces, strict=True)]

    @property
    def cutoffs(self) -> Cutoffs:
        """The cutoffs on the host; waits for the device the first time."""
        if self._read is None:
            # What belongs to a group is repeated for each of its layers.
            fields = slice(GroupField.KEY, GroupField.NUM_TIES_KEPT + 1)
            parts, rows = self.template.parts, self.rows()
            pieces = [part.groups(rows)[part.layers(rows)[:, LayerField.GROUP], fields].T.tolist() for part in parts]
            positions = [part.positions for part in parts]
            key, below, ties, kept = (merged(positions, list(column)) for column in zip(*pieces, strict=True))
            tie_indices, nonfinite = self._columns(LayerField.TIE_INDEX, LayerField.NONFINITE)
            if self.is_finite:
                nonfinite = [-1] * len(nonfinite)
            else:
                nonfinite = [-1 if index == _NO_INDEX else index for index in nonfinite]
            self._read = Cutoffs(key, below, ties, kept, tie_indices, nonfinite)
        return self._read
