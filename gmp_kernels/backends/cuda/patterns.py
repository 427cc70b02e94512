"""Layers with patterns or scores on a device: what of them is ranked, and what follows from its cutoffs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch

from gmp_kernels.backends.addresses import bits_address, element_address
from gmp_kernels.backends.cuda.selection_tables import DTYPE_CODES, Rows, SelectionTables, fill_chunks
from gmp_kernels.backends.layers import ranked_dtype
from gmp_kernels.backends.types import Cutoffs, Layer, PruneCounts, Selection
from gmp_kernels.backends.uploads import put

__all__ = ["PatternTable", "Ranked", "RankedSelection", "needs_ranking", "settles_weights"]

NO_PATTERN = 0, 0, 0, 0
WORD = 4  # bytes: groups that begin or end inside a word of bits share it


class _Plan(NamedTuple):
    """Numbers of a pattern, and what ``plan_of`` in _cuda.pyi says of it."""

    pattern: tuple[int, int, int, int]
    work: int
    chunk: int
    settles_alone: bool


class PatternTable:
    """Rows of csrc/cuda/tables.h for layers with patterns or scores, and a word that says whether any is not finite.

    Parameters
    ----------
    module : module
        _cuda or _simt.
    layers : sequence of Layer
    ranked : sequence of Layer or None
        What is ranked of each; None if it is not known.
    """

    def __init__(self, module: Any, layers: Sequence[Layer], ranked: Sequence[Layer | None]) -> None:
        self._module = module
        self._layers = layers
        self._plans = [_plan(module, layer) for layer in layers]
        self._order: Sequence[int] = range(len(layers))
        self.rows: Rows = np.zeros(len(layers), module.PATTERN_ROW)
        rows = self.rows
        rows["source"] = [element_address(layer.source) for layer in layers]
        rows["mask"] = [bits_address(layer.mask, layer.weight.numel()) for layer in layers]
        rows["n"] = [layer.weight.numel() for layer in layers]
        rows["pattern"] = [plan.pattern for plan in self._plans]
        rows["filter"] = [layer.filter for layer in layers]
        for row, layer, own in zip(rows, layers, ranked, strict=True):
            # All of a layer without a pattern is ranked that is not pruned.
            if own is not None and layer.pattern is not None:
                row["ranked"] = element_address(own.mask)
            if own is not None and _is_in_blocks(layer):
                row["sums"] = element_address(own.weight)

    def to_rank(self, launch: Any) -> Callable[[], None]:
        """Upload the rows; return the launch that fills in what is ranked."""
        dtypes = [DTYPE_CODES[layer.source.dtype] for layer in self._layers]
        self._place(launch)
        self.rows["nonfinite"] = self.flag
        return self._uploaded(launch, self._module.rank, dtypes, [plan.chunk for plan in self._plans])

    def to_settle(
        self, launch: Any, out: Sequence[torch.Tensor], selection: Selection, *, stops_at: int
    ) -> Callable[[], None]:
        """Upload the rows; return the launch that writes the bits and, of layers that rank themselves, zeros.

        ``stops_at`` is the address of a word that, if it is not 0, keeps it from writing.
        """
        rows = self.rows
        rows["weights"] = [element_address(layer.weight) if settles_weights(layer) else 0 for layer in self._layers]
        rows["out"] = [bits_address(bits, layer.weight.numel()) for bits, layer in zip(out, self._layers, strict=True)]
        rows["nonfinite"] = stops_at
        if isinstance(selection, RankedSelection):
            rows["layer"], rows["group"] = selection.found.cutoff_addresses()
        else:
            rows["key"], rows["tie_index"] = selection.cutoffs.keys, selection.cutoffs.tie_indices
        dtypes = [DTYPE_CODES[ranked_dtype(layer)] for layer in self._layers]
        self._place(launch)
        return self._uploaded(launch, self._module.settle, dtypes, [self._module.CHUNK] * len(rows))

    @property
    def flag(self) -> int:
        """The address of the word that says whether an unpruned weight is NaN or Inf."""
        return self._table.data_ptr()

    def is_finite(self) -> bool:
        """Whether no unpruned weight was found to be NaN or Inf; waits for the device."""
        word = np.zeros(1, np.int64)
        self._module.fetch(self._launch, self.flag, word)
        return not word[0]

    def counts(self) -> PruneCounts:
        """Return what ``settle`` has changed; waits for the device."""
        self._module.fetch(self._launch, self.flag + 8, self.rows.view(np.int64))
        rows = np.empty_like(self.rows)
        rows[self._order] = self.rows
        return PruneCounts.from_kept(*(rows[name].tolist() for name in ("n", "kept_before", "kept")))

    def _place(self, launch: Any) -> None:
        self._launch = launch
        num_words = 1 + self.rows.nbytes // 8
        self._table = torch.empty(num_words, dtype=torch.int64, device=self._layers[0].weight.device)

    def _uploaded(
        self, launch: Any, run: Callable[..., None], dtypes: Sequence[int], chunks: Sequence[int]
    ) -> Callable[[], None]:
        """Sort the rows by the kernels that they need, number their chunks, and copy them to the device."""
        kinds = [(plan.work, dtype) for plan, dtype in zip(self._plans, dtypes, strict=True)]
        self._order = order = sorted(range(len(kinds)), key=kinds.__getitem__)
        self.rows = rows = self.rows[order]
        parts, first = [], 0
        for kind, own in groupby(order, kinds.__getitem__):
            last = first + len(list(own))
            sizes = np.array([chunks[i] for i in order[first:last]])
            num_chunks = fill_chunks(rows[first:last], rows["n"][first:last], sizes)
            parts.append((*kind, first, last - first, num_chunks))
            first = last
        put(self._module, launch, np.concatenate((np.zeros(1, np.int64), rows.view(np.int64))), self._table)
        return partial(run, launch, self.flag + 8, parts)


class Ranked:
    """Ranked weights or blocks of layers, as ``Implementation.ranked`` describes it, on its way.

    Attributes
    ----------
    layers : list of Layer
    table : PatternTable or None
        None if no layer has a pattern.
    sees_all : bool
        Whether the table's word is about all layers, and not only about those with a pattern.
    """

    def __init__(self, module: Any, launch: Any, layers: Sequence[Layer]) -> None:
        self.layers = [_new_ranked(layer) for layer in layers]
        self.table: PatternTable | None = None
        # An Inf among sums may be an overflow, so that with blocks a selection cannot say which weights are finite.
        self.sees_all = any(map(_is_in_blocks, layers))
        looked_at = [i for i, layer in enumerate(layers) if self.sees_all or layer.pattern is not None]
        if looked_at:
            self.table = PatternTable(module, [layers[i] for i in looked_at], [self.layers[i] for i in looked_at])
            self.table.to_rank(launch)()


class RankedSelection(Selection):
    """Cutoffs of what is ranked of layers, which stay on the device until the first access.

    Parameters
    ----------
    layers : sequence of Layer
    ranked : Ranked
    found : SelectionTables
        The selection of what is ranked, which has not been launched yet.
    nonfinite_in : callable
        Returns per layer the flat index of the first NaN or Inf in it. It is called if there is any.
    """

    is_lazy = True

    def __init__(
        self,
        layers: Sequence[Layer],
        ranked: Ranked,
        found: SelectionTables,
        nonfinite_in: Callable[[], list[int]],
    ) -> None:
        self.layers, self.ranked, self.found = layers, ranked, found
        self._nonfinite_in = nonfinite_in
        self._cutoffs_read: Cutoffs | None = None
        if ranked.table is not None and not ranked.sees_all:
            found.set_flag(ranked.table.flag)

    @property
    def flag(self) -> int:
        """The address of the word that says whether an unpruned weight is NaN or Inf."""
        return self.found.flag if self.ranked.table is None else self.ranked.table.flag

    @property
    def is_finite(self) -> bool:
        """Whether no unpruned weight is NaN or Inf; waits for the device."""
        return self.found.is_finite if self.ranked.table is None else self.ranked.table.is_finite()

    @property
    def cutoffs(self) -> Cutoffs:
        """The cutoffs on the host; waits for the device the first time."""
        if self._cutoffs_read is None:
            found = self.found.cutoffs
            nonfinite = [-1] * len(found.keys) if self.is_finite else self._nonfinite_in()
            self._cutoffs_read = found._replace(nonfinite=nonfinite)
        return self._cutoffs_read


def needs_ranking(module: Any, layer: Layer) -> bool:
    """Return whether what is ranked of a layer has to be known before it can be written."""
    return not _plan(module, layer).settles_alone


def settles_weights(layer: Layer) -> bool:
    """Return whether ``settle`` zeroes the weights of a layer too, and not only their bits."""
    return layer.scores is None and not _is_in_blocks(layer)


def _is_in_blocks(layer: Layer) -> bool:
    return layer.pattern is not None and layer.pattern.unit > 1


def _plan(module: Any, layer: Layer) -> _Plan:
    pattern = NO_PATTERN
    if layer.pattern is not None:
        pattern = layer.pattern.row(layer.tensor.shape, is_channels_last=layer.is_channels_last)
    return _Plan(pattern, *module.plan_of(pattern, layer.filter))


def _new_ranked(layer: Layer) -> Layer:
    """Return what is ranked of a layer; with a pattern, memory for it, whose bits are zero."""
    pattern, device = layer.pattern, layer.weight.device
    if pattern is None:
        return layer if layer.is_plain else Layer(layer.source, layer.mask, layer.is_channels_last)
    values = layer.source
    if pattern.unit > 1:
        shape = pattern.ranked_shape(layer.tensor.shape)
        values = torch.empty(shape, dtype=ranked_dtype(layer), device=device)
    num_bytes = -(-values.numel() // 8)
    bits = torch.zeros(-(-num_bytes // WORD) * WORD, dtype=torch.uint8, device=device)[:num_bytes]
    return Layer(values, bits, layer.is_channels_last and pattern.unit == 1)
