"""The compiled CPU kernels (csrc/cpu): AVX-512, AVX2, NEON or portable C++, on torch's number of threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

# Imported before _C, so that the process has one OpenMP runtime, torch's, and our loops run on its warm threads.
import torch

from gmp_kernels.backends import ranking
from gmp_kernels.backends.at_once import at_once
from gmp_kernels.backends.dtypes import NAMES
from gmp_kernels.backends.layers import Layers, prepared, ranked_dtype
from gmp_kernels.backends.layouts import EXCHANGE
from gmp_kernels.backends.registry import Backend, register, why_not_built
from gmp_kernels.backends.types import (
    BracketCounts,
    Brackets,
    Compaction,
    Constants,
    Cutoffs,
    Integers,
    Layer,
    PruneCounts,
    Selection,
    StateMove,
    UpdateBatch,
    UpdateTensor,
)

try:
    from gmp_kernels import _C
except ImportError as error:
    _C = None  # type: ignore[assignment]
    _import_error = str(error)


Array: TypeAlias = tuple[int, int]
State: TypeAlias = tuple[Array, Array, Array]

_DENSE = (None, None, 0)  # in place of a Compaction


def _array(tensor: torch.Tensor | None) -> Array:
    """Return address and number of elements, so that C++ can check sizes; zeros for None."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), tensor.numel())


def _state(values: torch.Tensor, layout: Compaction | None) -> State:
    mask, chunk_offsets, _ = layout or _DENSE
    return _array(values), _array(mask), _array(chunk_offsets)


def _ends(brackets: Brackets) -> list[tuple[int, int]]:
    return list(zip(brackets.lo.tolist(), brackets.hi.tolist(), strict=True))


def _layers(layers: Sequence[Layer]) -> _C.Layers:
    """Make the rows of the layers, once."""

    def make() -> _C.Layers:
        return _C.layers(
            [(NAMES[w.weight.dtype], _array(w.weight), _array(w.mask), w.filter, _ranking(w)) for w in layers]
        )

    return prepared(layers, "cpu", make)


def _ranking(layer: Layer) -> tuple[str, Array, str, tuple[int, int, int, int]] | None:
    """Return what ranks a layer: dtype and values, the dtype that is ranked, and the pattern; None for a plain one."""
    if layer.is_plain:
        return None
    shape, source = layer.tensor.shape, layer.source
    row = (0, 0, 0, 0) if layer.pattern is None else layer.pattern.row(shape, is_channels_last=layer.is_channels_last)
    return NAMES[source.dtype], _array(source), NAMES[ranked_dtype(layer)], row


def _row(t: UpdateTensor) -> _C.UpdateTensor:
    if not isinstance(t.prepared, _C.UpdateTensor):
        _, chunk_offsets, num_kept = t.compaction or _DENSE
        of_weights = NAMES[t.weight.dtype], _array(t.weight), _array(t.master)
        state = list(map(_array, t.state)), NAMES[t.state_dtype]
        t.prepared = _C.update_tensor(*of_weights, *state, _array(t.mask), _array(chunk_offsets), num_kept)
    return t.prepared


