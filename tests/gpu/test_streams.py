"""Operations on a side stream see what comes before them there. Run by ``make gpu-check`` alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from gmp_kernels import BitMask, apply_masks_, optim, prune_

OPS = torch.ops.gmp_kernels
SIZES = (1_000_003, 7, 70_000)
Tensors = list[torch.Tensor]


def random(seed: int) -> Tensors:
    generator = torch.Generator("cuda").manual_seed(seed)
    return [torch.randn(size, device="cuda", generator=generator) for size in SIZES]


def masks() -> list[BitMask]:
    return [BitMask.from_bool(tensor > 0) for tensor in random(1)]


def packed() -> Tensors:
    return [mask.packed for mask in masks()]


def prune(weights: Tensors) -> Callable[[], object]:
    return lambda: prune_(weights, sparsity=0.9)


def prune_operation(weights: Tensors) -> Callable[[], object]:
    bits = packed()
    return lambda: OPS.prune_(weights, bits, [size // 2 + 1 for size in SIZES])


def apply(weights: Tensors) -> Callable[[], object]:
    kept = masks()
    return lambda: apply_masks_(weights, kept)


def average(weights: Tensors) -> Callable[[], object]:
    new, kept = random(2), masks()
    return lambda: optim.ema_update_(weights, new, 0.9, masks=kept)


def clip(gradients: Tensors) -> Callable[[], object]:
    params, kept = [nn.Parameter(tensor) for tensor in random(2)], masks()
    for p, gradient in zip(params, gradients, strict=True):
        p.grad = gradient
    return lambda: optim.clip_grad_norm_(params, 1.0, masks=kept)


def step(weights: Tensors) -> Callable[[], object]:
    params = [nn.Parameter(weight) for weight in weights]
    for p, gradient in zip(params, random(2), strict=True):
        p.grad = gradient
    return optim.AdamW(params, lr=0.1).step


def compiled_step(weights: Tensors) -> Callable[[], object]:
    take_step = step(weights)
    return torch.compile(lambda: take_step(), backend="aot_eager")


@pytest.mark.parametrize(
    "make", [prune, prune_operation, apply, average, clip, step, compiled_step], ids=lambda make: make.__name__
)
def test_the_side_stream_is_used(make: Callable[[Tensors], Callable[[], object]]) -> None:
    source = random(0)
    expected = [tensor.clone() for tensor in source]
    make(expected)()
    found = [torch.zeros_like(tensor) for tensor in source]
    call, side = make(found), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        # For as long as this takes, whatever runs on another stream finds zeros.
        torch.cuda._sleep(500_000_000)
        torch._foreach_copy_(found, source)
        call()
    side.synchronize()
    torch.cuda.synchronize()
    for tensor, other in zip(found, expected, strict=True):
        assert torch.equal(tensor, other)
    assert not any(torch.equal(tensor, other) for tensor, other in zip(expected, source, strict=True))
