"""The three stages of a gradual pruning run, as one object.

Stabilization trains at the pruning learning rate, pruning raises the sparsity while the learning rate stays, and
fine-tuning holds the sparsity, lowers the learning rate and drops the weight decay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal, Self, TypeAlias

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, SequentialLR

from gmp_kernels.errors import ScheduleError
from gmp_kernels.model.wrappers import optimizer_chain
from gmp_kernels.run import Run, check_lr_scheduler
from gmp_kernels.scheduler import GMPScheduler
from gmp_kernels.schedules import Cubic, Ramp, Schedule, check_sparsity, check_whole, to_steps

__all__ = ["Stages"]

Finetuning: TypeAlias = Sequence[float] | Literal["cosine", "linear"] | Callable[[Optimizer], LRScheduler] | None

INITIAL_SPARSITY = 0.05

# Default milestones at which fine-tuning lowers the learning rate, as fractions of the stage.
CUTS = (0.3, 0.65)

# Default number of updates where a run is known by its steps alone.
UPDATES = 100

# Part of the way from the full learning rate to the lowest, by the part of the pruning stage or cycle that is over.
PRUNING_SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda part: 0.0,
    "cosine": lambda part: 0.5 * (1.0 - math.cos(math.pi * part)),
    "cyclic": lambda part: 1.0 - abs(2.0 * part - 1.0),
    "rewind": lambda part: part,
}


@dataclass(frozen=True)
class Stages:
    """Lengths of the stages, in epochs. Every method works in optimizer steps, as schedules do.

    Parameters
    ----------
    stabilization : float
        Epochs before the first update, >= 0. One or two let the optimizer settle at the pruning learning rate.
    pruning : float
        Epochs from the first update to the last, >= 0. A third to a half of the run, or more.
    finetuning : float
        Epochs at the final sparsity, >= 0. At least a quarter of the run.
    steps_per_epoch : int
        Optimizer steps per epoch: ``len(loader)``, divided by the gradient accumulation.

    Raises
    ------
    ScheduleError
        A length is negative or not finite, or the run has no step.

    Examples
    --------
    >>> stages = Stages(1, 34, 25, steps_per_epoch=len(loader))
    >>> run = stages.attach(model, optimizer, 0.9)
    >>> for step in range(stages.total_steps):
    ...     train_step()  # forward, backward, optimizer.step()
    ...     run.step()
    """

    stabilization: float = 1
    pruning: float = 34
    finetuning: float = 25
    steps_per_epoch: int = field(kw_only=True)

    def __post_init__(self) -> None:
        for name in ("stabilization", "pruning", "finetuning"):
            to_steps(f"Stages: {name}", getattr(self, name), self.steps_per_epoch)
        if self.total_steps == 0:
            raise ScheduleError(
                f"Stages: expected at least one step, got {self.epochs} epochs of {self.steps_per_epoch} steps; "
                "lengthen a stage"
            )

    @classmethod
    def from_total(cls, epochs: float, *, steps_per_epoch: int) -> Self:
        """Divide a run of ``epochs``: one to stabilize, half to prune, the rest to fine-tune.

        A run of less than four epochs stabilizes for a quarter of it, so that fine-tuning always keeps a quarter.

        Raises
        ------
        ScheduleError
            As the constructor.
        """
        to_steps("Stages.from_total: epochs", epochs, steps_per_epoch)
        stabilization = min(1, epochs / 4)
        pruning = epochs / 2
        return cls(stabilization, pruning, epochs - stabilization - pruning, steps_per_epoch=steps_per_epoch)

    @classmethod
    def from_steps(cls, total_steps: int, *, stabilization: float = 1 / 60, pruning: float = 34 / 60) -> Self:
        """Divide a run that is known by its optimizer steps. An epoch of it is one step.

        Parameters
        ----------
        total_steps : int
            Optimizer steps of the whole run, >= 1.
        stabilization, pruning : float
            Fractions of the run, >= 0 and together at most 1. Fine-tuning gets the rest.

        Raises
        ------
        ScheduleError
            ``total_steps`` is not a whole number >= 1, or the fractions describe no stages.
        """
        total_steps = check_whole("Stages.from_steps: total_steps", total_steps, 1)
        if not (stabilization >= 0 and pruning >= 0 and stabilization + pruning <= 1 + 1e-9):
            raise ScheduleError(
                "Stages.from_steps: expected stabilization and pruning as fractions of the run that add up to at most "
                f"1, got {stabilization!r} and {pruning!r}; for 2 of 30 epochs pass 2/30"
            )
        begin = round(stabilization * total_steps)
        end = min(round((stabilization + pruning) * total_steps), total_steps)
        return cls(begin, end - begin, total_steps - end, steps_per_epoch=1)

    @property
    def epochs(self) -> float:
        """Length of the run, in epochs."""
        return self.stabilization + self.pruning + self.finetuning

    @cached_property
    def total_steps(self) -> int:
        """Length of the run, in optimizer steps."""
        return self._step(self.epochs)

    @cached_property
    def pruning_begin_step(self) -> int:
        """Step of the first update."""
        return self._step(self.stabilization)

    @cached_property
    def pruning_end_step(self) -> int:
        """Step of the last update; fine-tuning begins with it."""
        return self._step(self.stabilization + self.pruning)

    @property
    def weight_decay_end_step(self) -> int:
        """First step without weight decay: where fine-tuning begins."""
        return self.pruning_end_step

    def stage_at(self, step: int) -> str:
        """Return "stabilization", "pruning" or "fine-tuning"."""
        if step >= self.pruning_end_step:
            return "fine-tuning"
        return "pruning" if step >= self.pruning_begin_step else "stabilization"

    def schedule(
        self,
        initial_sparsity: float = INITIAL_SPARSITY,
        final_sparsity: float = 0.9,
        *,
        kind: type[Ramp] = Cubic,
        frequency: float | None = None,
    ) -> Ramp:
        """Return the sparsity schedule that fills the pruning stage, with its last update within the run.

        Parameters
        ----------
        initial_sparsity : float
            At the first update, in [0, 1].
        final_sparsity : float
            At the last update, in [0, 1] and not below the initial one.
        kind : type of Ramp
            The curve, a class of ``gmp_kernels.schedules``.
        frequency : float, optional
            Epochs from one update to the next; at least one step. Default: one. Where an epoch is one step, as in
            ``from_steps``: a hundredth of the pruning stage.

        Raises
        ------
        SparsityError, ScheduleError
            As the schedule's constructor.
        """
        if frequency is None:
            frequency = 1 if self.steps_per_epoch > 1 else self.pruning // UPDATES
        # Without fine-tuning, the step after the last would never be taken.
        last = self.total_steps - 1
        return kind(
            initial_sparsity,
            final_sparsity,
            min(self.pruning_begin_step, last),
            min(self.pruning_end_step, last),
            frequency=max(1, to_steps("Stages.schedule: frequency", frequency, self.steps_per_epoch)),
        )

    def lr_scheduler(
        self,
        optimizer: Optimizer,
        finetuning: Finetuning = None,
        *,
        gamma: float = 0.1,
        pruning: Literal["constant", "cosine", "cyclic", "rewind"] = "constant",
        cycles: int = 6,
        low: float = 0.1,
    ) -> LRScheduler:
        """Return a torch lr_scheduler, to be stepped after every optimizer step. A ``Run`` does that.

        The learning rate stays as the optimizer has it through stabilization, and then follows ``pruning`` and
        ``finetuning``. Except for a function in ``finetuning``, it is computed from the number of steps alone.

        Parameters
        ----------
        optimizer : torch.optim.Optimizer
        finetuning : sequence of float, "linear", "cosine", callable, optional
            Epochs, counted from the start of the run, after which the learning rate is multiplied by ``gamma``;
            or "linear" or "cosine", down to 0 at the end of the run; or a function of the optimizer that returns any
            torch lr_scheduler, which then counts its steps from the start of fine-tuning and starts at the full
            learning rate (not OneCycleLR, which overwrites the learning rate of the stages before).
            Default: two milestones, 30% and 65% into the stage.
        gamma : float
            Factor of the milestones.
        pruning : {"constant", "cosine", "cyclic", "rewind"}
            "constant" keeps the learning rate. "cosine" lowers it to ``low`` over the pruning stage, and fine-tuning
            begins there. "cyclic" lowers and raises it linearly, "rewind" lowers it linearly and then sets it back at
            once, ``cycles`` times in the stage each; fine-tuning begins at the full learning rate.
        cycles : int
            Cycles of "cyclic" and "rewind" in the pruning stage, >= 1.
        low : float
            Lowest learning rate of the pruning stage, as a fraction of the full one, in [0, 1].

        Raises
        ------
        ScheduleError
            A milestone is outside of fine-tuning, or an argument is none of the above.

        References
        ----------
        E. Kurtic and D. Alistarh, "GMP*: Well-Tuned Gradual Magnitude Pruning Can Outperform Most BERT-Pruning
        Methods", 2022, arXiv:2210.06384, which rewinds the learning rate.
        """
        if pruning not in PRUNING_SHAPES:
            raise ScheduleError(f"lr_scheduler: expected pruning to be one of {(*PRUNING_SHAPES,)}, got {pruning!r}")
        cycles = check_whole("lr_scheduler: cycles", cycles, 1)
        if not 0.0 <= low <= 1.0:
            raise ScheduleError(f"lr_scheduler: expected low to be a fraction in [0, 1], got {low!r}")
        before = partial(self._pruning_factor, pruning, 1 if pruning == "cosine" else cycles, low)
        is_known = finetuning is None or callable(finetuning) or isinstance(finetuning, Sequence)
        if not is_known or (isinstance(finetuning, str) and finetuning not in ("linear", "cosine")):
            raise ScheduleError(
                f"lr_scheduler: expected epochs, 'linear', 'cosine' or a function, got {finetuning!r}; pass e.g. "
                "[43, 50]"
            )
        if not (isinstance(gamma, (int, float)) and 0.0 <= gamma < math.inf):
            raise ScheduleError(f"lr_scheduler: expected gamma to be a number >= 0, got {gamma!r}; pass e.g. 0.1")
        if isinstance(finetuning, str):
            after = partial(self._decay_factor, finetuning)
        elif not callable(finetuning):
            after = partial(_steps_down, self._milestones(finetuning), gamma)
        for group in optimizer.param_groups:
            # Otherwise torch would go back to the learning rate that an earlier lr_scheduler has left here.
            group.pop("initial_lr", None)
        if callable(finetuning):
            return SequentialLR(
                optimizer, [LambdaLR(optimizer, before), finetuning(optimizer)], [self.pruning_end_step]
            )
        return LambdaLR(optimizer, partial(self._factor, before, after))

    def end_weight_decay(self, optimizer: Optimizer, step: int, *, groups: Collection[int] | None = None) -> None:
        """Set ``weight_decay`` to 0 once fine-tuning has begun; before that, do nothing.

        Call it before each optimizer step, or leave it to a ``Run``. ``step`` is the number of optimizer steps done,
        so that nothing has to be saved for a run that resumes. ``groups`` are the indices of the param groups that
        lose their weight decay; None means all.

        Raises
        ------
        ScheduleError
            The optimizer has no such param group.
        """
        indices = set(range(len(optimizer.param_groups)))
        if groups is not None and not (isinstance(groups, Collection) and indices.issuperset(groups)):
            raise ScheduleError(
                f"end_weight_decay: expected indices of the {len(indices)} param groups of the optimizer, got "
                f"{groups!r}; pass e.g. [0]"
            )
        if step < self.weight_decay_end_step:
            return
        for index, group in enumerate(optimizer.param_groups):
            if "weight_decay" in group and (groups is None or index in groups):
                group["weight_decay"] = 0.0

    def attach(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        schedule: Schedule | float = 0.9,
        *,
        lr_scheduler: LRScheduler | Literal["stages"] | None = "stages",
        remove_weight_decay: bool | Collection[int] = True,
        **arguments: Any,
    ) -> Run:
        """Return what drives the run: one call of its ``step()`` after every ``optimizer.step()``.

        Parameters
        ----------
        model : torch.nn.Module
        optimizer : torch.optim.Optimizer
            As in ``GMPScheduler``.
        schedule : Schedule or float
            A schedule, such as one of ``schedule()``, or only the final sparsity: then it is ``schedule()`` from 5%,
            or from the final sparsity if that is lower.
        lr_scheduler : torch lr_scheduler, "stages" or None
            "stages" means ``lr_scheduler(optimizer)``. Another torch lr_scheduler is stepped after every optimizer
            step. None leaves the learning rate alone.
        remove_weight_decay : bool or collection of int
            Whether weight decay ends where fine-tuning begins, or the indices of the param groups where it does.
        **arguments
            Of ``GMPScheduler``.

        Raises
        ------
        GMPError
            As ``schedule()``, ``GMPScheduler`` and ``end_weight_decay()``. Nothing has been changed.
        """
        if misplaced := arguments.keys() & {"initial_sparsity", "final_sparsity", "kind", "frequency"}:
            raise TypeError(
                f"Stages.attach: expected arguments of GMPScheduler, got {min(misplaced)!r}, which belongs to the "
                "schedule; pass a schedule, such as stages.schedule(0.05, 0.9, frequency=0.5)"
            )
        if not isinstance(schedule, Schedule):
            initial = min(INITIAL_SPARSITY, check_sparsity("Stages.attach: schedule", schedule))
            schedule = self.schedule(initial, schedule)
        if lr_scheduler != "stages":
            check_lr_scheduler("Stages.attach", lr_scheduler, [optimizer])
        inner = optimizer_chain(optimizer)[-1]
        set_options = None
        if remove_weight_decay is not False:
            groups = None if remove_weight_decay is True else remove_weight_decay
            set_options = partial(self.end_weight_decay, inner, groups=groups)
            set_options(-1)  # checks the indices before anything is changed
        pruner = GMPScheduler(model, optimizer, schedule, **arguments)
        if lr_scheduler == "stages":
            lr_scheduler = self.lr_scheduler(inner)
        return Run([pruner], lr_scheduler=lr_scheduler, set_options=set_options)

    def _step(self, epoch: float) -> int:
        return to_steps("Stages", epoch, self.steps_per_epoch)

    def _milestones(self, epochs: Sequence[float] | None) -> list[int]:
        """Return the steps after which fine-tuning lowers the learning rate."""
        begin = self.stabilization + self.pruning
        milestones = [begin + cut * self.finetuning for cut in CUTS] if epochs is None else list(epochs)
        steps = [to_steps("lr_scheduler: milestone", epoch, self.steps_per_epoch) for epoch in milestones]
        for epoch, step in zip(milestones, steps, strict=True):
            if not self.pruning_end_step <= step <= self.total_steps:
                raise ScheduleError(
                    f"lr_scheduler: expected milestones within fine-tuning, epochs {begin} to {self.epochs}, "
                    f"got {epoch}; count from the start of the run"
                )
        return steps

    def _pruning_factor(self, shape: str, cycles: int, low: float, step: int) -> float:
        """Return the factor of the learning rate at a step that is not after the pruning stage."""
        begin, end = self.pruning_begin_step, self.pruning_end_step
        if step < begin or begin == end:
            return 1.0
        # Whole numbers, because fractions of cycles would round to the wrong side of a rewind.
        cycle, rest = divmod((step - begin) * cycles, end - begin)
        part = 1.0 if shape == "cosine" and cycle else rest / (end - begin)
        return 1.0 - (1.0 - low) * PRUNING_SHAPES[shape](part)

    def _decay_factor(self, shape: str, step: int) -> float:
        """Return the factor of a decay to 0 over fine-tuning."""
        begin, end = self.pruning_end_step, self.total_steps
        part = min(1.0, (step - begin) / max(1, end - begin))
        return 1.0 - part if shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * part))

    def _factor(self, before: Callable[[int], float], after: Callable[[int], float], step: int) -> float:
        """Return the factor of the learning rate; fine-tuning multiplies that which the pruning stage ends with."""
        end = self.pruning_end_step
        return before(step) if step < end else before(end) * after(step)


def _steps_down(milestones: Sequence[int], gamma: float, step: int) -> float:
    """Return the factor that is left after the milestones passed so far."""
    return math.pow(gamma, sum(step >= milestone for milestone in milestones))
