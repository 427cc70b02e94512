"""Rows of the speed table on many small tensors, where most of the time is that of Python and of a call.

There are as many tensors as one layer, a small network, ResNet-50 and Llama 3 8B have parameters. A training loop's
caches are neither cold nor warm: the passes between two steps use them too. So every row is there twice.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from gmp_kernels.masks import BitMask
from gmp_kernels.ops import prune_
from gmp_kernels.optim import SGD, AdamW
from gmp_kernels.tools.bench.measurement import Case, Pair, Timed
from gmp_kernels.tools.bench.weights import SPARSITY

__all__ = ["NUMBERS", "counted", "fused_adamw", "mask_tensors", "pruning", "small_cases", "small_parameters"]

NUMBERS = (1, 25, 161, 291)
NUM_WEIGHTS = 256  # per tensor
STEP_BOUNDS = (1.0, 0.6)
PRUNE_BOUNDS = (0.5, 0.2)  # from 161 tensors on
PRUNE_FEW_BOUNDS = (1.2, 0.6)  # up to 25
FUSED = "torch fused"


def small_cases() -> list[Case]:
    """Return rows on optimizer steps and ``prune_``, each with cold and with warm caches."""
    cases = []
    for warm in (False, True):
        caches = "warm caches" if warm else "cold caches"
        for number in NUMBERS:
            where = f"{counted(number)} of {NUM_WEIGHTS}, {caches}"
            cases += [
                Case(f"SGD momentum step, {where}", FUSED, *STEP_BOUNDS, partial(_sgd_and_fused, number), warm=warm),
                Case(f"AdamW step, {where}", FUSED, *STEP_BOUNDS, partial(_adamw_and_fused, number), warm=warm),
                Case(
                    f"prune_, {where}",
                    "torch fused AdamW step",
                    *(PRUNE_BOUNDS if number > 25 else PRUNE_FEW_BOUNDS),
                    partial(_prune_and_fused, number),
                    warm=warm,
                ),
            ]
    return cases


def counted(num_tensors: int) -> str:
    """Return ``1 tensor``, ``25 tensors``."""
    return f"{num_tensors} tensor{'s' * (num_tensors > 1)}"


def small_parameters(num_tensors: int) -> list[nn.Parameter]:
    """Return parameters with random weights and gradients."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(NUM_WEIGHTS, generator=generator)) for _ in range(num_tensors)]
    for parameter in parameters:
        parameter.grad = torch.randn(NUM_WEIGHTS, generator=generator)
    return parameters


def fused_adamw(num_tensors: int) -> torch.optim.AdamW:
    """Return torch's fused AdamW for such parameters of its own."""
    return torch.optim.AdamW(small_parameters(num_tensors), fused=True)


def mask_tensors(optimizer: SGD | AdamW) -> None:
    """Give every parameter a mask that keeps every weight."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.set_masks({p: BitMask.ones(p.shape) for p in parameters})


def pruning(num_tensors: int, backend: str | None = None) -> Timed:
    """Return ``prune_`` of such tensors, which are dense again every time, with masks from earlier."""
    weights = small_parameters(num_tensors)
    masks = [BitMask.ones(weight.shape) for weight in weights]
    written = [*(weight.detach() for weight in weights), *(mask.packed for mask in masks)]
    dense = [tensor.clone() for tensor in written]
    prune = partial(prune_, weights, sparsity=SPARSITY, masks=masks, backend=backend)
    return Timed(prune, partial(torch._foreach_copy_, written, dense))


def _sgd_and_fused(num_tensors: int, _shrink: int) -> Pair:
    parameters = small_parameters(num_tensors)
    ours = SGD(parameters, lr=1e-3, momentum=0.9)
    mask_tensors(ours)
    return Pair(Timed(ours.step), Timed(torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, fused=True).step))


def _adamw_and_fused(num_tensors: int, _shrink: int) -> Pair:
    parameters = small_parameters(num_tensors)
    ours = AdamW(parameters)
    mask_tensors(ours)
    return Pair(Timed(ours.step), Timed(torch.optim.AdamW(parameters, fused=True).step))


def _prune_and_fused(num_tensors: int, _shrink: int) -> Pair:
    return Pair(pruning(num_tensors), Timed(fused_adamw(num_tensors).step))
