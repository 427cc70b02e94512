"""The oracle: the contract spelled out in numpy with a stable sort in float64.

It is written from the definition of the order and shares no trick with the kernels, so that they cannot share a bug.
It also runs where the compiled extension is missing; expect seconds per 10 million weights and 40 bytes of temporary
memory per weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch

from gmp_kernels.backends.at_once import at_once
from gmp_kernels.backends.keys import bits_of, key_of, largest_key, magnitude_of
from gmp_kernels.backends.layers import ranked_dtype
from gmp_kernels.backends.ranking import ranked
from gmp_kernels.backends.registry import Backend, register
from gmp_kernels.backends.types import (
    BracketCounts,
    Brackets,
    Compaction,
    Constants,
    Cutoffs,
    Layer,
    PruneCounts,
    Selection,
    StateMove,
    UpdateBatch,
)
from gmp_kernels.patterns import NM, Block, Unstructured


def _magnitude(weight: torch.Tensor) -> np.ndarray:
    """Return |w| in float64, exact for every dtype taken; all NaN are one value, after Inf."""
    magnitude: np.ndarray = np.abs(weight.reshape(-1).to(torch.float64).numpy())
    return magnitude


def _row_major(values: np.ndarray, layer: Layer) -> np.ndarray:
    """Bring values in the order of a layer's memory into the row-major order of its tensor."""
    shaped = values.reshape(tuple(layer.weight.shape))
    return (np.moveaxis(shaped, -1, 1) if layer.is_channels_last else shaped).reshape(-1)


def _as_in_memory(values: np.ndarray, layer: Layer) -> np.ndarray:
    """Do the inverse of ``_row_major``."""
    shaped = values.reshape(tuple(layer.tensor.shape))
    return (np.moveaxis(shaped, 1, -1) if layer.is_channels_last else shaped).reshape(-1)


def _ties(magnitude: np.ndarray, value: float) -> np.ndarray:
    ties: np.ndarray = np.isnan(magnitude) if np.isnan(value) else magnitude == value
    return ties


def _unpacked(mask: torch.Tensor | None, numel: int) -> np.ndarray:
    if mask is None:
        return np.ones(numel, dtype=bool)
    return np.unpackbits(mask.numpy(), count=numel, bitorder="little").astype(bool)


def _kept(layer: Layer) -> np.ndarray:
    return _unpacked(layer.mask, layer.weight.numel())


def _ranked(layer: Layer) -> tuple[np.ndarray, np.ndarray]:
    """Return the magnitudes that are ranked, and which of them are neither pruned nor protected, in row-major order."""
    magnitude, kept = (_row_major(values, layer) for values in (_magnitude(layer.source), _kept(layer)))
    shape, pattern = tuple(layer.tensor.shape), layer.pattern
    if isinstance(pattern, Block):
        dtype = np.float64 if layer.source.dtype == torch.float64 else np.float32
        matrix = magnitude.reshape(shape[0], -1).astype(dtype)
        with np.errstate(over="ignore"):
            sums = np.zeros(pattern.ranked_shape(shape), matrix.dtype)
            for row in range(pattern.rows):
                for column in range(pattern.cols):
                    sums = sums + matrix[row :: pattern.rows, column :: pattern.cols]
        of_blocks = kept.reshape(shape[0], -1)[:: pattern.rows, :: pattern.cols]
        return sums.reshape(-1).astype(np.float64), of_blocks.reshape(-1)
    if isinstance(pattern, NM):
        return magnitude, kept & ~_protected(magnitude, kept, shape, pattern.dim, pattern.of, pattern.keep)
    if isinstance(pattern, Unstructured) and pattern.min_kept_per_row:
        row = magnitude.size // shape[0]
        return magnitude, kept & ~_protected(magnitude, kept, (shape[0], row), 1, row, pattern.min_kept_per_row)
    return magnitude, kept


def _protected(
    magnitude: np.ndarray, kept: np.ndarray, shape: tuple[int, ...], dim: int, of: int, keep: int
) -> np.ndarray:
    """Return which weights are the last in the order of the contract among ``of`` neighbours along a dimension."""
    index = np.arange(magnitude.size)

    def in_groups(values: np.ndarray) -> np.ndarray:
        return np.moveaxis(values.reshape(shape), dim, -1).reshape(-1, of)

    order = np.lexsort(tuple(map(in_groups, (-index, magnitude, kept))))
    protected = np.zeros(magnitude.size, dtype=bool)
    protected[np.take_along_axis(in_groups(index), order[:, -keep:], axis=1)] = True
    return protected


