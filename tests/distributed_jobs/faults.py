"""On 2 ranks: what goes wrong on one of them, all of them say. Argument: a folder."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from launch import run
from masks import model_of, shard
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

import gmp_kernels as gmp
from gmp_kernels.search.communicator import Communicator
from gmp_kernels.tools.testing import assert_bitwise_equal

EVERY_STEP = gmp.schedules.Linear(0.1, 0.9, begin_step=0, end_step=8)


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {"first": torch.randn(6, 9, generator=generator), "second": torch.randn(4, 30, generator=generator)}


def sharded(placements: dict[str, object] | None = None) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    chosen = placements or {"first": Shard(0), "second": Shard(1)}
    return model_of({name: shard(weight, mesh, [chosen[name]]) for name, weight in weights().items()})


def pruner_of(model: nn.Module, schedule: gmp.schedules.Schedule = EVERY_STEP, **options: object) -> gmp.GMPScheduler:
    return gmp.GMPScheduler(
        model, torch.optim.SGD(model.parameters(), lr=0.1), schedule, **{"targets": "re:.", "count": "calls", **options}
    )


def everything(pruner: gmp.GMPScheduler) -> list[object]:
    held = [p.to_local() if hasattr(p, "to_local") else p for p in pruner.model.parameters()]
    bits = [tensor.detach().view(torch.int32).tolist() for tensor in held]
    return [*bits, *(m.packed.tolist() for m in pruner.masks.values()), pruner.step_count, repr(pruner.history)]


def refusal(pruner: gmp.GMPScheduler, error: type[gmp.GMPError], match: str) -> str:
    """Return what a step refuses with; the same on every rank, and nothing has changed."""
    before = everything(pruner)
    with pytest.raises(error, match=match) as caught:
        pruner.step()
    assert everything(pruner) == before
    messages: list[str] = [""] * 2
    dist.all_gather_object(messages, str(caught.value))
    assert messages[0] == messages[1]
    return messages[0]


def nan_on_one_rank() -> None:
    rank = dist.get_rank()
    for scope in ("layer", "global"):
        pruner = pruner_of(sharded(), scope=scope)
        pruner.step()
        local = pruner.model["second"].detach().to_local()
        if rank == 1:
            # Its columns are 15 to 29, and this one is still kept.
            kept = pruner.masks["second"].to_bool()[2].nonzero()[0]
            local[2, kept] = torch.nan
        where: list[int] = [0, 0]
        dist.all_gather_object(where, 2 * 30 + 15 + int(kept) if rank == 1 else 0)
        message = refusal(pruner, gmp.NonFiniteError, "NaN or Inf in 'second'")
        assert f"flat index {where[1]};" in message, (message, where)
        if rank == 1:
            local[2, kept] = 1.0
        assert pruner.step() is not None


def nan_in_one_copy() -> None:
    pruner = pruner_of(DistributedDataParallel(model_of(weights())))
    pruner.step()
    if dist.get_rank() == 0:
        pruner.model.module["first"].data[3, 4] = torch.inf
    refusal(pruner, gmp.NonFiniteError, f"'first' at flat index {3 * 9 + 4};")


def disagreements() -> None:
    rank = dist.get_rank()
    steeper = gmp.schedules.Linear(0.1, 0.8, begin_step=0, end_step=8)
    refusal(
        pruner_of(sharded(), [EVERY_STEP, steeper][rank]),
        gmp.StateError,
        "schedule: .*0.9.* on rank 0, .*0.8.* on rank 1",
    )
    refusal(pruner_of(sharded(), ignore=["second"][:rank]), gmp.StateError, r"layers: \['first', 'second'\] on rank 0")
    refusal(
        pruner_of(sharded(), scope=["layer", "global"][rank]), gmp.StateError, "scope: 'layer' on rank 0, 'global' on"
    )

    early, late = pruner_of(sharded()), pruner_of(sharded())
    early.step()
    checkpoint = early.state_dict()
    early.step()
    before = everything(late)
    for wrong in ({**checkpoint, "version": 0}, {**checkpoint, "history": 3}):
        message = ["another rank has refused", "of version|damaged"][rank]
        with pytest.raises(gmp.StateError, match=message):
            late.load_state_dict([checkpoint, wrong][rank])
    with pytest.raises(gmp.StateError, match="states of different steps"):
        late.load_state_dict([checkpoint, early.state_dict()][rank])
    assert everything(late) == before
    late.load_state_dict({**checkpoint, "step_count": 1 + rank})
    refusal(late, gmp.StateError, "step: 1 on rank 0, 2 on rank 1")

    early._held.progress.restore(step_count=2 + rank, num_uncounted=0, num_calls=2, is_current=False)
    refusal(early, gmp.StateError, "step: 2 on rank 0, 3 on rank 1; num_prune: ")


def copies_that_differ() -> None:
    rank = dist.get_rank()
    pruner = pruner_of(DistributedDataParallel(model_of(weights())))
    pruner.step()
    pruner.model.module["first"].data *= 1 + rank
    refusal(pruner, gmp.StateError, "thresholds: .* on rank 0, .* on rank 1")

    # A copy beside shards is ranked on one rank only, so that the masks have to tell.
    pruner = pruner_of(sharded({"first": Replicate(), "second": Shard(0)}))
    pruner.step()
    copy = pruner.model["first"].detach().to_local()
    copy.copy_(copy.flip(rank))
    with pytest.raises(gmp.StateError, match=r"mask of 'first' at \(0, 0\): \d+ on rank 0, \d+ on rank 1"):
        pruner.step()


def unfit_on_one_rank() -> None:
    shards, copies = pruner_of(sharded()), pruner_of(DistributedDataParallel(model_of(weights())))
    for pruner in (shards, copies):
        pruner.step()
    if dist.get_rank() == 1:
        parameter = shards.model["first"]
        parameter._local_tensor = parameter._local_tensor.t().contiguous().t()
        parameter = copies.model.module["first"]
        parameter.data = parameter.data.t().contiguous().t()
    error = [gmp.DistributedError, gmp.LayoutError][dist.get_rank()]
    for pruner in (shards, copies):
        with pytest.raises(error, match="expected a contiguous or channels_last tensor for 'first'"):
            pruner.step()


def parameters_without_shape() -> None:
    flat = FullyShardedDataParallel(nn.Linear(6, 4), device_id=torch.device("cpu"), use_orig_params=True)
    with pytest.raises(gmp.LayoutError, match=r"use torch\.distributed\.fsdp\.fully_shard"):
        pruner_of(flat, targets=None)


def silent_rank() -> None:
    """One that does not call step() while the other does."""
    pruner = pruner_of(sharded())
    pruner.step()
    if dist.get_rank() == 1:
        time.sleep(5)
        return
    before = everything(pruner)
    with pytest.raises(gmp.DistributedError, match="a process has died, or calls step"):
        pruner.step()
    assert everything(pruner) == before


def train(folder: Path, steps: range, save_at: int, die_at: int) -> tuple[nn.Module, gmp.GMPScheduler]:
    """Two ranks, each with the same batch: the mean of two equal gradients is that of one process."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 5))
    if dist.is_initialized():
        fully_shard(model)
    optimizer = gmp.optim.AdamW(model.parameters(), lr=0.01, compact_state=True)
    pruner = gmp.GMPScheduler(model, optimizer, gmp.schedules.Cubic(0.1, 0.9, begin_step=1, end_step=9, frequency=2))
    if steps.start:
        states = get_state_dict(model, optimizer)
        dcp.load({"model": states[0], "optimizer": states[1], "pruner": pruner}, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=states[0], optim_state_dict=states[1])
    for step in steps:
        if step == save_at:
            states = get_state_dict(model, optimizer)
            dcp.save({"model": states[0], "optimizer": states[1], "pruner": pruner}, checkpoint_id=folder)
        x = torch.randn(8, 7, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if step == die_at:
            die_in_the_middle(pruner)
            break
        pruner.step()
    return model, pruner


def die_in_the_middle(pruner: gmp.GMPScheduler) -> None:
    if dist.get_rank() == 1:
        Communicator.total = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    before = everything(pruner)
    with pytest.raises(gmp.DistributedError, match="expected an answer from each of 2 ranks"):
        pruner.step()
    assert everything(pruner) == before
    # The process group is no good any more.
    os._exit(0)


def resumed(folder: Path) -> None:
    model, pruner = train(folder, range(4, 12), -1, -1)
    whole = [p.full_tensor() for p in model.parameters()]
    masks = [p.full_tensor() for p in (layer["mask"] for layer in pruner.state_dict()["layers"].values())]
    dist.destroy_process_group()
    expected, expected_pruner = train(folder, range(12), -1, -1)
    for p, q in zip(whole, expected.parameters(), strict=True):
        assert_bitwise_equal(p, q)
    for mask, bits in zip(masks, expected_pruner.masks.values(), strict=True):
        assert_bitwise_equal(mask, bits.to_bool())
    assert pruner.sparsity == expected_pruner.sparsity


if __name__ == "__main__":
    checkpoints = Path(sys.argv[1])
    for fault in (
        nan_on_one_rank,
        nan_in_one_copy,
        disagreements,
        copies_that_differ,
        unfit_on_one_rank,
        parameters_without_shape,
    ):
        run(2, fault)
    run(2, silent_rank, timeout=2)
    run(2, train, checkpoints, range(12), 4, 7, dies=1)
    run(2, resumed, checkpoints)
