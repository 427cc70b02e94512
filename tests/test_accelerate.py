"""Pruning in loops of Hugging Face Accelerate, the real one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.data import DataLoader

import gmp_kernels as gmp
from gmp_kernels.distributed.placement import local

BATCHES, ACCUMULATION = 32, 2
OPTIMIZERS: dict[str, Any] = {
    "torch": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "gmp": lambda p: gmp.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "gmp_compact": lambda p: gmp.optim.AdamW(p, lr=0.01, weight_decay=0.1, compact_state=True),
}


class Loop:
    """One epoch of 32 batches, which are 16 optimizer steps; the run is attached before or after ``prepare``."""

    def __init__(self, optimizer: str, attaches: str, *, precision: str = "no", scaler: Any = None) -> None:
        torch.manual_seed(0)
        AcceleratorState._reset_state()  # which all Accelerators of a process share, with their precision
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATION, mixed_precision=precision)
        self.accelerator.scaler = scaler
        model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
        inner = OPTIMIZERS[optimizer](model.parameters())
        loader = DataLoader(torch.randn(4 * BATCHES, 16), batch_size=4)
        stages = gmp.Stages.from_steps(BATCHES // ACCUMULATION // self.accelerator.num_processes)
        if attaches == "before":
            self.run = stages.attach(model, inner, 0.9)
        self.model, self.optimizer, self.loader = self.prepare(self.accelerator, model, inner, loader)
        if attaches == "after":
            self.run = stages.attach(self.model, self.optimizer, 0.9)
        self.accelerator.register_for_checkpointing(self.run)

    def prepare(self, accelerator: Accelerator, *objects: Any) -> Any:
        return accelerator.prepare(*objects)

    def train(self, begin: int = 0, end: int = BATCHES, overflows: tuple[int, ...] = ()) -> None:
        for number, batch in enumerate(self.loader):
            if not begin <= number < end:
                continue
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(self.model(batch).square().mean())
                if number in overflows:
                    next(self.model.parameters()).grad[0, 0] = float("inf")
                self.optimizer.step()
                self.run.step()
                self.optimizer.zero_grad()

    def bits(self) -> list[torch.Tensor]:
        """Weights, state of the optimizer, and masks."""
        state = self.optimizer.state_dict()["state"]
        found = [value for entry in state.values() for value in entry.values() if isinstance(value, torch.Tensor)]
        masks = [mask.packed for mask in self.run.pruner.masks.values()]
        return [local(tensor).detach() for tensor in [*self.model.parameters(), *found]] + masks


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_before_or_after_prepare_is_the_same(optimizer, precision):
    loops = [Loop(optimizer, attaches, precision=precision) for attaches in ("before", "after")]
    for loop in loops:
        loop.train()
        assert (
            loop.run.step_count == BATCHES // ACCUMULATION and loop.run.pruner._held.progress.position.num_calls == 32
        )
        assert list(loop.run.pruner.verify().values()) == [round(0.9 * 512), round(0.9 * 256)]
        # The learning rate is that of a run of 16 steps, of which fine-tuning has lowered two.
        assert loop.optimizer.param_groups[0]["lr"] == pytest.approx(0.0001)
        assert loop.optimizer.param_groups[0]["weight_decay"] == 0.0
    assert all(map(torch.equal, loops[0].bits(), loops[1].bits()))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("attaches", ["before", "after"])
@pytest.mark.parametrize("stop", [12, 26])  # within and after the pruning stage
def test_a_resumed_run_has_the_bits_of_one_that_was_not_interrupted(tmp_path, optimizer, attaches, stop):
    whole = Loop(optimizer, attaches)
    whole.train()
    stopped = Loop(optimizer, attaches)
    stopped.train(end=stop)
    stopped.accelerator.save_state(str(tmp_path))
    resumed = Loop(optimizer, attaches)
    resumed.accelerator.load_state(str(tmp_path))
    resumed.train(begin=stop)
    assert all(map(torch.equal, whole.bits(), resumed.bits()))
    assert whole.optimizer.param_groups[0]["lr"] == resumed.optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("attaches", ["before", "after"])
def test_steps_that_are_skipped_do_not_count(attaches):
    loop = Loop("torch", attaches, scaler=torch.amp.GradScaler("cpu", init_scale=4.0))
    loop.train(overflows=(5, 11, 24))
    assert loop.run.step_count == BATCHES // ACCUMULATION - 3
    assert [report.step for report in loop.run.pruner.history][-1] == 9
    loop.run.pruner.verify()


def test_what_is_saved_is_exactly_sparse(tmp_path: Path):
    from safetensors.torch import load_file

    loop = Loop("gmp", "after")
    loop.train()
    loop.accelerator.save_model(loop.model, str(tmp_path))
    saved = load_file(tmp_path / "model.safetensors")
    assert [int((saved[name] == 0).sum()) for name in ("0.weight", "2.weight")] == [round(0.9 * 512), round(0.9 * 256)]
