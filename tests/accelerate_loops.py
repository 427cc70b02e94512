"""Training loops of Hugging Face Accelerate for a tiny model."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from compared_runs import bits, make_optimizer
from torch import nn
from torch.utils.data import DataLoader

import gmp_kernels as gmp

BATCHES, ACCUMULATION = 32, 2


class Loop:
    """One epoch of 32 batches, which are 16 optimizer steps; the run is attached before or after ``prepare``."""

    def __init__(self, optimizer: str, attaches: str, *, precision: str = "no", scaler: Any = None) -> None:
        torch.manual_seed(0)
        AcceleratorState._reset_state()  # which all Accelerators of a process share, with their precision
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATION, mixed_precision=precision)
        self.accelerator.scaler = scaler
        model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
        inner = make_optimizer(optimizer, model.parameters())
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

    def bits(self) -> dict[str, Any]:
        return bits(self.model, self.optimizer, self.run)
