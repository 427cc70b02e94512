"""A network with layers of every kind, recipes for it, and a run of one that notes what happens at each step."""

from __future__ import annotations

from typing import Any

import torch
from recipe_semantics import train_step, zeros_of
from torch import nn
from transformers.pytorch_utils import Conv1D

import gmp_kernels as gmp
from gmp_kernels import recipes

STEPS_PER_EPOCH = 4
EPOCHS = 8


def network() -> nn.ModuleDict:
    """Layers of every kind, with no zero in any parameter."""
    torch.manual_seed(0)
    layers = {
        "embed": nn.Embedding(7, 3),
        "conv": nn.Conv2d(3, 5, 3),
        "line": nn.Conv1d(3, 5, 2),
        "volume": nn.Conv3d(2, 3, 2),
        "up": nn.ConvTranspose1d(3, 5, 3),
        "up2": nn.ConvTranspose2d(2, 5, 2),
        "up3": nn.ConvTranspose3d(2, 3, 2),
        "proj": Conv1D(7, 3),
        "norm": nn.BatchNorm2d(5),
        "fc": nn.Linear(5, 8),
        "fc2": nn.Linear(8, 5, bias=False),
    }
    model = nn.ModuleDict(layers)
    for parameter in model.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def gmp_modifier(**changes: object) -> str:
    arguments: dict[str, object] = {
        "params": ["fc.weight"],
        "init_sparsity": 0.1,
        "final_sparsity": 0.8,
        "start_epoch": 1.0,
        "end_epoch": 3.0,
        "update_frequency": 0.5,
    }
    return item("GMPruningModifier", **arguments | changes)


def item(name: str, **arguments: object) -> str:
    return f"  - !{name}\n" + "".join(f"    {key}: {value}\n" for key, value in arguments.items() if value is not None)


def recipe_of(*items: str) -> recipes.Recipe:
    return recipes.load("modifiers:\n" + "".join(items))


class Job:
    """A model trained by a recipe, with what happened at each step."""

    def __init__(self, *items: str, model: nn.Module | None = None, num_groups: int = 1, **arguments: Any) -> None:
        self.model = network() if model is None else model
        parameters = list(self.model.parameters())
        groups = [{"params": parameters[index::num_groups]} for index in range(num_groups)]
        self.optimizer = torch.optim.SGD(groups, lr=0.5, momentum=0.9, weight_decay=0.25)
        self.run = recipe_of(*items, item("EpochRangeModifier", end_epoch=EPOCHS)).attach(
            self.model, self.optimizer, STEPS_PER_EPOCH, **arguments
        )
        self.zeros: list[dict[str, int]] = []
        self.reports: list[tuple[gmp.StepReport, ...]] = []
        self.rates: list[list[float]] = []
        self.decays: list[list[float]] = []

    def train(self, epochs: float) -> Job:
        for step in range(len(self.zeros), round(epochs * STEPS_PER_EPOCH)):
            self.rates.append([group["lr"] for group in self.optimizer.param_groups])
            self.decays.append([group["weight_decay"] for group in self.optimizer.param_groups])
            train_step(self.model, self.optimizer, step)
            self.reports.append(self.run.step())
            self.zeros.append(zeros_of(self.model))
        return self

    @property
    def targets(self) -> list[str]:
        return [name for pruner in self.run.pruners for name in pruner.masks]
