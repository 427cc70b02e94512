"""The pruners of a recipe: one for each modifier that prunes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import nn

from gmp_kernels.distributed.placement import local, sum_over_shards
from gmp_kernels.errors import RecipeError, StateError, warn
from gmp_kernels.masks import BitMask
from gmp_kernels.model.coverage import shown_names
from gmp_kernels.ops import Scope
from gmp_kernels.pruner.interrupts import write_despite_interrupts
from gmp_kernels.pruner.layers import writable_mask
from gmp_kernels.recipes.modifiers import ConstantPruning, GradualPruning, Modifier, Pruning
from gmp_kernels.recipes.names import Names
from gmp_kernels.recipes.timing import EpochRamp, Hold, first_step
from gmp_kernels.reports import StepReport
from gmp_kernels.scheduler import GMPScheduler
from gmp_kernels.schedules import Constant, Schedule

__all__ = ["PrunerPlan", "plan_pruners", "schedule_of", "share_of_zeros"]


class LettingGo(GMPScheduler):
    """A pruner that lets its weights train again once its last update is made; ``leave_enabled: False`` asks for it.

    From then on its masks keep everything, so what it reports is a sparsity of 0. It still counts the steps.
    """

    def step(self) -> StepReport | None:
        report = super().step()
        held = self._held
        if self.finished and any(held.num_pruned.values()):
            held.check_masks(self.masks)
            masks = {name: BitMask.ones(mask.shape, mask.packed.device) for name, mask in self.masks.items()}

            def write() -> None:
                for name, mask in masks.items():
                    self.masks[name].packed = writable_mask(held, name).packed.copy_(mask.packed)
                held.masks_changed(dict.fromkeys(held.parameters, 0))
                held.apply(held.parameters)

            write_despite_interrupts(write, held.shards)
        return report

    def _begin_load(self, state_dict: Mapping[str, Any], masks_only: bool = False) -> Callable[[], None]:
        load = super()._begin_load(state_dict, masks_only)
        held = self._held
        optimizer = held.masked_optimizer
        if optimizer is not None and not any(layer["num_pruned"] for layer in state_dict["layers"].values()):
            for name, parameter in held.parameters.items():
                if held.num_pruned[name] and optimizer.state.get(parameter):
                    raise StateError(
                        "load_state_dict: expected to load a run that has let its weights go before its optimizer, got "
                        f"an optimizer that has state of '{name}' and drops it where the run holds zeros; build both "
                        "anew, load the run first and then the optimizer"
                    )
        return load


@dataclass(frozen=True)
class PrunerPlan:
    """Arguments of a pruner, found before anything is changed."""

    kind: type[GMPScheduler]
    schedules: Mapping[str, Schedule]
    scope: Scope
    start: Any

    def build(self, model: nn.Module, optimizer: torch.optim.Optimizer, arguments: Mapping[str, Any]) -> GMPScheduler:
        """Return the pruner."""
        first = next(iter(self.schedules.values()))
        return self.kind(
            model,
            optimizer,
            first,
            targets=list(self.schedules),
            overrides={name: schedule for name, schedule in self.schedules.items() if schedule != first},
            scope=self.scope,
            start=self.start,
            **arguments,
        )


def schedule_of(modifier: GradualPruning, initial: float, final: float, steps_per_epoch: int) -> Schedule:
    """Return the schedule of parameters that go from ``initial`` to ``final``."""
    if modifier.end == -1:
        # At the start of a ramp without an end, it stays.
        return Constant(initial, first_step(modifier.start, steps_per_epoch))
    return EpochRamp(initial, final, modifier.start, modifier.end, modifier.frequency, modifier.curve, steps_per_epoch)


def plan_pruners(
    modifiers: Iterable[Modifier], names: Names, steps_per_epoch: int, share_of_zeros: Callable[[str], float]
) -> list[PrunerPlan]:
    """Return what each pruner is built from; ``share_of_zeros`` tells the zeros that a parameter has.

    Raises
    ------
    RecipeError
        As ``Recipe.attach``.
    """
    reached: dict[Pruning, dict[str, float]] = {}
    for modifier in modifiers:
        if isinstance(modifier, Pruning):
            finals = reached[modifier] = {}
            for final, patterns in modifier.entries:
                for name in names.reached_by(modifier.name, patterns):
                    finals.setdefault(name, final)
    if not reached:
        raise RecipeError(
            "Recipe.attach: expected a recipe that prunes, got one without a GMPruningModifier, "
            "MagnitudePruningModifier, GlobalMagnitudePruningModifier or ConstantPruningModifier; add one"
        )
    _refuse_overlaps(reached)
    plans = []
    for modifier, finals in reached.items():
        if isinstance(modifier, GradualPruning):
            plans.append(_gradual_plan(modifier, finals, share_of_zeros, steps_per_epoch))
        elif finals:
            plans.append(_constant_plan(modifier, list(finals), steps_per_epoch))
    return plans


def _refuse_overlaps(reached: Mapping[Pruning, dict[str, float]]) -> None:
    """Leave to each pruning modifier the parameters that are its own, or raise if two want the same.

    A ConstantPruningModifier that begins when a gradual one has ended, which keeps its zeros, changes nothing.
    """
    for one, other in combinations(reached, 2):
        shared = [name for name in reached[one] if name in reached[other]]
        if not shared:
            continue
        gradual, constant = (other, one) if isinstance(one, ConstantPruning) else (one, other)
        changes_nothing = (
            isinstance(gradual, GradualPruning)
            and isinstance(constant, ConstantPruning)
            and gradual.leave_enabled
            and 0 <= gradual.end <= constant.start
        )
        if not changes_nothing:
            raise RecipeError(
                f"Recipe.attach: expected one pruning modifier per parameter, got {one.name} and {other.name} for "
                f"{shown_names(shared)}; write one ramp over both times, or name each parameter in one of them"
            )
        for name in shared:
            del reached[constant][name]


def _gradual_plan(
    modifier: GradualPruning,
    finals: Mapping[str, float],
    share_of_zeros: Callable[[str], float],
    steps_per_epoch: int,
) -> PrunerPlan:
    """Return the plan for parameters that end at the sparsities in ``finals``."""
    start: Any = {}  # zeros that the recipe does not ask for train
    if modifier.initial is not None:
        initials = dict.fromkeys(finals, modifier.initial)
    else:
        start = "zeros"
        initials = {name: share_of_zeros(name) for name in finals}
        above = [name for name, final in finals.items() if initials[name] > final]
        if above:
            warn(
                f"Recipe.attach: {modifier.name}: {shown_names(above)} have more zeros than final_sparsity asks "
                "for, and keep them; pruned weights never come back"
            )
    schedules = {
        name: schedule_of(modifier, initials[name], max(initials[name], final), steps_per_epoch)
        for name, final in finals.items()
    }
    lets_go = not modifier.leave_enabled and modifier.end != -1
    return PrunerPlan(
        LettingGo if lets_go else GMPScheduler, schedules, "global" if modifier.is_global else "layer", start
    )


def _constant_plan(modifier: Pruning, names: list[str], steps_per_epoch: int) -> PrunerPlan:
    """Return the plan that holds the zeros of these parameters."""
    if modifier.start > 0:
        raise RecipeError(
            f"Recipe.attach: {modifier.name}: expected zeros that are held from the start of the run, or by a gradual "
            f"modifier that has ended by epoch {modifier.start:g}, for {shown_names(names)}; set start_epoch to 0"
        )
    if modifier.end == -1:
        return PrunerPlan(GMPScheduler, dict.fromkeys(names, Constant(None)), "layer", "zeros")
    return PrunerPlan(
        LettingGo, dict.fromkeys(names, Hold(first_step(modifier.end, steps_per_epoch))), "layer", "zeros"
    )


def share_of_zeros(parameter: nn.Parameter) -> float:
    """Return the fraction of zeros in a parameter, over all its shards."""
    zeros = BitMask.from_zeros(local(parameter).detach())
    return int(sum_over_shards(zeros.numel - zeros.num_kept, parameter)) / parameter.numel()
