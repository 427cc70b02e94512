"""Layers that follow one schedule, and how many weights each of them gives up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from gmp_kernels.errors import TargetError
from gmp_kernels.model.coverage import shown_names
from gmp_kernels.model.targets import Entry, ParameterIndex
from gmp_kernels.pruner.distributions import DISTRIBUTIONS, Distribution, emptied_layers, together, uniform
from gmp_kernels.schedules import Schedule

__all__ = ["Group", "groups_of", "warning_of_emptied"]


class Group(NamedTuple):
    """Layers that follow one schedule.

    Attributes
    ----------
    schedule : Schedule
    shapes : dict of str to torch.Size
        Shapes of the layers, in the order of the model.
    distribute : Distribution
        Divides the sparsity among them.
    """

    schedule: Schedule
    shapes: dict[str, torch.Size]
    distribute: Distribution

    def num_prune(self, sparsity: float) -> list[int]:
        """Return how many weights ``prune_`` prunes: one number per layer, or one of all in global scope."""
        return self.distribute(sparsity, list(self.shapes.values()))


def groups_of(
    index: ParameterIndex,
    shapes: Mapping[str, torch.Size],
    schedule: Schedule,
    *,
    distribution: str,
    overrides: Mapping[Entry, float | Schedule],
    scope: str,
) -> tuple[Group, list[Group]]:
    """Divide the targets of a pruner among its schedule and the overrides; the first that matches a layer applies.

    ``shapes`` are those of the targets, in the order of the model of ``index``; the rest is as in ``GMPScheduler``.

    Returns
    -------
    Group
        Layers that follow the schedule itself, perhaps none.
    list of Group
        Groups of the overrides, none empty.

    Raises
    ------
    TargetError
        An override reaches no target, or there is one in global scope.
    SparsityError
        An override outside [0, 1].
    ValueError
        An unknown distribution; in global scope any but "uniform".
    """
    if distribution not in DISTRIBUTIONS:
        raise ValueError(
            f"GMPScheduler: expected distribution to be one of {tuple(DISTRIBUTIONS)}, got {distribution!r}"
        )
    if scope == "global" and distribution != "uniform":
        raise ValueError(
            f"GMPScheduler: expected distribution='uniform' with scope='global', got {distribution!r}; ranking all "
            "layers together decides what each gives up"
        )
    if scope == "global" and overrides:
        raise TargetError(
            f"GMPScheduler: expected no overrides with scope='global', got {overrides!r}; use scope='layer', or "
            "ignore= for layers to leave alone"
        )
    left = dict(shapes)
    groups = []
    for entry, value in overrides.items():
        reached = [name for name in index.find("overrides", entry) if name in shapes]
        if not reached:
            raise TargetError(
                f"overrides: expected entries that reach a target, got {entry!r}, which reaches only parameters "
                "that are not pruned; add them to targets="
            )
        own = value if isinstance(value, Schedule) else schedule.with_final_sparsity(value)
        taken = {name: left.pop(name) for name in reached if name in left}
        if taken:
            groups.append(Group(own, taken, uniform))
    return Group(schedule, left, together if scope == "global" else DISTRIBUTIONS[distribution]), groups


def warning_of_emptied(groups: Sequence[Group], scope: str) -> str | None:
    """Return a warning if the final sparsities leave a layer without a weight."""
    emptied: list[str] = []
    for group in groups:
        sizes = list(map(math.prod, group.shapes.values()))
        counts = group.num_prune(group.schedule.final_sparsity)
        if scope == "global":
            # Ranking decides how much each layer loses. It is known before only if all lose everything.
            counts = sizes if counts == [sum(sizes)] else [0] * len(sizes)
        emptied += emptied_layers(list(group.shapes), sizes, counts)
    if not emptied:
        return None
    is_alone = scope == "layer"
    advice = "give them a lower sparsity in overrides=, or add them to ignore=" if is_alone else "end lower"
    return (
        "GMPScheduler: expected weights left in every layer, got a schedule that prunes all of "
        f"{shown_names(emptied)}; {advice}"
    )
