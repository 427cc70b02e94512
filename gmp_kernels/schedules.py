"""Sparsity schedules: they say which optimizer steps prune, and to which sparsity. Plain numbers, no tensors.

The number of a step is the count of optimizer steps before it: 0 at the first ``scheduler.step()``. Before
``begin_step`` there is no update and sparsity is 0. The first update is at ``begin_step``. The one at ``end_step``
always happens and sets exactly ``final_sparsity``, which holds from then on. Pruned weights never come back, so no
schedule may fall.
"""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Self

from gmp_kernels.errors import ScheduleError, SparsityError

__all__ = [
    "Constant",
    "Cosine",
    "Cubic",
    "Exponential",
    "InverseCubic",
    "Linear",
    "MultiStep",
    "OneShot",
    "Polynomial",
    "Ramp",
    "Schedule",
    "check_sparsity",
    "check_whole",
    "to_steps",
]


class Schedule(ABC):
    """Interface of every schedule. Subclass it to write your own; the scheduler needs nothing more.

    Attributes
    ----------
    begin_step, end_step : int
        First and last update, in optimizer steps.
    final_sparsity : float
        Sparsity that the update at ``end_step`` sets, in [0, 1].
    """

    if TYPE_CHECKING:
        # Only the type checker sees these: a dataclass would take an inherited property for the default of its field.
        @property
        def begin_step(self) -> int: ...
        @property
        def end_step(self) -> int: ...
        @property
        def final_sparsity(self) -> float: ...

    @abstractmethod
    def sparsity_at(self, step: int) -> float:
        """Return the target sparsity, in [0, 1], at ``step``."""

    @abstractmethod
    def is_update_step(self, step: int) -> bool:
        """Return whether the weights are pruned at ``step``."""

    @abstractmethod
    def with_final_sparsity(self, sparsity: float) -> Self:
        """Return the same schedule with another final sparsity and the same update steps."""

    def to_dict(self) -> dict[str, object]:
        """Return the class name and every argument as plain data. Equal schedules, and only those, give equal dicts."""
        return {"kind": type(self).__name__, **deepcopy(vars(self))}


