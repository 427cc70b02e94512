"""Rows of the speed table on a GPU: every operation compared with a copy of the bytes it must move, or with torch.

A copy within the device is the floor: it reads and writes as many bytes at the rate that memory has in the same run.
Sizes are those of large models, because the time of small tensors on a GPU is mostly that of launches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from gmp_kernels.masks import BitMask
from gmp_kernels.ops import apply_masks_, magnitude_threshold, prune_
from gmp_kernels.optim import AdamW
from gmp_kernels.tools.bench.measurement import Case, Pair, Timed
from gmp_kernels.tools.presets import resnet50_layers

__all__ = ["gpu_cases", "llama_8b_sizes", "resnet50_sizes"]

BILLION = 10**9
NUM_WEIGHTS = 1 << 28  # for optimizer steps, which hold up to five such tensors on either side
LAYER = 1 << 24  # 4096 x 4096, a size at which topk is commonly used
SPARSITY = 0.9
STD = 0.02
MAX_LAUNCHES = 12
EVENT = 0.02  # increase of the sparsity in one update of a schedule
UPDATE = "0.88 to 0.9"  # in the names of rows that start from masks, and weights pruned by them
WITH_HOST = "with the host"  # in the names of rows whose clock starts while the device is idle
SECTOR = 32  # bytes of the smallest write to memory
FEWER = 64  # divides the weights of Llama 8B in the row of its optimizer step, whose state would not fit otherwise
ADAMW_BYTES = 28  # per float32 weight: weights, gradients and both averages in, all but the gradients out


def resnet50_sizes() -> list[int]:
    """Return the number of elements of all 161 parameters of ResNet-50: weights, batch norms, the classifier's bias."""
    sizes = []
    for name, shape in resnet50_layers().items():
        sizes.append(math.prod(shape))
        sizes += [shape[0]] if name == "fc.weight" else [shape[0]] * 2
    return sizes


def llama_8b_sizes() -> list[int]:
    """Return the number of elements of all 291 parameters of Llama 3 8B.

    Source: A. Grattafiori et al., "The Llama 3 herd of models", 2024, arXiv:2407.21783, table 3.
    """
    width, hidden, keys, vocabulary = 4096, 14336, 1024, 128256
    block = [width * width] * 2 + [keys * width] * 2 + [hidden * width] * 3 + [width] * 2
    return [vocabulary * width, *block * 32, width, vocabulary * width]


def gpu_cases(device: torch.device, cuda: str = "cuda", triton: str = "triton") -> list[Case]:
    """Return every row of the table, the most important first; ``cuda`` and ``triton`` name the backends compared."""
    run = _Builder(device, cuda, triton)
    return [
        *_large_cases(run),
        *_model_cases(run),
        *_rival_cases(run),
        *_memory_cases(run),
        Case("triton: apply fp32, 0.9", "cuda", 1 / 0.8, None, run.applied_by_both),
        Case("triton: AdamW fp32, 0", "cuda", 1 / 0.8, None, run.adamw_by_both),
        Case("triton: threshold fp32, 0.9", "cuda", 1 / 0.5, None, run.thresholds_by_both),
    ]


def _large_cases(run: _Builder) -> list[Case]:
    """Return rows on one tensor that is far larger than any cache."""
    step = _step_bytes(torch.float32)
    event = _step_bytes(torch.float32, 1 - (1 - EVENT) ** (SECTOR / 4))
    read, moved, fused = "a read at a copy's rate", "a copy of as many bytes", "torch fused, no mask"
    return [
        Case("threshold fp32, 1e9, 0.9", read, 1.6, 1.2, partial(run.threshold, torch.float32), min_bytes=4 * BILLION),
        Case("threshold bf16, 1e9, 0.9", read, 1.8, 1.3, partial(run.threshold, torch.bfloat16), min_bytes=2 * BILLION),
        Case("AdamW fp32, 0", fused, 1.1, 1.0, partial(run.adamw, 0.0, False), min_bytes=ADAMW_BYTES * NUM_WEIGHTS),
        Case("AdamW fp32, compact state, 0.9", fused, 0.8, 0.6, partial(run.adamw, 0.9, True)),
        Case("AdamW fp32, compact state, 0.95", fused, 0.65, 0.45, partial(run.adamw, 0.95, True)),
        Case("AdamW fp32, 0.9", fused, 0.85, 0.7, partial(run.adamw, 0.9, False)),
        Case(
            "prune step fp32, 1e9, 0 to 0.9", moved, 1.5, 1.15, partial(run.prune, 0.0, step), min_bytes=step * BILLION
        ),
        Case(
            f"prune step fp32, 1e9, {UPDATE}",
            moved,
            1.5,
            1.15,
            partial(run.prune, SPARSITY - EVENT, event),
            min_bytes=event * BILLION,
        ),
    ]


