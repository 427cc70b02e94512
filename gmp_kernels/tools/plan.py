"""The dry run of a gradual pruning run: sparsity, learning rate and weight decay, epoch by epoch.

It steps the schedule and the torch lr_scheduler of the real run on an empty model, so the numbers are those of the run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

import torch

from gmp_kernels.errors import ScheduleError
from gmp_kernels.schedules import Ramp
from gmp_kernels.stages import Stages

__all__ = ["PRESETS", "Plan", "Preset", "Row", "Trace", "plan_rows", "resnet50_layers"]

# A trace holds every step. This many steps take a minute or two.
MOST_STEPS = 10_000_000


def resnet50_layers() -> dict[str, tuple[int, ...]]:
    """Return {name: shape} of the prunable weights of torchvision's ResNet-50: 53 convolutions and the classifier.

    Source: K. He et al., "Deep residual learning for image recognition", 2016, table 1.
    """
    layers: dict[str, tuple[int, ...]] = {"conv1.weight": (64, 3, 7, 7)}
    channels = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 << stage
        for block in range(blocks):
            name = f"layer{stage + 1}.{block}"
            layers[f"{name}.conv1.weight"] = (width, channels, 1, 1)
            layers[f"{name}.conv2.weight"] = (width, width, 3, 3)
            layers[f"{name}.conv3.weight"] = (4 * width, width, 1, 1)
            if block == 0:
                layers[f"{name}.downsample.0.weight"] = (4 * width, channels, 1, 1)
            channels = 4 * width
    layers["fc.weight"] = (1000, channels)
    return layers


class Trace(NamedTuple):
    """Values at each step, from 0 to ``total_steps`` inclusive; the last entry is the state after the run.

    Attributes
    ----------
    sparsity : list of float
        Sparsity once the step is done.
    learning_rate, weight_decay : list of float
        Values that the optimizer uses for the step.
    """

    sparsity: list[float]
    learning_rate: list[float]
    weight_decay: list[float]


@dataclass(frozen=True)
class Plan:
    """A run whose course is computed without training.

    Parameters
    ----------
    stages : Stages
    initial_sparsity, final_sparsity : float
        Fractions in [0, 1], initial <= final.
    learning_rate : float
        Learning rate during stabilization and pruning.
    weight_decay : float
        Weight decay until fine-tuning.
    layers : dict of str to tuple of int
        {name: shape} of the pruned weights, each pruned to the same sparsity.

    Raises
    ------
    SparsityError, ScheduleError
        The sparsities make no schedule, or the run has more than ten million steps.
    """

    stages: Stages
    initial_sparsity: float = 0.05
    final_sparsity: float = 0.9
    learning_rate: float = 0.01
    weight_decay: float = 1e-4
    layers: dict[str, tuple[int, ...]] = field(default_factory=resnet50_layers)

    def __post_init__(self) -> None:
        if self.stages.total_steps > MOST_STEPS:
            raise ScheduleError(
                f"Plan: expected a run of at most {MOST_STEPS} optimizer steps, got {self.stages.total_steps:.3g}; "
                "shorten a stage, or lower steps_per_epoch"
            )
        self.schedule()

    def schedule(self) -> Ramp:
        """Return the sparsity schedule: cubic, one update per epoch."""
        return self.stages.schedule(self.initial_sparsity, self.final_sparsity)

    @cached_property
    def trace(self) -> Trace:
        """The values at every optimizer step, from the training loop without the training."""
        optimizer = torch.optim.SGD(
            [torch.zeros(1, device="cpu")], lr=self.learning_rate, weight_decay=self.weight_decay
        )
        lr_scheduler = self.stages.lr_scheduler(optimizer)
        schedule = self.schedule()
        group = optimizer.param_groups[0]
        trace = Trace([], [], [])
        sparsity = 0.0
        # lr_scheduler.step() warns unless the optimizer has stepped at least once. Without gradients this does nothing.
        optimizer.step()
        for step in range(self.stages.total_steps + 1):
            self.stages.end_weight_decay(optimizer, step)
            if schedule.is_update_step(step):
                sparsity = schedule.sparsity_at(step)
            trace.sparsity.append(sparsity)
            trace.learning_rate.append(group["lr"])
            trace.weight_decay.append(group["weight_decay"])
            lr_scheduler.step()
        return trace


class Row(NamedTuple):
    """One line of the plan: the state after ``epoch`` epochs.

    Attributes
    ----------
    epoch : float
    step : int
        Optimizer steps done by then.
    stage : str
        Stage that begins or continues here.
    sparsity : float
    num_prune : dict of str to int
        Number of pruned weights of each layer: round(sparsity * n).
    learning_rate, weight_decay : float
        Values of the next step; in the last row, the values after the run.
    """

    epoch: float
    step: int
    stage: str
    sparsity: float
    num_prune: dict[str, int]
    learning_rate: float
    weight_decay: float

    @property
    def total_num_prune(self) -> int:
        """Number of pruned weights in all layers."""
        return sum(self.num_prune.values())


def plan_rows(plan: Plan) -> list[Row]:
    """Return one row per epoch, from epoch 0 to the end of the run."""
    stages, trace = plan.stages, plan.trace
    sizes = {name: math.prod(shape) for name, shape in plan.layers.items()}
    rows = []
    for epoch in [*range(math.ceil(stages.total_steps / stages.steps_per_epoch)), stages.epochs]:
        step = round(epoch * stages.steps_per_epoch)
        rows.append(
            Row(
                epoch,
                step,
                stages.stage_at(step),
                trace.sparsity[step],
                {name: round(trace.sparsity[step] * n) for name, n in sizes.items()},
                trace.learning_rate[step],
                trace.weight_decay[step],
            )
        )
    return rows


class Preset(StrEnum):
    """The runs that come with the package."""

    BLOG = "blog"
    RESNET50 = "resnet50"


# ImageNet: 1 281 167 images in batches of 256. Both runs prune ResNet-50.
IMAGENET_STEPS = 5005

PRESETS = {
    # 5% at epoch 1, an update per epoch, 90% at epoch 35, held to epoch 60.
    Preset.BLOG: Plan(Stages(1, 34, 25, steps_per_epoch=IMAGENET_STEPS)),
    # 5% to 85% over epochs 2 to 37, fine-tuning to 57; learning rate 0.01, 0.001 at epoch 43, 0.0001 at epoch 50.
    Preset.RESNET50: Plan(Stages(2, 35, 20, steps_per_epoch=IMAGENET_STEPS), final_sparsity=0.85),
}
