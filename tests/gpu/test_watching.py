"""What a pruner looks at on a GPU, where looking must not wait."""

from __future__ import annotations

import pytest
import torch
from conftest import usable
from on_gpu import GPU, ON_GPU
from torch import nn

import gmp_kernels as gmp
from gmp_kernels.errors import GMPWarning
from gmp_kernels.pruner.watch import GPU_INTERVAL, compare


@pytest.fixture(params=ON_GPU)
def gpu(request: pytest.FixtureRequest) -> str:
    """Name of every backend whose tensors are on a GPU."""
    return usable(request.param)


def pruned(optimizer: str, gpu: str) -> tuple[nn.Module, torch.optim.Optimizer, gmp.GMPScheduler]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)).to(GPU)
    if optimizer == "torch":
        made: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    else:
        made = gmp.optim.AdamW(model.parameters(), lr=0.01, compact_state=optimizer == "compact", backend=gpu)
    return model, made, gmp.GMPScheduler(model, made, gmp.schedules.OneShot(0.9), backend=gpu)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(32, 64, device=GPU)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("optimizer", ["torch", "dense", "compact"])
def test_weights_loaded_back_are_pruned_again(gpu: str, optimizer: str) -> None:
    model, made, pruner = pruned(optimizer, gpu)
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    step(model, made)
    pruner.step()
    model.load_state_dict(dense)
    with pytest.warns(GMPWarning, match="were not zero any more"):
        pruner.step()
    assert sum(pruner.verify().values()) == round(0.9 * 64 * 256) * 2


def test_writes_without_a_trace_are_found_a_few_calls_later(gpu: str) -> None:
    model, made, pruner = pruned("torch", gpu)
    step(model, made)
    pruner.step()
    for layer in (model[0], model[2]):
        layer.weight.data.fill_(0.5)
    with pytest.warns(GMPWarning, match="were not zero any more"):
        for _ in range(2 * GPU_INTERVAL + 1):
            pruner.step()
            torch.cuda.synchronize()
    pruner.verify()


@pytest.mark.parametrize("optimizer", ["torch", "dense", "compact"])
def test_steps_between_updates_do_not_wait(gpu: str, optimizer: str) -> None:
    model, made, pruner = pruned(optimizer, gpu)
    for _ in range(2):
        step(model, made)
        pruner.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2 * GPU_INTERVAL):
            step(model, made)
            pruner.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_steps_that_a_grad_scaler_skips_on_the_gpu_do_not_count(gpu: str) -> None:
    model, made, _ = pruned("dense", gpu)
    pruner = gmp.GMPScheduler(model, made, gmp.schedules.Linear(0.1, 0.9, 0, 8), backend=gpu)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40, growth_interval=1000)
    taken = 0
    for i in range(12):
        made.zero_grad()
        before = model[0].weight.detach().clone()
        x = torch.randn(32, 64, device=GPU) * (1e32 if i < 5 else 1.0)
        loss = model(x)
        scaler.scale(loss.sum() if i < 5 else loss.square().mean()).backward()
        scaler.step(made)
        scaler.update()
        taken += not torch.equal(before, model[0].weight.detach())
        pruner.step()
    assert 0 < taken < 12
    assert pruner.step_count == taken


def test_contradictions_are_counted_there(gpu: str) -> None:
    weight = torch.ones(3 << 20, device=GPU)
    weight[::4] = 0.0
    mask = gmp.BitMask.from_bool(torch.arange(3 << 20, device=GPU) % 3 > 0)
    kept = mask.to_bool()
    expected = [int((~kept & (weight != 0)).sum()), int((kept & (weight == 0)).sum())]
    assert compare(weight, mask).tolist() == expected
