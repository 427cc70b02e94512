"""Position of a run in its schedules, counted in optimizer steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from gmp_kernels.schedules import Schedule

__all__ = ["Count", "Position", "Progress", "StepCount"]


class Count(NamedTuple):
    """Number of steps at one moment, of which a GPU may know some alone.

    Attributes
    ----------
    known : int
        Steps that were taken for certain.
    num_open : int
        Steps that a GPU decided to take or skip.
    taken : torch.Tensor or None
        How many of those it took.
    """

    known: int = 0
    num_open: int = 0
    taken: torch.Tensor | None = None

    @property
    def at_most(self) -> int:
        """Number of steps if none was skipped."""
        return self.known + self.num_open

    def settled(self) -> Count:
        """Return the same with nothing left open, which waits for the GPU."""
        return self if self.taken is None else Count(self.known + int(self.taken))


class StepCount:
    """Steps that an optimizer has taken.

    Attributes
    ----------
    now : Count
    """

    def __init__(self) -> None:
        self.now = Count()

    def add(self, found_inf: torch.Tensor | None = None) -> None:
        """Count a step, unless the flag of a GradScaler made the optimizer skip it.

        Notes
        -----
        A flag on a GPU is added up there. Whoever needs the sum waits for it, not the step.
        """
        known, num_open, taken = self.now
        if found_inf is None or found_inf.device.type == "cpu":
            self.now = Count(known + (found_inf is None or not found_inf.item()), num_open, taken)
        else:
            step = (found_inf == 0).sum()
            self.now = Count(known, num_open + 1, step if taken is None else taken + step)

    def settle(self) -> Count:
        """Return the number of steps for certain; waits for a GPU that has decided about some."""
        self.now = self.now.settled()
        return self.now


class Position(NamedTuple):
    """Result of the latest call: one store replaces it, so that an interrupt leaves the old one or the new one."""

    steps: Count
    made: int  # the last step whose updates are made
    num_calls: int
    num_idle: int  # calls in a row without a step


class Progress:
    """Steps counted so far, and which of the updates that are due by then have been made.

    The update of step ``n`` is due once ``n`` steps are counted, whether or not the next one has been taken. Where
    several steps were taken since the last call, the latest update among them is made.

    Parameters
    ----------
    steps : StepCount or None
        None: every call is a step.
    """

    def __init__(self, steps: StepCount | None) -> None:
        self._steps = steps
        self._offset = 0 if steps is None else steps.settle().known
        self._position = Position(Count(self._offset), -1, 0, 0)

    @property
    def step_count(self) -> int:
        """Optimizer steps counted at the latest call. Waits for a GPU that decides about steps."""
        return self._position.steps.settled().known - self._offset

    @property
    def num_calls(self) -> int:
        """Calls of ``step()``, those without an optimizer step included."""
        return self._position.num_calls

    @property
    def num_idle(self) -> int:
        """Latest calls in a row that found no step of the optimizer."""
        return self._position.num_idle

    @property
    def num_uncounted(self) -> int:
        """Optimizer steps taken since the latest call, which the next one counts."""
        return 0 if self._steps is None else self._steps.settle().known - self._position.steps.settled().known

    @property
    def is_current(self) -> bool:
        """Whether the updates of ``step_count`` have been made already."""
        return self._position.made >= self.step_count

    def has_made(self, step: int) -> bool:
        """Whether the updates up to this step have been made."""
        return self._position.made >= step

    def state(self) -> dict[str, int]:
        """Return the arguments of ``restore`` that lead here, as plain data."""
        return {
            "step_count": self.step_count,
            "num_uncounted": self.num_uncounted,
            "num_calls": self.num_calls,
            "is_current": self.is_current,
        }

    def restore(self, *, step_count: int, num_uncounted: int, num_calls: int, is_current: int) -> None:
        """Continue where ``state`` was taken.

        Parameters
        ----------
        step_count, num_calls : int
        num_uncounted : int
            Optimizer steps taken since the latest call.
        is_current : int
            Whether the updates of ``step_count`` were made.
        """
        now = Count() if self._steps is None else Count(self._steps.settle().known - num_uncounted)
        position = Position(now, step_count if is_current else step_count - 1, num_calls, 0)
        self._offset, self._position = now.known - step_count, position

    def due(self, schedules: Sequence[Schedule]) -> tuple[list[int | None], Position]:
        """Return the step of the update that each schedule is due for, and the position once they are made."""
        before = self._position
        now = Count(before.steps.known + 1) if self._steps is None else self._steps.now
        steps = self._range(now, before)
        if now.taken is not None and any(_latest(schedule, steps) is not None for schedule in schedules):
            assert self._steps is not None
            now, before = self._steps.settle(), before._replace(steps=before.steps.settled())
            steps = self._range(now, before)
        idle = 0 if now.at_most > before.steps.at_most else before.num_idle + 1
        after = Position(now, max(before.made, steps.stop - 1), before.num_calls + 1, idle)
        return [_latest(schedule, steps) for schedule in schedules], after

    def advance(self, position: Position) -> None:
        """Go to a position that ``due`` returned."""
        self._position = position

    def _range(self, now: Count, before: Position) -> range:
        """Steps whose updates have to have been made after this call, and are not."""
        step = now.at_most - self._offset
        has_stepped = now.at_most > before.steps.at_most
        return range(before.made + 1, step if has_stepped else step + 1)


def _latest(schedule: Schedule, steps: Iterable[int]) -> int | None:
    return next((step for step in reversed(steps) if schedule.is_update_step(step)), None)  # type: ignore[call-overload]
