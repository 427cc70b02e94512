"""Layers that follow one schedule, and how many weights each of them gives up to reach its sparsity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from gmp_kernels.errors import SparsityError, TargetError
from gmp_kernels.model.coverage import shown_names
from gmp_kernels.model.targets import Entry, ParameterIndex
from gmp_kernels.ops import Scope
from gmp_kernels.pruner.distributions import (
    Distribution,
    Limit,
    distribution_of,
    emptied_layers,
    total_to_prune,
    uniform,
)
from gmp_kernels.pruner.limits import Limits
from gmp_kernels.schedules import Schedule

__all__ = ["Group", "check_limits", "groups_of", "warning_of_emptied"]


class Group(NamedTuple):
    """Layers that follow one schedule.

    Attributes
    ----------
    schedule : Schedule
    shapes : dict of str to torch.Size
        Shapes of the layers, in the order of the model.
    distribute : Distribution
        Divides the sparsity among them.
    limits : list of Limit or None
        What each may give up; None if all weights may be pruned, one by one.
    """

    schedule: Schedule
    shapes: dict[str, torch.Size]
    distribute: Distribution
    limits: list[Limit] | None = None

    def num_prune(self, sparsity: float) -> dict[str, int]:
        """Return how many weights to prune, by layer; in global scope only the sum counts."""
        counts = self.distribute(sparsity, list(self.shapes.values()), self.limits)
        return dict(zip(self.shapes, counts, strict=True))


def groups_of(
    index: ParameterIndex,
    shapes: Mapping[str, torch.Size],
    schedule: Schedule,
    distribution: str,
    overrides: Mapping[Entry, float | Schedule],
    scope: Scope,
    limits: Limits,
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
        An override reaches no target; in global scope, there is one, or a distribution other than "uniform".
    SparsityError
        An override outside [0, 1].
    ValueError
        An unknown scope or distribution.
    """
    distribute = distribution_of(distribution, scope)
    if scope == "global" and overrides:
        raise TargetError(
            f"GMPScheduler: expected no overrides with scope='global', got {overrides!r}; use scope='layer', or "
            "ignore= for layers to leave alone"
        )
    left = dict(shapes)
    groups = []
    for value, names in index.assigned("overrides", overrides, shapes):
        own = value if isinstance(value, Schedule) else schedule.with_final_sparsity(value)
        taken = {name: left.pop(name) for name in names}
        groups.append(Group(own, taken, uniform, limits.of_layers(taken)))
    main = Group(schedule, left, distribute, limits.of_layers(left))
    for group in [main, *groups]:
        check_limits("GMPScheduler", group, limits, "end lower, or give them less in overrides=")
    return main, groups


def check_limits(op: str, group: Group, limits: Limits, advice: str) -> None:
    """Refuse a final sparsity above what patterns and ``max_sparsity`` allow.

    Raises
    ------
    SparsityError
    """
    own = group.limits
    if not group.shapes or own is None:
        return
    final, sizes = group.schedule.final_sparsity, list(map(math.prod, group.shapes.values()))
    names, highest = list(group.shapes), sum(limit.most for limit in own) / sum(sizes)
    if group.distribute is uniform:
        # Rounding may reach a unit above the cap, which then counts, but not above what a pattern allows.
        cap = 1.0 if limits.max_sparsity is None else limits.max_sparsity
        allowed = []
        for name, shape in group.shapes.items():
            pattern = limits.patterns.get(name)
            unit, most = (1, shape.numel()) if pattern is None else (pattern.unit, pattern.most(shape))
            is_reached = round(final * (shape.numel() // unit)) * unit <= most
            allowed.append(min(cap, 1.0 if is_reached else most / shape.numel()))
        highest = min(allowed)
        names = [name for name, share in zip(names, allowed, strict=True) if share < final]
        is_over = bool(names)
    else:
        is_over = total_to_prune(final, sizes, [limit.unit for limit in own]) > sum(limit.most for limit in own)
    if is_over:
        together = "" if group.distribute is uniform else " together"
        raise SparsityError(
            f"{op}: expected a final sparsity of at most {math.floor(1e6 * highest) / 1e6} for "
            f"{shown_names(names)}{together}, as {limits} allows, got {final}; {advice}"
        )


def warning_of_emptied(groups: Sequence[Group], scope: str) -> str | None:
    """Return a warning if the final sparsities leave a layer without a weight."""
    emptied: list[str] = []
    for group in groups:
        sizes = list(map(math.prod, group.shapes.values()))
        counts = list(group.num_prune(group.schedule.final_sparsity).values())
        if scope == "global":
            # Ranking decides how much each layer loses. It is known before only if all lose everything.
            counts = sizes if sum(counts) == sum(sizes) else [0] * len(sizes)
        emptied += emptied_layers(list(group.shapes), sizes, counts)
    if not emptied:
        return None
    is_alone = scope == "layer"
    advice = "give them a lower sparsity in overrides=, or add them to ignore=" if is_alone else "end lower"
    return (
        "GMPScheduler: expected weights left in every layer, got a schedule that prunes all of "
        f"{shown_names(emptied)}; {advice}"
    )
