"""The sample of the Python driver: brackets for thresholds, from a few thousand unpruned weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch

from gmp_kernels.backends.keys import bits_of, largest_key
from gmp_kernels.backends.types import Brackets, Draw, Layer

__all__ = ["estimate"]

LINE = 64  # bytes that a read brings from memory anyway, so all of them are sampled
LEAST, MOST = 1 << 10, 1 << 16  # weights to sample of a group; n^(2/3) in between, as in csrc/cpu/sample.h
# A backend that draws samples takes twice as many of wide keys, of which a narrower bracket holds far fewer. As in
# csrc/cpu/sample.h, samples are no larger than this.
DRAWN, DRAWN_BYTES = 2, 1 << 18
BATCH_BYTES = 1 << 19  # of weights that are sampled at a time
MISS = NormalDist().cdf(-4)  # probability that a threshold lies above the union of all brackets, and of below


def estimate(
    groups: Sequence[Sequence[Layer]],
    num_prune: Sequence[int],
    num_pruned: Sequence[int | None],
    sizes: Sequence[int],
    num_parts: Sequence[int],
    draw: Draw | None = None,
    layers: Sequence[Layer] | None = None,
) -> tuple[Brackets, np.ndarray]:
    """Bracket a threshold per group by a sample. If the sample has no unpruned weight, the bracket is empty.

    Parameters
    ----------
    groups : sequence of sequences of Layer
        The layers of a group are ranked together. They are whole layers, or the local parts of them.
    num_prune, num_pruned, sizes : sequences of int
        Per group, of the whole layers: weights to prune, weights pruned already (None: unknown), and all weights.
    num_parts : sequence of int
        Per group, how many ranks sample different parts of it. The union of their brackets nearly always holds the
        threshold.
    draw : callable, optional
        ``Implementation.draw`` of the backend.
    layers : sequence of Layer, optional
        All layers of the groups in this order, in a form that a backend takes faster.

    Returns
    -------
    Brackets
        One per group.
    numpy.ndarray
        Per group, the average fraction of its weights per key around the threshold.
    """
    found, densities = Brackets(*np.zeros((2, len(groups)), np.int64)), np.zeros(len(groups))

    def put(batch: list[int], sample: _Sample) -> None:
        request = np.array([(num_prune[i], num_pruned[i] or 0, sizes[i], _sigmas(num_parts[i])) for i in batch]).T
        is_known = np.array([num_pruned[i] is not None for i in batch])
        found.lo[batch], found.hi[batch], densities[batch] = _brackets(sample, is_known, *request)

    of_groups = [[layer.weight for layer in own] for own in groups]
    wanted = [_wanted(sum(map(torch.numel, own)), own[0].itemsize) for own in of_groups]
    left = [*range(len(groups))]
    if draw is not None:
        left = _draw_all(draw, groups, layers, wanted, put)
    alike: dict[tuple[torch.dtype, int, tuple[int, ...]], list[int]] = defaultdict(list)
    strides = {}
    for i in left:
        numels, dtype = [layer.weight.numel() for layer in groups[i]], groups[i][0].weight.dtype
        width = min(LINE // dtype.itemsize, max(numels))
        # The stride is odd, so that it does not keep in step with rows, whose lengths are even.
        strides[i] = max(1, (sum(numels) // width // (wanted[i] // width) - 1) | 1)
        alike[dtype, width, tuple(-(-(n // width) // strides[i]) for n in numels)].append(i)
    for (dtype, width, lines_of_layers), positions in alike.items():
        num_lines = sum(lines_of_layers)
        step = max(1, BATCH_BYTES // (num_lines * width * dtype.itemsize))
        for first in range(0, len(positions), step):
            batch = positions[first : first + step]
            views = [
                _spread(layer, lines, width, strides[i])
                for i in batch
                for layer, lines in zip(groups[i], lines_of_layers, strict=True)
            ]
            weights, masks = (torch.cat(views_).view(len(batch), -1).cpu() for views_ in zip(*views, strict=True))
            put(batch, _sorted_sample(weights, masks.numpy()))
    return found, densities


class _Sample(NamedTuple):
    """Sampled weights of some groups of a dtype.

    Attributes
    ----------
    keys : numpy.ndarray
        A sorted row per group, in which the keys of the unpruned weights follow each other.
    first, unpruned, size : numpy.ndarray
        Per group: place of the first of them, their number, and that of all sampled weights.
    largest : int
        Key of NaN.
    """

    keys: np.ndarray
    first: np.ndarray
    unpruned: np.ndarray
    size: np.ndarray
    largest: int


@cache
def _wanted(size: int, itemsize: int) -> int:
    """Return how many weights to sample of a group of this size."""
    wanted: int = min(max(LEAST, round(size ** (2 / 3))), MOST)
    # With few keys around a threshold there is little to gain from a narrow bracket.
    return wanted // 2 if itemsize == 2 else wanted


def _draw_all(
    draw: Draw,
    groups: Sequence[Sequence[Layer]],
    layers: Sequence[Layer] | None,
    wanted: Sequence[int],
    put: Callable[[list[int], _Sample], None],
) -> list[int]:
    """Have the backend sample the groups; return the positions of those of whose tiny layers it takes nothing."""
    layers = [layer for own in groups for layer in own] if layers is None else layers
    ends = [*accumulate(map(len, groups))]
    alike: dict[torch.dtype, list[int]] = defaultdict(list)
    for i, own in enumerate(groups):
        alike[own[0].weight.dtype].append(i)
    missed: list[int] = []
    for dtype, positions in alike.items():
        times = DRAWN if dtype.itemsize > 2 else 1
        most = min(times * max(wanted[i] for i in positions), DRAWN_BYTES // dtype.itemsize)
        step = max(1, BATCH_BYTES // (most * dtype.itemsize))
        for start in range(0, len(positions), step):
            batch = positions[start : start + step]
            asked = [(ends[i] - len(groups[i]), len(groups[i]), min(times * wanted[i], most)) for i in batch]
            keys, unpruned, pruned = draw(layers, asked)
            keys = keys[:, : unpruned.max() + 1]
            keys.sort(axis=1)
            rows = np.flatnonzero(unpruned + pruned)
            if len(rows) < len(batch):
                missed += [i for i, size in zip(batch, (unpruned + pruned).tolist(), strict=True) if not size]
                keys, unpruned, pruned = keys[rows], unpruned[rows], pruned[rows]
            if len(rows):
                sample = _Sample(keys, np.zeros_like(unpruned), unpruned, unpruned + pruned, largest_key(dtype))
                put([batch[row] for row in rows.tolist()], sample)
    return missed


def _spread(layer: Layer, num_lines: int, width: int, stride: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return every ``stride``-th line of a layer, ``num_lines`` in all, and the bytes of its mask."""
    weight, mask = layer.weight, layer.mask
    num_bytes = -(-width // 8)
    if mask is None:
        bits = torch.full((num_lines, num_bytes), 255, dtype=torch.uint8, device=weight.device)
        bits[:, -1] >>= -width % 8
    else:
        bits = mask.as_strided((num_lines, num_bytes), (stride * num_bytes, 1))
    return weight.reshape(-1).as_strided((num_lines, width), (stride * width, 1)), bits


@cache
def _sigmas(num_parts: int) -> float:
    """Return half the width of a bracket, which shrinks with more parts: the union misses only if all brackets do."""
    return max(0.0, -NormalDist().inv_cdf(MISS ** (1 / num_parts)))


def _sorted_sample(weights: torch.Tensor, masks: np.ndarray) -> _Sample:
    """Return the sample in which each group has a row of weights, and one of the bytes of their masks."""
    keys = bits_of(weights).numpy()
    keys &= np.iinfo(keys.dtype).max
    # Pruned weights are zero and come first.
    keys.sort(axis=1)
    unpruned = np.unpackbits(masks, axis=1).sum(axis=1, dtype=np.int64)
    size = np.full(len(keys), keys.shape[1])
    return _Sample(keys, size - unpruned, unpruned, size, largest_key(weights.dtype))


def _brackets(
    sample: _Sample,
    is_known: np.ndarray,
    num_prune: np.ndarray,
    num_pruned: np.ndarray,
    sizes: np.ndarray,
    sigmas: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Estimate ends and densities."""
    keys, before, unpruned, size, largest = sample
    # Ranks are among the unpruned weights or, if their number is not known, among all weights.
    shares = np.clip((num_prune - num_pruned) / np.maximum(1, sizes - num_pruned), 0.0, 1.0)
    ranked = np.where(is_known, unpruned, size)
    ranks = shares * ranked - (ranked - unpruned) * ~is_known
    half = 1 + sigmas * np.sqrt(shares * ranked * (1 - shares))
    low, high = np.floor(ranks - half).astype(np.int64), np.ceil(ranks + half).astype(np.int64)
    rows = np.arange(len(keys))

    def keys_at(ranks: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.minimum(keys[rows, np.clip(before - 1 + ranks, 0, keys.shape[1] - 1)], largest)
        return found

    lo = np.where(unpruned == 0, largest, np.where(low < 1, 0, keys_at(low)))
    hi = np.where(unpruned == 0, 0, np.where(high > unpruned, largest, keys_at(high)))
    # The density comes from a wider range, because the few ranks inside would tell less.
    first, last = (np.clip(ends, 1, np.maximum(1, unpruned)) for ends in (low - (high - low), high + (high - low)))
    density = (last - first + 1) / (size * (keys_at(last) - keys_at(first).astype(float) + 1))
    return lo, hi, density
