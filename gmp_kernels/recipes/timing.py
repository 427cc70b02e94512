"""Epochs of a recipe in optimizer steps, and the sparsity schedule whose times are such epochs."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Self

from gmp_kernels.errors import ScheduleError
from gmp_kernels.schedules import Schedule, check_sparsity

__all__ = ["CURVES", "EpochRamp", "Hold", "first_step"]

# The part of the way that is done at progress p.
CURVES: dict[str, Callable[[float], float]] = {
    "linear": lambda p: p,
    "cubic": lambda p: 1.0 - (1.0 - p) ** 3,
    "inverse_cubic": lambda p: 1.0 - (1.0 - p) ** (1.0 / 3.0),
}
# A schedule lists its updates, and a recipe is text from elsewhere.
MOST_UPDATES = 1_000_000


def first_step(epoch: float, steps_per_epoch: int, least: int = 0) -> int:
    """Return the first step, not before ``least``, at which the run is at ``epoch`` or past it.

    After n optimizer steps it is at n / steps_per_epoch, in floating point.
    """
    step = max(least, math.floor(epoch * steps_per_epoch) - 1)
    while step / steps_per_epoch < epoch:
        step += 1
    return step


@lru_cache
def _update_steps(begin: int, end: int, frequency: float, steps_per_epoch: int) -> Container[int]:
    """Return the steps of updates from ``begin`` to ``end``, both included.

    In between there is one wherever the epoch has reached that of the last update plus ``frequency``. With epochs in
    floating point this is not every multiple of it: 0.05 + 0.01 is more than 6 / 100.
    """
    if frequency <= 0:
        return range(begin, end + 1)
    steps, step = {end}, begin
    while step < end:
        steps.add(step)
        step = first_step(step / steps_per_epoch + frequency, steps_per_epoch, least=step + 1)
        if len(steps) > MOST_UPDATES:
            raise ScheduleError(
                f"recipe: expected at most {MOST_UPDATES} updates, got one every {frequency:g} epochs from step "
                f"{begin} to {end}; raise update_frequency"
            )
    return frozenset(steps)


@dataclass(frozen=True)
class EpochRamp(Schedule):
    """A ramp between two epochs, which need not fall on whole steps.

    The first update is at the first step at or past ``start``, the last at the first step at or past ``end``, which
    sets ``final_sparsity``. Between them there is one wherever ``frequency`` epochs have passed since the last.

    Parameters
    ----------
    initial_sparsity, final_sparsity : float
        Fractions in [0, 1], initial <= final.
    start, end : float
        Epochs, start <= end. A start of -1 is at once, and the ramp is then that from epoch -1.
    frequency : float
        Epochs; below that of one step, every step.
    curve : str
        One of ``CURVES``.
    steps_per_epoch : int
    """

    initial_sparsity: float
    final_sparsity: float
    start: float
    end: float
    frequency: float
    curve: str
    steps_per_epoch: int

    @property
    def begin_step(self) -> int:
        return first_step(self.start, self.steps_per_epoch)

    @property
    def end_step(self) -> int:
        return first_step(self.end, self.steps_per_epoch)

    def sparsity_at(self, step: int) -> float:
        if step < self.begin_step:
            return 0.0
        if step >= self.end_step:
            return self.final_sparsity
        done = CURVES[self.curve]((step / self.steps_per_epoch - self.start) / (self.end - self.start))
        if done >= 1.0 - sys.float_info.epsilon:
            return self.final_sparsity
        return done * (self.final_sparsity - self.initial_sparsity) + self.initial_sparsity

    def is_update_step(self, step: int) -> bool:
        return step in _update_steps(self.begin_step, self.end_step, self.frequency, self.steps_per_epoch)

    def with_final_sparsity(self, sparsity: float) -> Self:
        sparsity = check_sparsity("EpochRamp.with_final_sparsity", sparsity)
        return replace(self, initial_sparsity=min(self.initial_sparsity, sparsity), final_sparsity=sparsity)


@dataclass(frozen=True)
class Hold(Schedule):
    """No update: what is pruned at the start stays so until ``end_step``."""

    end_step: int
    begin_step: int = 0
    final_sparsity: float = 0.0

    def sparsity_at(self, step: int) -> float:
        return 0.0

    def is_update_step(self, step: int) -> bool:
        return False

    def with_final_sparsity(self, sparsity: float) -> Self:
        return self
