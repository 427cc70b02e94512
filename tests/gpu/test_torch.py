"""The kernels beneath torch's compilers, its default device, and its sharding, on one GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import usable
from on_gpu import GPU, ON_GPU, hand_out, started
from optim_cases import assert_same_run, prune_more
from subprocesses import run_python
from torch import nn

import gmp_kernels as gmp

MODES = {"inductor": {}, "reduce-overhead": {"mode": "reduce-overhead"}}
RAMP = gmp.schedules.Cubic(0.2, 0.9, begin_step=2, end_step=10, frequency=2)


@pytest.fixture(params=ON_GPU)
def gpu(request: pytest.FixtureRequest) -> Iterator[str]:
    """Name of every backend whose tensors are on a GPU, with nothing compiled yet."""
    torch._dynamo.reset()
    yield usable(request.param)
    torch._dynamo.reset()


@pytest.mark.parametrize("compact", [False, True], ids=["dense", "compact"])
@pytest.mark.parametrize("mode", MODES)
def test_a_compiled_step_is_the_step(gpu: str, mode: str, compact: bool) -> None:
    """With updates between: masks and state move or stay, and the graph must know."""
    params, optimizer, masks = started(gpu, "adamw", compact_state=compact)
    mirror, other, other_masks = started(gpu, "adamw", compact_state=compact)
    take_step = torch.compile(lambda: optimizer.step(), **MODES[mode])
    for step in range(4, 12):
        if step in (7, 9):
            prune_more(optimizer, params, masks, step / 10)
            prune_more(other, mirror, other_masks, step / 10)
        hand_out(params, step)
        take_step()
        hand_out(mirror, step)
        other.step()
    assert_same_run(params, optimizer, mirror, other)


@pytest.mark.parametrize("mode", MODES)
def test_a_compiled_model_trains_and_stays_pruned(gpu: str, mode: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)).to(GPU)
    optimizer = gmp.optim.AdamW(model.parameters(), lr=0.01, backend=gpu)
    pruner = gmp.GMPScheduler(model, optimizer, RAMP, backend=gpu)
    forward = torch.compile(model, **MODES[mode])
    x = torch.randn(512, 64, device=GPU)
    y = (x[:, :10] * 3).argmax(1)
    losses = []
    for _ in range(60):
        torch.compiler.cudagraph_mark_step_begin()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(forward(x), y)
        loss.backward()
        optimizer.step()
        pruner.step()
        losses.append(loss.item())
        for name, mask in pruner.masks.items():
            assert not model.get_parameter(name).detach()[~mask.to_bool()].any()
    assert pruner.sparsity == pytest.approx(0.9, abs=0.001)
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("mode", MODES)
def test_a_whole_compiled_training_step_has_the_bits_of_the_plain_one(gpu: str, mode: str) -> None:
    """With gradients that round nowhere, the integers that weights are multiplied by: whatever torch fuses."""
    runs = []
    for compiled in (False, True):
        p = nn.Parameter(torch.linspace(-1, 1, 70_001, device=GPU))
        factor = torch.arange(70_001, device=GPU).remainder(7).sub(3).float()
        optimizer = gmp.optim.SGD([p], lr=0.125, momentum=0.5, backend=gpu)

        def train(p=p, factor=factor, optimizer=optimizer) -> None:
            (p * factor).sum().backward()
            optimizer.step()

        take_step = torch.compile(train, **MODES[mode]) if compiled else train
        for step in range(4):
            p.grad = None
            take_step()
            if step == 1:
                prune_more(optimizer, [p], {}, 0.5)
        runs.append(p.detach().clone())
    assert torch.equal(*runs)


DEFAULT_DEVICE = """
import sys, torch, gmp_kernels as gmp
from torch import nn
def run(device, backend):
    generator = torch.Generator("cpu").manual_seed(0)
    made = [torch.randn(n, generator=generator, device="cpu").to(device) for n in (70_001, 7, 4096)]
    params = [nn.Parameter(weight) for weight in made]
    optimizer = gmp.optim.AdamW(params, lr=0.01, compact_state=sys.argv[2] == "compact", backend=backend)
    masks = None
    for step in range(4):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, device="cpu").to(device)
        optimizer.step()
        masks = gmp.prune_([p.detach() for p in params], sparsity=0.5 + step / 10, masks=masks, backend=backend).masks
        optimizer.set_masks(dict(zip(params, masks)))
    gmp.optim.clip_grad_norm_(params, 1.0, masks=masks)
    return [p.detach().cpu() for p in params] + [mask.packed.cpu() for mask in masks]
expected = run("cpu", "cpu")
torch.set_default_device("cuda")
found = run("cuda", sys.argv[1])
print("same" if all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)) else "different")
"""


@pytest.mark.parametrize("state", ["dense", "compact"])
def test_a_default_device_changes_nothing(gpu: str, state: str) -> None:
    done = run_python("-c", DEFAULT_DEVICE, gpu, state)
    assert done.stdout == "same\n", done.stdout + done.stderr


SHARDED = """
import sys, torch, torch.distributed as dist, gmp_kernels as gmp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
dist.init_process_group("nccl", init_method="file://" + sys.argv[2], rank=0, world_size=1)
torch.cuda.set_device(0)
def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 30)).cuda()
def run(model):
    optimizer = gmp.optim.AdamW(model.parameters(), lr=0.01, backend=sys.argv[1])
    ramp = gmp.schedules.Cubic(0.2, 0.9, begin_step=2, end_step=9, frequency=3)
    pruner = gmp.GMPScheduler(model, optimizer, ramp, scope=sys.argv[3], backend=sys.argv[1])
    for step in range(12):
        generator = torch.Generator("cuda").manual_seed(step)
        for p in model.parameters():
            gradient = torch.randn(p.shape, generator=generator, device="cuda")
            p.grad = DTensor.from_local(gradient, p.device_mesh, p.placements) if isinstance(p, DTensor) else gradient
        optimizer.step()
        pruner.step()
    weights = [p.detach().to_local() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]
    return weights, pruner.sparsity
whole, sparsity = run(network())
sharded, sparsity_of_shards = run(fully_shard(network()))
same = all(torch.equal(a, b) for a, b in zip(sharded, whole, strict=True))
print("same" if same and sparsity == sparsity_of_shards else "different", flush=True)
dist.destroy_process_group()
"""


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_model_sharded_by_nccl_on_one_gpu_is_the_plain_one(gpu: str, tmp_path: Path, scope: str) -> None:
    done = run_python("-c", SHARDED, gpu, tmp_path / "store", scope)
    assert done.stdout.startswith("same\n"), done.stdout + done.stderr