def _model_cases(run: _Builder) -> list[Case]:
    """Return rows on as many tensors as real models have, where the host has most work.

    The rows named "first" are a schedule's first update, when there are no masks yet. The others start from masks.
    """
    whole, fused = "the same in one tensor", "torch fused, no mask"
    return [
        *(
            Case(f"prune step {model}, {how}", whole, must, aim, partial(run.layers, name, before), wall=wall)
            for how, before, wall in (
                (UPDATE, SPARSITY - EVENT, False),
                (f"{UPDATE}, {WITH_HOST}", SPARSITY - EVENT, True),
                (f"first, 0 to 0.9, {WITH_HOST}", 0.0, True),
            )
            for model, name, must, aim in (
                ("fp32, ResNet-50", "resnet50", 2.0, 1.3),
                ("bf16, Llama 8B", "llama_8b", 1.3, 1.1),
            )
        ),
        *(
            Case(f"AdamW fp32, 0, {tensors}", fused, 1.1, 0.9, partial(run.adamw_of_model, name), wall=True)
            for name, tensors in (("resnet50", "161 tensors"), ("llama_8b", f"291 tensors, Llama 8B / {FEWER}"))
        ),
        *(
            Case(f"prune step, {name}", f"{MAX_LAUNCHES} launches", 1.0, None, partial(run.launches, name), "launches")
            for name in MODELS
        ),
    ]


def _rival_cases(run: _Builder) -> list[Case]:
    """Return rows compared with common alternatives, in a loop over the tensors.

    ``kthvalue`` is left out for 1e9 weights, where it takes minutes.
    """

    def rows(what: str, name: str, before: float, rivals: Sequence[str], wall: bool = False) -> list[Case]:
        each = ", per layer" if name in MODELS else ""
        return [
            Case(
                f"prune step fp32, {what}",
                RIVALS[rival][0] + each,
                1 / 10,
                1 / 30,
                partial(run.beside_rival, rival, name, before),
                wall=wall,
            )
            for rival in rivals
        ]

    layer, update = "4096 x 4096", SPARSITY - EVENT
    return [
        *rows(f"ResNet-50, {UPDATE}, {WITH_HOST}", "resnet50", update, tuple(RIVALS), wall=True),
        *rows(f"1e9, {UPDATE}", "1e9 fp32", update, ("topk", "sort")),
        *rows(f"{layer}, 0.9", layer, 0.0, tuple(RIVALS)),
        *rows(f"{layer}, 0.9, {WITH_HOST}", layer, 0.0, tuple(RIVALS), wall=True),
    ]


def _memory_cases(run: _Builder) -> list[Case]:
    limit = "5% of largest + 4 MB"
    return [
        Case(f"peak extra memory, {name}", limit, 1.0, None, partial(run.memory, name), "B")
        for name in ("1e9 fp32", *MODELS)
    ]


MODELS: dict[str, tuple[Callable[[], list[int]], torch.dtype]] = {
    "resnet50": (resnet50_sizes, torch.float32),
    "llama_8b": (llama_8b_sizes, torch.bfloat16),
}
WEIGHTS: dict[str, tuple[Callable[[], list[int]], torch.dtype]] = {
    "1e9 fp32": (lambda: [BILLION], torch.float32),
    "4096 x 4096": (lambda: [LAYER], torch.float32),
    **MODELS,
}


# The alternatives are in their best form: magnitudes and outputs are prepared before the clock starts.


def _topk(weight: torch.Tensor) -> Callable[[], object]:
    magnitude, kept = weight.abs(), torch.empty_like(weight)
    num_kept = weight.numel() - round(SPARSITY * weight.numel())  # the smaller side

    def topk() -> None:
        indices = torch.topk(magnitude, num_kept, sorted=False).indices
        weight.mul_(kept.zero_().scatter_(0, indices, 1.0))

    return topk