@dataclass(frozen=True)
class Ramp(Schedule):
    """A curve from ``initial_sparsity`` at ``begin_step`` to ``final_sparsity`` at ``end_step``.

    Parameters
    ----------
    initial_sparsity, final_sparsity : float
        Fractions in [0, 1], initial <= final.
    begin_step, end_step : int
        In optimizer steps, 0 <= begin <= end. If they are equal there is one update, to ``final_sparsity``.
    frequency : int
        Steps from one update to the next, >= 1, counted from ``begin_step``. Keyword-only, as is all that follows.

    Raises
    ------
    SparsityError
        A sparsity is not a number in [0, 1].
    ScheduleError
        The steps are not whole numbers in ascending order, or the sparsity would fall.

    Notes
    -----
    Let p = (step - begin_step) / (end_step - begin_step). A subclass defines the part of the way that remains at p,
    falling from 1 at p = 0 to 0 at p = 1. Then sparsity = final + (initial - final) * remaining.
    """

    initial_sparsity: float
    final_sparsity: float
    begin_step: int
    end_step: int
    frequency: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        kind = type(self).__name__
        for name in ("initial_sparsity", "final_sparsity"):
            _store(self, name, check_sparsity(f"{kind}: {name}", getattr(self, name)))
        for name, least in (("begin_step", 0), ("end_step", 0), ("frequency", 1)):
            _store(self, name, check_whole(f"{kind}: {name}", getattr(self, name), least))
        if self.end_step < self.begin_step:
            raise ScheduleError(
                f"{kind}: expected begin_step <= end_step, got {self.begin_step} and {self.end_step}; swap them"
            )
        if self.final_sparsity < self.initial_sparsity:
            raise ScheduleError(
                f"{kind}: expected initial_sparsity <= final_sparsity, got {self.initial_sparsity} and "
                f"{self.final_sparsity}; pruned weights never come back, so start lower"
            )

    @classmethod
    def from_epochs(
        cls,
        initial_sparsity: float,
        final_sparsity: float,
        *,
        begin: float,
        end: float,
        frequency: float = 1,
        steps_per_epoch: int,
        **shape: float,
    ) -> Self:
        """Return the schedule whose times are given in epochs, rounded to whole steps.

        Parameters
        ----------
        initial_sparsity, final_sparsity : float
            As in the constructor.
        begin, end : float
            Epochs after which the first and the last update happen.
        frequency : float
            Epochs from one update to the next; at least one step.
        steps_per_epoch : int
            Optimizer steps per epoch.
        **shape : float
            Other arguments of the constructor: ``power`` of Polynomial.

        Raises
        ------
        SparsityError, ScheduleError
            As in the constructor, and for epochs that are negative or not finite.
        """
        op = f"{cls.__name__}.from_epochs"
        return cls(
            initial_sparsity,
            final_sparsity,
            to_steps(f"{op}: begin", begin, steps_per_epoch),
            to_steps(f"{op}: end", end, steps_per_epoch),
            frequency=max(1, to_steps(f"{op}: frequency", frequency, steps_per_epoch)),
            **shape,
        )

    def sparsity_at(self, step: int) -> float:
        if step < self.begin_step:
            return 0.0
        # Both ends are returned as given: the arithmetic below would be off by a rounding error there.
        if step >= self.end_step:
            return self.final_sparsity
        if step == self.begin_step:
            return self.initial_sparsity
        progress = (step - self.begin_step) / (self.end_step - self.begin_step)
        sparsity = self.final_sparsity + (self.initial_sparsity - self.final_sparsity) * self._remaining(progress)
        # final + (initial - final) may round to just below initial.
        return max(sparsity, self.initial_sparsity)

    def is_update_step(self, step: int) -> bool:
        if not self.begin_step <= step <= self.end_step:
            return False
        return (step - self.begin_step) % self.frequency == 0 or step == self.end_step

    def with_final_sparsity(self, sparsity: float) -> Self:
        """Return the same ramp to ``sparsity``, starting no higher than that."""
        sparsity = check_sparsity(f"{type(self).__name__}.with_final_sparsity", sparsity)
        return replace(self, initial_sparsity=min(self.initial_sparsity, sparsity), final_sparsity=sparsity)

    @abstractmethod
    def _remaining(self, progress: float) -> float:
        """Return the part of the way still to go, falling from 1 at progress 0 to 0 at progress 1."""


