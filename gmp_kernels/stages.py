"""The three stages of a gradual pruning run, as one object.

Stabilization trains at the pruning learning rate, pruning raises the sparsity while the learning rate stays, and
fine-tuning holds the sparsity, lowers the learning rate and drops the weight decay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Self, TypeAlias

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler, MultiStepLR, SequentialLR

from gmp_kernels.errors import ScheduleError
from gmp_kernels.schedules import Cubic, Ramp, to_steps

__all__ = ["Stages"]

Finetuning: TypeAlias = Sequence[float] | Literal["cosine"] | Callable[[Optimizer], LRScheduler] | None

# Default milestones at which fine-tuning lowers the learning rate, as fractions of the stage.
CUTS = (0.3, 0.65)


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
    >>> lr_scheduler = stages.lr_scheduler(optimizer)
    >>> pruner = GMPScheduler(model, optimizer, stages.schedule(final_sparsity=0.9))
    >>> for step in range(stages.total_steps):
    ...     stages.end_weight_decay(optimizer, step)
    ...     train_step()  # forward, backward, optimizer.step()
    ...     pruner.step()
    ...     lr_scheduler.step()
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

    @property
    def epochs(self) -> float:
        """Length of the run, in epochs."""
        return self.stabilization + self.pruning + self.finetuning

    @property
    def total_steps(self) -> int:
        """Length of the run, in optimizer steps."""
        return self._step(self.epochs)

    @property
    def pruning_begin_step(self) -> int:
        """Step of the first update."""
        return self._step(self.stabilization)

    @property
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
        initial_sparsity: float = 0.05,
        final_sparsity: float = 0.9,
        *,
        kind: type[Ramp] = Cubic,
        frequency: float = 1,
    ) -> Ramp:
        """Return the sparsity schedule that fills the pruning stage.

        Parameters
        ----------
        initial_sparsity : float
            At the first update, in [0, 1].
        final_sparsity : float
            At the last update, in [0, 1] and not below the initial one.
        kind : type of Ramp
            The curve, a class of ``gmp_kernels.schedules``.
        frequency : float
            Epochs from one update to the next; at least one step.

        Raises
        ------
        SparsityError, ScheduleError
            As the schedule's constructor.
        """
        return kind.from_epochs(
            initial_sparsity,
            final_sparsity,
            begin=self.stabilization,
            end=self.stabilization + self.pruning,
            frequency=frequency,
            steps_per_epoch=self.steps_per_epoch,
        )

    def lr_scheduler(self, optimizer: Optimizer, finetuning: Finetuning = None, *, gamma: float = 0.1) -> LRScheduler:
        """Return a torch lr_scheduler, to be stepped after every optimizer step.

        The learning rate stays as the optimizer has it through stabilization and pruning, and then follows
        ``finetuning``.

        Parameters
        ----------
        optimizer : torch.optim.Optimizer
        finetuning : sequence of float, "cosine", callable, optional
            Epochs, counted from the start of the run, after which the learning rate is multiplied by ``gamma``;
            or "cosine", down to 0 at the end of the run; or a function of the optimizer that returns any torch
            lr_scheduler, which then counts its steps from the start of fine-tuning (not OneCycleLR, which overwrites
            the learning rate of the stages before). Default: two milestones, 30% and 65% into the stage.
        gamma : float
            Factor of the milestones.

        Raises
        ------
        ScheduleError
            A milestone is outside of fine-tuning, or ``finetuning`` is none of the above.
        """
        if finetuning == "cosine" or callable(finetuning):
            steps = max(1, self.total_steps - self.pruning_end_step)
            then = finetuning(optimizer) if callable(finetuning) else CosineAnnealingLR(optimizer, T_max=steps)
            hold = ConstantLR(optimizer, factor=1.0, total_iters=self.pruning_end_step)
            return SequentialLR(optimizer, [hold, then], [self.pruning_end_step])
        if isinstance(finetuning, str):
            raise ScheduleError(
                f"lr_scheduler: expected epochs, 'cosine' or a function, got {finetuning!r}; pass e.g. [43, 50]"
            )
        begin = self.stabilization + self.pruning
        milestones = [begin + cut * self.finetuning for cut in CUTS] if finetuning is None else list(finetuning)
        steps_of = [to_steps("lr_scheduler: milestone", epoch, self.steps_per_epoch) for epoch in milestones]
        for epoch, step in zip(milestones, steps_of, strict=True):
            if not self.pruning_end_step <= step <= self.total_steps:
                raise ScheduleError(
                    f"lr_scheduler: expected milestones within fine-tuning, epochs {begin} to {self.epochs}, "
                    f"got {epoch}; count from the start of the run"
                )
        return MultiStepLR(optimizer, steps_of, gamma)

    def end_weight_decay(self, optimizer: Optimizer, step: int) -> None:
        """Set ``weight_decay`` of every param group to 0 once fine-tuning has begun; before that, do nothing.

        Call it before each optimizer step. ``step`` is the number of optimizer steps done, so that nothing has to be
        saved for a run that resumes.
        """
        if step >= self.weight_decay_end_step:
            for group in optimizer.param_groups:
                if "weight_decay" in group:
                    group["weight_decay"] = 0.0

    def _step(self, epoch: float) -> int:
        return to_steps("Stages", epoch, self.steps_per_epoch)
