"""A Trainer of Lightning on two ranks, each with a copy of the model: one run in two parts."""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist
from pytorch_lightning.callbacks import ModelCheckpoint

sys.path.insert(0, str(Path(__file__).parents[1]))
from compared_runs import OPTIMIZERS, assert_same_bits, assert_same_on_all_ranks, bits
from launch import leave
from lightning_trainers import EPOCHS, Manual, Module, fit

from gmp_kernels.integrations.lightning import GMPCallback


def job(folder: Path, optimizer: str, kind: type[Module]) -> None:
    arguments = {"strategy": "ddp", "devices": 2}
    whole, keeper = GMPCallback(0.9, pruning=0.2), ModelCheckpoint(folder, "{step}", save_top_k=-1)
    first = fit(folder, [keeper, whole], kind(optimizer), enable_checkpointing=True, **arguments)
    assert dist.get_world_size() == 2 and whole.run.pruner._held.shards.are_copies
    assert whole.run.finished and whole.run.step_count == first.global_step
    expected = bits(first.lightning_module, first.optimizers[0], whole.run)
    assert_same_on_all_ranks(expected)
    rest = GMPCallback(0.9, pruning=0.2)
    middle = folder / f"step={first.global_step // EPOCHS}.ckpt"
    second = fit(folder, rest, kind(optimizer), ckpt_path=middle, **arguments)
    assert rest.run.step_count == whole.run.step_count
    assert_same_bits(bits(second.lightning_module, second.optimizers[0], rest.run), expected)


if __name__ == "__main__":
    for optimizer in OPTIMIZERS:
        for kind in (Module, Manual):
            job(Path(sys.argv[1]) / optimizer / kind.__name__, optimizer, kind)
    leave()
