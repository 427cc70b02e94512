"""Layers with patterns or scores on a device: what of them is ranked, and what follows from its cutoffs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch

from gmp_kernels.backends.addresses import bits_address, element_address
from gmp_kernels.backends.cuda.selection_tables import DTYPE_CODES, Rows, fill_chunks
from gmp_kernels.backends.layers import ranked_dtype
from gmp_kernels.backends.types import Cutoffs, Layer, PruneCounts
from gmp_kernels.backends.uploads import put

__all__ = ["PatternTable", "needs_ranking", "new_ranked", "ranking_table", "settling_table", "writes_weights"]

NO_PATTERN = 0, 0, 0, 0
WORD = 4  # bytes: groups that begin or end inside a word of bits share it


class PatternTable(NamedTuple):
    """Rows of csrc/cuda/tables.h, sorted by the kernels that they need.

    Attributes
    ----------
    order : sequence of int
        The layer that each row is for.
    rows : numpy.ndarray
        As they were uploaded.
    table : torch.Tensor
        The rows on the device.
    parts : list of tuple
        The rows that have a launch of their own, as launches take them.
    """

    order: Sequence[int]
    rows: Rows
    table: torch.Tensor
    parts: list[tuple[int, int, int, int, int]]

    def counts(self, module: Any, launch: Any) -> PruneCounts:
        """Return what ``settle`` has changed; waits for the device."""
        module.fetch(launch, self.table.data_ptr(), self.rows.view(np.int64))
        rows = np.empty_like(self.rows)
        rows[self.order] = self.rows
        return PruneCounts.from_kept(*(rows[name].tolist() for name in ("n", "kept_before", "kept")))


class _Plan(NamedTuple):
    """Numbers of a pattern, and what ``plan_of`` in _cuda.pyi says of it."""

    pattern: tuple[int, int, int, int]
    work: int
    chunk: int
    settles_alone: bool


def _plan(module: Any, layer: Layer) -> _Plan:
    pattern = NO_PATTERN
    if layer.pattern is not None:
        pattern = layer.pattern.row(layer.tensor.shape, is_channels_last=layer.is_channels_last)
    return _Plan(pattern, *module.plan_of(pattern, layer.filter))


def needs_ranking(module: Any, layer: Layer) -> bool:
    """Return whether what is ranked has to be known before it can be written."""
    return not _plan(module, layer).settles_alone


def new_ranked(layer: Layer) -> Layer:
    """Return memory for what is ranked of a layer with a pattern. The bits are zero."""
    pattern, device = layer.pattern, layer.weight.device
    assert pattern is not None
    values = layer.source
    if pattern.unit > 1:
        shape = pattern.ranked_shape(layer.tensor.shape)
        values = torch.empty(shape, dtype=ranked_dtype(layer), device=device)
    num_bytes = -(-values.numel() // 8)
    bits = torch.zeros(-(-num_bytes // WORD) * WORD, dtype=torch.uint8, device=device)[:num_bytes]
    return Layer(values, bits, layer.is_channels_last and pattern.unit == 1)


def ranking_table(module: Any, launch: Any, layers: Sequence[Layer], ranked: Sequence[Layer]) -> PatternTable:
    """Return the table with which ``rank`` fills in what is ranked of layers with patterns."""
    plans = [_plan(module, layer) for layer in layers]
    kinds = [(plan.work, DTYPE_CODES[layer.source.dtype]) for plan, layer in zip(plans, layers, strict=True)]
    chunks = [plan.chunk for plan in plans]
    return _uploaded(module, launch, _rows(module, layers, plans, ranked), kinds, chunks, layers[0].weight.device)


def settling_table(
    module: Any,
    launch: Any,
    layers: Sequence[Layer],
    ranked: Sequence[Layer | None],
    out: Sequence[torch.Tensor],
    cutoffs: Cutoffs,
) -> PatternTable:
    """Return the table with which ``settle`` writes new bits and, of layers that rank themselves, zeros."""
    plans = [_plan(module, layer) for layer in layers]
    rows = _rows(module, layers, plans, ranked)
    rows["weights"] = [element_address(layer.weight) if writes_weights(layer) else 0 for layer in layers]
    rows["out"] = [bits_address(bits, layer.weight.numel()) for bits, layer in zip(out, layers, strict=True)]
    rows["key"], rows["tie_index"] = cutoffs.keys, cutoffs.tie_indices
    kinds = [(plan.work, DTYPE_CODES[ranked_dtype(layer)]) for plan, layer in zip(plans, layers, strict=True)]
    chunks = [module.CHUNK] * len(layers)
    return _uploaded(module, launch, rows, kinds, chunks, layers[0].weight.device)


def writes_weights(layer: Layer) -> bool:
    """Return whether ``settle`` zeroes the weights of a layer too, and not only their bits."""
    return layer.scores is None and (layer.pattern is None or layer.pattern.unit == 1)


def _rows(module: Any, layers: Sequence[Layer], plans: Sequence[_Plan], ranked: Sequence[Layer | None]) -> Rows:
    """Return a row per layer; fields of chunks, and of what is written to the layer, are 0."""
    rows: Rows = np.zeros(len(layers), module.PATTERN_ROW)
    rows["source"] = [element_address(layer.source) for layer in layers]
    rows["mask"] = [bits_address(layer.mask, layer.weight.numel()) for layer in layers]
    rows["n"] = [layer.weight.numel() for layer in layers]
    rows["pattern"] = [plan.pattern for plan in plans]
    rows["filter"] = [layer.filter for layer in layers]
    for row, layer, own in zip(rows, layers, ranked, strict=True):
        if own is not None:
            row["ranked"] = element_address(own.mask)
        if own is not None and layer.pattern is not None and layer.pattern.unit > 1:
            row["sums"] = element_address(own.weight)
    return rows


def _uploaded(
    module: Any,
    launch: Any,
    rows: Rows,
    kinds: Sequence[tuple[int, int]],
    chunks: Sequence[int],
    device: torch.device,
) -> PatternTable:
    """Sort the rows by the kernels that they need, number their chunks, and copy them to the device."""
    order = sorted(range(len(kinds)), key=kinds.__getitem__)
    rows = rows[order]
    parts, first = [], 0
    for kind, own in groupby(order, kinds.__getitem__):
        last = first + len(list(own))
        own_chunks = np.array([chunks[i] for i in order[first:last]])
        num_chunks = fill_chunks(rows[first:last], rows["n"][first:last], own_chunks)
        parts.append((*kind, first, last - first, num_chunks))
        first = last
    words = rows.view(np.int64)
    table = torch.empty(words.size, dtype=torch.int64, device=device)
    put(module, launch, words, table)
    return PatternTable(order, rows, table, parts)
