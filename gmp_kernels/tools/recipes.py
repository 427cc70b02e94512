"""The dry run of a SparseML recipe, for the layers of a checkpoint, and what to know before running it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from gmp_kernels.checkpoints.files import TensorInfo
from gmp_kernels.checkpoints.targets import TensorIndex
from gmp_kernels.errors import RecipeError
from gmp_kernels.model.coverage import shown_names
from gmp_kernels.pruner.distributions import together, uniform
from gmp_kernels.pruner.groups import Group
from gmp_kernels.recipes import Recipe
from gmp_kernels.recipes.modifiers import ALL, ALL_PRUNABLE, GradualPruning, Pruning
from gmp_kernels.recipes.names import Names
from gmp_kernels.recipes.pruners import plan_pruners, schedule_of
from gmp_kernels.recipes.recipe import words_about_ends
from gmp_kernels.schedules import Schedule
from gmp_kernels.tools.plan import Course, check_length

__all__ = ["course_of", "is_recipe", "layers_of", "warnings_about"]

# Weights of a modifier whose layers are not known: enough to show six digits of its sparsity.
ONE_SIZE = torch.Size([1_000_000])
SUFFIXES = (".md", ".yaml", ".yml")


def is_recipe(run: str) -> bool:
    """Return whether the argument of a command names a recipe rather than a checkpoint."""
    return run.startswith("zoo:") or Path(run).suffix.lower() in SUFFIXES


def layers_of(tensors: Sequence[TensorInfo]) -> dict[str, tuple[int, ...]]:
    """Return {name: shape} of what a recipe can name in a checkpoint: all tensors."""
    return {tensor.name: tensor.shape for tensor in tensors}


def course_of(recipe: Recipe, layers: Mapping[str, tuple[int, ...]], steps_per_epoch: int) -> Course:
    """Return what a recipe does; the first param group stands for all, and NaN for values of the optimizer's own.

    Parameters
    ----------
    recipe : Recipe
    layers : mapping of str to shape
        Layers of a checkpoint, taken as dense. If there are none, each sparsity of each modifier counts as a layer, all
        of one size.
    steps_per_epoch : int

    Raises
    ------
    RecipeError
        An entry matches no layer, or as ``Recipe.attach``.
    ScheduleError
        The run has more than ten million steps.
    """
    check_length(recipe.epochs * steps_per_epoch)
    trace = recipe.trace(steps_per_epoch)
    groups: dict[tuple[int, str], Group] = {}
    plans = plan_pruners(recipe.modifiers, _names(layers), steps_per_epoch, lambda name: 0.0) if layers else []
    for number, plan in enumerate(plans):
        for name, schedule in plan.schedules.items():
            group = Group(schedule, {}, together if plan.scope == "global" else uniform)
            groups.setdefault((number, repr(schedule)), group).shapes[name] = torch.Size(layers[name])
    for modifier in recipe.modifiers if not layers else ():
        if not isinstance(modifier, GradualPruning):
            continue
        for final, _ in modifier.entries:
            label = f"{modifier.name}, to {100 * final:.3g}%"
            schedule = schedule_of(modifier, modifier.initial or 0.0, final, steps_per_epoch)
            groups[len(groups), label] = Group(schedule, {label: ONE_SIZE}, uniform)
    if not groups:
        raise RecipeError(
            "plan: expected a recipe that prunes gradually, got none of its modifiers; name a checkpoint to see what "
            "others hold"
        )
    return Course(
        list(groups.values()),
        [math.nan if rate is None else rate for rate in trace.learning_rate],
        [math.nan if decay is None else decay for decay in trace.weight_decay],
        steps_per_epoch,
        _parts([group.schedule for group in groups.values()], len(trace.learning_rate) - 1),
    )


def _names(layers: Mapping[str, tuple[int, ...]]) -> Names:
    # Weights of linear, convolutional and embedding layers are matrices; those of norms are not.
    prunable = [name for name, shape in layers.items() if name.split(".")[-1] == "weight" and len(shape) > 1]
    return Names({name: name for name in layers}, prunable)


def _parts(schedules: Sequence[Schedule], total_steps: int) -> dict[str, tuple[float, float]]:
    """Return the stages of a run: before the first update, up to the last, and after it."""
    begin = min(max(0, schedule.begin_step) for schedule in schedules)
    end = max(begin, *(schedule.end_step for schedule in schedules))
    ends = {"stabilization": (0, begin), "pruning": (begin, end), "fine-tuning": (end, total_steps)}
    return {name: (first, float(last)) for name, (first, last) in ends.items() if last > first}


def warnings_about(recipe: Recipe, layers: Mapping[str, tuple[int, ...]], steps_per_epoch: int) -> Iterator[str]:
    """Yield what may surprise in a run of the recipe; with ``layers``, what it does to them."""
    tensors = [TensorInfo(Path(), name, "F32", shape, 0, 0) for name, shape in layers.items()]
    left_out = {t.name: t.reason for t in TensorIndex(tensors).choose(None, None)[1].left_out} if layers else {}
    yield from words_about_ends(recipe, steps_per_epoch)
    for modifier in recipe.modifiers:
        if isinstance(modifier, GradualPruning):
            if not modifier.leave_enabled and modifier.end != -1:
                yield f"{modifier.name}: its weights train again after epoch {modifier.end:g} (leave_enabled: False)"
            if 0 < modifier.frequency * steps_per_epoch < 1:
                yield (
                    f"{modifier.name}: an update every {modifier.frequency:g} epochs is more than one per step, which "
                    "is what there is"
                )
        if isinstance(modifier, Pruning):
            for entry in (name for _, names in modifier.entries for name in names):
                yield from (f"{modifier.name}: {word}" for word in _words_about(entry, layers, left_out))


def _words_about(entry: str, layers: Mapping[str, tuple[int, ...]], left_out: Mapping[str, str]) -> Iterator[str]:
    reached = _names(layers).reached_by("", [entry], strict=False) if layers else []
    if entry in layers:
        return  # meant as it is
    unusual: dict[str, list[str]] = {}
    for name in reached:
        if name in left_out:
            unusual.setdefault(left_out[name], []).append(name)
    for reason, names in unusual.items():
        yield f"{entry!r} reaches {shown_names(names)} ({reason}), which gmp-kernels leaves out by default"
    if not layers and entry in (ALL, ALL_PRUNABLE):
        what = "biases and norms" if entry == ALL else "embeddings"
        yield f"{entry!r} includes {what}, which gmp-kernels leaves out by default"
    if entry.startswith("re:"):
        longer = [name for name in reached if not re.fullmatch(entry.removeprefix("re:"), name)]
        if longer:
            yield f"{entry!r} matches beginnings of names, also of {shown_names(longer)}; end it with $ for the whole"
