"""Tables of a selection on a device: filled in from a template that is made once, and read back in one piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from gmp_kernels.backends import Bracket, Layer, Threshold
from gmp_kernels.backends._layers import Columns, Selections, merged, thresholds_of
from gmp_kernels.backends._rows import address, by_dtype, element_address
from gmp_kernels.backends._tables import num_chunks_of, upload
from gmp_kernels.keys import keys_of_magnitudes, largest_key, magnitudes_of_keys

__all__ = ["SelectionTables", "Template"]

_NO_INDEX = (1 << 63) - 1
MEMORY_BYTES = 4 << 20  # for the workspace of a selection, and a share of the largest layer
MEMORY_SHARE = 0.05
LEAST_CAPACITY = 256  # keys per chunk that come before the flags of what is touched: a list that overflows costs a read
DRIFT_BITS = 6  # a threshold is expected within 1/64 of an octave of the last one

Integers = npt.NDArray[np.int64]


class LayerField:
    """Positions in a LayerRow of csrc/cuda/tables.h."""

    WEIGHTS, MASK, N, FIRST_CHUNK, GROUP, CUT, NONFINITE, KEPT_BEFORE, KEPT, TOUCHED, COUNT = range(11)


class GroupField:
    """Positions in a GroupRow of csrc/cuda/tables.h."""

    FIRST_LAYER, NUM_LAYERS, N, NUM_PRUNE, FIRST_CHUNK, NUM_CHUNKS, LO, HI = range(8)
    KEY, NUM_BELOW, NUM_TIES, NUM_TIES_KEPT, COUNT = range(16, 21)


class Part(NamedTuple):
    """The layers of one dtype, and where their rows are among all."""

    dtype: torch.dtype
    name: str
    positions: list[int]
    start: int
    num_groups: int
    num_chunks: int
    touched: Integers  # per layer: where its flags begin in the workspace, in bytes, -1 if it has none
    bins: int  # where they begin among all
    lists: tuple[int, int, int]  # where candidates and both counts per chunk begin in the workspace, in bytes

    def layers(self, rows: Integers) -> Integers:
        """The rows of its layers."""
        stop = self.start + LayerField.COUNT * len(self.positions)
        return rows[self.start : stop].reshape(-1, LayerField.COUNT)

    def groups(self, rows: Integers) -> Integers:
        """The rows of its groups."""
        start = self.start + LayerField.COUNT * len(self.positions)
        return rows[start : start + GroupField.COUNT * self.num_groups].reshape(-1, GroupField.COUNT)

    def taken(self, column: Sequence[Any]) -> Sequence[Any]:
        """The entries of its groups, or layers, in a column of all."""
        return [column[i] for i in self.positions] if len(self.positions) < len(column) else column


class Template:
    """Contents of a selection's tables that follow from the addresses, sizes and dtypes of its layers.

    Parameters
    ----------
    module : module
        _cuda or _simt.
    multiprocessors : int
    layers : sequence of Layer
    is_global : bool
        All layers are one group; else each is.
    selects, prunes : bool
        Whether there is something to select, and whether that is applied afterwards: what this will not change is then
        noted down for it.
    """

    def __init__(
        self,
        module: Any,
        multiprocessors: int,
        layers: Sequence[Layer],
        *,
        is_global: bool,
        selects: bool,
        prunes: bool,
    ) -> None:
        self.device = layers[0].weight.device
        self.sizes = sizes = [layer.weight.numel() for layer in layers]
        item_sizes = [layer.weight.itemsize for layer in layers]
        chunks = [num_chunks_of(n, module.CHUNK) for n in sizes]
        masks = [address(layer.mask) for layer in layers]
        num_groups = 1 if is_global else len(layers)
        num_values = 1 + (LayerField.COUNT + 1) * len(layers) + GroupField.COUNT * num_groups
        self._blocks = module.num_counting_blocks(multiprocessors)
        self._bins = module.BINS

        # What there is memory for: bins, a count per chunk in either list, the rows; then flags; then candidates.
        left = MEMORY_BYTES + int(MEMORY_SHARE * max(n * size for n, size in zip(sizes, item_sizes, strict=True)))
        left -= 8 * self._num_bins(sum(chunks)) + 8 * sum(chunks) + 8 * num_values
        key_bytes = sum(n * size for n, size in zip(chunks, item_sizes, strict=True))
        touched, used = [-1] * len(layers), 0
        if prunes:
            room = left - LEAST_CAPACITY * key_bytes
            for i, n in enumerate(sizes):
                flag_bytes = 4 * num_chunks_of(n, module.TOUCHED_BY)
                if masks[i] and used + flag_bytes <= room:
                    touched[i] = used
                    used += flag_bytes
        self.has_flags = used > 0
        left -= used
        self.capacity = min(module.LIST_CAPACITY, max(0, left // key_bytes)) if selects else 0

        self.rows: Integers = np.zeros(num_values, np.int64)  # the first is set once a NaN or Inf is found
        self.parts: list[Part] = []
        start, bins = 1, 0
        for name, positions in by_dtype(layers).items():
            own_chunks = np.array([chunks[i] for i in positions])
            dtype, num_chunks = layers[positions[0]].weight.dtype, int(own_chunks.sum())
            lists = -(-used // 8) * 8
            counts = lists + num_chunks * self.capacity * dtype.itemsize
            counts = -(-counts // 4) * 4
            part = Part(
                dtype,
                name,
                positions,
                start,
                1 if is_global else len(positions),
                num_chunks,
                np.array([touched[i] for i in positions]),
                bins,
                (lists, counts, counts + 4 * num_chunks),
            )
            if selects:
                used = counts + 8 * num_chunks
                bins += self._num_bins(num_chunks)
            rows, groups = part.layers(self.rows), part.groups(self.rows)
            rows[:, LayerField.WEIGHTS] = [element_address(layers[i].weight) for i in positions]
            rows[:, LayerField.MASK] = [masks[i] for i in positions]
            rows[:, LayerField.N] = rows[:, LayerField.CUT] = [sizes[i] for i in positions]
            rows[:, LayerField.FIRST_CHUNK] = own_chunks.cumsum() - own_chunks
            rows[:, LayerField.NONFINITE] = _NO_INDEX
            groups[:, GroupField.NUM_LAYERS] = len(positions) // part.num_groups
            if is_global:
                groups[:, GroupField.N] = rows[:, LayerField.N].sum()
                groups[:, GroupField.NUM_CHUNKS] = part.num_chunks
            else:
                rows[:, LayerField.GROUP] = groups[:, GroupField.FIRST_LAYER] = range(len(positions))
                groups[:, GroupField.N] = rows[:, LayerField.N]
                groups[:, GroupField.FIRST_CHUNK] = rows[:, LayerField.FIRST_CHUNK]
                groups[:, GroupField.NUM_CHUNKS] = own_chunks
            self.parts.append(part)
            start += rows.size + groups.size
        self.workspace_bytes, self.total_bins = used, bins
        # Where the new bits go, part by part: to the masks, unless there are none.
        self.out_start = start
        self.rows[start:] = [masks[i] for part in self.parts for i in part.positions]

    def _num_bins(self, num_chunks: int) -> int:
        """Return the number of bins that so many chunks are counted in."""
        return int(self._bins * min(self._blocks, num_chunks))


class SelectionTables(Selections):
    """Selections whose numbers stay on the device until somebody looks at them; then all are read at once.

    Parameters
    ----------
    module : module
        _cuda or _simt.
    template : Template
    layers : sequence of Layer
    num_prune, hints : sequence, optional
        As for ``Implementation.select``.
    found : Columns, optional
        Selections made elsewhere, in place of these.
    """

    def __init__(
        self,
        module: Any,
        template: Template,
        layers: Sequence[Layer],
        num_prune: Sequence[int] = (),
        hints: Sequence[Threshold | None] = (),
        found: Columns | None = None,
    ) -> None:
        self.layers = layers
        self.template = template
        device = template.device
        self._rows: Integers | None = None
        self._read: Columns | None = None
        self.workspace = torch.empty(template.workspace_bytes, dtype=torch.uint8, device=device)
        self.bins = torch.zeros(template.total_bins, dtype=torch.int64, device=device)
        rows = template.rows.copy()
        hinted = any(hints)
        for part in template.parts:
            if template.has_flags:
                flags = self.workspace.data_ptr() + part.touched
                part.layers(rows)[:, LayerField.TOUCHED] = np.where(part.touched >= 0, flags, 0)
            if num_prune:
                part.groups(rows)[:, GroupField.NUM_PRUNE] = part.taken(num_prune)
            if hinted:
                _fill_brackets(part.groups(rows), part.taken(hints), part.dtype)
            if found is not None:
                part.layers(rows)[:, LayerField.CUT] = part.taken(found.cuts)
                values = [threshold.value for threshold in part.taken(found.thresholds)]
                part.groups(rows)[:, GroupField.KEY] = keys_of_magnitudes(values, part.dtype)
        self.buffer = upload(torch.from_numpy(rows), torch.int64, device)
        self.tables = [(part.name, self._tables(module, part)) for part in template.parts]

    def _tables(self, module: Any, part: Part) -> Any:
        rows, workspace = self.buffer.data_ptr(), self.workspace.data_ptr()
        layers = rows + 8 * part.start
        return module.Tables(
            layers,
            len(part.positions),
            layers + 8 * LayerField.COUNT * len(part.positions),
            part.num_groups,
            part.num_chunks,
            self.bins.data_ptr() + 8 * part.bins,
            *[workspace + place for place in part.lists],
            self.template.capacity,
            rows,
        )

    def rows(self) -> Integers:
        """Read everything back; waits for the device the first time."""
        if self._rows is None:
            self._rows = self.buffer.to("cpu", copy=True).numpy()
        return self._rows

    def forget(self) -> None:
        """Read again next time: more has been launched."""
        self._rows = None

    @property
    def is_finite(self) -> bool:
        """Whether no unpruned weight is NaN or Inf."""
        return bool(self.rows()[0] == 0)

    def kept(self) -> tuple[list[int], list[int]]:
        """Weights kept before and now, per layer, once they have been pruned."""
        before, after = self._fields(
            [part.layers(self.rows()) for part in self.template.parts], LayerField.KEPT_BEFORE, 2
        )
        return before, after

    def brackets(self) -> list[Bracket]:
        """The bracket of every group."""
        return list(
            map(Bracket, *self._fields([part.groups(self.rows()) for part in self.template.parts], GroupField.LO, 2))
        )

    def _fields(self, rows: Sequence[Integers], first: int, number: int) -> list[list[int]]:
        """So many columns of all parts, from the first on."""
        pieces: list[list[list[int]]] = [own[:, first : first + number].T.tolist() for own in rows]
        if len(pieces) == 1:
            return pieces[0]
        positions = [part.positions for part in self.template.parts]
        return [merged(positions, column) for column in zip(*pieces, strict=True)]

    @property
    def columns(self) -> Columns:
        """All that was found; waits for the device the first time."""
        if self._read is None:
            parts, rows = self.template.parts, self.rows()
            groups = [part.groups(rows) for part in parts]
            cuts, nonfinite = self._fields([part.layers(rows) for part in parts], LayerField.CUT, 2)
            counts = self._fields(groups, GroupField.NUM_BELOW, 3)
            values = [
                np.where(
                    own[:, GroupField.NUM_TIES], magnitudes_of_keys(own[:, GroupField.KEY], part.dtype), 0.0
                ).tolist()
                for own, part in zip(groups, parts, strict=True)
            ]
            all_values = merged([part.positions for part in parts], values)
            self._read = Columns(
                thresholds_of(all_values, *counts),
                cuts,
                [-1 if index == _NO_INDEX else index for index in nonfinite],
            )
        return self._read


def _fill_brackets(groups: Integers, hints: Sequence[Threshold | None], dtype: torch.dtype) -> None:
    """Brackets around earlier thresholds; (0, 0) where it is not worth trying, because a miss costs a read."""
    nothing = Threshold(0.0, 0, 0, 0)
    value, below, ties, kept = zip(*(hint or nothing for hint in hints), strict=True)
    num_pruned = np.array(below) + np.array(ties) - np.array(kept)
    moved = np.abs(num_pruned - groups[:, GroupField.NUM_PRUNE])
    near = (np.array(ties) > 0) & (moved <= groups[:, GroupField.N] // 1024)
    one, two = keys_of_magnitudes([1.0, 2.0], dtype).tolist()
    drift = max(1, (two - one) >> DRIFT_BITS)
    keys = keys_of_magnitudes(value, dtype)
    groups[:, GroupField.LO] = np.where(near, np.maximum(keys - drift, 0), 0)
    groups[:, GroupField.HI] = np.where(near, np.minimum(keys + drift, largest_key(dtype)), 0)
