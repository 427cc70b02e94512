"""Rows of the speed table: every operation compared with its usual alternative, in one run.

A row of the table is a ``Case``. Add a new one to the function of its kind, and a new kind to ``all_cases``.

The baselines are in their best form: |w| is computed before the clock starts, buffers and outputs are allocated, and
topk is unsorted and on the smaller side. ``tensor.sum()`` is not an alternative but the floor: one read of the weights
at the speed of memory.
"""

from __future__ import annotations

import math
import statistics
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
from gmp_kernels.optim import SGD, AdamW
from gmp_kernels.optim.compact import layout_of
from gmp_kernels.scheduler import GMPScheduler
from gmp_kernels.schedules import Polynomial
from gmp_kernels.tools.bench.checkpoints import checkpoint_cases
from gmp_kernels.tools.bench.host import host_cases
from gmp_kernels.tools.bench.measurement import Case, Pair, Timed
from gmp_kernels.tools.presets import resnet50_layers

__all__ = [
    "all_cases",
    "memory_cases",
    "optimizer_cases",
    "prune_cases",
    "scheduler_cases",
    "select_cases",
    "training_cases",
]

# One layer of 4096 x 4096. In fp32 its 64 MB do not fit into the last-level cache of common CPUs.
NUM_WEIGHTS = 1 << 24
SPARSITIES = (0.5, 0.9, 0.99)
SPARSITY = 0.9
# Standard deviation of the weights, as in a trained layer, and the size of one optimizer step.
STD = 0.02
STEP = 1e-3 * STD
NUM_LAYERS = 160
NUM_CALLS = 100


def select_cases() -> list[Case]:
    """Return rows on the exact threshold, without and with an earlier one, against one read and other selections."""
    cases = []
    for sparsity in SPARSITIES:
        cold = f"threshold fp32, {sparsity}, cold"
        warm = f"threshold fp32, {sparsity}, warm"
        cases += [
            Case(cold, "tensor.sum()", 1.8, 1.3, partial(_cold_and_sum, sparsity)),
            Case(warm, "tensor.sum()", 1.4, 1.1, partial(_warm_and_sum, sparsity)),
            Case(cold, "np.partition", 1 / 8, 1 / 15, partial(_cold_and_partition, sparsity)),
            Case(cold, "torch.kthvalue", 1 / 40, 1 / 100, partial(_cold_and_kthvalue, sparsity)),
            Case(cold, "torch.topk", 1 / 40, 1 / 100, partial(_cold_and_topk, sparsity)),
        ]
    return [
        *cases,
        # This baseline makes no copy, unlike np.partition, but destroys the magnitudes.
        Case(
            f"threshold fp32, {SPARSITY}, cold",
            "partition() in place",
            1.0,
            None,
            partial(_cold_and_partition_in_place, SPARSITY),
        ),
        Case(f"threshold bf16, {SPARSITY}, cold", "threshold fp32", 0.8, 0.6, _bf16_and_fp32),
        Case(f"threshold fp32, {SPARSITY}, 10x the weights", "1x the weights", 11.0, None, _tenfold),
    ]


def prune_cases() -> list[Case]:
    """Return rows on the full prune step, i.e. threshold, zeros and bitmask, from dense weights."""
    return [
        Case(f"prune step fp32, {SPARSITY}", "sum() + mul_()", 1.5, 1.1, _prune_and_sum_mul),
        Case(f"prune step fp32, {SPARSITY}", "l1_unstructured", 1 / 100, 1 / 300, _prune_and_l1_unstructured),
        Case(f"prune step, ResNet-50, {SPARSITY}", "the same in one tensor", 1.3, 1.1, _layers_and_one_tensor),
        Case(
            f"prune step, ResNet-50, channels_last, {SPARSITY}", "contiguous", 1.1, 1.0, _channels_last_and_contiguous
        ),
    ]


def scheduler_cases() -> list[Case]:
    """Return rows on ``GMPScheduler.step()`` when no update is due: one call with cold caches, and many in a row."""
    name = f"scheduler.step() between updates, {NUM_LAYERS} layers"
    return [
        Case(name, "30 us", 1.0, 0.2, partial(_idle_steps, 1)),
        Case(f"{NUM_CALLS} x {name}", f"{NUM_CALLS} x 30 us", 1.0, 0.2, partial(_idle_steps, NUM_CALLS)),
    ]


