"""One object that drives a pruning run: sparsity, learning rate and weight decay, by one call per step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import ChainedScheduler, LRScheduler, ReduceLROnPlateau

from gmp_kernels.errors import StateError, warn
from gmp_kernels.model.wrappers import optimizer_chain
from gmp_kernels.pruner.state import gathered
from gmp_kernels.reports import StepReport
from gmp_kernels.scheduler import GMPScheduler

__all__ = ["Run", "check_lr_scheduler"]


class Run:
    """Steps the pruners of a run and, with them, its learning rate and other options of the optimizer.

    ``Stages.attach`` and ``Recipe.attach`` return one. Call ``step()`` after every ``optimizer.step()``. All that it
    sets follows from the number of optimizer steps that the pruners have counted, so a step that a GradScaler skipped
    changes neither sparsity nor learning rate.

    Parameters
    ----------
    pruners : sequence of GMPScheduler
        At least one; all follow the same optimizer, or optimizers that step together.
    lr_scheduler : torch lr_scheduler, optional
        Stepped once per optimizer step, from where it is now.
    set_options : callable, optional
        Called with the number of optimizer steps done: now, and whenever the number has changed.

    Attributes
    ----------
    pruners : tuple of GMPScheduler
    lr_scheduler : torch lr_scheduler or None

    Raises
    ------
    TypeError
        ``lr_scheduler`` is not one that can be stepped without arguments, or ``pruners`` are no pruners.
    ValueError
        There are no pruners, one is there twice, or ``lr_scheduler`` is of an optimizer that none of them follows.
    """

    def __init__(
        self,
        pruners: Sequence[GMPScheduler],
        *,
        lr_scheduler: LRScheduler | None = None,
        set_options: Callable[[int], None] | None = None,
    ) -> None:
        self.pruners = _checked_pruners(pruners)
        check_lr_scheduler("Run", lr_scheduler, [pruner.optimizer for pruner in self.pruners])
        self.lr_scheduler = lr_scheduler
        self._set_options = set_options
        self._options_at = -1
        self._stepped_to = 0  # where the lr_scheduler was left
        self._ahead = 0  # steps that it had taken before the run began
        self._has_warned = False
        self._join()
        self._follow()

    @property
    def pruner(self) -> GMPScheduler:
        """The pruner of a run that has one; a StateError if there are more."""
        if len(self.pruners) > 1:
            raise StateError(f"Run.pruner: expected one pruner, got {len(self.pruners)}; use run.pruners")
        return self.pruners[0]

    @property
    def step_count(self) -> int:
        """Optimizer steps counted so far."""
        return self.pruners[0].step_count

    @property
    def finished(self) -> bool:
        """Whether every pruner has made its last update."""
        return all(pruner.finished for pruner in self.pruners)

    @property
    def sparsity(self) -> float:
        """Fraction of pruned weights over the targets of all pruners."""
        sizes = [sum(pruner._num_weights.values()) for pruner in self.pruners]
        num_pruned = sum(round(n * pruner.sparsity) for n, pruner in zip(sizes, self.pruners, strict=True))
        return 1.0 - (sum(sizes) - num_pruned) / sum(sizes)

    def step(self) -> tuple[StepReport, ...]:
        """Prune if an update is due, and set the learning rate and the other options of the next optimizer step.

        Returns
        -------
        tuple of StepReport
            The updates that were due, at most one per pruner. Usually empty.

        Raises
        ------
        GMPError
            As ``GMPScheduler.step()``. Pruners before the one that raised have made their updates; the learning rate
            has not changed. Repair the weights and call it again.
        """
        reports = tuple(report for pruner in self.pruners if (report := pruner.step()) is not None)
        self._follow()
        return reports

    def state_dict(self) -> dict[str, Any]:
        """Return what a bit-exact resume needs besides the model's and the optimizer's own state.

        Plain data and tensors, as in ``GMPScheduler.state_dict()``; ``torch.load(..., weights_only=True)`` reads it.
        Of sharded parameters it holds the whole masks (1 bit per weight on every rank), so that one rank can save them
        in a file for any number of ranks; every rank has to make the call.
        """
        return {
            "pruners": [gathered(pruner.state_dict()) for pruner in self.pruners],
            "lr_scheduler": None if self.lr_scheduler is None else self.lr_scheduler.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], masks_only: bool = False) -> None:
        """Continue where ``state_dict()`` was taken. Model, optimizer and run may be loaded in any order.

        Parameters
        ----------
        state_dict : mapping
        masks_only : bool
            Load the masks only, and keep schedules, step count and learning rate of this run: for one of another
            length.

        Raises
        ------
        StateError
            The state is that of another run. Nothing has been changed.
        """
        states = self._states_in(state_dict)
        rates = None if masks_only else self._rates_in(state_dict)
        loads = [pruner._begin_load(state, masks_only) for pruner, state in zip(self.pruners, states, strict=True)]
        for load in loads:
            load()
        if self.lr_scheduler is not None and rates is not None:
            self.lr_scheduler.load_state_dict(rates)
            groups = self.lr_scheduler.optimizer.param_groups
            for group, rate in zip(groups, self.lr_scheduler.get_last_lr(), strict=True):
                _set_rate(group, rate)
            self._join()
        self._options_at = -1
        self._follow()

    def _states_in(self, state_dict: Mapping[str, Any]) -> Sequence[Any]:
        """Return the states of the pruners, as many as there are here."""
        states = state_dict.get("pruners") if isinstance(state_dict, Mapping) else None
        if not isinstance(states, (list, tuple)):
            found = sorted(map(str, state_dict)) if isinstance(state_dict, Mapping) else type(state_dict).__name__
            raise StateError(
                f"Run.load_state_dict: expected what Run.state_dict() returned, got {found}; pass the run's own part "
                "of the checkpoint (a pruner's own state goes to run.pruner.load_state_dict)"
            )
        if len(states) != len(self.pruners):
            raise StateError(
                f"Run.load_state_dict: expected the state of a run with as many pruners as this one, "
                f"{len(self.pruners)}, got {len(states)}; build the run as the one that was saved"
            )
        return states

    def _rates_in(self, state_dict: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the state of the lr_scheduler, for the param groups here."""
        rates = state_dict.get("lr_scheduler")
        if (rates is None) != (self.lr_scheduler is None):
            has, got = ("no ", "one") if self.lr_scheduler is None else ("an ", "none")
            raise StateError(
                f"Run.load_state_dict: expected {has}lr_scheduler in the state, as in this run, got {got}; build the "
                "run with the same lr_scheduler="
            )
        if self.lr_scheduler is not None and rates is not None:
            expected = len(self.lr_scheduler.optimizer.param_groups)
            last = rates.get("_last_lr") if isinstance(rates, Mapping) else None
            num_rates = len(last) if isinstance(last, list) else None
            if num_rates != expected:
                raise StateError(
                    f"Run.load_state_dict: expected learning rates of {expected} param groups in the state, got "
                    f"{num_rates}; build the optimizer with the param groups of the run that was saved"
                )
            if _public_names(rates) != _public_names(self.lr_scheduler.state_dict()):
                raise StateError(
                    f"Run.load_state_dict: expected the state of a {type(self.lr_scheduler).__name__}, got that of "
                    "another lr_scheduler; build the run with the one that was saved"
                )
        return None if rates is None else dict(rates)

    def _join(self) -> None:
        """Take the lr_scheduler as it is now. One that is behind the pruners is to catch up with them."""
        if self.lr_scheduler is not None:
            self._stepped_to = _steps_of(self.lr_scheduler)
            self._ahead = max(0, self._stepped_to - self.pruners[0]._num_steps_seen)

    def _follow(self) -> None:
        """Set what follows from the number of steps done."""
        # Without the steps that a GPU may have skipped: to know them takes waiting for it.
        step = self.pruners[0]._num_steps_seen
        if self.lr_scheduler is not None:
            found = _steps_of(self.lr_scheduler)
            if not self._has_warned and found > self._stepped_to:
                self._has_warned = True
                warn(
                    f"Run: expected an lr_scheduler that nothing else steps, got one that is at step {found} instead "
                    f"of {self._stepped_to}; leave its step() to run.step()"
                )
            for _ in range(found, step + self._ahead):
                self.lr_scheduler.step()
            self._stepped_to = _steps_of(self.lr_scheduler)
        if self._set_options is not None and step != self._options_at:
            self._set_options(step)
        self._options_at = step

    def __repr__(self) -> str:
        """Return the pruners and the learning rate."""
        rates = [] if self.lr_scheduler is None else self.lr_scheduler.get_last_lr()
        shown = ", ".join(f"{float(rate):g}" for rate in rates) or "left alone"
        return "\n".join([f"Run, learning rates {shown}", *map(repr, self.pruners)])