def _of_weights(values: np.ndarray, layer: Layer) -> np.ndarray:
    """Return for each weight, in row-major order, the value of what it is ranked by: its own, or that of its block."""
    if not isinstance(layer.pattern, Block):
        return values
    down, across = layer.pattern.ranked_shape(tuple(layer.tensor.shape))
    return np.kron(values.reshape(down, across), np.ones((layer.pattern.rows, layer.pattern.cols), bool)).reshape(-1)


class Reference:
    """Implementation with numpy, and torch's plain operators for the optimizer step."""

    capturable = False
    selects_patterns = True
    skips_pruned_blocks = False
    chunk = 0
    draw = None
    count_slots = None

    def select(
        self,
        layers: Sequence[Layer],
        num_prune: Sequence[int],
        group_sizes: Sequence[int],
        brackets: Brackets | None = None,
        prunes: bool = False,
    ) -> Selection:
        rows: list[tuple[int, ...]] = []
        for count, size in zip(num_prune, group_sizes, strict=True):
            rows += self._select_group(layers[len(rows) : len(rows) + size], count)
        return Selection(Cutoffs.of(rows))

    def _select_group(self, layers: Sequence[Layer], num_prune: int) -> list[tuple[int, ...]]:
        """Return a row of ``Cutoffs`` for each layer."""
        parts = list(map(_ranked, layers))
        magnitude, kept = (np.concatenate(column) for column in zip(*parts, strict=True))
        sizes = [len(own) for own, _ in parts]
        starts = np.cumsum([0, *sizes])
        nonfinite = [
            _first(_row_major(_kept(layer) & ~np.isfinite(_magnitude(layer.source)), layer)) for layer in layers
        ]
        already = int((~kept).sum())
        if num_prune <= already:
            return [(0, already, 0, 0, *row) for row in zip(sizes, nonfinite, strict=True)]

        # The order of the contract: already pruned first, then magnitude ascending (NaN last), then higher index first.
        higher_index_first = -np.arange(magnitude.size)
        order = np.lexsort((higher_index_first, magnitude, kept))
        value = magnitude[order[num_prune - 1]]
        ties = kept & _ties(magnitude, value)
        num_ties = int(ties.sum())
        pruned = np.zeros(magnitude.size, dtype=bool)
        pruned[order[:num_prune]] = True
        num_ties_kept = int((ties & ~pruned).sum())
        threshold = key_of(float(value), ranked_dtype(layers[0])), num_prune - (num_ties - num_ties_kept)
        first_pruned_tie = int(np.flatnonzero(ties & pruned)[0])
        tie_indices = [int(np.clip(first_pruned_tie - start, 0, n)) for start, n in zip(starts, sizes, strict=False)]
        return [(*threshold, num_ties, num_ties_kept, *row) for row in zip(tie_indices, nonfinite, strict=True)]

    def ranked(self, layers: Sequence[Layer]) -> Sequence[Layer]:
        return ranked(layers)

    def count(
        self,
        layers: Sequence[Layer],
        brackets: Brackets,
        num_bins: int,
        candidates: Sequence[torch.Tensor | None] | None = None,
    ) -> BracketCounts:
        found = BracketCounts.nothing(len(layers), num_bins)
        ends = brackets.lo.tolist(), brackets.hi.tolist(), brackets.shifts(num_bins).tolist()
        given = [None] * len(layers) if candidates is None else candidates
        for i, row in enumerate(zip(layers, *ends, given, strict=True)):
            found.put(i, _count(*row, num_bins))
        return found

    def prune(
        self, layers: Sequence[Layer], selection: Selection, out: Sequence[torch.Tensor], *, finite: bool = False
    ) -> PruneCounts | None:
        cutoffs = selection.cutoffs
        if finite and max(cutoffs.nonfinite) >= 0:
            return None
        before, now = [], []
        writes: list[tuple[torch.Tensor, np.ndarray]] = []
        bits: list[Callable[[], object]] = []
        for layer, key, tie_index, packed in zip(layers, cutoffs.keys, cutoffs.tie_indices, out, strict=True):
            kept = _kept(layer)
            before.append(int(kept.sum()))
            magnitude, eligible = _ranked(layer)
            value = magnitude_of(key, ranked_dtype(layer))
            # NaN is above every number, and nothing is above NaN.
            above = ~(magnitude <= value) & ~np.isnan(value)
            stays = above | (_ties(magnitude, value) & (np.arange(magnitude.size) < tie_index))
            kept &= _as_in_memory(_of_weights(~eligible | stays, layer), layer)
            writes.append((layer.weight, kept))
            bits.append(partial(packed.copy_, torch.from_numpy(np.packbits(kept, bitorder="little"))))
            now.append(int(kept.sum()))
        _write(writes, bits)
        return PruneCounts.from_kept([layer.weight.numel() for layer in layers], before, now)

    def apply(self, layers: Sequence[Layer]) -> None:
        _write([(layer.weight, _kept(layer)) for layer in layers])

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
        given = constants.on_host()
        writes: list[Callable[[], object]] = []
        for t, gradient, row in zip(batch.tensors, gradients, rows, strict=True):
            c = given[row]
            if c.get("skip"):
                continue
            kept = torch.from_numpy(_unpacked(t.mask, t.weight.numel()))
            compute = torch.float64 if t.weight.dtype == torch.float64 else torch.float32
            written = [_in_memory(t.weight), *([] if t.master is None else [_in_memory(t.master)])]
            weight = written[-1].to(compute)
            grad = torch.where(kept, _in_memory(gradient).to(compute), 0.0)
            targets = list(map(_in_memory, t.state))
            state = [target.to(compute, copy=True) for target in targets]
            if t.compaction is not None:
                state = [torch.zeros_like(kept, dtype=s.dtype).masked_scatter_(kept, s) for s in state]
            weight = _RULES[rule](weight, grad, state, c)
            if t.state_dtype == torch.bfloat16:
                state = [_rounded_at_random(values, c.get("rounding_seed", 0)) for values in state]
            for target, source in zip(targets, state, strict=True):
                new = torch.where(kept, source, 0.0) if t.compaction is None else source[kept]
                writes.append(partial(target.copy_, new))
            writes += [partial(target.copy_, torch.where(kept, weight, 0.0)) for target in written]
        at_once([*writes, *after])

    def sum_squares(self, gradients: Sequence[Layer]) -> float:
        return float(sum((_magnitude(g.weight)[_kept(g)] ** 2).sum() for g in gradients))

    def compactions(self, masks: Sequence[tuple[torch.Tensor, int]]) -> list[Compaction]:
        no_offsets = torch.zeros(0, dtype=torch.int64, device="cpu")
        return [Compaction(mask, no_offsets, int(_unpacked(mask, numel).sum())) for mask, numel in masks]

    def move_state(self, moves: Sequence[StateMove]) -> None:
        for move in moves:
            dense = torch.zeros(move.numel, dtype=move.source.dtype, device="cpu")
            dense[_places(move.source_layout, move.numel)] = move.source.reshape(-1)
            move.target.view(-1).copy_(dense[_places(move.target_layout, move.numel)])


