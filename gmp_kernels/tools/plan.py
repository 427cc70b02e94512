"""The dry run of a gradual pruning run: sparsity, learning rate and weight decay, step by step.

A ``Course`` is what a run does, whatever it was computed from. A ``Plan`` computes one from stages: it steps the
schedule and the torch lr_scheduler of the real run on an empty model, so the numbers are those of the run.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch.optim.lr_scheduler import LRScheduler

from gmp_kernels.checks import check_fit
from gmp_kernels.errors import ScheduleError
from gmp_kernels.patterns import Pattern
from gmp_kernels.pruner.distributions import distribution_of, together
from gmp_kernels.pruner.groups import Group, check_limits
from gmp_kernels.pruner.limits import Limits
from gmp_kernels.schedules import Cubic, Ramp
from gmp_kernels.stages import Stages

__all__ = ["TOGETHER", "Course", "Plan", "Row", "check_length", "dry_run", "parts_of"]

# The learning rate is kept for every step. This many steps take a minute or two.
MOST_STEPS = 10_000_000
TOGETHER = "all layers together"


class Row(NamedTuple):
    """State of a run after ``epoch`` epochs.

    Attributes
    ----------
    epoch : float
    step : int
        Optimizer steps done by then.
    stage : str
        Stage that begins or continues here.
    sparsity : float
        Fraction of pruned weights over all layers.
    num_prune : dict of str to int
        Number of pruned weights of each layer; of layers ranked together, their sum under ``TOGETHER``.
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


@dataclass(frozen=True)
class Course:
    """Sparsity, learning rate and weight decay of a run at every optimizer step.

    Parameters
    ----------
    groups : sequence of Group
        Layers with their schedules. A layer is in one group.
    learning_rate, weight_decay : sequence of float
        Values that the optimizer uses for each step, from step 0 on; the last entries are those after the run.
    steps_per_epoch : int
    stages : dict of str to (float, float)
        {name: (first step, last step)}, in order.
    """

    groups: Sequence[Group]
    learning_rate: Sequence[float]
    weight_decay: Sequence[float]
    steps_per_epoch: int
    stages: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return len(self.learning_rate) - 1

    @property
    def layers(self) -> dict[str, Sequence[int]]:
        """{name: shape} of all layers."""
        return {name: shape for group in self.groups for name, shape in group.shapes.items()}

    @property
    def num_weights(self) -> int:
        """Weights of all layers."""
        return sum(map(math.prod, self.layers.values()))

    @cached_property
    def updates(self) -> list[list[int]]:
        """Steps of the updates within the run, one list per group."""
        found = []
        for group in self.groups:
            schedule = group.schedule
            steps = range(max(0, schedule.begin_step), min(schedule.end_step, self.total_steps) + 1)
            found.append([step for step in steps if schedule.is_update_step(step)])
        return found

    def num_prune(self, step: int) -> dict[str, int]:
        """Return the number of pruned weights once the updates up to ``step`` are made, as in ``Row``."""
        counts: dict[str, int] = {}
        for group, updates in zip(self.groups, self.updates, strict=True):
            made = bisect_right(updates, step)
            found = group.num_prune(group.schedule.sparsity_at(updates[made - 1]) if made else 0.0)
            counts |= {TOGETHER: sum(found.values())} if group.distribute is together else found
        return counts

    def rows(self) -> list[Row]:
        """Return one row per epoch, from epoch 0 to the end of the run."""
        rows = []
        last = self.total_steps / self.steps_per_epoch
        for epoch in [*range(math.ceil(last)), last]:
            step = round(epoch * self.steps_per_epoch)
            counts = self.num_prune(step)
            stage = next((name for name in reversed(self.stages) if self.stages[name][0] <= step), "")
            sparsity = sum(counts.values()) / self.num_weights
            rows.append(Row(epoch, step, stage, sparsity, counts, self.learning_rate[step], self.weight_decay[step]))
        return rows


def check_length(total_steps: float) -> None:
    """Raise ScheduleError for a run that takes too long to go through step by step."""
    if total_steps > MOST_STEPS:
        raise ScheduleError(
            f"Plan: expected a run of at most {MOST_STEPS} optimizer steps, got {total_steps:.3g}; "
            "shorten it, or lower steps_per_epoch"
        )


def parts_of(stages: Stages, unit: float = 1) -> dict[str, tuple[float, float]]:
    """Return {name: (begin, end)} of the stages; ``unit`` is the number of steps that count as 1."""
    ends = [0, stages.pruning_begin_step, stages.pruning_end_step, stages.total_steps]
    return {stages.stage_at(begin): (begin / unit, end / unit) for begin, end in pairwise(ends) if end > begin}


