"""Stop on 4 ranks, go on on others: the same bits as one process that was never stopped. Argument: a folder."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from launch import run
from masks import assert_same
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from training import OPTIMIZERS, STEPS, WAYS, local, network, piece_of

import gmp_kernels as gmp
from gmp_kernels.tools.testing import assert_bitwise_equal

STOP = 7
# Update steps as keys, and layers of their own: what a checkpoint has to bring back as it was.
SCHEDULE = gmp.schedules.MultiStep({2: 0.2, 5: 0.6, 9: 0.9})
OVERRIDES = {"3": 0.5}
GOES_ON = {"rows on 2": 2, "rows on 1": 1, "rows_and_tensor on 4": 4}


def build(way: str, kind: str) -> tuple[nn.Module, torch.optim.Optimizer, gmp.GMPScheduler]:
    dtype, make_optimizer = OPTIMIZERS[kind]
    model = network(dtype)
    if way == "rows":
        fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    elif way != "whole":
        model = WAYS[way](model)
    optimizer = make_optimizer(model.parameters())
    return model, optimizer, gmp.GMPScheduler(model, optimizer, SCHEDULE, overrides=OVERRIDES)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, pruner: gmp.GMPScheduler, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = piece_of(torch.randn(p.shape, generator=generator).to(p.dtype), p)
        optimizer.step()
        pruner.step()


def save(folder: Path) -> None:
    for kind in OPTIMIZERS:
        model, optimizer, pruner = build("rows", kind)
        train(model, optimizer, pruner, range(STOP))
        state = {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer),
            "pruner": pruner,
        }
        dcp.save(state, checkpoint_id=folder / kind)


def go_on(folder: Path, way: str) -> None:
    for kind in OPTIMIZERS:
        model, optimizer, pruner = build(way, kind)
        state = {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer),
            "pruner": pruner,
        }
        dcp.load(state, checkpoint_id=folder / kind)
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
        assert pruner.step_count == STOP
        train(model, optimizer, pruner, range(STOP, STEPS))

        whole, whole_optimizer, whole_pruner = build("whole", kind)
        train(whole, whole_optimizer, whole_pruner, range(STEPS))
        assert_same(pruner, whole_pruner, f"{way} {kind}")
        expected, states = (o.state_dict()["state"] for o in (whole_optimizer, optimizer))
        for i, p in enumerate(model.parameters()):
            for key, value in expected[i].items():
                wanted = local(piece_of(value, p)) if value.shape == p.shape else value
                assert_bitwise_equal(local(states[i][key]), wanted, f"{key} of {way} {kind} {i}")


def go_on_without_ranks(folder: Path) -> None:
    """The masks of a sharded checkpoint that was made into a file serve a model that is not sharded."""
    dcp_to_torch_save(folder / "momentum", folder / "momentum.pt")
    state = torch.load(folder / "momentum.pt", weights_only=False)
    _, _, pruner = build("whole", "momentum")
    pruner.load_state_dict(state["pruner"])
    expected = build("whole", "momentum")
    train(*expected, range(STOP))
    assert pruner.masks == expected[2].masks
    assert pruner.sparsity == expected[2].sparsity


if __name__ == "__main__":
    checkpoints = Path(sys.argv[1])
    run(4, save, checkpoints)
    for name, world_size in GOES_ON.items():
        run(world_size, go_on, checkpoints, name.split()[0])
    go_on_without_ranks(checkpoints)
