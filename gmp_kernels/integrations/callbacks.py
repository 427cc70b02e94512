"""Base of the callbacks for all trainers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from gmp_kernels.errors import StateError, warn
from gmp_kernels.model.wrappers import optimizer_chain
from gmp_kernels.run import Run
from gmp_kernels.scheduler import GMPScheduler
from gmp_kernels.schedules import Ramp, check_whole
from gmp_kernels.stages import Stages

__all__ = ["PruningCallback"]


class PruningCallback:
    """Prunes the model that a trainer trains, gradually over the run whose length the trainer knows.

    Parameters
    ----------
    final_sparsity : float
        Sparsity at the end of the pruning stage, in [0, 1].
    initial_sparsity : float
        Sparsity at its first update.
    stabilization, pruning : float
        Lengths of the first two stages as fractions of the run. The rest fine-tunes.
    frequency : int, optional
        Optimizer steps from one update to the next. Default: a hundredth of the pruning stage, at least one step.
    remove_weight_decay : bool
        Whether weight decay ends where fine-tuning begins.
    **arguments
        Of ``GMPScheduler``, such as ``targets``, ``ignore``, ``overrides`` or ``scope``.

    Raises
    ------
    SparsityError, ScheduleError
        Arguments that describe no schedule.
    TypeError
        An argument that ``GMPScheduler`` does not have.

    Warns
    -----
    GMPWarning
        Training ended before the last update was made.
    """

    def __init__(
        self,
        final_sparsity: float = 0.9,
        *,
        initial_sparsity: float = 0.05,
        stabilization: float = 1 / 60,
        pruning: float = 34 / 60,
        frequency: int | None = None,
        remove_weight_decay: bool = True,
        **arguments: Any,
    ) -> None:
        inspect.signature(GMPScheduler).bind(None, None, None, **arguments)
        if frequency is not None:
            check_whole("GMPCallback: frequency", frequency, 1)
        self._fractions = {"stabilization": stabilization, "pruning": pruning}
        self._sparsities = initial_sparsity, final_sparsity
        self._frequency = frequency
        self._options: dict[str, Any] = {"remove_weight_decay": remove_weight_decay, **arguments}
        self._run: Run | None = None
        self._total_steps = 0
        self._decays: list[dict[str, Any]] = []  # weight decay of the param groups when the run began
        self._plan(10_000)  # raises what is wrong with the arguments whatever the length of the run is

    @property
    def run(self) -> Run:
        """The run that drives the pruning; its ``pruner`` is the ``GMPScheduler``. A StateError before training."""
        if self._run is None:
            raise StateError("GMPCallback.run: expected a run, got none, as training has not begun; train first")
        return self._run

    def _plan(self, total_steps: int) -> tuple[Stages, Ramp]:
        stages = Stages.from_steps(total_steps, **self._fractions)
        return stages, stages.schedule(*self._sparsities, frequency=self._frequency)

    def _begin(self, model: nn.Module, optimizer: Any, total_steps: int, state: Mapping[str, Any] | None) -> None:
        """Attach to a model that starts to train, or goes on where ``state`` was taken.

        A run that goes on keeps the schedule it began with, whatever its length is now. A new run of a model that this
        callback has pruned before keeps what is pruned, and begins with the weight decay of the run before.
        """
        if state is not None:
            if not isinstance(state, Mapping) or not {"total_steps", "run"} <= state.keys():
                found = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
                raise StateError(
                    f"GMPCallback: expected what this callback has saved in the checkpoint, got {found}; resume from "
                    "another checkpoint"
                )
            total_steps = state["total_steps"]
        inner = optimizer_chain(optimizer)[-1]
        if state is None and self._run is not None and inner is optimizer_chain(self._run.pruner.optimizer)[-1]:
            for group, decay in zip(inner.param_groups, self._decays, strict=False):
                group.update(decay)  # the earlier run may have ended it
        self._decays = [{key: group[key] for key in group.keys() & {"weight_decay"}} for group in inner.param_groups]
        stages, schedule = self._plan(total_steps)
        options = dict(self._options)
        if state is None and self._run is not None and _are_same(self._run.pruner.model, model):
            options["start"] = self._run.pruner.masks
        run = stages.attach(model, optimizer, schedule, lr_scheduler=None, **options)
        if state is not None:
            run.load_state_dict(state["run"])
            if state["run"]["pruners"][0]["num_uncounted"]:
                run.step()  # as was about to happen when another callback saved the checkpoint
        self._run, self._total_steps = run, total_steps

    def _state(self) -> dict[str, Any]:
        """Return the ``state`` of a later ``_begin``."""
        return {"total_steps": self._total_steps, "run": self.run.state_dict()}

    def _figures(self, *, of_layers: bool = True) -> dict[str, float]:
        """Return what is logged after an update."""
        layers = self.run.pruner.layer_sparsities() if of_layers else {}
        return {"sparsity/global": self.run.sparsity, **{f"sparsity/{name}": found for name, found in layers.items()}}

    def _end(self) -> None:
        """Warn if the run has ended before its schedule."""
        if not self.run.finished:
            schedule = self.run.pruner.schedule
            warn(
                f"GMPCallback: training ended after {self.run.step_count} optimizer steps, before the last update at "
                f"step {schedule.end_step}, and so at sparsity {self.run.sparsity:.4f} instead of "
                f"{schedule.final_sparsity}. To go on, resume from the last checkpoint. For a run that ends early, "
                f"shorten stabilization= and pruning=: they are fractions of the {self._total_steps} steps that the "
                "trainer announced"
            )


def _are_same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models are one, perhaps wrapped."""
    return next(one.parameters()) is next(other.parameters())
