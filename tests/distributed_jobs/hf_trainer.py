"""A Trainer of Hugging Face Transformers on two ranks, each with a copy of the model: one run in two parts."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
from hf_trainers import OPTIMIZERS, STEPS, Stop, bits, make_trainer

from gmp_kernels.errors import GMPWarning
from gmp_kernels.integrations.transformers import GMPCallback


def gathered(tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    ranks = [[torch.empty_like(tensor) for tensor in tensors] for _ in range(dist.get_world_size())]
    for i, tensor in enumerate(tensors):
        dist.all_gather([rank[i] for rank in ranks], tensor.contiguous())
    return ranks


def job(folder: Path, optimizer: str) -> None:
    arguments = {"optimizer": optimizer, "ddp_backend": "gloo", "gradient_accumulation_steps": 2}
    whole = GMPCallback(0.9)
    first = make_trainer(folder / "whole", whole, **arguments)
    first.train()
    assert dist.get_world_size() == 2 and whole.run.pruner._held.shards.are_copies
    assert whole.run.finished and whole.run.step_count == STEPS
    expected = bits(first, whole)
    mine, other = gathered(expected)
    assert all(map(torch.equal, mine, other))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GMPWarning)  # the run does end early
        make_trainer(folder / "parts", GMPCallback(0.9), Stop(10), **arguments).train()
    dist.barrier()
    rest = GMPCallback(0.9)
    second = make_trainer(folder / "parts", rest, **arguments)
    second.train(resume_from_checkpoint=True)
    assert all(map(torch.equal, expected, bits(second, rest)))


if __name__ == "__main__":
    for optimizer in OPTIMIZERS:
        job(Path(sys.argv[1]) / optimizer, optimizer)
    dist.destroy_process_group()
