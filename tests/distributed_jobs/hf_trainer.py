"""A Trainer of Hugging Face Transformers on two ranks, each with a copy of the model: one run in two parts."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
from compared_runs import OPTIMIZERS, assert_same_bits, assert_same_on_all_ranks, bits
from hf_trainers import STEPS, Stop, make_trainer
from launch import leave

from gmp_kernels.errors import GMPWarning
from gmp_kernels.integrations.transformers import GMPCallback


def job(folder: Path, optimizer: str) -> None:
    arguments = {"optimizer": optimizer, "ddp_backend": "gloo", "gradient_accumulation_steps": 2}
    whole = GMPCallback(0.9)
    first = make_trainer(folder / "whole", whole, **arguments)
    first.train()
    assert dist.get_world_size() == 2 and whole.run.pruner._held.shards.are_copies
    assert whole.run.finished and whole.run.step_count == STEPS
    expected = bits(first.model, first.optimizer, whole.run)
    assert_same_on_all_ranks(expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GMPWarning)  # the run does end early
        make_trainer(folder / "parts", GMPCallback(0.9), Stop(10), **arguments).train()
    dist.barrier()
    rest = GMPCallback(0.9)
    second = make_trainer(folder / "parts", rest, **arguments)
    second.train(resume_from_checkpoint=True)
    assert_same_bits(bits(second.model, second.optimizer, rest.run), expected)


if __name__ == "__main__":
    for optimizer in OPTIMIZERS:
        job(Path(sys.argv[1]) / optimizer, optimizer)
    leave()