def optimizer_cases() -> list[Case]:
    """Return rows on an optimizer step with masks, against torch's fused step without masks or with masks by hand."""
    fused = "torch fused, no mask"
    compact = {0.9: (0.75, 0.6), 0.95: (0.65, 0.5), 0.99: (0.25, 0.15)}
    return [
        Case("AdamW, dense state, 0", fused, 1.05, 0.95, partial(_adamw_and_fused, 0.0, False)),
        Case("AdamW, dense state, 0.9", fused, 1.0, 0.9, partial(_adamw_and_fused, 0.9, False)),
        *(
            Case(f"AdamW, compact state, {sparsity}", fused, must, aim, partial(_adamw_and_fused, sparsity, True))
            for sparsity, (must, aim) in compact.items()
        ),
        Case("SGD momentum, compact state, 0.9", fused, 0.9, 0.7, _sgd_and_fused),
        Case("AdamW, dense state, 0.9", "torch fused + _foreach_mul_", 0.5, 0.35, _adamw_and_masks_by_hand),
        Case("AdamW state, compact, 0.9", "0.105 dense + 1 bit/weight", 1.0, None, _state_bytes, "B"),
    ]


def training_cases() -> list[Case]:
    """Return the row on all work of a training beside forward and backward passes; the training times it itself."""
    return [Case("small network's GMP run, after the backward pass", "torch fused, no pruning", 1.0, None, _gmp_run)]


