"""A recipe, and the run that it describes for a model and an optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from gmp_kernels.errors import RecipeError, warn
from gmp_kernels.model.names import named_parameters
from gmp_kernels.model.wrappers import optimizer_chain
from gmp_kernels.recipes.modifiers import GradualPruning, Modifier, TrainableParams, read
from gmp_kernels.recipes.names import Names
from gmp_kernels.recipes.options import Options, RecipeLR, in_order, learning_rate_of, weight_decay_of
from gmp_kernels.recipes.pruners import plan_pruners, schedule_of, share_of_zeros
from gmp_kernels.recipes.text import Overrides, items_of
from gmp_kernels.recipes.timing import first_step
from gmp_kernels.run import Run
from gmp_kernels.scheduler import GMPScheduler
from gmp_kernels.schedules import check_whole

__all__ = ["Recipe", "Trace", "load", "words_about_ends"]


def load(recipe: str | PathLike[str], recipe_args: Overrides = None) -> Recipe:
    """Return a SparseML recipe, ready to be attached to a model.

    Parameters
    ----------
    recipe : str or path
        Path of a ``.yaml`` file, or of a ``.md`` file with the recipe between two lines of ``---`` or ``+++``; or the
        text of a recipe, which has a newline.
    recipe_args : mapping or str, optional
        Values that replace those of the recipe's variables: {name: value}, a JSON object, or
        ``"num_epochs=10,final_sparsity=0.8"``.

    Returns
    -------
    Recipe

    Raises
    ------
    RecipeError
        It is no recipe, or it asks for something that this library does not do: an unknown modifier or argument, a
        sparsity that falls, a pattern such as 2:4.
    OSError
        The file cannot be read.
    ModuleNotFoundError
        PyYAML is not installed: ``pip install 'gmp-kernels[recipes]'``.

    Warns
    -----
    GMPWarning
        Modifiers that are skipped, because they do something else than gradual magnitude pruning.

    Notes
    -----
    Nothing in a recipe is executed: tags make no objects, and ``eval(...)`` knows numbers and arithmetic only.
    """
    modifiers, skipped = read(items_of(recipe, recipe_args))
    if skipped:
        warn(
            f"recipe: skipped {', '.join(skipped)}, which gradual magnitude pruning has no part in; do it in the "
            "training loop, or go without"
        )
    for modifier in modifiers:
        if isinstance(modifier, GradualPruning) and modifier.end == -1:
            warn(
                f"recipe: {modifier.name} has no end and stays at init_sparsity; set end_epoch to reach final_sparsity"
            )
    return Recipe(modifiers, skipped)


class Trace(NamedTuple):
    """The course of a recipe, with one value per optimizer step from 0 to the last, inclusive.

    Attributes
    ----------
    sparsity : dict of str to list of float
        {label: sparsity after the update of that step}, for each sparsity that a modifier prunes to. An initial
        sparsity that is taken from the model counts as 0.
    learning_rate, weight_decay : list of float or None
        Values of the first param group for that step; None while those of the optimizer hold.
    """

    sparsity: dict[str, list[float]]
    learning_rate: list[float | None]
    weight_decay: list[float | None]


@dataclass(frozen=True)
class Recipe:
    """SparseML recipe, as ``load`` has read it.

    Attributes
    ----------
    modifiers : tuple of Modifier
        In the order of the recipe.
    skipped : tuple of str
        Names of the modifiers that are left out.
    """

    modifiers: tuple[Modifier, ...]
    skipped: tuple[str, ...] = ()

    @property
    def epochs(self) -> int:
        """Length of the run in whole epochs: up to the last start or end of any modifier."""
        return math.ceil(max([0.0, *(max(modifier.start, modifier.end) for modifier in self.modifiers)]))

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        steps_per_epoch: int,
        *,
        lr_scheduler: LRScheduler | None = None,
        **arguments: Any,
    ) -> Run:
        """Return what drives the run; call its ``step()`` after every ``optimizer.step()``, for ``epochs`` epochs.

        Parameters
        ----------
        model : torch.nn.Module
        optimizer : torch.optim.Optimizer
            As in ``GMPScheduler``. The learning rate and weight decay of the recipe replace those it has.
        steps_per_epoch : int
            Optimizer steps per epoch: ``len(loader)``, divided by the gradient accumulation.
        lr_scheduler : torch lr_scheduler, optional
            For a recipe that leaves the learning rate alone.
        **arguments
            ``count``, ``nonfinite`` and ``backend`` of ``GMPScheduler``.

        Returns
        -------
        Run
            With a pruner for each modifier that prunes, in the order of the recipe.

        Raises
        ------
        RecipeError
            An entry matches no parameter, two modifiers prune the same one, nothing is pruned, or the optimizer does
            not have the recipe's param groups.
        GMPError
            As ``GMPScheduler``. Nothing has been changed.

        Warns
        -----
        GMPWarning
            A parameter has more zeros than its final sparsity asks for, or the last update of a ramp is due when the
            run is over.
        """
        steps_per_epoch = check_whole("Recipe.attach: steps_per_epoch", steps_per_epoch, 1)
        if unknown := set(arguments) - {"count", "nonfinite", "backend"}:
            raise TypeError(
                f"Recipe.attach: expected count, nonfinite or backend, got {sorted(unknown)[0]!r}; the recipe says the "
                "rest"
            )
        inner = optimizer_chain(optimizer)[-1]
        names, parameters = Names.of_model(model), named_parameters(model)
        plans = plan_pruners(self.modifiers, names, steps_per_epoch, lambda name: share_of_zeros(parameters[name]))
        rates = learning_rate_of(self.modifiers, steps_per_epoch)
        decay = weight_decay_of(self.modifiers, steps_per_epoch)
        rates.check_groups("learning rate", len(inner.param_groups))
        decay.check_groups("weight decay", len(inner.param_groups))
        if rates and lr_scheduler is not None:
            raise RecipeError(
                "Recipe.attach: expected no lr_scheduler for a recipe that sets the learning rate, got a "
                f"{type(lr_scheduler).__name__}; leave it out, or take the recipe's modifiers out"
            )
        trained = {
            modifier: [parameters[n] for n in names.reached_by(modifier.name, modifier.names, strict=modifier.strict)]
            for modifier in in_order(self.modifiers)
            if isinstance(modifier, TrainableParams)
        }
        for word in words_about_ends(self, steps_per_epoch):
            warn(f"Recipe.attach: {word}")
        pruners: list[GMPScheduler] = []
        try:
            for plan in plans:
                pruners.append(plan.build(model, optimizer, arguments))  # noqa: PERF401  # kept if a later one fails
        except BaseException:
            for pruner in pruners:
                pruner.remove()
            raise
        if rates:
            lr_scheduler = RecipeLR(inner, rates)
        return Run(
            pruners,
            lr_scheduler=lr_scheduler,
            set_options=Options(inner, decay, trained, steps_per_epoch) if decay or trained else None,
        )

    def trace(self, steps_per_epoch: int) -> Trace:
        """Return sparsity, learning rate and weight decay at every step, without a model.

        Raises
        ------
        ScheduleError
            ``steps_per_epoch`` is not a whole number >= 1, or the run has too many updates.
        """
        steps = range(self.epochs * check_whole("Recipe.trace: steps_per_epoch", steps_per_epoch, 1) + 1)
        sparsity = {}
        for modifier in self.modifiers:
            if not isinstance(modifier, GradualPruning):
                continue
            for final, _ in modifier.entries:
                schedule, values = schedule_of(modifier, modifier.initial or 0.0, final, steps_per_epoch), [0.0]
                for step in steps:
                    values.append(schedule.sparsity_at(step) if schedule.is_update_step(step) else values[-1])
                label = f"{modifier.name}, {final:.0%}" if len(modifier.entries) > 1 else modifier.name
                sparsity[label] = values[1:]
        rates = learning_rate_of(self.modifiers, steps_per_epoch)
        decay = weight_decay_of(self.modifiers, steps_per_epoch)
        return Trace(sparsity, [rates.at(step, 0) for step in steps], [decay.at(step, 0) for step in steps])


def words_about_ends(recipe: Recipe, steps_per_epoch: int) -> Iterator[str]:
    """Yield what to do about each ramp whose last update is due when the run is over."""
    num_steps = recipe.epochs * steps_per_epoch
    for modifier in recipe.modifiers:
        if isinstance(modifier, GradualPruning) and modifier.end != -1:
            end_step = first_step(modifier.end, steps_per_epoch)
            if end_step >= num_steps:
                yield (
                    f"{modifier.name}: expected an end_epoch that the run of {num_steps} steps reaches, got "
                    f"{modifier.end:g}: its update is due at step {end_step}, counted from 0; call run.step() once "
                    "more after the last step, or train an epoch more"
                )
