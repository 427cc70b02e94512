"""On 4 ranks: training of sharded and replicated models against one process, after every step, down to the bit.

Gradients are made up, the same for all: adding up those of several ranks would round in an order of its own.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable

import torch
from launch import leave, run
from masks import assert_same, shard
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import gmp_kernels as gmp
from gmp_kernels.model.names import named_parameters
from gmp_kernels.tools.testing import assert_bitwise_equal

STEPS = 12
SCHEDULE = gmp.schedules.Cubic(0.2, 0.9, begin_step=2, end_step=9, frequency=3)

OPTIMIZERS: dict[str, tuple[torch.dtype, Callable[..., torch.optim.Optimizer]]] = {
    "torch": (torch.float32, lambda p: torch.optim.AdamW(p, lr=0.01)),
    "momentum": (torch.float32, lambda p: gmp.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3)),
    "compact": (torch.float32, lambda p: gmp.optim.AdamW(p, lr=0.01, compact_state=True)),
    "master": (torch.bfloat16, lambda p: gmp.optim.AdamW(p, lr=0.01, master_weights=True)),
}


def network(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(3)
    # Rows that 4 does not divide, and fewer rows than ranks.
    return nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)


def networks(way: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """The same network whole and divided; copies have a convolution too, in channels_last on the ranks."""
    whole = network(dtype)
    if way == "copies":
        whole.append(nn.Conv2d(5, 7, 3).to(dtype))
    divided = copy.deepcopy(whole)
    return whole, WAYS[way](divided.to(memory_format=torch.channels_last))


def by_tensor(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (4,))
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel(), "3": ColwiseParallel()})


def by_rows_and_tensor(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "tensor"))
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    return fully_shard(model, mesh=mesh["rows"])


WAYS = {
    "rows": lambda model: fully_shard(model, mesh=init_device_mesh("cpu", (4,))),
    "copies_of_rows": lambda model: fully_shard(
        model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "rows"))
    ),
    "tensor": by_tensor,
    "rows_and_tensor": by_rows_and_tensor,
    "copies": DistributedDataParallel,
}


def piece_of(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return shard(whole, like.device_mesh, like.placements) if isinstance(like, DTensor) else whole.clone()


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def train(way: str, kind: str, scope: str) -> None:
    dtype, make_optimizer = OPTIMIZERS[kind]
    whole, model = networks(way, dtype)
    optimizers = [make_optimizer(m.parameters()) for m in (whole, model)]
    pruners = [gmp.GMPScheduler(m, o, SCHEDULE, scope=scope) for m, o in zip((whole, model), optimizers, strict=True)]
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        for p, q in zip(whole.parameters(), model.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            q.grad = piece_of(p.grad, q)
        norms = [
            gmp.optim.clip_grad_norm_(m.parameters(), 1e9, masks=[pruner.masks.get(name) for name in names])
            for m, pruner in zip((whole, model), pruners, strict=True)
            for names in [list(named_parameters(m))]  # those of the masks: without what wrappers add
        ]
        torch.testing.assert_close(*norms)
        for optimizer, pruner in zip(optimizers, pruners, strict=True):
            optimizer.step()
            pruner.step()
        states = [optimizer.state_dict()["state"] for optimizer in optimizers]
        for i, (p, q) in enumerate(zip(whole.parameters(), model.parameters(), strict=True)):
            what = f"{way} {kind} {scope} step {step} parameter {i}"
            assert_bitwise_equal(local(q.detach()), local(piece_of(p.detach(), q)), what)
            for key, value in states[0][i].items():
                expected = local(piece_of(value, q)) if value.shape == p.shape else value
                assert_bitwise_equal(local(states[1][i][key]), expected, f"{key} of {what}")
    if way == "copies":
        assert list(pruners[1].masks.values()) == list(pruners[0].masks.values())
    else:
        assert_same(pruners[1], pruners[0], f"{way} {kind} {scope}")


def job(ways: list[str]) -> None:
    for way in ways:
        for kind in OPTIMIZERS:
            for scope in ("layer", "global"):
                train(way, kind, scope)


if __name__ == "__main__":
    run(4, job, sys.argv[1:] or list(WAYS))
    if "RANK" in os.environ:
        leave()