def _checked_pruners(pruners: Sequence[GMPScheduler]) -> tuple[GMPScheduler, ...]:
    """Return the pruners, or refuse what is none."""
    found = tuple(pruners) if isinstance(pruners, Iterable) else (pruners,)
    others = [type(one).__name__ for one in found if not isinstance(one, GMPScheduler)]
    if others or not isinstance(pruners, Iterable):
        raise TypeError(
            f"Run: expected a sequence of GMPScheduler, got {others[0] if others else 'one alone'}; pass "
            "[GMPScheduler(...)]"
        )
    if not found:
        raise ValueError("Run: expected at least one pruner, got none; pass [GMPScheduler(...)]")
    if len(set(map(id, found))) < len(found):
        raise ValueError("Run: expected different pruners, got one twice; pass each once")
    return found


def check_lr_scheduler(what: str, lr_scheduler: object, optimizers: Iterable[Any]) -> None:
    """Refuse what ``Run`` cannot step, and the lr_scheduler of an optimizer that is none of these."""
    if lr_scheduler is None:
        return
    if not isinstance(lr_scheduler, LRScheduler) or isinstance(lr_scheduler, ReduceLROnPlateau):
        raise TypeError(
            f"{what}: expected a torch lr_scheduler that is stepped without arguments, got a "
            f"{type(lr_scheduler).__name__}; pass lr_scheduler=None and set the learning rate yourself"
        )
    if not any(one is lr_scheduler.optimizer for optimizer in optimizers for one in optimizer_chain(optimizer)):
        raise ValueError(
            f"{what}: expected an lr_scheduler of the optimizer that is followed, got one of another "
            f"{type(lr_scheduler.optimizer).__name__}; build it for this optimizer"
        )


def _public_names(state: Mapping[str, Any]) -> list[set[str]]:
    """Return what tells the state of one kind of lr_scheduler from another's, and of those in it."""
    names = {name for name in state if not name.startswith("_")}
    return [names, *(inner for part in state.get("_schedulers", ()) for inner in _public_names(part))]


def _steps_of(lr_scheduler: LRScheduler) -> int:
    """Return the steps that an lr_scheduler has taken."""
    while isinstance(lr_scheduler, ChainedScheduler):  # which has no count of its own
        lr_scheduler = lr_scheduler._schedulers[0]
    return lr_scheduler.last_epoch


def _set_rate(group: dict[str, Any], rate: Any) -> None:
    """Set a learning rate; one that is a tensor is written in place, as torch does for captured graphs."""
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = float(rate)