def _sort(weight: torch.Tensor) -> Callable[[], object]:
    magnitude, num_prune = weight.abs(), round(SPARSITY * weight.numel())
    out = (torch.empty_like(magnitude), torch.empty(magnitude.shape, dtype=torch.int64, device=weight.device))

    def sort() -> None:
        ordered, _ = torch.sort(magnitude, out=out)
        weight.mul_(magnitude > ordered[num_prune - 1])

    return sort


def _kthvalue(weight: torch.Tensor) -> Callable[[], object]:
    magnitude, num_prune = weight.abs(), round(SPARSITY * weight.numel())

    def kthvalue() -> None:
        weight.mul_(magnitude > torch.kthvalue(magnitude, num_prune).values)

    return kthvalue


RIVALS: dict[str, tuple[str, Callable[[torch.Tensor], Callable[[], object]]]] = {
    "topk": ("torch.topk + scatter", _topk),
    "sort": ("torch.sort + mul_", _sort),
    "kthvalue": ("torch.kthvalue + mul_", _kthvalue),
}


def _step_bytes(dtype: torch.dtype, sectors_written: float = 1.0) -> float:
    """Return the bytes per weight of a prune step: two reads, the write of changed sectors, and one bit of mask."""
    return dtype.itemsize * (2 + sectors_written) + 1 / 8


