"""Learning rate, weight decay and trainable parameters of a recipe, as functions of the optimizer steps done."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gmp_kernels.errors import RecipeError
from gmp_kernels.recipes.modifiers import (
    LearningRate,
    LearningRateFunction,
    Modifier,
    SetLearningRate,
    SetOption,
    SetWeightDecay,
    TrainableParams,
)
from gmp_kernels.recipes.timing import first_step

__all__ = ["Options", "RecipeLR", "Setting", "learning_rate_of", "weight_decay_of"]


class Segment(NamedTuple):
    """Steps from ``first`` to ``last`` (None: without end) at which a modifier sets a value for these param groups."""

    first: int
    last: int | None
    groups: frozenset[int] | None
    value: Callable[[int], float]


class Setting:
    """An option of an optimizer's param groups over the run; each modifier overwrites what was set before."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = segments

    def __bool__(self) -> bool:
        return bool(self._segments)

    def at(self, step: int, group: int) -> float | None:
        """Return the value that was set last by ``step``, or None if the optimizer's own still holds."""
        latest, value = -1, None
        for segment in self._segments:
            set_at = step if segment.last is None else min(step, segment.last)
            # Of two that set a value at one step, the later in order wins.
            if segment.first <= step and set_at >= latest and (segment.groups is None or group in segment.groups):
                latest, value = set_at, partial(segment.value, set_at)
        return None if value is None else value()

    def check_groups(self, what: str, num_groups: int) -> None:
        """Raise RecipeError for a param group that the optimizer does not have."""
        for segment in self._segments:
            beyond = [index for index in segment.groups or () if index >= num_groups]
            if beyond:
                raise RecipeError(
                    f"Recipe.attach: expected the {what} of {num_groups} param groups, got one of group {beyond[0]}; "
                    "build the optimizer with the recipe's groups"
                )


def in_order(modifiers: Iterable[Modifier]) -> list[Modifier]:
    """Return the modifiers in the order in which SparseML applies them: by end, where -1 is last, then by start."""
    return sorted(modifiers, key=lambda modifier: (modifier.end == -1, modifier.end, modifier.start))


def learning_rate_of(modifiers: Iterable[Modifier], steps_per_epoch: int) -> Setting:
    """Return the learning rate of a recipe."""
    kinds = SetLearningRate | LearningRateFunction | LearningRate
    return Setting([_segment(m, steps_per_epoch) for m in in_order(modifiers) if isinstance(m, kinds)])


def weight_decay_of(modifiers: Iterable[Modifier], steps_per_epoch: int) -> Setting:
    """Return the weight decay of a recipe."""
    return Setting([_segment(m, steps_per_epoch) for m in in_order(modifiers) if isinstance(m, SetWeightDecay)])


def _segment(modifier: SetOption | LearningRateFunction | LearningRate, steps_per_epoch: int) -> Segment:
    first = first_step(modifier.start, steps_per_epoch)
    end = None if modifier.end == -1 else first_step(modifier.end, steps_per_epoch, least=first)
    if isinstance(modifier, SetOption):
        return Segment(first, first, modifier.groups, lambda step: modifier.value)
    if isinstance(modifier, LearningRateFunction):
        return Segment(first, end, modifier.groups, partial(_on_curve, modifier, steps_per_epoch))
    # It ends with its last step before the end, without the cut that may fall on the end itself.
    last = None if end is None else max(first, end - 1)
    return Segment(first, last, None, partial(_by_scheduler, modifier, steps_per_epoch, first))


def _on_curve(modifier: LearningRateFunction, steps_per_epoch: int, step: int) -> float:
    start = max(modifier.start, 0.0)
    if modifier.function == "cyclic_linear":
        part = _part_of_cycle(step - start * steps_per_epoch, modifier.end - start, modifier.cycle, steps_per_epoch)
    else:
        part = (step / steps_per_epoch - start) / (modifier.end - start)
    part = min(max(part, 0.0), 1.0)
    if modifier.function == "cosine":
        part = 0.5 * (1.0 - math.cos(math.pi * part))
    return modifier.initial + part * (modifier.final - modifier.initial)


def _part_of_cycle(step: float, epochs: float, cycle: float, steps_per_epoch: int) -> float:
    """Return the part of its cycle that is done: 0 at the first step of each, 1 at the last; 1 at the end of all."""
    total, length = epochs * steps_per_epoch, max(1.0, cycle * steps_per_epoch)
    # Steps are whole, so a little less than a whole cycle is rounding.
    number = math.floor(step / length + 1e-9)
    if step >= total:
        return 1.0
    begin = number * length
    return (step - begin) / max(min(length, total - begin) - 1.0, 1.0)


def _by_scheduler(modifier: LearningRate, steps_per_epoch: int, first: int, step: int) -> float:
    start = max(modifier.start, 0.0)
    if modifier.kind == "CosineAnnealingWarmRestarts":
        part = math.fmod(step / steps_per_epoch - start, modifier.step_size) / modifier.step_size
        return modifier.lowest + (modifier.initial - modifier.lowest) * 0.5 * (1.0 + math.cos(math.pi * part))
    if modifier.kind == "MultiStepLR":
        steps = Counter(round((milestone - start) * steps_per_epoch) for milestone in modifier.milestones)
        cuts = sum(number for at, number in steps.items() if at <= step - first)
    else:
        cuts = (step - first) // max(1, round(modifier.step_size * steps_per_epoch))
    return modifier.initial * modifier.gamma**cuts


class RecipeLR(LRScheduler):
    """A torch lr_scheduler whose learning rate follows from the number of steps alone, as a recipe gives it."""

    def __init__(self, optimizer: Optimizer, setting: Setting) -> None:
        self._setting = setting
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        """Return the learning rate of each param group."""
        values = [self._setting.at(self.last_epoch, group) for group in range(len(self.base_lrs))]
        return [base if value is None else value for value, base in zip(values, self.base_lrs, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Return the position, as plain data; the recipe is not part of it."""
        return {key: value for key, value in super().state_dict().items() if key != "_setting"}


class Options:
    """Sets weight decay, and which parameters train, to what follows from the number of optimizer steps done.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
    weight_decay : Setting
    trained : mapping of TrainableParams to sequence of Parameter
        In the order in which they apply. After the last end, a parameter is as it is now.
    steps_per_epoch : int
    """

    def __init__(
        self,
        optimizer: Optimizer,
        weight_decay: Setting,
        trained: Mapping[TrainableParams, Sequence[nn.Parameter]],
        steps_per_epoch: int,
    ) -> None:
        self._optimizer = optimizer
        self._weight_decay = weight_decay
        self._before = {p: p.requires_grad for parameters in trained.values() for p in parameters}
        self._trained = [
            (
                first_step(modifier.start, steps_per_epoch),
                math.inf if modifier.end <= 0 else first_step(modifier.end, steps_per_epoch),
                modifier.trainable,
                parameters,
            )
            for modifier, parameters in trained.items()
        ]

    def __call__(self, step: int) -> None:
        for index, group in enumerate(self._optimizer.param_groups):
            value = self._weight_decay.at(step, index)
            if value is not None:
                group["weight_decay"] = value
        wanted = dict(self._before)
        for first, end, trainable, parameters in self._trained:
            if first <= step < end:
                wanted.update(dict.fromkeys(parameters, trainable))
        for parameter, trainable in wanted.items():
            if parameter.requires_grad != trainable:
                parameter.requires_grad_(trainable)
                if not trainable:
                    # Or the optimizer would go on with the gradient that is there.
                    parameter.grad = None