def memory_cases() -> list[Case]:
    """Return rows on the peak memory of a prune step beyond weights and masks."""
    limit = "5% of largest + 4 MB"
    return [
        Case("peak extra memory, one layer", limit, 1.0, None, lambda shrink: _memory([NUM_WEIGHTS // shrink]), "B"),
        Case("peak extra memory, ResNet-50", limit, 1.0, None, lambda shrink: _memory(_resnet50_sizes(shrink)), "B"),
    ]


def all_cases() -> list[Case]:
    """Return every row of the table."""
    return [
        *select_cases(),
        *prune_cases(),
        *optimizer_cases(),
        *training_cases(),
        *scheduler_cases(),
        *host_cases(),
        *memory_cases(),
        *checkpoint_cases(),
    ]


def _weights(num_weights: int) -> torch.Tensor:
    return torch.randn(num_weights, generator=torch.Generator().manual_seed(0)).mul_(STD)


def _threshold(weight: torch.Tensor, num_prune: int, previous: Threshold | None = None) -> Timed:
    return Timed(lambda: magnitude_threshold(weight, num_prune, previous=previous))


def _cold(sparsity: float, shrink: int) -> tuple[torch.Tensor, int, Timed]:
    """Return the weights, the number of weights to prune, and our side."""
    weight = _weights(NUM_WEIGHTS // shrink)
    num_prune = round(sparsity * weight.numel())
    return weight, num_prune, _threshold(weight, num_prune)


def _cold_and_sum(sparsity: float, shrink: int) -> Pair:
    weight, _, ours = _cold(sparsity, shrink)
    return Pair(ours, Timed(weight.sum))


def _warm_and_sum(sparsity: float, shrink: int) -> Pair:
    weight, num_prune, _ = _cold(sparsity, shrink)
    previous = magnitude_threshold(weight, num_prune)
    weight += STEP * torch.randn(weight.numel(), generator=torch.Generator().manual_seed(1))
    return Pair(_threshold(weight, num_prune, previous), Timed(weight.sum))


def _cold_and_partition(sparsity: float, shrink: int) -> Pair:
    weight, num_prune, ours = _cold(sparsity, shrink)
    magnitude = weight.abs().numpy()
    return Pair(ours, Timed(lambda: np.partition(magnitude, num_prune - 1)[num_prune - 1]))


def _cold_and_partition_in_place(sparsity: float, shrink: int) -> Pair:
    weight, num_prune, ours = _cold(sparsity, shrink)
    magnitude = weight.abs().numpy()
    partitioned = np.empty_like(magnitude)

    def run() -> float:
        partitioned.partition(num_prune - 1)
        return float(partitioned[num_prune - 1])

    return Pair(ours, Timed(run, lambda: np.copyto(partitioned, magnitude)))


def _cold_and_kthvalue(sparsity: float, shrink: int) -> Pair:
    weight, num_prune, ours = _cold(sparsity, shrink)
    magnitude = weight.abs()
    out = (torch.empty(()), torch.empty((), dtype=torch.int64))
    return Pair(ours, Timed(lambda: torch.kthvalue(magnitude, num_prune, out=out)[0]))


def _cold_and_topk(sparsity: float, shrink: int) -> Pair:
    weight, num_prune, ours = _cold(sparsity, shrink)
    magnitude = weight.abs()
    # The threshold is the smallest of the k largest magnitudes. From a sparsity of 0.5 on, this is the smaller side.
    k = weight.numel() - num_prune + 1
    out = (torch.empty(k), torch.empty(k, dtype=torch.int64))
    return Pair(ours, Timed(lambda: torch.topk(magnitude, k, sorted=False, out=out)[0]))


def _bf16_and_fp32(shrink: int) -> Pair:
    weight, num_prune, fp32 = _cold(SPARSITY, shrink)
    bf16 = weight.bfloat16()
    return Pair(_threshold(bf16, num_prune), fp32)


def _tenfold(shrink: int) -> Pair:
    many = _weights(4 * NUM_WEIGHTS // shrink)
    # This fits into some caches, but the long read before each run leaves nothing of it there.
    few = many[: many.numel() // 10].clone()
    return Pair(*(_threshold(weight, round(SPARSITY * weight.numel())) for weight in (many, few)))


def _prune_and_sum_mul(shrink: int) -> Pair:
    dense = _weights(NUM_WEIGHTS // shrink)
    weight = dense.clone()

    def sum_mul() -> None:
        # This is the floor, so it multiplies by a scalar: a mask would be one more read.
        weight.sum()
        weight.mul_(1.0)

    restore = partial(weight.copy_, dense)
    return Pair(Timed(lambda: prune_(weight, sparsity=SPARSITY), restore), Timed(sum_mul, restore))


def _prune_and_l1_unstructured(shrink: int) -> Pair:
    dense = _weights(NUM_WEIGHTS // shrink)
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
    dense = _weights(sum(sizes))
    whole = dense.clone()
    layers = torch.split(whole, sizes)
    restore = partial(whole.copy_, dense)
    return Pair(
        Timed(lambda: prune_(layers, sparsity=SPARSITY), restore),
        Timed(lambda: prune_(whole, sparsity=SPARSITY), restore),
    )


def _channels_last_and_contiguous(shrink: int) -> Pair:
    shapes = [(max(1, num_filters // shrink), *of_filter) for num_filters, *of_filter in resnet50_layers().values()]
    dense = [_weights(math.prod(shape)).view(shape) for shape in shapes]

    def step(channels_last: bool) -> Timed:
        layers = [
            weight.clone(
                memory_format=torch.channels_last if channels_last and weight.ndim == 4 else torch.preserve_format
            )
            for weight in dense
        ]
        return Timed(lambda: prune_(layers, sparsity=SPARSITY), partial(torch._foreach_copy_, layers, dense))

    return Pair(step(True), step(False))


def _parameter(shrink: int) -> nn.Parameter:
    parameter = nn.Parameter(_weights(NUM_WEIGHTS // shrink))
    parameter.grad = _weights(NUM_WEIGHTS // shrink)
    return parameter


def _mask(num_weights: int, sparsity: float) -> BitMask:
    """Return a mask of independent bits, which has the fewest dead blocks."""
    return BitMask.from_bool(torch.rand(num_weights, generator=torch.Generator().manual_seed(2)) >= sparsity)


def _masked(optimizer: SGD | AdamW, parameter: nn.Parameter, sparsity: float) -> SGD | AdamW:
    optimizer.set_masks({parameter: _mask(parameter.numel(), sparsity)})
    optimizer.step()  # creates the state
    return optimizer


def _adamw_and_fused(sparsity: float, compact_state: bool, shrink: int) -> Pair:
    ours, theirs = _parameter(shrink), _parameter(shrink)
    masked = _masked(AdamW([ours], compact_state=compact_state), ours, sparsity)
    return Pair(Timed(masked.step), Timed(torch.optim.AdamW([theirs], fused=True).step))


def _sgd_and_fused(shrink: int) -> Pair:
    ours, theirs = _parameter(shrink), _parameter(shrink)
    masked = _masked(SGD([ours], lr=1e-3, momentum=0.9, compact_state=True), ours, SPARSITY)
    return Pair(Timed(masked.step), Timed(torch.optim.SGD([theirs], lr=1e-3, momentum=0.9, fused=True).step))


def _adamw_and_masks_by_hand(shrink: int) -> Pair:
    ours, theirs = _parameter(shrink), _parameter(shrink)
    masked = _masked(AdamW([ours]), ours, SPARSITY)
    fused = torch.optim.AdamW([theirs], fused=True)
    fused.step()
    state = fused.state[theirs]
    held = [theirs.detach(), state["exp_avg"], state["exp_avg_sq"]]
    # The masks are float32, because _foreach_mul_ is slower when it has to convert.
    masks = [_mask(theirs.numel(), SPARSITY).to_bool().float()] * len(held)

    def step() -> None:
        fused.step()
        torch._foreach_mul_(held, masks)

    return Pair(Timed(masked.step), Timed(step))


def _gmp_run(shrink: int) -> Pair:
    # Imported here, because only this row needs scikit-learn.
    from gmp_kernels.tools.bench.network import seconds_after_backward

    epochs = max(3, 60 // shrink)
    runs = [(seconds_after_backward("gmp", epochs), seconds_after_backward(None, epochs)) for _ in range(3)]
    return Pair(*(statistics.median(seconds) for seconds in zip(*runs, strict=True)))


def _state_bytes(shrink: int) -> Pair:
    parameter = _parameter(shrink)
    optimizer = _masked(AdamW([parameter], compact_state=True), parameter, SPARSITY)
    n = parameter.numel()
    state = [optimizer.state[parameter][key] for key in ("exp_avg", "exp_avg_sq")]
    # Both sides count the mask. Ours also counts the chunk offsets that address the state.
    layout = layout_of(optimizer.state[parameter])
    assert layout is not None
    return Pair(
        float(sum(tensor.nbytes for tensor in state) + layout.chunk_offsets.nbytes + n / 8), 0.105 * 8 * n + n / 8
    )


def _idle_steps(num_calls: int, _shrink: int) -> Pair:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(NUM_LAYERS)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    # There is an update at the first step, and none while the steps are timed.
    schedule = Polynomial(0.5, SPARSITY, begin_step=0, end_step=1 << 40, frequency=1 << 40)
    # It counts calls, because no optimizer steps here. A step checks the same things in both cases.
    pruner = GMPScheduler(model, optimizer, schedule, count="calls")
    pruner.step()
    return Pair(Timed(lambda: [pruner.step() for _ in range(num_calls)]), num_calls * 30e-6)


def _memory(sizes: Sequence[int]) -> Pair:
    # A new process has no memory that was freed but not given back, which would hide that of the step.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        peak = pool.submit(_peak_extra_bytes, sizes, torch.get_num_threads()).result()
    return Pair(float(peak), 0.05 * 4 * max(sizes) + 4e6)


def _peak_extra_bytes(sizes: Sequence[int], num_threads: int) -> int:
    torch.set_num_threads(num_threads)
    layers = [_weights(n) for n in sizes]
    masks = [BitMask.ones(weight.shape) for weight in layers]
    # Start the threads and load everything that is loaded on first use, which is not memory of the step.
    _weights(1 << 20).sum()
    prune_(_weights(8), sparsity=SPARSITY)
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak_bytes()
    prune_(layers, sparsity=SPARSITY, masks=masks)
    return _peak_bytes() - before


def _peak_bytes() -> int:
    """Return the peak resident size of this process since ``5`` was written to its ``clear_refs``."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])
