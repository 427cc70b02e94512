"""Position of a run in its schedules, counted in optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from gmp_kernels.errors import warn
from gmp_kernels.schedules import Schedule

__all__ = ["PATIENCE", "Position", "Progress"]

PATIENCE = 100  # calls in a row without an optimizer step, or steps without a call, before a warning


class Position(NamedTuple):
    """Result of the latest call: one store replaces it, so that an interrupt leaves the old one or the new one.

    Attributes
    ----------
    num_steps : int
        Steps counted by then, including those that a GPU may have skipped.
    skipped : torch.Tensor or None
        How many of them a GPU has skipped; None if there is nothing to subtract.
    made : int
        The last step whose updates are made.
    num_calls : int
        Calls of ``step()``, including those without an optimizer step.
    num_idle : int
        Latest calls in a row that found no step of the optimizer.
    """

    num_steps: int = 0
    skipped: torch.Tensor | None = None
    made: int = -1
    num_calls: int = 0
    num_idle: int = 0


class Progress:
    """Count of optimizer steps, and of the updates that have been made for them.

    The update of step ``n`` is due once ``n`` steps are counted, whether or not the next one has been taken. Where
    several steps were taken since the last call, the latest update among them is made.

    Parameters
    ----------
    counts_calls : bool
        Whether every call is a step, whatever the optimizer does.
    schedules : sequence of Schedule
        To warn where an update is due and no call comes.
    repeats : bool
        Whether updates go on after the end of a schedule, as often as before it. Schedules that say no frequency have
        an update at every step then.

    Attributes
    ----------
    position : Position
        The caller replaces it by the one that ``due`` returned.
    """

    def __init__(self, *, counts_calls: bool, schedules: Sequence[Schedule] = (), repeats: bool = False) -> None:
        self.counts_calls = counts_calls
        self._repeats = repeats
        begins = [schedule.begin_step for schedule in schedules if schedule.end_step >= 0]
        self._overdue_at = min(begins) + PATIENCE if begins else None
        self.position = Position()
        self._num_steps = 0
        self._skipped: torch.Tensor | None = None

    def add(self, found_inf: torch.Tensor | None = None) -> None:
        """Count a step of the optimizer, unless the flag of a GradScaler made it skip the step.

        Notes
        -----
        Flags on a GPU are added up there. Only code that needs the sum waits for it; the step does not.
        """
        if self.counts_calls:
            return
        if found_inf is None or found_inf.device.type == "cpu":
            self._num_steps += found_inf is None or not found_inf.item()
        else:
            skipped = (found_inf != 0).sum()
            skipped = skipped if self._skipped is None else self._skipped + skipped
            self.__dict__.update(_num_steps=self._num_steps + 1, _skipped=skipped)
        if self._num_steps == self._overdue_at and not self.position.num_calls:
            warn(
                f"GMPScheduler: expected calls of step(), got {self._num_steps} optimizer steps without any, so that "
                "nothing is pruned; call it, or step() of the run, after every optimizer.step()"
            )

    @property
    def step_count(self) -> int:
        """Optimizer steps counted at the latest call. Waits for a GPU if that decides which steps are skipped."""
        self._settle()
        return self.position.num_steps

    def state(self) -> dict[str, int]:
        """Return the arguments of ``restore`` that lead here, as plain data."""
        self._settle()
        position = self.position
        return {
            "step_count": position.num_steps,
            "num_uncounted": 0 if self.counts_calls else self._num_steps - position.num_steps,
            "num_calls": position.num_calls,
            "is_current": position.made >= position.num_steps,
        }

    def restore(self, *, step_count: int, num_uncounted: int, num_calls: int, is_current: int) -> None:
        """Continue where ``state`` was taken, including steps that the latest call had not counted yet."""
        position = Position(step_count, None, step_count if is_current else step_count - 1, num_calls)
        self.__dict__.update(position=position, _num_steps=step_count + num_uncounted, _skipped=None)

    def due(self, schedules: Sequence[Schedule]) -> tuple[list[int | None], Position]:
        """Return the step of the update due in each schedule, and the position once these are made."""
        before = self.position
        # Steps that a GPU may have skipped are counted here.
        num_steps = before.num_steps + 1 if self.counts_calls else self._num_steps
        num_idle = 0 if num_steps > before.num_steps else before.num_idle + 1
        # Open are the steps whose updates are still to be made; the next one too if the optimizer has not stepped, or
        # if weights are ranked anew after each step.
        open_steps = range(before.made + 1, num_steps + (num_idle > 0 or self._repeats))
        due = [_latest(schedule, open_steps, self._repeats) for schedule in schedules]
        if self._skipped is not None and any(step is not None for step in due):
            self._settle()
            return self.due(schedules)
        made = max(before.made, open_steps.stop - 1)
        return due, Position(num_steps, self._skipped, made, before.num_calls + 1, num_idle)

    def _settle(self) -> None:
        """Subtract the steps that a GPU has skipped. Waits for it."""
        if self._skipped is None:
            return
        before = self.position
        known = before.num_steps if before.skipped is None else before.num_steps - int(before.skipped)
        self.__dict__.update(
            position=before._replace(num_steps=known, skipped=None),
            _num_steps=self._num_steps - int(self._skipped),
            _skipped=None,
        )


def _latest(schedule: Schedule, steps: range, repeats: bool) -> int | None:
    for step in reversed(steps):
        if schedule.is_update_step(step) or (repeats and _is_repeated(schedule, step)):
            return step
    return None


def _is_repeated(schedule: Schedule, step: int) -> bool:
    begin = schedule.begin_step
    return 0 <= begin <= step and (step - begin) % getattr(schedule, "frequency", 1) == 0
