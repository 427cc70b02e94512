"""Layers that follow one schedule, and how many weights each of them gives up."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from gmp_kernels.errors import TargetError
from gmp_kernels.model.coverage import shown_names
from gmp_kernels.model.targets import Entry, ParameterIndex
from gmp_kernels.pruner.distributions import DISTRIBUTIONS, Distribution, emptied_layers, uniform
from gmp_kernels.schedules import Schedule

__all__ = ["Groups"]


class _Group(NamedTuple):
    """Layers that follow one schedule, and how its sparsity is divided among them."""

    schedule: Schedule
    names: list[str]
    distribute: Distribution
    is_override: bool = False


class Groups:
    """Targets of a pruner, divided among its schedule and the overrides of it.

    Parameters
    ----------
    index : ParameterIndex
        Of the model.
    shapes : mapping of str to torch.Size
        Of the targets, in the order of the model.
    schedule : Schedule
    distribution : str
    overrides : mapping of entry to float or Schedule
        The first that reaches a layer decides.
    scope : {"layer", "global"}

    Attributes
    ----------
    schedules : list of Schedule
        One per group.

    Raises
    ------
    TargetError
        An override reaches no target, or there is one in global scope.
    SparsityError
        An override outside [0, 1].
    ValueError
        An unknown distribution; in global scope any but "uniform".
    """

    def __init__(
        self,
        index: ParameterIndex,
        shapes: Mapping[str, torch.Size],
        schedule: Schedule,
        *,
        distribution: str,
        overrides: Mapping[Entry, float | Schedule],
        scope: str,
    ) -> None:
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
        self.shapes = dict(shapes)
        self._schedule = schedule
        self._distribution = distribution
        self._scope = scope
        left = dict.fromkeys(shapes)
        groups = []
        for entry, value in overrides.items():
            reached = [name for name in index.find("overrides", entry) if name in shapes]
            if not reached:
                raise TargetError(
                    f"overrides: expected entries that reach a target, got {entry!r}, which reaches only parameters "
                    "that are not pruned; add them to targets="
                )
            own = value if isinstance(value, Schedule) else schedule.with_final_sparsity(value)
            groups.append(_Group(own, [name for name in reached if name in left], uniform, is_override=True))
            for name in reached:
                left.pop(name, None)
        groups.insert(0, _Group(schedule, list(left), DISTRIBUTIONS[distribution]))
        self._groups = [group for group in groups if group.names]
        self.schedules = [group.schedule for group in self._groups]

    @property
    def end_step(self) -> int:
        """The last step that has an update."""
        return max(schedule.end_step for schedule in self.schedules)

    def num_weights(self, names: Iterable[str]) -> int:
        """Return the number of weights of whole layers."""
        return sum(math.prod(self.shapes[name]) for name in names)

    def weights_to_prune(self, steps: Sequence[int | None]) -> dict[str, int]:
        """Return how many weights of each layer are to be pruned once the update of its group's step is made.

        Parameters
        ----------
        steps : sequence of int or None
            The step of each group's update; None for those without one, whose layers are left out.
        """
        counts: dict[str, int] = {}
        for group, step in zip(self._groups, steps, strict=True):
            if step is not None:
                found = self._distribute(group, group.schedule.sparsity_at(step))
                counts.update(zip(group.names, found, strict=True))
        return {name: counts[name] for name in self.shapes if name in counts}

    def counts(self, num_prune: Mapping[str, int], names: Sequence[str], step: int) -> list[int]:
        """Return what ``prune_`` is told for these layers, which are due at ``step``."""
        if self._scope == "layer":
            return [num_prune[name] for name in names]
        return [round(self._schedule.sparsity_at(step) * self.num_weights(names))]

    def warn_of_emptied(self) -> str | None:
        """Return a warning if the schedules, where they end, leave a layer without a weight."""
        emptied: list[str] = []
        for group in self._groups:
            sizes = [self.num_weights([name]) for name in group.names]
            sparsity = group.schedule.final_sparsity
            if self._scope == "layer":
                counts = self._distribute(group, sparsity)
            else:
                # Any layer may lose more than its share; only when all lose everything is it known before.
                counts = sizes if round(sparsity * sum(sizes)) == sum(sizes) else [0] * len(sizes)
            emptied += emptied_layers(group.names, sizes, counts)
        if not emptied:
            return None
        is_alone = self._scope == "layer"
        advice = "give them a lower sparsity in overrides=, or add them to ignore=" if is_alone else "end lower"
        return (
            "GMPScheduler: expected weights left in every layer, got a schedule that prunes all of "
            f"{shown_names(emptied)}; {advice}"
        )

    def settings(self) -> dict[str, Any]:
        """Return what tells one run from another, as plain data."""
        return {
            "schedule": self._schedule.to_dict(),
            "overrides": {
                name: group.schedule.to_dict() for group in self._groups if group.is_override for name in group.names
            },
            "scope": self._scope,
            "distribution": self._distribution,
        }

    def _distribute(self, group: _Group, sparsity: float) -> list[int]:
        return group.distribute(sparsity, [self.shapes[name] for name in group.names])