class Cpu:
    """Implementation with one C call for all layers."""

    capturable = False
    selects_patterns = True
    skips_pruned_blocks = False
    chunk = 0 if _C is None else _C.CHUNK

    def select(
        self,
        layers: Sequence[Layer],
        num_prune: Sequence[int],
        group_sizes: Sequence[int],
        brackets: Brackets | None = None,
        prunes: bool = False,
    ) -> Selection:
        expected = [] if brackets is None else _ends(brackets)
        found = _C.select(_layers(layers), num_prune, group_sizes, expected, torch.get_num_threads())
        return Selection(Cutoffs(*found))

    def ranked(self, layers: Sequence[Layer]) -> Sequence[Layer]:
        return ranking.ranked(layers)

    def count(
        self,
        layers: Sequence[Layer],
        brackets: Brackets,
        num_bins: int,
        candidates: Sequence[torch.Tensor | None] | None = None,
        chunk_bins: npt.NDArray[np.uint16] | None = None,
    ) -> BracketCounts:
        bins = np.zeros((len(layers), num_bins), np.int64)
        places = list(map(_array, candidates or [None] * len(layers)))
        of_chunks = (0, 0) if chunk_bins is None else (chunk_bins.ctypes.data, chunk_bins.size)
        asked = _ends(brackets), places, (bins.ctypes.data, bins.size), of_chunks
        rows = _C.count(_layers(layers), *asked, num_bins, torch.get_num_threads())
        below, inside, pruned, nonfinite = np.array(rows, np.int64).reshape(-1, 4).T
        return BracketCounts(below, inside, pruned, nonfinite, bins)

    def draw(
        self, layers: Sequence[Layer], groups: Sequence[tuple[int, int, int]]
    ) -> tuple[npt.NDArray[np.signedinteger], Integers, Integers]:
        itemsize = layers[groups[0][0]].weight.dtype.itemsize
        row = max(wanted for *_, wanted in groups) + _C.DRAW_SLACK_BYTES // itemsize
        keys = np.empty((len(groups), row), f"i{itemsize}")
        counts = _C.draw(_layers(layers), groups, (keys.ctypes.data, keys.size), row, torch.get_num_threads())
        unpruned, pruned = np.array(counts, np.int64).T
        return keys, unpruned, pruned

    def count_slots(
        self,
        layers: Sequence[Layer],
        rows: Integers,
        keys: Integers,
        places: Integers,
        brackets: Brackets,
        regions: Sequence[tuple[Sequence[int], Sequence[int], Sequence[int]]],
        num_slots: int,
        indices: Integers | None = None,
    ) -> Integers:
        counts = np.zeros((len(rows), num_slots + 2), np.int64)
        # Most layers have equal regions.
        known = {region: i for i, region in enumerate(dict.fromkeys(regions))}
        columns = rows, keys, places, brackets.lo, brackets.shifts(num_slots)
        ties = list(zip(*(column.tolist() for column in columns), [known[region] for region in regions], strict=True))
        sides = [list(zip(*region, strict=True)) for region in known]
        to_list = (0, 0), 0
        if indices is not None:
            to_list = (indices.ctypes.data, indices.size), indices.shape[1]
        array = counts.ctypes.data, counts.size
        _C.count_slots(_layers(layers), ties, sides, array, num_slots, *to_list, torch.get_num_threads())
        return counts

    def prune(
        self, layers: Sequence[Layer], selection: Selection, out: Sequence[torch.Tensor], *, finite: bool = False
    ) -> PruneCounts | None:
        keys, *_, tie_indices, nonfinite = selection.cutoffs
        if finite and max(nonfinite) >= 0:
            return None
        places = [] if isinstance(layers, Layers) and out is layers.masks else list(map(_array, out))
        before, now = _C.prune(_layers(layers), keys, tie_indices, places, torch.get_num_threads())
        sizes = layers.sizes if isinstance(layers, Layers) else [layer.weight.numel() for layer in layers]
        return PruneCounts.from_kept(sizes, before, now)

    def apply(self, layers: Sequence[Layer]) -> None:
        _C.apply_masks(_layers(layers), torch.get_num_threads())

    def update(
        self,
        rule: str,
        batch: UpdateBatch,
        gradients: Sequence[torch.Tensor],
        rows: Sequence[int],
        constants: Constants,
        *,
        after: Sequence[Callable[[], object]] = (),
    ) -> None:
        if not isinstance(batch.prepared, _C.UpdateBatch):
            batch.prepared = _C.update_batch(list(map(_row, batch.tensors)))
        found = None if EXCHANGE is None else _C.gradients_at(EXCHANGE, [*gradients])
        found = found or _C.gradients(list(map(_array, gradients)))
        arguments = rule, batch.prepared, found, rows, constants.on_host(), torch.get_num_threads()
        if after:
            at_once([partial(_C.update, *arguments), *after])
        else:
            _C.update(*arguments)

    def sum_squares(self, gradients: Sequence[Layer]) -> float:
        return _C.sum_squares(_layers(gradients), torch.get_num_threads())

    def compactions(self, masks: Sequence[tuple[torch.Tensor, int]]) -> list[Compaction]:
        sizes = [-(-numel // _C.CHUNK) + 1 for _, numel in masks]
        offsets = torch.empty(sum(sizes), dtype=torch.int64, device="cpu")
        num_kept = _C.chunk_offsets([(_array(mask), numel) for mask, numel in masks], _array(offsets))
        bits = [mask for mask, _ in masks]
        return list(map(Compaction, bits, offsets.split_with_sizes(sizes), num_kept))

    def move_state(self, moves: Sequence[StateMove]) -> None:
        rows = []
        for source, source_layout, target, target_layout, numel in moves:
            states = _state(source, source_layout), _state(target, target_layout)
            rows.append((*states, numel, NAMES[source.dtype]))
        _C.move_state(rows, torch.get_num_threads())


def _probe() -> str | None:
    if _C is None:
        return why_not_built(_import_error, "install a C++ compiler and run pip install again")
    try:
        _C.isa()
    except ValueError as error:
        return str(error)
    return None


def isa() -> str | None:
    """Return the instruction set of the kernels; None if they cannot run."""
    return None if _probe() else _C.isa()


def _supports(device: torch.device) -> str | None:
    return None if device.type == "cpu" else f"it takes CPU tensors, got {device}; move them with .cpu()"


register(Backend("cpu", priority=10, probe=_probe, supports=_supports, load=Cpu))
