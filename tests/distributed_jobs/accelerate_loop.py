"""A loop of Accelerate on two ranks, each with a copy of the model or half of it (FSDP 2): one run in two parts."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from accelerate.utils import DistributedType

sys.path.insert(0, str(Path(__file__).parents[1]))
from accelerate_loops import BATCHES, Loop
from compared_runs import OPTIMIZERS, assert_same_bits
from launch import leave

from gmp_kernels.distributed.placement import is_sharded
from gmp_kernels.errors import StateError


class ShardedLoop(Loop):
    """Accelerate passes over the plugin where there is no GPU; told that it is in use, it runs on gloo as well."""

    def prepare(self, accelerator: Accelerator, *objects: object) -> tuple:
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=True)
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
        assert accelerator.is_fsdp2
        prepared = accelerator.prepare(*objects)
        assert all(is_sharded(p) for p in prepared[0].parameters())
        return prepared


def job(folder: Path, kind: type[Loop], optimizer: str, stop: int) -> None:
    whole = kind(optimizer, "after")
    num_batches = len(whole.loader)
    whole.train()
    assert whole.run.step_count == num_batches // 2 == BATCHES // 4  # the ranks share the batches
    assert whole.run.pruner.sparsity > 0.89
    stopped = kind(optimizer, "after")
    stopped.train(end=stop)
    stopped.accelerator.save_state(str(folder))
    resumed = kind(optimizer, "after")
    resumed.accelerator.load_state(str(folder))
    resumed.train(begin=stop)
    assert_same_bits(resumed.bits(), whole.bits())
    for name, thresholds in whole.run.pruner._held.thresholds.items():
        assert thresholds == resumed.run.pruner._held.thresholds[name]


def refuses_the_shards_of_one_rank() -> None:
    loop = ShardedLoop("torch", "after")
    loop.train()
    file = io.BytesIO()
    torch.save(loop.run.pruner.state_dict(), file)
    sent = [file.getvalue()]
    torch.distributed.broadcast_object_list(sent)
    try:
        loop.run.pruner.load_state_dict(torch.load(io.BytesIO(sent[0]), weights_only=False))
    except StateError as error:
        assert "one rank's shards have been loaded on all" in str(error)
    else:
        raise AssertionError("the shards of rank 0 were taken for those of this rank")


if __name__ == "__main__":
    for kind in (Loop, ShardedLoop):
        for optimizer in OPTIMIZERS:
            for stop in (4, 14):  # within and after the pruning stage
                job(Path(sys.argv[1]) / kind.__name__ / optimizer / str(stop), kind, optimizer, stop)
    refuses_the_shards_of_one_rank()
    leave()
