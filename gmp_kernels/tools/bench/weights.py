"""Weights, masks and parameters of the rows on large tensors."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import nn

from gmp_kernels.masks import BitMask

__all__ = ["NUM_WEIGHTS", "SPARSITY", "STD", "STEP", "mask_of", "parameter_of", "weights_of"]

# One layer of 4096 x 4096. In fp32 its 64 MB do not fit into the last-level cache of common CPUs.
NUM_WEIGHTS = 1 << 24
SPARSITY = 0.9
STD = 0.02  # of the weights, as in a trained layer
STEP = 1e-3 * STD  # size of one optimizer step


@lru_cache(1)
def _drawn(num_weights: int) -> torch.Tensor:
    return torch.randn(num_weights, generator=torch.Generator().manual_seed(0)).mul_(STD)


def weights_of(num_weights: int) -> torch.Tensor:
    """Return normal random weights, float32 of shape (num_weights,), the same every time."""
    return _drawn(num_weights).clone()


def parameter_of(num_weights: int) -> nn.Parameter:
    """Return a parameter with random weights, and with a gradient that has the same values."""
    parameter = nn.Parameter(weights_of(num_weights))
    parameter.grad = weights_of(num_weights)
    return parameter


@lru_cache(1)
def mask_of(num_weights: int, sparsity: float) -> BitMask:
    """Return a mask of independent bits, which has the fewest dead blocks."""
    return BitMask.from_bool(torch.rand(num_weights, generator=torch.Generator().manual_seed(2)) >= sparsity)
