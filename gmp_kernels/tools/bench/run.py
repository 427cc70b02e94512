"""Rows of the speed table: every operation compared with its usual alternative, in one run.

A row of the table is a ``Case``. Add a new one to the function of its kind, and a new kind to ``all_cases``.

The baselines are in their best form: |w| is computed before the clock starts, buffers and outputs are allocated, and
topk is unsorted and on the smaller side. ``tensor.sum()`` is not an alternative but the floor: one read of the weights
at the speed of memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from gmp_kernels.masks import BitMask
from gmp_kernels.ops import Threshold, magnitude_threshold, prune_
from gmp_kernels.scheduler import GMPScheduler
from gmp_kernels.schedules import Polynomial
from gmp_kernels.tools.bench.checkpoints import checkpoint_cases
from gmp_kernels.tools.bench.host import host_cases
from gmp_kernels.tools.bench.measurement import Case, Pair, Timed
from gmp_kernels.tools.bench.optimizers import optimizer_cases
from gmp_kernels.tools.bench.patterns import pattern_cases, regrow_cases
from gmp_kernels.tools.bench.sharded import sharded_cases
from gmp_kernels.tools.bench.small import small_cases
from gmp_kernels.tools.bench.training import training_cases
from gmp_kernels.tools.bench.weights import NUM_WEIGHTS, SPARSITY, STEP, weights_of
from gmp_kernels.tools.presets import resnet50_layers

__all__ = [
    "all_cases",
    "memory_cases",
    "prune_cases",
    "scheduler_cases",
    "select_cases",
]

SPARSITIES = (0.5, 0.9, 0.99)
NUM_LAYERS = 160


def select_cases() -> list[Case]:
    """Return rows on the exact threshold, without and with an earlier one, against one read and other selections."""
    read, at = "tensor.sum()", f"threshold fp32, {SPARSITY}"
    return [
        *(Case(f"threshold fp32, {s}", read, 1.5, 1.2, partial(_first_and_sum, s)) for s in SPARSITIES),
        *(
            Case(f"threshold fp32, {s}, from the last one", read, 1.4, 1.1, partial(_next_and_sum, s))
            for s in SPARSITIES
        ),
        Case(f"threshold bf16, {SPARSITY}", "threshold fp32", 0.65, 0.55, partial(_half_and_fp32, torch.bfloat16)),
        Case(f"threshold fp16, {SPARSITY}", "threshold fp32", 0.65, 0.55, partial(_half_and_fp32, torch.float16)),
        Case(f"{at}, 10x the weights", "1x the weights", 11.0, None, _tenfold),
        Case(at, "np.partition", 1 / 8, 1 / 15, _first_and_partition),
        # This baseline makes no copy, unlike np.partition, but destroys the magnitudes.
        Case(at, "partition() in place", 1.0, None, _first_and_partition_in_place),
        Case(at, "torch.kthvalue", 1 / 40, 1 / 100, _first_and_kthvalue, once=True),
        Case(at, "torch.topk", 1 / 40, 1 / 100, _first_and_topk, once=True),
    ]


def prune_cases() -> list[Case]:
    """Return rows on the full prune step, i.e. threshold, zeros and bitmask, from dense weights."""
    return [
        Case(f"prune step fp32, {SPARSITY}", "sum() + mul_()", 1.5, 1.1, _prune_and_sum_mul),
        Case(
            f"prune step fp32, {SPARSITY}", "l1_unstructured", 1 / 100, 1 / 300, _prune_and_l1_unstructured, once=True
        ),
        Case(f"prune step, ResNet-50, {SPARSITY}", "the same in one tensor", 1.3, 1.1, _layers_and_one_tensor),
        Case(
            f"prune step, ResNet-50, channels_last, {SPARSITY}", "contiguous", 1.1, 1.0, _channels_last_and_contiguous
        ),
    ]


def scheduler_cases() -> list[Case]:
    """Return rows on ``GMPScheduler.step()`` when no update is due, with cold and with warm caches."""
    name = f"scheduler.step() between updates, {NUM_LAYERS} layers"
    return [
        Case(f"{name}, {'warm' if warm else 'cold'} caches", "30 us", 1.0, 0.2, _idle_step, warm=warm)
        for warm in (False, True)
    ]


def memory_cases() -> list[Case]:
    """Return rows on the peak memory of a prune step beyond weights and masks."""
    limit = "5% of largest + 4 MB"
    return [
        Case("peak extra memory, one layer", limit, 1.0, None, _memory_of_layer, "B", most_processes=1),
        Case("peak extra memory, ResNet-50", limit, 1.0, None, _memory_of_resnet50, "B", most_processes=1),
    ]


def all_cases(folder: Path) -> list[Case]:
    """Return every row of the table; ``folder`` is where rows on checkpoints keep their files."""
    return [
        *select_cases(),
        *prune_cases(),
        *pattern_cases(),
        *regrow_cases(),
        *optimizer_cases(),
        *small_cases(),
        *scheduler_cases(),
        *training_cases(),
        *sharded_cases(),
        *host_cases(),
        *memory_cases(),
        *checkpoint_cases(folder),
    ]


def _threshold(weight: torch.Tensor, num_prune: int, previous: Threshold | None = None) -> Timed:
    return Timed(lambda: magnitude_threshold(weight, num_prune, previous=previous))


def _first(sparsity: float, shrink: int) -> tuple[torch.Tensor, int, Timed]:
    """Return the weights, the number of weights to prune, and our side."""
    weight = weights_of(NUM_WEIGHTS // shrink)
    num_prune = round(sparsity * weight.numel())
    return weight, num_prune, _threshold(weight, num_prune)


def _first_and_sum(sparsity: float, shrink: int) -> Pair:
    weight, _, ours = _first(sparsity, shrink)
    return Pair(ours, Timed(weight.sum))


def _next_and_sum(sparsity: float, shrink: int) -> Pair:
    weight, num_prune, _ = _first(sparsity, shrink)
    previous = magnitude_threshold(weight, num_prune)
    weight += STEP * torch.randn(weight.numel(), generator=torch.Generator().manual_seed(1))
    return Pair(_threshold(weight, num_prune, previous), Timed(weight.sum))


def _first_and_partition(shrink: int) -> Pair:
    weight, num_prune, ours = _first(SPARSITY, shrink)
    magnitude = weight.abs().numpy()
    return Pair(ours, Timed(lambda: np.partition(magnitude, num_prune - 1)[num_prune - 1]))


def _first_and_partition_in_place(shrink: int) -> Pair:
    weight, num_prune, ours = _first(SPARSITY, shrink)
    magnitude = weight.abs().numpy()
    partitioned = np.empty_like(magnitude)

    def run() -> float:
        partitioned.partition(num_prune - 1)
        return float(partitioned[num_prune - 1])

    return Pair(ours, Timed(run, lambda: np.copyto(partitioned, magnitude)))


def _first_and_kthvalue(shrink: int) -> Pair:
    weight, num_prune, ours = _first(SPARSITY, shrink)
    magnitude = weight.abs()
    out = (torch.empty(()), torch.empty((), dtype=torch.int64))
    return Pair(ours, Timed(lambda: torch.kthvalue(magnitude, num_prune, out=out)[0]))


def _first_and_topk(shrink: int) -> Pair:
    weight, num_prune, ours = _first(SPARSITY, shrink)
    magnitude = weight.abs()
    # The threshold is the smallest of the k largest magnitudes. From a sparsity of 0.5 on, this is the smaller side.
    k = weight.numel() - num_prune + 1
    out = (torch.empty(k), torch.empty(k, dtype=torch.int64))
    return Pair(ours, Timed(lambda: torch.topk(magnitude, k, sorted=False, out=out)[0]))


def _half_and_fp32(dtype: torch.dtype, shrink: int) -> Pair:
    weight, num_prune, fp32 = _first(SPARSITY, shrink)
    return Pair(_threshold(weight.to(dtype), num_prune), fp32)


def _tenfold(shrink: int) -> Pair:
    many = weights_of(4 * NUM_WEIGHTS // shrink)
    # This fits into some caches, but the long read before each run leaves nothing of it there.
    few = many[: many.numel() // 10].clone()
    return Pair(*(_threshold(weight, round(SPARSITY * weight.numel())) for weight in (many, few)))


def _prune_and_sum_mul(shrink: int) -> Pair:
    dense = weights_of(NUM_WEIGHTS // shrink)
    weight = dense.clone()

    def sum_mul() -> None:
        # This is the floor, so it multiplies by a scalar: a mask would be one more read.
        weight.sum()
        weight.mul_(1.0)

    restore = partial(weight.copy_, dense)
    return Pair(Timed(lambda: prune_(weight, sparsity=SPARSITY), restore), Timed(sum_mul, restore))


def _prune_and_l1_unstructured(shrink: int) -> Pair:
    dense = weights_of(NUM_WEIGHTS // shrink)
    weight = dense.clone()
    module = nn.Module()

    def fresh() -> None:
        nonlocal module
        module = nn.Module()
        module.weight = nn.Parameter(dense.clone())

    return Pair(
        Timed(lambda: prune_(weight, sparsity=SPARSITY), partial(weight.copy_, dense)),
        Timed(lambda: torch_prune.l1_unstructured(module, "weight", amount=SPARSITY), fresh),  # type: ignore[no-untyped-call]
    )


def _resnet50_sizes(shrink: int) -> list[int]:
    return [max(1, math.prod(shape) // shrink) for shape in resnet50_layers().values()]


def _layers_and_one_tensor(shrink: int) -> Pair:
    sizes = _resnet50_sizes(shrink)
    dense = weights_of(sum(sizes))
    whole = dense.clone()
    layers = torch.split(whole, sizes)
    restore = partial(whole.copy_, dense)
    return Pair(
        Timed(lambda: prune_(layers, sparsity=SPARSITY), restore),
        Timed(lambda: prune_(whole, sparsity=SPARSITY), restore),
    )


def _channels_last_and_contiguous(shrink: int) -> Pair:
    shapes = [(max(1, num_filters // shrink), *of_filter) for num_filters, *of_filter in resnet50_layers().values()]
    dense = [weights_of(math.prod(shape)).view(shape) for shape in shapes]

    def step(channels_last: bool) -> Timed:
        layers = [
            weight.clone(
                memory_format=torch.channels_last if channels_last and weight.ndim == 4 else torch.preserve_format
            )
            for weight in dense
        ]
        return Timed(lambda: prune_(layers, sparsity=SPARSITY), partial(torch._foreach_copy_, layers, dense))

    return Pair(step(True), step(False))


def _idle_step(_shrink: int) -> Pair:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(NUM_LAYERS)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    # There is an update at the first step, and none while the steps are timed.
    schedule = Polynomial(0.5, SPARSITY, begin_step=0, end_step=1 << 40, frequency=1 << 40)
    # It counts calls, because no optimizer steps here. A step checks the same things in both cases.
    pruner = GMPScheduler(model, optimizer, schedule, count="calls")
    pruner.step()
    return Pair(Timed(pruner.step), 30e-6)


def _memory_of_layer(shrink: int) -> Pair:
    return _memory([NUM_WEIGHTS // shrink])


def _memory_of_resnet50(shrink: int) -> Pair:
    return _memory(_resnet50_sizes(shrink))


def _memory(sizes: Sequence[int]) -> Pair:
    # A new process has no memory that was freed but not given back, which would hide that of the step.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        peak = pool.submit(_peak_extra_bytes, sizes, torch.get_num_threads()).result()
    return Pair(float(peak), 0.05 * 4 * max(sizes) + 4e6)


def _peak_extra_bytes(sizes: Sequence[int], num_threads: int) -> int:
    torch.set_num_threads(num_threads)
    layers = [weights_of(n) for n in sizes]
    masks = [BitMask.ones(weight.shape) for weight in layers]
    # Start the threads and load everything that is loaded on first use, which is not memory of the step.
    weights_of(1 << 20).sum()
    prune_(weights_of(8), sparsity=SPARSITY)
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak_bytes()
    prune_(layers, sparsity=SPARSITY, masks=masks)
    return _peak_bytes() - before


def _peak_bytes() -> int:
    """Return the peak resident size of this process since ``5`` was written to its ``clear_refs``."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])
