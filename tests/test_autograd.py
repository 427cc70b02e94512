"""Every write is seen by autograd: what was saved for a backward pass before it raises instead of being used."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from optim_cases import masked, parameters, random_gradients, random_masks

from gmp_kernels import BitMask, GMPScheduler, apply_masks_, optim, prune_, schedules
from gmp_kernels.tools.testing import device_of

OPS = torch.ops.gmp_kernels
SHAPES = [(9, 5), (40,)]
Call = tuple[Callable[[], object], list[torch.Tensor]]


def tensors(backend: str, seed: int = 0) -> list[torch.Tensor]:
    return [p.detach() for p in parameters(SHAPES, seed=seed, device=device_of(backend))]


def masks(backend: str) -> list[BitMask]:
    return list(random_masks(tensors(backend), 0.5).values())


def packed(backend: str) -> list[torch.Tensor]:
    return [mask.packed for mask in masks(backend)]


def prune(backend: str) -> Call:
    written = tensors(backend)
    return lambda: prune_(written, sparsity=0.5, backend=backend), written


def apply(backend: str) -> Call:
    written = tensors(backend)
    return lambda: apply_masks_(written, masks(backend), backend=backend), written


def average(backend: str) -> Call:
    written = tensors(backend)
    return lambda: optim.ema_update_(written, tensors(backend, 1), 0.9, masks=masks(backend), backend=backend), written


def clip(backend: str) -> Call:
    params = parameters(SHAPES, device=device_of(backend))
    for p, gradient in zip(params, tensors(backend, 1), strict=True):
        p.grad = gradient
    written = [p.grad for p in params]
    return lambda: optim.clip_grad_norm_(params, 0.1, masks=masks(backend), backend=backend), written


def optimizer_and_all_it_writes(
    backend: str, case: str, *, compact_state: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[optim.SGD | optim.Adam, list[torch.Tensor]]:
    """After one step, so that there is state; and about to take another."""
    params = parameters(SHAPES, dtype, device=device_of(backend))
    master_weights = dtype is not torch.float32
    optimizer = masked(case, params, compact_state=compact_state, master_weights=master_weights, backend=backend)
    optimizer.set_masks(random_masks(params, 0.5))
    for p, gradient in zip(params, random_gradients(params, 0), strict=True):
        p.grad = gradient
    optimizer.step()
    return optimizer, [*params, *(v for p in params for v in optimizer.state[p].values() if v is not None)]


def sgd(backend: str) -> Call:
    optimizer, written = optimizer_and_all_it_writes(backend, "momentum", dtype=torch.bfloat16)
    return optimizer.step, written


def amsgrad(backend: str) -> Call:
    optimizer, written = optimizer_and_all_it_writes(backend, "amsgrad")
    return optimizer.step, written


def compact_adamw(backend: str) -> Call:
    optimizer, written = optimizer_and_all_it_writes(backend, "adamw", compact_state=True)
    return optimizer.step, written


def new_masks(backend: str) -> Call:
    optimizer, written = optimizer_and_all_it_writes(backend, "momentum")
    fewer = random_masks(optimizer.param_groups[0]["params"], 0.8)
    return lambda: optimizer.set_masks(fewer), written


def scheduler(backend: str) -> Call:
    model = torch.nn.Linear(8, 8, device=device_of(backend))
    pruner = GMPScheduler(model, torch.optim.SGD(model.parameters(), lr=0.1), schedules.OneShot(0.5), backend=backend)
    return pruner.step, [model.weight]


def prune_operation(backend: str) -> Call:
    written = tensors(backend)
    return lambda: OPS.prune_(written, packed(backend), [30, 30], backend=backend), written


def apply_operation(backend: str) -> Call:
    written = tensors(backend)
    return lambda: OPS.apply_masks_(written, packed(backend), backend=backend), written


def average_operation(backend: str) -> Call:
    written = tensors(backend)
    return lambda: OPS.ema_update_(written, tensors(backend, 1), 0.9, packed(backend), backend=backend), written


def clip_operation(backend: str) -> Call:
    written = tensors(backend)
    return lambda: OPS.clip_gradients_(written, 0.1, packed(backend), backend=backend), written


def step_operation(backend: str) -> Call:
    optimizer, written = optimizer_and_all_it_writes(backend, "adamw")
    params = optimizer.param_groups[0]["params"]
    return lambda: OPS.optimizer_step_(optimizer.handle, [0, 1], params, random_gradients(params, 1)), written


CALLS = [
    prune,
    apply,
    average,
    clip,
    sgd,
    amsgrad,
    compact_adamw,
    new_masks,
    scheduler,
    prune_operation,
    apply_operation,
    average_operation,
    clip_operation,
    step_operation,
]


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("make", CALLS, ids=lambda make: make.__name__)
def test_a_stale_saved_tensor_raises(
    backend: str, make: Callable[[str], Call], mode: Callable[[], AbstractContextManager[object]]
) -> None:
    call, written = make(backend)
    losses = [(torch.ones_like(tensor, requires_grad=True) * tensor).sum() for tensor in written]
    with mode():
        call()
    for loss in losses:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
def test_the_bits_of_masks_have_versions_too(backend: str, mode: Callable[[], AbstractContextManager[object]]) -> None:
    ours, theirs = masks(backend), packed(backend)
    versions = [bits._version for bits in (*(mask.packed for mask in ours), *theirs)]
    with mode():
        prune_(tensors(backend), sparsity=0.9, masks=ours, backend=backend)
        OPS.prune_(tensors(backend), theirs, [40, 36], backend=backend)
    after = [bits._version for bits in (*(mask.packed for mask in ours), *theirs)]
    assert all(new > old for new, old in zip(after, versions, strict=True))


def test_what_is_only_read_keeps_its_version(backend: str) -> None:
    bits, weights = packed(backend), tensors(backend, 1)
    OPS.apply_masks_(tensors(backend), bits, backend=backend)
    OPS.ema_update_(tensors(backend), weights, 0.9, bits, backend=backend)
    OPS.magnitude_threshold(weights[0], 20, bits[0], backend=backend)
    assert [tensor._version for tensor in (*bits, *weights)] == [
        m._version for m in (*packed(backend), *tensors(backend, 1))
    ]


@pytest.mark.parametrize(
    "make", [prune, apply, average, clip, prune_operation, clip_operation], ids=lambda m: m.__name__
)
def test_inference_tensors_are_written(backend: str, make: Callable[[str], Call]) -> None:
    with torch.inference_mode():
        call, written = make(backend)
        before = [tensor.clone() for tensor in written]
        call()
    assert all(tensor.is_inference() and not torch.equal(tensor, b) for tensor, b in zip(written, before, strict=True))


def test_gradients_flow_on_through_pruned_weights(backend: str) -> None:
    weight = torch.nn.Parameter(torch.arange(1.0, 9.0, device=device_of(backend)))
    OPS.prune_([weight], [BitMask.ones(weight.shape, weight.device).packed], [4], backend=backend)
    assert weight.requires_grad and weight.is_leaf
    (weight * weight).sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [0.0] * 4 + [10.0, 12.0, 14.0, 16.0]