class _Builder:
    """Builder of the two sides of each case, on one device."""

    def __init__(self, device: torch.device, cuda: str, triton: str) -> None:
        self._device, self._cuda, self._triton = device, cuda, triton

    def _weights(self, n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        generator = torch.Generator(self._device).manual_seed(0)
        return torch.empty(n, dtype=dtype, device=self._device).normal_(0.0, STD, generator=generator)

    def _model(self, name: str, shrink: int) -> tuple[torch.Tensor, list[int]]:
        """Return all weights of a model in one tensor, and the sizes of its layers."""
        sizes_of, dtype = WEIGHTS[name]
        sizes = [max(1, n // shrink) for n in sizes_of()]
        return self._weights(sum(sizes), dtype), sizes

    def _copy(self, num_bytes: float) -> Timed:
        """Return a copy that moves ``num_bytes``, reads and writes together."""
        source = torch.empty(int(num_bytes) // 2, dtype=torch.uint8, device=self._device).random_()
        return Timed(partial(torch.empty_like(source).copy_, source))

    def _mask(self, n: int, sparsity: float) -> BitMask:
        generator = torch.Generator(self._device).manual_seed(2)
        return BitMask.from_bool(torch.rand(n, generator=generator, device=self._device) >= sparsity)

    def threshold(self, dtype: torch.dtype, shrink: int) -> Pair:
        weight = self._weights(BILLION // shrink, dtype)
        return Pair(self._threshold(weight, self._cuda), self._copy(weight.nbytes))

    def _threshold(self, weight: torch.Tensor, backend: str) -> Timed:
        num_prune = round(SPARSITY * weight.numel())
        return Timed(lambda: magnitude_threshold(weight, num_prune, backend=backend))

    def prune(self, pruned_before: float, bytes_per_weight: float, shrink: int) -> Pair:
        weight = self._weights(BILLION // shrink)
        ours = self._prune([weight], weight, self._masks([weight], pruned_before))
        return Pair(ours, self._copy(bytes_per_weight * weight.numel()))

    def _prune(
        self,
        layers: Sequence[torch.Tensor],
        whole: torch.Tensor,
        masks: Sequence[BitMask] | None = None,
        before: torch.Tensor | None = None,
    ) -> Timed:
        """Return a prune step of ``layers``, parts of ``whole``; it starts from the same weights and masks every time.

        ``before`` is a copy of the weights if one exists already.
        """
        weights_before = whole.clone() if before is None else before
        bits_before = [mask.packed.clone() for mask in masks or []]

        def restore() -> None:
            whole.copy_(weights_before)
            for mask, bits in zip(masks or [], bits_before, strict=True):
                mask.packed.copy_(bits)

        return Timed(lambda: prune_(layers, sparsity=SPARSITY, masks=masks, backend=self._cuda), restore)

    def _masks(self, layers: Sequence[torch.Tensor], pruned_before: float) -> list[BitMask] | None:
        """Prune the layers to ``pruned_before`` and return their masks; None if that is 0."""
        return prune_(layers, sparsity=pruned_before, backend=self._cuda).masks if pruned_before else None

    def layers(self, model: str, pruned_before: float, shrink: int) -> Pair:
        whole, sizes = self._model(model, shrink)
        layers = torch.split(whole, sizes)
        masks, mask_of_whole = self._masks(layers, pruned_before), None
        if masks is not None:
            # Both sides start with the same weights pruned.
            mask_of_whole = [BitMask.from_bool(torch.cat([mask.to_bool() for mask in masks]))]
        before = whole.clone()
        return Pair(self._prune(layers, whole, masks, before), self._prune([whole], whole, mask_of_whole, before))

    def launches(self, model: str, shrink: int) -> Pair:
        whole, sizes = self._model(model, shrink)
        step = self._prune(torch.split(whole, sizes), whole)
        step.run()  # loads what is loaded on first use
        step.prepare()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
            step.run()
        kernels = [
            event.name
            for event in trace.events() or []
            if event.device_type == DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset"))
        ]
        if not kernels and self._device.type == "cuda":
            raise RuntimeError("the profiler saw no kernels, so their number is not known")
        return Pair(float(len(kernels)), float(MAX_LAUNCHES))

    def memory(self, model: str, shrink: int) -> Pair:
        whole, sizes = self._model(model, shrink)
        layers = torch.split(whole, sizes)
        step = self._prune(layers, whole, [BitMask.ones(layer.shape, self._device) for layer in layers])
        step.run()
        step.prepare()
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        step.run()
        peak = torch.cuda.max_memory_allocated(self._device) - before
        return Pair(float(peak), 0.05 * whole.itemsize * max(sizes) + 4e6)

    def _parameter(self, n: int) -> nn.Parameter:
        parameter = nn.Parameter(self._weights(n))
        parameter.grad = self._weights(n)
        return parameter

    def _masked_step(self, sparsity: float, compact_state: bool, backend: str, shrink: int) -> Timed:
        parameter = self._parameter(NUM_WEIGHTS // shrink)
        optimizer = AdamW([parameter], compact_state=compact_state, backend=backend)
        optimizer.set_masks({parameter: self._mask(parameter.numel(), sparsity)})
        return Timed(optimizer.step)

    def adamw(self, sparsity: float, compact_state: bool, shrink: int) -> Pair:
        ours = self._masked_step(sparsity, compact_state, self._cuda, shrink)
        return Pair(ours, Timed(torch.optim.AdamW([self._parameter(NUM_WEIGHTS // shrink)], fused=True).step))

    def adamw_of_model(self, name: str, shrink: int) -> Pair:
        sizes = [max(1, n // shrink // (FEWER if name == "llama_8b" else 1)) for n in MODELS[name][0]()]
        parameters = [self._parameter(n) for n in sizes]
        ours = AdamW(parameters, backend=self._cuda)
        ours.set_masks({parameter: self._mask(parameter.numel(), 0.0) for parameter in parameters})
        theirs = torch.optim.AdamW([self._parameter(n) for n in sizes], fused=True)
        return Pair(Timed(ours.step), Timed(theirs.step))

    def adamw_by_both(self, shrink: int) -> Pair:
        return Pair(*(self._masked_step(0.0, False, backend, shrink) for backend in (self._triton, self._cuda)))

    def thresholds_by_both(self, shrink: int) -> Pair:
        weight = self._weights(NUM_WEIGHTS // shrink)
        return Pair(self._threshold(weight, self._triton), self._threshold(weight, self._cuda))

    def applied_by_both(self, shrink: int) -> Pair:
        weight = self._weights(NUM_WEIGHTS // shrink)
        dense, mask = weight.clone(), self._mask(weight.numel(), SPARSITY)
        restore = partial(weight.copy_, dense)
        ours, baseline = (partial(apply_masks_, weight, mask, backend=name) for name in (self._triton, self._cuda))
        return Pair(Timed(ours, restore), Timed(baseline, restore))

    def beside_rival(self, rival: str, name: str, pruned_before: float, shrink: int) -> Pair:
        whole, sizes = self._model(name, shrink)
        layers = torch.split(whole, sizes)
        ours = self._prune(layers, whole, self._masks(layers, pruned_before))
        theirs = [RIVALS[rival][1](layer) for layer in layers]

        def one_by_one() -> None:
            for prune_layer in theirs:
                prune_layer()

        return Pair(ours, Timed(one_by_one, ours.prepare))
