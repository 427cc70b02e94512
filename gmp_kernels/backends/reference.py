"""The oracle: the contract spelled out in numpy with a stable sort in float64.

Written from the definition of the order and sharing no trick with the kernels, so that the two cannot share a bug.
Also what runs where the compiled extension is missing; expect seconds per 10 million weights and 40 bytes of
temporary memory per weight.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch

from gmp_kernels.backends import Backend, Layer, Selection, Threshold, Written, register


def _magnitude(weight: torch.Tensor) -> np.ndarray:
    """|w| in float64, exact for every dtype taken; all NaN are one value, after Inf."""
    return np.abs(weight.reshape(-1).to(torch.float64).numpy())


def _kept(layer: Layer) -> np.ndarray:
    n = layer.weight.numel()
    if layer.mask is None:
        return np.ones(n, dtype=bool)
    return np.unpackbits(layer.mask.numpy(), count=n, bitorder="little").astype(bool)


class Reference:
    """Implementation of the three operations with numpy."""

    def select(
        self, layers: Sequence[Layer], num_prune: Sequence[int], hints: Sequence[Threshold | None]
    ) -> list[Selection]:
        groups = [[layer] for layer in layers] if len(num_prune) == len(layers) else [list(layers)]
        return [self._select_group(group, k) for group, k in zip(groups, num_prune, strict=True)]

    def _select_group(self, layers: list[Layer], num_prune: int) -> Selection:
        magnitude = np.concatenate([_magnitude(layer.weight) for layer in layers])
        kept = np.concatenate([_kept(layer) for layer in layers])
        starts = np.cumsum([0] + [layer.weight.numel() for layer in layers])
        nonfinite = tuple(
            _first(kept[start:end] & ~np.isfinite(magnitude[start:end]))
            for start, end in itertools.pairwise(starts)
        )
        already = int((~kept).sum())
        if num_prune <= already:
            sizes = tuple(layer.weight.numel() for layer in layers)
            return Selection(Threshold(0.0, already, 0, 0), sizes, nonfinite)

        # The order of the contract: already pruned first, then magnitude ascending (NaN last), then higher index first.
        higher_index_first = -np.arange(magnitude.size)
        order = np.lexsort((higher_index_first, magnitude, kept))
        value = magnitude[order[num_prune - 1]]
        ties = kept & ((magnitude == value) | (np.isnan(magnitude) & np.isnan(value)))
        num_ties = int(ties.sum())
        pruned = np.zeros(magnitude.size, dtype=bool)
        pruned[order[:num_prune]] = True
        num_ties_kept = int((ties & ~pruned).sum())
        threshold = Threshold(float(value), num_prune - (num_ties - num_ties_kept), num_ties, num_ties_kept)
        first_pruned_tie = int(np.flatnonzero(ties & pruned)[0])
        cuts = tuple(
            int(np.clip(first_pruned_tie - start, 0, end - start))
            for start, end in itertools.pairwise(starts)
        )
        return Selection(threshold, cuts, nonfinite)

    def prune(
        self, layers: Sequence[Layer], selections: Sequence[Selection], out: Sequence[torch.Tensor]
    ) -> list[Written]:
        per_layer = [(s.threshold, cut) for s in selections for cut in s.cuts]
        written = []
        for layer, (threshold, cut), packed in zip(layers, per_layer, out, strict=True):
            kept = _kept(layer)
            already = int((~kept).sum())
            if threshold.num_ties:
                magnitude = _magnitude(layer.weight)
                tie = (magnitude == threshold.value) | (np.isnan(magnitude) & np.isnan(threshold.value))
                above = magnitude > threshold.value
                if not np.isnan(threshold.value):
                    above |= np.isnan(magnitude)
                kept &= above | (tie & (np.arange(kept.size) < cut))
            _write(layer.weight, kept)
            packed.copy_(torch.from_numpy(np.packbits(kept, bitorder="little")))
            num_pruned = int((~kept).sum())
            written.append(Written(num_pruned, num_pruned - already))
        return written

    def apply(self, layers: Sequence[Layer]) -> None:
        for layer in layers:
            _write(layer.weight, _kept(layer))


def _first(where: np.ndarray) -> int:
    found = np.flatnonzero(where)
    return int(found[0]) if found.size else -1


def _write(weight: torch.Tensor, kept: np.ndarray) -> None:
    weight.view(-1)[torch.from_numpy(~kept)] = 0.0


def _supports(device: torch.device) -> str | None:
    return None if device.type == "cpu" else f"it takes CPU tensors, got {device}; move them with .cpu()"


register(Backend("reference", priority=0, probe=lambda: None, supports=_supports, load=Reference))