class _Rates(torch.optim.SGD):
    """An optimizer of nothing but its learning rate and weight decay.

    What it overrides would import torch's compiler, which takes two seconds.
    """

    def __init__(self, learning_rate: float, weight_decay: float) -> None:
        super().__init__([torch.zeros(1, device="cpu")], lr=learning_rate, weight_decay=weight_decay)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.param_groups.append(self.defaults | param_group)

    def step(self, closure: Any = None) -> Any:
        return None


def dry_run(
    optimizer: torch.optim.Optimizer,
    total_steps: int,
    *,
    lr_scheduler: LRScheduler | None = None,
    set_options: Callable[[int], None] = lambda step: None,
) -> tuple[list[float], list[float]]:
    """Return learning rate and weight decay of the first param group at each step, up to and after the last.

    Takes what a ``Run`` takes, in the training loop without the training. The optimizer is changed.
    """
    group = optimizer.param_groups[0]
    learning_rate, weight_decay = [], []
    # lr_scheduler.step() warns unless the optimizer has stepped at least once. Without gradients this does nothing.
    optimizer.step()
    for step in range(total_steps + 1):
        set_options(step)
        learning_rate.append(float(group["lr"]))
        weight_decay.append(float(group["weight_decay"]))
        if lr_scheduler is not None:
            lr_scheduler.step()
    return learning_rate, weight_decay


@dataclass(frozen=True)
class Plan:
    """A run in three stages.

    Parameters
    ----------
    stages : Stages
    layers : mapping of str to tuple of int
        {name: shape} of the pruned weights.
    initial_sparsity, final_sparsity, kind, frequency
        As in ``Stages.schedule``.
    learning_rate : float
        Learning rate during stabilization.
    weight_decay : float
        Weight decay until fine-tuning.
    pruning_lr, finetuning_lr
        Shapes of the learning rate: ``pruning`` and ``finetuning`` of ``Stages.lr_scheduler``; "steps" are its two
        default milestones.
    scope, distribution
        As in ``GMPScheduler``.
    pattern : Pattern, optional
        Of all layers.

    Raises
    ------
    SparsityError, ScheduleError, TargetError, ShapeError
        The arguments make no schedule or do not fit together, layers do not fit the pattern, or the run has more than
        ten million steps.
    """

    stages: Stages
    layers: Mapping[str, tuple[int, ...]]
    initial_sparsity: float = 0.05
    final_sparsity: float = 0.9
    kind: type[Ramp] = Cubic
    frequency: float | None = None
    learning_rate: float = 0.01
    weight_decay: float = 1e-4
    pruning_lr: Literal["constant", "cosine", "cyclic", "rewind"] = "constant"
    finetuning_lr: Literal["steps", "linear", "cosine"] = "steps"
    scope: Literal["layer", "global"] = "layer"
    distribution: Literal["uniform", "erk"] = "uniform"
    pattern: Pattern | None = None

    def __post_init__(self) -> None:
        check_length(self.stages.total_steps)
        self.schedule()
        distribution_of(self.distribution, self.scope)
        patterns = [self.pattern] * len(self.layers)
        check_fit("Plan", patterns, list(self.layers.values()), list(self.layers))
        check_limits("Plan", self._group, self._limits, "end lower")

    def schedule(self) -> Ramp:
        """Return the sparsity schedule."""
        return self.stages.schedule(
            self.initial_sparsity, self.final_sparsity, kind=self.kind, frequency=self.frequency
        )

    @cached_property
    def course(self) -> Course:
        """Course of the run: sparsity, learning rate and weight decay."""
        stages = self.stages
        optimizer = _Rates(self.learning_rate, self.weight_decay)
        finetuning = None if self.finetuning_lr == "steps" else self.finetuning_lr
        learning_rate, weight_decay = dry_run(
            optimizer,
            stages.total_steps,
            lr_scheduler=stages.lr_scheduler(optimizer, finetuning, pruning=self.pruning_lr),
            set_options=lambda step: stages.end_weight_decay(optimizer, step),
        )
        return Course([self._group], learning_rate, weight_decay, stages.steps_per_epoch, parts_of(stages))

    @property
    def _limits(self) -> Limits:
        return Limits({} if self.pattern is None else dict.fromkeys(self.layers, self.pattern))

    @property
    def _group(self) -> Group:
        shapes = {name: torch.Size(shape) for name, shape in self.layers.items()}
        distribute = distribution_of(self.distribution, self.scope)
        return Group(self.schedule(), shapes, distribute, self._limits.of_layers(shapes))
