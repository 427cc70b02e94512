"""Tables of a selection on a device: laid out once, filled in and uploaded by each call, and read back in one piece."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gmp_kernels.backends.addresses import bits_address, element_address
from gmp_kernels.backends.devices import current
from gmp_kernels.backends.dtypes import DTYPES
from gmp_kernels.backends.layers import by_dtype, group_positions
from gmp_kernels.backends.types import Brackets, Cutoffs, Layer, PruneCounts, Selection
from gmp_kernels.backends.uploads import put

__all__ = ["DTYPE_CODES", "NO_INDEX", "Rows", "SelectionTables", "fill_chunks"]

DTYPE_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}
NO_INDEX = (1 << 63) - 1
# Limits of the workspace of a selection: so many bytes, and a share of the largest layer. The promise is 4e6 bytes and
# that share. With all of that planned for, an H200 used 1.00 to 1.04 times as much, because torch's allocator rounds
# sizes up and leaves blocks unsplit that are up to 1 MB too large.
MEMORY_BYTES = 3 << 20
MEMORY_SHARE = 0.05
ALIGNMENT = 128  # bytes, of the workspace behind the rows: a cache line
LEAST_CAPACITY = 256  # keys per chunk; memory for them comes before flags, because a list that overflows costs a read

Rows = npt.NDArray[Any]


def fill_chunks(rows: Rows, sizes: Sequence[int] | Rows, chunk: int | Rows) -> int:
    """Number the chunks of all tensors consecutively, in their rows of csrc/cuda/tables.h; return their total.

    ``chunk`` is their size, or one for each row.
    """
    rows["n"] = sizes
    chunks = -(-rows["n"] // chunk)
    rows["first_chunk"] = chunks.cumsum() - chunks
    return int(chunks.sum())


def _rounded_up(places: int, alignment: int) -> int:
    return -(-places // alignment) * alignment


class SelectionTables(Selection):
    """Cutoffs whose numbers stay on the device until the first access, which reads all of them at once.

    The constructor lays out the tables of the layers by their addresses, sizes and dtypes alone; it keeps no tensor.
    ``filled`` returns a copy with memory on the device.

    Parameters
    ----------
    module : module
        _cuda or _simt.
    multiprocessors : int
    layers : sequence of Layer
    group_sizes : sequence of int
        As for ``Implementation.select``.
    selects, prunes : bool
        Whether the tables are for a selection, and whether ``prune`` follows, for which the selection then notes the
        weights that will not change.

    Attributes
    ----------
    sizes : list of int
        Sizes of the layers.
    rows : numpy.ndarray
        int64: all rows, as a call uploads them. ``view`` returns them as records.
    tables : numpy.ndarray
        int64, the argument of launches: rows of TABLES, one per dtype. They have places in the buffer, and in copies
        addresses. Numpy is ten times faster with plain integers.
    layer_order, group_order : numpy.ndarray
        The layer or group that each row is for; those of one dtype come together.
    buffer : torch.Tensor
        In copies only: the rows on the device, and the workspace behind them.
    """

    is_lazy = True
    buffer: torch.Tensor

    def __init__(
        self,
        module: Any,
        multiprocessors: int,
        layers: Sequence[Layer],
        group_sizes: Sequence[int],
        *,
        selects: bool = True,
        prunes: bool = False,
    ) -> None:
        self._module = module
        self.layers: Sequence[Layer] | None = None  # the layers for which `prune` may use these tables as they are
        self._launch: Any = None
        self._read: Rows | None = None
        self._found: Cutoffs | None = None
        layers = list(layers)
        self.sizes = [layer.weight.numel() for layer in layers]
        parts = list(by_dtype(layers).values())
        groups_of_parts = [group_positions(part, group_sizes) for part in parts]
        self.layer_order = np.concatenate(parts)
        self.group_order = np.concatenate(groups_of_parts)
        ordered = [layers[i] for i in self.layer_order]
        self.device = ordered[0].weight.device
        record = [
            ("nonfinite", np.int64),  # set once a NaN or Inf is found
            ("layers", module.LAYER_ROW, (len(ordered),)),
            ("groups", module.GROUP_ROW, (len(group_sizes),)),
            ("out", np.int64, (len(ordered),)),  # addresses of the new bits: the masks, if there are any
        ]
        self._record = np.dtype(record)
        self.rows: Rows = np.zeros(self._record.itemsize // 8, np.int64)
        view = self.view(self.rows)
        rows, groups = view["layers"], view["groups"]
        sizes = [layer.weight.numel() for layer in ordered]
        rows["weights"] = [element_address(layer.weight) for layer in ordered]
        rows["mask"] = view["out"] = [bits_address(layer.mask, n) for layer, n in zip(ordered, sizes, strict=True)]
        rows["cut"] = rows["tie_index"] = sizes
        rows["filter"] = [layer.filter for layer in ordered]
        rows["nonfinite"] = NO_INDEX

        tables: Rows = np.zeros(len(parts), module.TABLES)
        self.tables: Rows = tables.view(np.int64)
        first_layer = first_group = 0
        for table, part, own_groups in zip(tables, parts, groups_of_parts, strict=True):
            own = rows[first_layer : first_layer + len(part)]
            num_layers = np.array([group_sizes[g] for g in own_groups])
            group = groups[first_group : first_group + len(num_layers)]
            table["num_chunks"] = fill_chunks(own, sizes[first_layer : first_layer + len(part)], module.CHUNK)
            table["dtype"] = DTYPE_CODES[ordered[first_layer].weight.dtype]
            table["layers"], table["groups"] = (column.ctypes.data - self.rows.ctypes.data for column in (own, group))
            table["num_layers"], table["num_groups"] = len(own), len(group)
            table["permuted"] = (own["filter"] > 1).any()
            own["group"] = np.arange(len(group)).repeat(num_layers)
            group["num_layers"] = num_layers
            group["first_layer"] = firsts = num_layers.cumsum() - num_layers
            group["first_chunk"] = own["first_chunk"][firsts]
            group["n"] = np.add.reduceat(own["n"], firsts)
            group["num_chunks"] = np.diff(group["first_chunk"], append=table["num_chunks"])
            first_layer += len(own)
            first_group += len(group)
        # The row of each layer's group.
        first_layers = tables["num_layers"].cumsum() - tables["num_layers"]
        self._out_places = view["out"].ctypes.data - self.rows.ctypes.data + 8 * first_layers
        first_groups = tables["num_groups"].cumsum() - tables["num_groups"]
        self._groups = rows["group"] + first_groups.repeat(tables["num_layers"])
        self._place_workspace(tables, rows, multiprocessors, selects, prunes)
        is_place: Rows = np.zeros(len(parts), module.TABLES)
        for name in ("buffer", "layers", "groups", "bins", "lists", "list_counts", "tie_counts", "nonfinite"):
            is_place[name] = 1
        self._is_place = is_place.view(np.int64)

    def _place_workspace(self, tables: Rows, rows: Rows, multiprocessors: int, selects: bool, prunes: bool) -> None:
        """Divide the workspace: first bins, rows and counts per chunk of both lists, then flags, then candidates."""
        module = self._module
        item_sizes = np.array([list(DTYPES)[code].itemsize for code in tables["dtype"]])
        num_groups = len(self.group_order)
        num_bins = module.BINS * min(module.READERS * multiprocessors, num_groups)
        end = _rounded_up(self.rows.nbytes, ALIGNMENT)
        largest = int((rows["n"] * item_sizes.repeat(tables["num_layers"])).max())
        # The place where candidates have to end.
        room = MEMORY_BYTES + int(MEMORY_SHARE * largest) - 8 * num_bins - 8 * int(tables["num_chunks"].sum())
        key_bytes = int((tables["num_chunks"] * item_sizes).sum())
        if prunes:
            for i in np.argsort(self.layer_order):
                flag_bytes = 4 * -(-int(rows["n"][i]) // module.TOUCHED_BY)
                if rows["mask"][i] and end + flag_bytes <= room - LEAST_CAPACITY * key_bytes:
                    rows["touched"][i] = end
                    end += flag_bytes
        capacity = min(module.LIST_CAPACITY, max(0, room - end) // key_bytes) if selects else 0
        tables["capacity"] = capacity
        for table, item_size in zip(tables, item_sizes, strict=True):
            num_chunks = int(table["num_chunks"])
            table["lists"] = lists = _rounded_up(end, 8)
            table["list_counts"] = counts = _rounded_up(lists + num_chunks * capacity * int(item_size), 4)
            table["tie_counts"] = counts + 4 * num_chunks
            if selects:
                end = counts + 8 * num_chunks
        # The dtypes use these bins one after the other, and each clears them first.
        tables["bins"] = _rounded_up(end, 8)
        self._num_words = _rounded_up(end, 8) // 8 + (num_bins if selects else 0)

    def view(self, rows: Rows) -> Rows:
        """Return rows like ``self.rows`` as a record: nonfinite, layers, groups and out."""
        return rows.view(self._record).reshape(())

    def filled(
        self,
        launch: Any,
        layers: Sequence[Layer] | None = None,
        num_prune: Sequence[int] = (),
        brackets: Brackets | None = None,
        found: Cutoffs | None = None,
    ) -> SelectionTables:
        """Return a copy with memory on the device, uploaded on the stream of a launch.

        ``num_prune`` and ``brackets`` are those of ``Implementation.select``; ``found`` are the cutoffs of another
        selection.
        """
        made = copy(self)
        made.layers, made._launch = layers, launch
        made.buffer = torch.empty(self._num_words, dtype=torch.int64, device=self.device)
        rows = self.rows
        if num_prune or found is not None:
            rows = rows.copy()
            view = self.view(rows)
            groups = view["groups"]
            if num_prune:
                groups["num_prune"] = np.array(num_prune)[self.group_order]
            if brackets is not None:
                is_given = brackets.lo <= brackets.hi  # others become 0 and 0, for which the kernel takes a sample
                groups["lo"], groups["hi"] = (np.where(is_given, ends, 0)[self.group_order] for ends in brackets)
            if found is not None:
                view["layers"]["tie_index"] = tie_indices = np.array(found.tie_indices)[self.layer_order]
                filters = view["layers"]["filter"].prod(axis=1)
                view["layers"]["cut"] = -(-tie_indices // filters) * filters
                groups["key"] = np.array(found.keys)[self.layer_order]
        put(self._module, launch, rows, made.buffer)
        made.tables = self.tables + self._is_place * made.buffer.data_ptr()
        return made

    def to_write(self, launch: Any, out: Sequence[torch.Tensor] | None, *, finite: bool) -> Rows:
        """Return the tables for a launch that writes the new bits of each layer; None means to the masks.

        With ``finite``, nothing is written if a NaN or Inf was found. The next access reads the rows again.
        """
        if out is not None:
            addresses = [bits_address(out[i], self.sizes[i]) for i in self.layer_order]
            put(self._module, launch, np.array(addresses), self.buffer[int(self._out_places[0]) // 8 :])
        self._launch, self._read = launch, None
        words = self.tables.copy()
        tables = words.view(self._module.TABLES)
        tables["out"] = self.buffer.data_ptr() + self._out_places
        tables["finite"] = finite
        return words

    @property
    def flag(self) -> int:
        """The address of the word that says whether an unpruned weight is NaN or Inf."""
        return int(self.tables.view(self._module.TABLES)["nonfinite"][0])

    def set_flag(self, address: int) -> None:
        """Use another word for that, and stop an application if it is set."""
        self.tables = self.tables.copy()
        tables = self.tables.view(self._module.TABLES)
        tables["nonfinite"], tables["finite"] = address, 1

    def cutoff_addresses(self) -> tuple[Rows, Rows]:
        """Return the addresses of the row of each layer, and of the row of its group."""
        rows, groups = (np.empty(len(self.sizes), np.int64) for _ in range(2))
        first_rows, first_groups = (
            self.buffer.data_ptr() + self.view(self.rows)[name].ctypes.data - self.rows.ctypes.data
            for name in ("layers", "groups")
        )
        rows[self.layer_order] = first_rows + np.arange(len(rows)) * self._module.LAYER_ROW.itemsize
        groups[self.layer_order] = first_groups + self._groups * self._module.GROUP_ROW.itemsize
        return rows, groups

    def read(self) -> Rows:
        """Return the rows as they are on the device, as a record; waits for it the first time."""
        if self._read is None:
            rows = np.empty_like(self.rows)
            with current(self.device):
                self._module.fetch(self._launch, self.buffer.data_ptr(), rows)
            self._read = self.view(rows)
        return self._read

    @property
    def is_finite(self) -> bool:
        """Whether no unpruned weight is NaN or Inf."""
        return int(self.read()["nonfinite"]) == 0

    def counts(self) -> PruneCounts:
        """Return what pruning changed, once it is done."""
        layers = self.read()["layers"]
        return PruneCounts.from_kept(self.sizes, *(self._by_layer(layers[name]) for name in ("kept_before", "kept")))

    def _by_layer(self, column: Rows) -> list[int]:
        """Return a column of the rows of all layers, in the order of the layers."""
        found: list[int] = column.tolist()
        if len(self.tables) > len(self._module.TABLES.names):
            found = [value for _, value in sorted(zip(self.layer_order, found, strict=True))]
        return found

    @property
    def cutoffs(self) -> Cutoffs:
        """The cutoffs on the host; waits for the device the first time."""
        if self._found is None:
            layers, groups = self.read()["layers"], self.read()["groups"]
            # The values of a group are repeated for each of its layers.
            of_groups = ("key", "num_below", "num_ties", "num_ties_kept")
            nonfinite = np.where(layers["nonfinite"] == NO_INDEX, -1, layers["nonfinite"])
            tie_indices = np.where(layers["filter"].prod(axis=1) > 1, layers["tie_index"], layers["cut"])
            columns = [*(groups[name][self._groups] for name in of_groups), tie_indices, nonfinite]
            self._found = Cutoffs(*map(self._by_layer, columns))
        return self._found