@dataclass(frozen=True)
class Polynomial(Ramp):
    """remaining = (1 - p) ** power.

    Steep at first, while there are many small weights, and flat towards the end. Power 3 gives the schedule of M. Zhu
    and S. Gupta, "To prune, or not to prune", 2017, arXiv:1710.01878. ``power`` is a number > 0; otherwise as ``Ramp``.
    """

    power: float = field(default=3.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < _real(self.power) < math.inf:
            raise ScheduleError(f"Polynomial: expected a finite power > 0, got {self.power!r}; 3 is the usual one")
        _store(self, "power", float(self.power))

    def _remaining(self, progress: float) -> float:
        return math.pow(1.0 - progress, self.power)


@dataclass(frozen=True)
class Linear(Ramp):
    """remaining = 1 - p: every update prunes the same number of weights. Arguments as ``Ramp``."""

    def _remaining(self, progress: float) -> float:
        return 1.0 - progress


@dataclass(frozen=True)
class Cubic(Ramp):
    """remaining = (1 - p)^3: the schedule of Zhu and Gupta, see ``Polynomial``. Arguments as ``Ramp``."""

    def _remaining(self, progress: float) -> float:
        return (1.0 - progress) ** 3


@dataclass(frozen=True)
class InverseCubic(Ramp):
    """remaining = (1 - p)^(1/3): flat at first, steep towards the end. Arguments as ``Ramp``."""

    def _remaining(self, progress: float) -> float:
        return math.cbrt(1.0 - progress)


@dataclass(frozen=True)
class Exponential(Ramp):
    """Density falls exponentially: every update prunes the same fraction of the weights that are left.

    density = d0 * (d1 / d0) ** p, with d0 = 1 - initial_sparsity and d1 = 1 - final_sparsity; equally
    remaining = 1 - (1 - exp(-k p)) / (1 - exp(-k)) with k = ln(d0 / d1). Density never reaches 0 that way, so
    ``final_sparsity`` must be below 1; otherwise as ``Ramp``.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.final_sparsity == 1.0:
            raise SparsityError("Exponential: expected final_sparsity < 1, got 1.0; no decay ends there, take Cubic")

    def _remaining(self, progress: float) -> float:
        decay = math.log1p((self.final_sparsity - self.initial_sparsity) / (1.0 - self.final_sparsity))
        if decay == 0.0:  # initial == final
            return 0.0
        return 1.0 - math.expm1(-decay * progress) / math.expm1(-decay)


@dataclass(frozen=True)
class Cosine(Ramp):
    """remaining = (1 + cos(pi p)) / 2: half a cosine, flat at both ends. Arguments as ``Ramp``."""

    def _remaining(self, progress: float) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * progress))


class _Staircase(Schedule):
    """A few sparsities, each held from its own step on; the only updates are at those steps."""

    @abstractmethod
    def _values(self) -> dict[int, float]:
        """Return {step: sparsity}, both ascending; empty if there is no update."""

    @property
    def begin_step(self) -> int:
        return min(self._values(), default=-1)

    @property
    def end_step(self) -> int:
        return max(self._values(), default=-1)

    @property
    def final_sparsity(self) -> float:
        return max(self._values().values(), default=0.0)

    def sparsity_at(self, step: int) -> float:
        return max((sparsity for begin, sparsity in self._values().items() if begin <= step), default=0.0)

    def is_update_step(self, step: int) -> bool:
        return step in self._values()

    def with_final_sparsity(self, sparsity: float) -> Self:
        return replace(self, sparsity=sparsity)  # type: ignore[type-var]  # subclasses are dataclasses


@dataclass(frozen=True)
class MultiStep(_Staircase):
    """A sparsity per milestone, each held from its step on.

    Parameters
    ----------
    milestones : mapping of int to float
        {step: sparsity}; steps >= 0 in any order, sparsities in [0, 1] that do not fall. Copied.

    Raises
    ------
    SparsityError
        A sparsity is not a number in [0, 1].
    ScheduleError
        There are no milestones, a step is not a whole number >= 0, or a sparsity falls.
    """

    milestones: Mapping[int, float]

    def __post_init__(self) -> None:
        milestones = {
            check_whole("MultiStep: step", step, 0): check_sparsity(f"MultiStep: sparsity at step {step}", sparsity)
            for step, sparsity in self.milestones.items()
        }
        if not milestones:
            raise ScheduleError("MultiStep: expected {step: sparsity}, got no milestones; write e.g. {1000: 0.5}")
        ascending = sorted(milestones.items())
        for (earlier, low), (later, high) in pairwise(ascending):
            if high < low:
                raise ScheduleError(
                    f"MultiStep: expected sparsities that do not fall, got {low} at step {earlier} and {high} at step "
                    f"{later}; pruned weights never come back, so raise the later one"
                )
        _store(self, "milestones", dict(ascending))

    @classmethod
    def from_epochs(cls, milestones: Mapping[float, float], *, steps_per_epoch: int) -> Self:
        """Return the schedule of {epoch: sparsity}. Epochs are rounded to whole steps, which must stay distinct.

        Raises
        ------
        SparsityError, ScheduleError
            As in the constructor, and for epochs that are negative, not finite, or fall on the same step.
        """
        steps = {to_steps("MultiStep.from_epochs: epoch", epoch, steps_per_epoch): epoch for epoch in milestones}
        if len(steps) != len(milestones):
            raise ScheduleError(
                f"MultiStep.from_epochs: expected epochs on distinct steps, got {sorted(milestones)} with "
                f"{steps_per_epoch} steps per epoch; move them apart"
            )
        return cls({step: milestones[epoch] for step, epoch in steps.items()})

    def with_final_sparsity(self, sparsity: float) -> Self:
        """Return the same steps with every sparsity scaled so that the last is ``sparsity``."""
        sparsity = check_sparsity("MultiStep.with_final_sparsity", sparsity)
        last = self.final_sparsity
        # Divide first: value / last is at most 1, and exactly 1 for the last, whatever the rounding.
        scale = {step: value / last if last else 1.0 for step, value in self._values().items()}
        return replace(self, milestones={step: part * sparsity for step, part in scale.items()})

    def _values(self) -> dict[int, float]:
        return self.milestones  # type: ignore[return-value]  # __post_init__ made it a dict


@dataclass(frozen=True)
class Constant(_Staircase):
    """One sparsity, reached at ``begin_step`` in a single update and held.

    Parameters
    ----------
    sparsity : float or None
        In [0, 1]. None holds what is pruned at the start and prunes nothing more.
    begin_step : int
        In optimizer steps, >= 0.

    Raises
    ------
    SparsityError, ScheduleError
        As ``MultiStep``.
    """

    sparsity: float | None
    begin_step: int = 0

    def __post_init__(self) -> None:
        if self.sparsity is not None:
            _store(self, "sparsity", check_sparsity("Constant: sparsity", self.sparsity))
        _store(self, "begin_step", check_whole("Constant: begin_step", self.begin_step, 0))

    @classmethod
    def from_epochs(cls, sparsity: float | None, *, begin: float = 0, steps_per_epoch: int) -> Self:
        """Return the schedule that begins after ``begin`` epochs, rounded to whole steps."""
        return cls(sparsity, to_steps("Constant.from_epochs: begin", begin, steps_per_epoch))

    def _values(self) -> dict[int, float]:
        return {} if self.sparsity is None else {self.begin_step: self.sparsity}


@dataclass(frozen=True)
class OneShot(_Staircase):
    """All pruning in a single update at ``step``, the baseline for gradual pruning. Otherwise as ``Constant``."""

    sparsity: float
    step: int = 0

    def __post_init__(self) -> None:
        _store(self, "sparsity", check_sparsity("OneShot: sparsity", self.sparsity))
        _store(self, "step", check_whole("OneShot: step", self.step, 0))

    @classmethod
    def from_epochs(cls, sparsity: float, *, epoch: float = 0, steps_per_epoch: int) -> Self:
        """Return the schedule that prunes after ``epoch`` epochs, rounded to whole steps."""
        return cls(sparsity, to_steps("OneShot.from_epochs: epoch", epoch, steps_per_epoch))

    def _values(self) -> dict[int, float]:
        return {self.step: self.sparsity}


def to_steps(what: str, epochs: float, steps_per_epoch: int) -> int:
    """Return ``epochs`` in whole optimizer steps; a ScheduleError calls the value ``what``."""
    steps_per_epoch = check_whole(f"{what}: steps_per_epoch", steps_per_epoch, 1)
    if not 0.0 <= _real(epochs) < math.inf:
        raise ScheduleError(f"{what}: expected a finite number of epochs >= 0, got {epochs!r}; count from the start")
    try:
        return round(float(epochs) * steps_per_epoch)
    except OverflowError:
        raise ScheduleError(
            f"{what}: expected a number of steps that a float can hold, got more; lower the epochs or steps_per_epoch"
        ) from None


def _store(schedule: Schedule, name: str, value: object) -> None:
    """Write a field of a frozen dataclass from its own ``__post_init__``."""
    object.__setattr__(schedule, name, value)


def _real(value: object) -> float:
    """Return a number as a float, and anything else as NaN, which is in no range."""
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan


def check_sparsity(what: str, value: object) -> float:
    """Return ``value``, a real number in [0, 1], as a float; a SparsityError calls it ``what``."""
    number = _real(value)
    if not 0.0 <= number <= 1.0:
        raise SparsityError(f"{what}: expected a sparsity in [0, 1] (a fraction, not a percentage), got {value!r}")
    return number


def check_whole(what: str, value: object, least: int) -> int:
    """Return ``value``, a whole number of at least ``least``, as an int; a ScheduleError calls it ``what``."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        raise ScheduleError(f"{what}: expected a whole number >= {least}, got {value!r}; count in optimizer steps")
    return int(value)
