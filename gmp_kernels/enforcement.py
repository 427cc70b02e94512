"""Holding pruned weights at zero under an optimizer that knows nothing of masks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from gmp_kernels import capture
from gmp_kernels.errors import CaptureError
from gmp_kernels.masks import BitMask
from gmp_kernels.ops import apply_masks_
from gmp_kernels.sharding import local

__all__ = ["enforce_masks_", "refuse_capture"]


def refuse_capture(device: torch.device, what: str, use: str) -> None:
    """Raise CaptureError while a CUDA graph is captured, whose replays do not run what Python does here."""
    if capture.is_capturing(device):
        raise CaptureError(f"expected nothing that a CUDA graph would leave out, got {what}; use {use}")


def enforce_masks_(
    optimizer: torch.optim.Optimizer,
    masks: Mapping[torch.Tensor, BitMask],
    *,
    with_weights: bool,
    backend: str | None,
) -> None:
    """Zero what is pruned in the optimizer's state, and in the weights where asked: one call per device.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        All of its floating state that has a parameter's shape is masked: momentum, averages of gradients.
    masks : mapping of parameter to BitMask
        Each for what this process holds of the parameter.
    with_weights : bool
    backend : str, optional
    """
    calls: dict[torch.device, tuple[list[torch.Tensor], list[BitMask]]] = {}
    for parameter, mask in masks.items():
        for tensor in map(local, _masked_tensors(optimizer, parameter, with_weights)):
            if not tensor.numel():
                continue
            if tensor.is_contiguous():
                tensors, bits = calls.setdefault(tensor.device, ([], []))
                tensors.append(tensor)
                bits.append(mask.to(tensor.device))
            else:
                # Momentum takes over the strides of the first gradient, whatever they are.
                tensor.masked_fill_(~mask.to_bool().to(tensor.device), 0.0)
    for tensors, bits in calls.values():
        apply_masks_(tensors, bits, backend=backend)


def _masked_tensors(
    optimizer: torch.optim.Optimizer, parameter: torch.Tensor, with_weights: bool
) -> Iterator[torch.Tensor]:
    if with_weights:
        yield parameter.detach()
    for value in optimizer.state.get(parameter, {}).values():
        if not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
            continue
        # Counters such as Adam's ``step`` are floating tensors too, without dimensions.
        if value.ndim and value.is_floating_point():
            yield value
