"""Rows of the speed table on N:M, on blocks, and on masks that may grow back.

Peers find 2:4 with ``topk`` in groups, or by a product with the six patterns that a group can have, and project with
``topk`` over the whole tensor. These baselines give zeros and a mask as we do. Their mask has the dtype of the weights,
by which torch multiplies several times faster than by bools. Magnitudes are there before the clock starts, and so is
the memory of all results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations

import torch

from gmp_kernels.ops import PruneResult, Threshold, apply_masks_, begin_prune, prune_
from gmp_kernels.patterns import NM, Block, Pattern
from gmp_kernels.tools.bench.measurement import Case, Pair, Timed
from gmp_kernels.tools.bench.weights import NUM_WEIGHTS, STEP, mask_of, weights_of

__all__ = ["pattern_cases", "regrow_cases"]

KEEP, OF = 2, 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROJECTED = 0.95
EARLIER_STEPS = 6  # after which a threshold moves by less than a hundredth in a step


def pattern_cases() -> list[Case]:
    """Return rows on prune steps in patterns, from dense weights."""
    cases = []
    for name, dtype in DTYPES.items():
        step = f"prune step 2:4 {name}"
        cases += [
            Case(step, "sum() + mul_()", 1.3, 1.0, partial(_step_and_sum_mul, dtype)),
            Case(step, "topk in groups + scatter", 1 / 20, 1 / 60, partial(_step_and_topk, dtype)),
            Case(step, "matmul with 6 patterns", 1 / 20, 1 / 60, partial(_step_and_matmul, dtype)),
        ]
    half_way, half = (1 - KEEP / OF) / 2, 0.5
    return [
        *cases,
        Case(
            f"prune step 2:4 fp32, at {half_way} of the way up",
            "unstructured",
            1.5,
            1.1,
            partial(_step_and_unstructured, NM(KEEP, OF), half_way),
        ),
        Case(
            f"prune step of 4x4 blocks fp32, {half}",
            "unstructured",
            1.5,
            1.0,
            partial(_step_and_unstructured, Block(4, 4), half),
        ),
    ]


def regrow_cases() -> list[Case]:
    """Return rows on a projection onto the largest weights after an optimizer step, as in every step before."""
    step = f"projection fp32, {PROJECTED}, from the last one"
    return [
        Case(step, "tensor.sum()", 2.2, 1.5, _projection_and_sum),
        Case(step, "topk + scatter", 1 / 50, 1 / 150, _projection_and_topk),
    ]


def _matrix(shrink: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a square matrix of which every side is divisible by 4."""
    side = math.isqrt(NUM_WEIGHTS // shrink) // OF * OF
    return weights_of(side * side).view(side, side).to(dtype)


def _dense_again(shrink: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, Callable[[], object]]:
    """Return weights, and what makes them dense again."""
    dense = _matrix(shrink, dtype)
    weight = dense.clone()
    return weight, partial(weight.copy_, dense)


def _two_to_four(weight: torch.Tensor) -> Callable[[], object]:
    return partial(prune_, weight, sparsity=1 - KEEP / OF, pattern=NM(KEEP, OF))


def _step_and_sum_mul(dtype: torch.dtype, shrink: int) -> Pair:
    weight, restore = _dense_again(shrink, dtype)

    def sum_mul() -> None:
        weight.sum()
        weight.mul_(1.0)  # the floor, as in the row without a pattern

    return Pair(Timed(_two_to_four(weight), restore), Timed(sum_mul, restore))


def _step_and_topk(dtype: torch.dtype, shrink: int) -> Pair:
    weight, restore = _dense_again(shrink, dtype)
    groups = weight.view(-1, OF)
    magnitude, mask = groups.abs(), torch.empty_like(groups)
    smallest = magnitude.new_empty(len(groups), OF - KEEP)
    pruned = torch.empty(smallest.shape, dtype=torch.int64)

    def topk_scatter() -> torch.Tensor:
        torch.topk(magnitude, OF - KEEP, largest=False, sorted=False, out=(smallest, pruned))
        groups.mul_(mask.fill_(1.0).scatter_(1, pruned, 0.0))
        return mask

    return Pair(Timed(_two_to_four(weight), restore), Timed(topk_scatter, restore))


def _step_and_matmul(dtype: torch.dtype, shrink: int) -> Pair:
    weight, restore = _dense_again(shrink, dtype)
    groups = weight.view(-1, OF)
    magnitude, mask = groups.abs(), torch.empty_like(groups)
    patterns = torch.tensor([[i in kept for i in range(OF)] for kept in combinations(range(OF), KEEP)]).to(dtype)
    columns = patterns.T.contiguous()
    sums, best = magnitude.new_empty(len(groups), len(patterns)), torch.empty(len(groups), dtype=torch.int64)

    def matmul() -> torch.Tensor:
        torch.argmax(torch.matmul(magnitude, columns, out=sums), 1, out=best)
        groups.mul_(torch.index_select(patterns, 0, best, out=mask))
        return mask

    return Pair(Timed(_two_to_four(weight), restore), Timed(matmul, restore))


def _step_and_unstructured(pattern: Pattern, sparsity: float, shrink: int) -> Pair:
    weight, restore = _dense_again(shrink)
    return Pair(
        Timed(partial(prune_, weight, sparsity=sparsity, pattern=pattern), restore),
        Timed(partial(prune_, weight, sparsity=sparsity), restore),
    )


def _projection(shrink: int) -> tuple[torch.Tensor, Timed, Callable[[], object]]:
    """Return the weights, our side, and what makes the weights those before the projection again.

    The optimizer has moved all weights since the last projection, those too that it had set to zero. Some of the others
    are small enough to change places with them, as they are after many steps.
    """
    generator = torch.Generator().manual_seed(1)
    weight = weights_of(NUM_WEIGHTS // shrink)
    mask = mask_of(weight.numel(), PROJECTED).clone()
    apply_masks_(weight, mask)

    def step() -> None:
        weight.add_(torch.randn(weight.numel(), generator=generator), alpha=STEP)

    def project(previous: Sequence[Threshold] | None) -> PruneResult:
        # What GMPScheduler(regrow=True) calls.
        return begin_prune([weight], [mask], "layer", "error", previous, None, None, PROJECTED, regrow=True)()

    thresholds = None
    for _ in range(EARLIER_STEPS):
        step()
        thresholds = project(thresholds).thresholds
    step()
    restore = partial(weight.copy_, weight.clone())
    return weight, Timed(partial(project, thresholds), restore), restore


def _projection_and_sum(shrink: int) -> Pair:
    weight, ours, restore = _projection(shrink)
    return Pair(ours, Timed(weight.sum, restore))


def _projection_and_topk(shrink: int) -> Pair:
    weight, ours, restore = _projection(shrink)
    magnitude, mask = weight.abs(), torch.empty_like(weight)
    num_kept = weight.numel() - round(PROJECTED * weight.numel())
    largest, indices = weight.new_empty(num_kept), torch.empty(num_kept, dtype=torch.int64)

    def topk_scatter() -> torch.Tensor:
        torch.topk(magnitude, num_kept, sorted=False, out=(largest, indices))
        weight.mul_(mask.zero_().scatter_(0, indices, 1.0))
        return mask

    return Pair(ours, Timed(topk_scatter, restore))
