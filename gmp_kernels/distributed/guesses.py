"""Thresholds guessed from a sample of the unpruned weights that this rank holds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch

from gmp_kernels.backends import Bracket, Layer
from gmp_kernels.backends.keys import bits_of, largest_key

__all__ = ["Guess", "Question", "guess"]

LINE = 64  # bytes: what the memory brings anyway is looked at as a whole
LEAST, MOST = 1 << 10, 1 << 16  # weights to sample of a group; n^(2/3) in between, as in csrc/cpu/selector.h
BATCH_BYTES = 1 << 19  # of weights that are sampled at a time
MISS = NormalDist().cdf(-4)  # how often a threshold may lie above the union of all brackets, or below it


class Question(NamedTuple):
    """One threshold to guess.

    Attributes
    ----------
    layers : sequence of Layer
        One group, ranked together.
    share : float
        Of the unpruned weights: how many lie up to the threshold.
    num_answers : int
        How many ranks guess from other weights of the same group: the union of their brackets is what counts.
    """

    layers: Sequence[Layer]
    share: float
    num_answers: int


class Guess(NamedTuple):
    """A bracket, and which fraction of the weights lies on each key around the threshold."""

    bracket: Bracket
    density: float


def guess(questions: Sequence[Question]) -> list[Guess]:
    """Answer the questions. Where a sample finds nothing unpruned, the bracket is empty."""
    alike: dict[tuple[torch.dtype, int, tuple[int, ...]], list[int]] = defaultdict(list)
    strides = []
    for i, (layers, _, _) in enumerate(questions):
        sizes, dtype = [layer.weight.numel() for layer in layers], layers[0].weight.dtype
        width = min(LINE // dtype.itemsize, max(sizes))
        lines, wanted = sum(sizes) // width, min(max(LEAST, round(sum(sizes) ** (2 / 3))), MOST) // width
        # With few keys around a threshold there is little to gain from a narrow bracket.
        wanted //= 2 if dtype.itemsize == 2 else 1
        # Odd, lest it be in step with rows: their lengths are even.
        strides.append(max(1, (lines // wanted - 1) | 1))
        alike[dtype, width, tuple(-(-(size // width) // strides[i]) for size in sizes)].append(i)
    answers: dict[int, Guess] = {}
    for (dtype, width, lines_of_layers), positions in alike.items():
        num_lines = sum(lines_of_layers)
        step = max(1, BATCH_BYTES // (num_lines * width * dtype.itemsize))
        for first in range(0, len(positions), step):
            batch = positions[first : first + step]
            views = [
                _spread(layer, lines, width, strides[i])
                for i in batch
                for layer, lines in zip(questions[i].layers, lines_of_layers, strict=True)
            ]
            weights, masks = (torch.cat(views_).view(len(batch), -1).cpu() for views_ in zip(*views, strict=True))
            found = _brackets(weights, masks.numpy(), [questions[i] for i in batch])
            answers.update(zip(batch, found, strict=True))
    return [answers[i] for i in range(len(questions))]


def _spread(layer: Layer, num_lines: int, width: int, stride: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every ``stride``-th line of a layer, as far as there are ``num_lines``, and the bytes of its mask."""
    weight, mask = layer
    assert mask is not None
    num_bytes = -(-width // 8)
    return (
        weight.as_strided((num_lines, width), (stride * width, 1)),
        mask.as_strided((num_lines, num_bytes), (stride * num_bytes, 1)),
    )


@cache
def _sigmas(num_answers: int) -> float:
    """Half the width of a bracket. The union misses on one side only if each of them does: they need not be wide."""
    return max(0.0, -NormalDist().inv_cdf(MISS ** (1 / num_answers)))


def _brackets(weights: torch.Tensor, masks: np.ndarray, questions: Sequence[Question]) -> list[Guess]:
    """One row of sampled weights, and of the bytes of their masks, per question."""
    largest = largest_key(weights.dtype)
    keys = bits_of(weights).numpy()
    keys &= np.iinfo(keys.dtype).max
    # Pruned weights are zero and come first.
    keys.sort(axis=1)
    size = keys.shape[1]
    unpruned = np.unpackbits(masks, axis=1).sum(axis=1, dtype=np.int64)
    shares = np.array([question.share for question in questions])
    sigmas = np.array([_sigmas(question.num_answers) for question in questions])
    ranks = shares * unpruned
    half = 1 + sigmas * np.sqrt(ranks * (1 - shares))
    low, high = np.floor(ranks - half).astype(np.int64), np.ceil(ranks + half).astype(np.int64)
    rows = np.arange(len(keys))

    def keys_at(ranks: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.minimum(keys[rows, np.clip(size - unpruned - 1 + ranks, 0, size - 1)], largest)
        return found

    lo = np.where(unpruned == 0, largest, np.where(low < 1, 0, keys_at(low)))
    hi = np.where(unpruned == 0, 0, np.where(high > unpruned, largest, keys_at(high)))
    # From further around: the few ranks inside would tell less.
    first, last = np.maximum(low - (high - low), 1), np.minimum(high + (high - low), unpruned)
    density = (last - first + 1) / (size * (keys_at(last) - keys_at(first).astype(float) + 1))
    return [Guess(Bracket(*row), d) for *row, d in zip(lo.tolist(), hi.tolist(), density.tolist(), strict=True)]
