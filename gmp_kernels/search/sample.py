"""The sample of the Python driver: brackets for thresholds, from a few thousand unpruned weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from statistics import NormalDist

import numpy as np
import torch

from gmp_kernels.backends.keys import bits_of, largest_key
from gmp_kernels.backends.types import Brackets, Layer

__all__ = ["estimate"]

LINE = 64  # bytes that a read brings from memory anyway, so all of them are sampled
LEAST, MOST = 1 << 10, 1 << 16  # weights to sample of a group; n^(2/3) in between, as in csrc/cpu/sample.h
BATCH_BYTES = 1 << 19  # of weights that are sampled at a time
MISS = NormalDist().cdf(-4)  # probability that a threshold lies above the union of all brackets, and of below


def estimate(
    groups: Sequence[Sequence[Layer]],
    num_prune: Sequence[int],
    num_pruned: Sequence[int | None],
    sizes: Sequence[int],
    num_parts: Sequence[int],
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

    Returns
    -------
    Brackets
        One per group.
    numpy.ndarray
        Per group, the average fraction of its weights per key around the threshold.
    """
    alike: dict[tuple[torch.dtype, int, tuple[int, ...]], list[int]] = defaultdict(list)
    strides = []
    for i, layers in enumerate(groups):
        numels, dtype = [layer.weight.numel() for layer in layers], layers[0].weight.dtype
        width = min(LINE // dtype.itemsize, max(numels))
        lines, wanted = sum(numels) // width, min(max(LEAST, round(sum(numels) ** (2 / 3))), MOST) // width
        # With few keys around a threshold there is little to gain from a narrow bracket.
        wanted //= 2 if dtype.itemsize == 2 else 1
        # The stride is odd, so that it does not keep in step with rows, whose lengths are even.
        strides.append(max(1, (lines // wanted - 1) | 1))
        alike[dtype, width, tuple(-(-(n // width) // strides[i]) for n in numels)].append(i)
    found, densities = Brackets(*np.zeros((2, len(groups)), np.int64)), np.zeros(len(groups))
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
            request = np.array([(num_prune[i], num_pruned[i] or 0, sizes[i], _sigmas(num_parts[i])) for i in batch]).T
            is_known = np.array([num_pruned[i] is not None for i in batch])
            found.lo[batch], found.hi[batch], densities[batch] = _brackets(weights, masks.numpy(), is_known, *request)
    return found, densities


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


def _brackets(
    weights: torch.Tensor,
    masks: np.ndarray,
    is_known: np.ndarray,
    num_prune: np.ndarray,
    num_pruned: np.ndarray,
    sizes: np.ndarray,
    sigmas: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Estimate ends and densities; each group has a row of sampled weights, and one of the bytes of their masks."""
    largest = largest_key(weights.dtype)
    keys = bits_of(weights).numpy()
    keys &= np.iinfo(keys.dtype).max
    # Pruned weights are zero and come first.
    keys.sort(axis=1)
    size = keys.shape[1]
    unpruned = np.unpackbits(masks, axis=1).sum(axis=1, dtype=np.int64)
    # Ranks are among the unpruned weights or, if their number is not known, among all weights.
    shares = np.clip((num_prune - num_pruned) / np.maximum(1, sizes - num_pruned), 0.0, 1.0)
    ranked = np.where(is_known, unpruned, size)
    ranks = shares * ranked - (ranked - unpruned) * ~is_known
    half = 1 + sigmas * np.sqrt(shares * ranked * (1 - shares))
    low, high = np.floor(ranks - half).astype(np.int64), np.ceil(ranks + half).astype(np.int64)
    rows = np.arange(len(keys))

    def keys_at(ranks: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.minimum(keys[rows, np.clip(size - unpruned - 1 + ranks, 0, size - 1)], largest)
        return found

    lo = np.where(unpruned == 0, largest, np.where(low < 1, 0, keys_at(low)))
    hi = np.where(unpruned == 0, 0, np.where(high > unpruned, largest, keys_at(high)))
    # The density comes from a wider range, because the few ranks inside would tell less.
    first, last = (np.clip(ends, 1, np.maximum(1, unpruned)) for ends in (low - (high - low), high + (high - low)))
    density = (last - first + 1) / (size * (keys_at(last) - keys_at(first).astype(float) + 1))
    return lo, hi, density
