"""Things that the tests of this folder share: backends that run on a GPU, weights on it, and optimizers with a past."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from conftest import KERNELS
from optim_cases import masked, parameters, random_gradients, random_masks, set_gradients

from gmp_kernels.tools.testing import device_of

GPU = device_of("cuda")
# Where none was asked for, "cuda" fails with the reason why it cannot run.
ON_GPU = [name for name in KERNELS if device_of(name) == GPU] or ["cuda"]
SHAPES = [(24, 33), (7,), (65, 9), (3 * 16384 + 5,)]


def random_weight(n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.empty(n, dtype=dtype, device=GPU).normal_(generator=torch.Generator(GPU).manual_seed(seed))


def started(gpu: str, case: str = "adamw", **options: Any) -> tuple[list[Any], Any, dict[torch.Tensor, Any]]:
    """Parameters on the GPU, their optimizer with a few steps behind it, and the masks it has."""
    params = parameters(SHAPES, device=GPU)
    optimizer = masked(case, params, backend=gpu, **options)
    masks = random_masks(params, 0.7)
    optimizer.set_masks(masks)
    for step in range(3):
        set_gradients(params, random_gradients(params, step), {})
        optimizer.step()
    return params, optimizer, masks


def hand_out(params: Sequence[torch.Tensor], step: int) -> None:
    """New gradients in the memory of the old ones."""
    for p, gradient in zip(params, random_gradients(params, step), strict=True):
        p.grad.copy_(gradient)
