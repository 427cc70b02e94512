"""Layers that follow one schedule, and how many weights each of them gives up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from gmp_kernels.coverage import shown_names
from gmp_kernels.distributions import DISTRIBUTIONS, Distribution, emptied_layers, uniform
from gmp_kernels.errors import TargetError
from gmp_kernels.schedules import Schedule
from gmp_kernels.targets import Entry, ParameterIndex

__all__ = ["Group", "groups_of", "warn_of_emptied", "weights_to_prune"]


class Group(NamedTuple):
    """Layers that follow one schedule, and how its sparsity is divided among them."""

    schedule: Schedule
    names: list[str]
    distribute: Distribution
    is_override: bool = False


def groups_of(
    index: ParameterIndex,
    names: Sequence[str],
    schedule: Schedule,
    distribution: str,
    overrides: Mapping[Entry, float | Schedule],
    scope: str,
) -> list[Group]:
    """Divide the targets among the schedule and the overrides; of these the first that reaches a layer decides.

    Raises
    ------
    TargetError
        An override reaches no target.
    SparsityError
        An override outside [0, 1].
    ValueError
        An unknown distribution; in global scope any but "uniform", and overrides.
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
    left = dict.fromkeys(names)
    groups = []
    for entry, value in overrides.items():
        reached = [name for name in index.find("overrides", entry) if name in names]
        if not reached:
            raise TargetError(
                f"overrides: expected entries that reach a target, got {entry!r}, which reaches only parameters that "
                "are not pruned; add them to targets="
            )
        own = value if isinstance(value, Schedule) else schedule.with_final_sparsity(value)
        groups.append(Group(own, [name for name in reached if name in left], uniform, is_override=True))
        for name in reached:
            left.pop(name, None)
    groups.insert(0, Group(schedule, list(left), DISTRIBUTIONS[distribution]))
    return [group for group in groups if group.names]


def warn_of_emptied(groups: Sequence[Group], shapes: Mapping[str, torch.Size], scope: str) -> str | None:
    """Return a warning if the schedules, where they end, leave a layer without a weight."""
    emptied: list[str] = []
    for group in groups:
        sizes = [shapes[name].numel() for name in group.names]
        sparsity = group.schedule.final_sparsity
        if scope == "layer":
            counts = group.distribute(sparsity, [shapes[name] for name in group.names])
        else:
            # Any layer may lose more than its share; only when all lose everything is it known before.
            counts = sizes if round(sparsity * sum(sizes)) == sum(sizes) else [0] * len(sizes)
        emptied += emptied_layers(group.names, sizes, counts)
    if not emptied:
        return None
    return (
        "GMPScheduler: expected weights left in every layer, got a schedule that prunes all of "
        f"{shown_names(emptied)}; give them a lower sparsity in overrides=, or add them to ignore="
    )


def weights_to_prune(
    groups: Sequence[Group], steps: Sequence[int | None], shapes: Mapping[str, torch.Size]
) -> dict[str, int]:
    """Return how many weights of each layer are to be pruned once the update of its group's step is made.

    Parameters
    ----------
    groups : sequence of Group
    steps : sequence of int or None
        The step of each group's update; None for those without one, whose layers are left out.
    shapes : mapping of str to torch.Size
        Of all layers; the result is in their order.
    """
    counts: dict[str, int] = {}
    for group, step in zip(groups, steps, strict=True):
        if step is not None:
            sparsity = group.schedule.sparsity_at(step)
            found = group.distribute(sparsity, [shapes[name] for name in group.names])
            counts.update(zip(group.names, found, strict=True))
    return {name: counts[name] for name in shapes if name in counts}
