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


def test_two_streams_in_turn_see_each_others_work() -> None:
    """Each waits for the other; tables and workspace of one must not be the other's while it still runs."""
    source = random(0)
    expected = [tensor.clone() for tensor in source]
    found = [tensor.clone() for tensor in source]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    params = [[nn.Parameter(tensor) for tensor in tensors] for tensors in (found, expected)]
    optimizers = [optim.AdamW(p, lr=0.1) for p in params]
    kept = [None, None]
    for i, (weights, optimizer) in enumerate(zip(params, optimizers, strict=True)):
        torch.cuda.synchronize()
        last = torch.cuda.current_stream()
        for turn in range(6):
            stream = streams[turn % 2] if i == 0 else last
            stream.wait_stream(last)
            with torch.cuda.stream(stream):
                if i == 0:
                    torch.cuda._sleep(50_000_000)
                for p, gradient in zip(weights, random(10 + turn), strict=True):
                    p.grad = gradient
                optimizer.step()
                pruned = prune_([p.detach() for p in weights], sparsity=0.3 + turn / 10, masks=kept[i])
                kept[i] = pruned.masks
                optimizer.set_masks(dict(zip(weights, pruned.masks, strict=True)))
            last = stream
        torch.cuda.synchronize()
    assert kept[0] == kept[1]
    for p, q in zip(*params, strict=True):
        assert torch.equal(p, q)


def test_two_streams_at_once_do_not_share_what_a_call_writes() -> None:
    """Nothing orders them; each works on tensors of its own."""
    sources = [random(seed) for seed in (0, 1)]
    expected = []
    for source in sources:
        weights = [tensor.clone() for tensor in source]
        expected.append((weights, prune_(weights, sparsity=0.9).masks))
    found, streams = [[t.clone() for t in source] for source in sources], [torch.cuda.Stream() for _ in sources]
    torch.cuda.synchronize()
    results = []
    for _ in range(5):
        results = []
        for weights, source, stream in zip(found, sources, streams, strict=True):
            with torch.cuda.stream(stream):
                torch._foreach_copy_(weights, source)
                results.append(prune_(weights, sparsity=0.9))
    torch.cuda.synchronize()
    for (weights, kept), pruned, result in zip(expected, found, results, strict=True):
        assert result.masks == kept
        assert all(torch.equal(a, b) for a, b in zip(pruned, weights, strict=True))
