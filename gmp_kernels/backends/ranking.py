"""What is ranked of layers with a pattern or scores, with torch's operators on any device.

``ranked`` reduces such layers to plain ones, which every selection takes; ``prune`` writes what the selection of those
has found to the layers themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from gmp_kernels.backends.at_once import at_once
from gmp_kernels.backends.keys import keys_of
from gmp_kernels.backends.layers import Layer
from gmp_kernels.backends.types import Implementation, PruneCounts, Selection
from gmp_kernels.formats import ROW_MAJOR
from gmp_kernels.masks import BitMask

__all__ = ["prune", "ranked", "sources"]


def sources(layers: Sequence[Layer]) -> list[Layer]:
    """Return the tensors that rank layers, as plain layers of all unpruned weights, to look for NaN and Inf."""
    return [Layer(layer.source, layer.mask, layer.is_channels_last) for layer in layers]


def ranked(layers: Sequence[Layer]) -> list[Layer]:
    """Do what ``Implementation.ranked`` describes. Temporary memory: up to 30 bytes per weight of the largest layer."""
    return [layer if layer.is_plain else _ranked(layer) for layer in layers]


def _ranked(layer: Layer) -> Layer:
    pattern = layer.pattern
    if pattern is None:
        return Layer(layer.source, layer.mask, layer.is_channels_last)
    eligible = pattern.eligible(_in_tensor(keys_of(layer.source), layer), _kept(layer))
    if pattern.unit > 1:
        return Layer(pattern.ranked(_in_tensor(layer.source, layer)), _packed(eligible))
    return Layer(layer.source, _packed_like(eligible, layer), layer.is_channels_last)


def prune(
    implementation: Implementation,
    layers: Sequence[Layer],
    selection: Selection,
    out: Sequence[torch.Tensor],
    *,
    finite: bool,
) -> PruneCounts | None:
    """Do what ``Implementation.prune`` describes, for layers with patterns or scores."""
    cutoffs = selection.cutoffs
    if finite and max(cutoffs.nonfinite) >= 0:
        return None
    before, now, bits = [], [], []
    for layer, key, tie_index in zip(layers, cutoffs.keys, cutoffs.tie_indices, strict=True):
        own, kept = _ranked(layer) if not layer.is_plain else layer, _kept(layer)
        shape = own.tensor.shape
        keys = _in_tensor(keys_of(own.weight), own).reshape(-1)
        ties = keys == key
        ties[tie_index:] = False
        stays = (ties | (keys > key)).view(shape) | ~_kept(own)
        left = kept & (stays if layer.pattern is None else layer.pattern.spread(stays, kept.shape))
        before.append(int(kept.sum()))
        now.append(int(left.sum()))
        bits.append(_packed_like(left, layer))
    writes = [Layer(layer.weight, own, layer.is_channels_last) for layer, own in zip(layers, bits, strict=True)]
    copies = [partial(packed.copy_, own) for packed, own in zip(out, bits, strict=True)]
    at_once([partial(implementation.apply, writes), *copies])
    return PruneCounts.from_kept([layer.weight.numel() for layer in layers], before, now)


def _in_tensor(values: torch.Tensor, layer: Layer) -> torch.Tensor:
    """Return a view, in the tensor's own order of dimensions, of values in the order of the layer's memory."""
    return values.movedim(-1, 1) if layer.is_channels_last else values


def _kept(layer: Layer) -> torch.Tensor:
    """Return the mask of a layer as bool, of the shape of its tensor."""
    tensor = layer.tensor
    if layer.mask is None:
        return torch.ones_like(tensor, dtype=torch.bool)
    return _in_tensor(BitMask.of(layer.mask, layer.weight.shape, ROW_MAJOR).to_bool(), layer)


def _packed(kept: torch.Tensor) -> torch.Tensor:
    return BitMask.from_bool(kept.contiguous()).packed


def _packed_like(kept: torch.Tensor, layer: Layer) -> torch.Tensor:
    """Pack bools of the shape of a layer's tensor in the order of its memory."""
    return _packed(kept.movedim(1, -1) if layer.is_channels_last else kept)