def _in_memory(tensor: torch.Tensor) -> torch.Tensor:
    """Return the elements of a tensor without gaps in the order of its memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _places(layout: Compaction | None, numel: int) -> torch.Tensor:
    return torch.from_numpy(_unpacked(None if layout is None else layout.mask, numel))


def _count(
    layer: Layer, lo: int, hi: int, shift: int, candidates: torch.Tensor | None, num_bins: int
) -> tuple[int, int, int, int, np.ndarray]:
    """Return a row of ``BracketCounts``."""
    magnitude, kept, dtype = _magnitude(layer.weight), _kept(layer), layer.weight.dtype
    nonfinite = _first(kept & ~np.isfinite(magnitude))
    # Magnitudes are sorted with NaN at the end, so that those below a key come first.
    ranked = np.sort(magnitude[kept])
    ends = [min(lo + ((b + 1) << shift), hi + 1) for b in range(num_bins)]
    below, *until = (_num_below(ranked, key, dtype) for key in (lo, *ends))
    bins = np.diff([below, *(max(below, u) for u in until)])
    inside = int(bins.sum())
    if candidates is not None and inside <= candidates.numel():
        candidates[:inside] = torch.from_numpy(ranked[below : below + inside]).to(dtype)
    return below, inside, int((~kept).sum()), nonfinite, bins


def _num_below(ranked: np.ndarray, key: int, dtype: torch.dtype) -> int:
    if key > largest_key(dtype):
        return ranked.size
    return int(np.searchsorted(ranked, magnitude_of(key, dtype), side="left"))


def _scaled(weight: torch.Tensor, grad: torch.Tensor, c: Mapping[str, float]) -> tuple[torch.Tensor, torch.Tensor]:
    grad = grad * c.get("grad_factor", 1.0)
    weight = weight * c.get("decay", 1.0)
    return weight, grad + c["weight_decay"] * weight if c.get("weight_decay") else grad


def _sgd(weight: torch.Tensor, grad: torch.Tensor, state: list[torch.Tensor], c: Mapping[str, float]) -> torch.Tensor:
    weight, grad = _scaled(weight, grad, c)
    if state:
        (momentum,) = state
        momentum.copy_(grad if c["first_step"] else momentum * c["momentum"] + c["one_minus_dampening"] * grad)
        grad = grad + c["momentum"] * momentum if c["nesterov"] else momentum
    return weight - c["lr"] * grad


def _adam(weight: torch.Tensor, grad: torch.Tensor, state: list[torch.Tensor], c: Mapping[str, float]) -> torch.Tensor:
    weight, grad = _scaled(weight, grad, c)
    exp_avg, exp_avg_sq = state[:2]
    exp_avg.lerp_(grad, c["one_minus_beta1"])
    exp_avg_sq.mul_(c["beta2"]).addcmul_(grad, grad, value=c["one_minus_beta2"])
    second = torch.maximum(state[2], exp_avg_sq, out=state[2]) if len(state) == 3 else exp_avg_sq
    return weight.addcdiv(exp_avg, second.sqrt() / c["bias_correction2_sqrt"] + c["eps"], value=-c["step_size"])


def _average(
    weight: torch.Tensor, grad: torch.Tensor, state: list[torch.Tensor], c: Mapping[str, float]
) -> torch.Tensor:
    return weight.lerp(grad, c["one_minus_beta1"])


def _rounded_at_random(values: torch.Tensor, seed: float) -> torch.Tensor:
    """Round float32 to one of the two bfloat16 values around it, the nearer the likelier."""
    factor = (int(seed) + 1) * 0x9E3779B9 % 2**32
    factor = (factor ^ factor >> 16) * 0x7FEB352D % 2**32
    factor = (factor ^ factor >> 15) * 0x846CA68B % 2**32
    factor = (factor ^ factor >> 16) | 1
    bits = values.numpy().view(np.uint32).astype(np.uint64)
    random = bits * np.uint64(factor) % 2**32 // 2**16
    # Of the 2**16 random numbers, as many as the distance from the lower neighbour lead to the upper one.
    rounded = bits // 2**16 + (random + bits % 2**16 >= 2**16)
    halves = np.where(np.isnan(values.numpy()), 0x7FC0, rounded).astype(np.uint16)
    return torch.from_numpy(halves.view(np.int16)).view(torch.bfloat16)


_RULES = {"sgd": _sgd, "adam": _adam, "average": _average}


def _first(where: np.ndarray) -> int:
    found = np.flatnonzero(where)
    return int(found[0]) if found.size else -1


def _write(weights: Sequence[tuple[torch.Tensor, np.ndarray]], after: Sequence[Callable[[], object]] = ()) -> None:
    """Zero the bits (+0.0) of all weights that are not kept, and make the calls ``after``."""
    # Outside of this mode torch refuses to write to inference tensors; kernels do not.
    with torch.inference_mode():
        zeroing = [
            partial(bits_of(weight).view(-1).masked_fill_, torch.from_numpy(~kept), 0) for weight, kept in weights
        ]
        at_once([*zeroing, *after])


def _supports(device: torch.device) -> str | None:
    return None if device.type == "cpu" else f"it takes CPU tensors, got {device}; move them with .cpu()"


register(Backend("reference", priority=0, probe=lambda: None, supports=_supports, load=Reference))
