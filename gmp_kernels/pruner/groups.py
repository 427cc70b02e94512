"""Layers that follow one schedule, and how many weights each of them gives up to reach its sparsity."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple, TypeAlias, get_args

import torch

from gmp_kernels.checks import check_choice
from gmp_kernels.errors import TargetError
from gmp_kernels.model.coverage import shown_names
from gmp_kernels.model.targets import Entry, ParameterIndex
from gmp_kernels.ops import Scope
from gmp_kernels.schedules import Schedule

__all__ = ["Group", "distribution_of", "emptied_layers", "erk", "groups_of", "uniform", "warning_of_emptied"]

# Returns num_prune per layer, for a sparsity and the shapes of the layers.
Distribution: TypeAlias = Callable[[float, Sequence[Sequence[int]]], list[int]]


def uniform(sparsity: float, shapes: Sequence[Sequence[int]]) -> list[int]:
    """Return num_prune per layer with every layer at the same sparsity: round(sparsity * n).

    Parameters
    ----------
    sparsity : float
        Fraction of weights to prune, in [0, 1].
    shapes : sequence of shapes
        One per layer, none empty.
    """
    return [round(sparsity * math.prod(shape)) for shape in shapes]


def together(sparsity: float, shapes: Sequence[Sequence[int]]) -> list[int]:
    """Return counts whose sum is round(sparsity * N), N being all weights: where layers are ranked together."""
    return [round(sparsity * sum(map(math.prod, shapes))), *[0] * (len(shapes) - 1)]


def emptied_layers(names: Sequence[str], sizes: Sequence[int], num_pruned: Sequence[int]) -> list[str]:
    """Return the names of the layers that have no weight left: whatever goes in, their output is a constant."""
    return [name for name, n, pruned in zip(names, sizes, num_pruned, strict=True) if pruned >= n]


def erk(sparsity: float, shapes: Sequence[Sequence[int]]) -> list[int]:
    """Return num_prune per layer with densities after Erdos-Renyi-Kernel: small layers keep more of their weights.

    The density of a layer is proportional to sum(dims) / prod(dims), so the number of weights it keeps is
    proportional to sum(dims). If that is more than it has, the other layers keep the excess instead.
    The total is exactly round(sparsity * N), N being all weights of all layers.

    Parameters
    ----------
    sparsity : float
        Fraction of all weights to prune, in [0, 1].
    shapes : sequence of shapes
        One per layer, none empty.

    Notes
    -----
    Whole numbers come from Webster's divisor method, with each layer capped at its size. The j-th weight that a layer
    would keep has the share (j - 1/2) / sum(dims). The smallest shares are granted; ties go to the earlier layer.
    Pruned weights cannot come back, so no layer may lose less when more is pruned in total. This method ensures that,
    unlike rounding by largest remainders.

    References
    ----------
    .. [1] U. Evci et al., "Rigging the lottery: making all tickets winners", ICML 2020, arXiv:1911.11134.
    .. [2] M. Balinski and H. P. Young, "Fair representation", 1982: divisor methods are house monotone.
    """
    sizes = [math.prod(shape) for shape in shapes]
    dims = [sum(shape) for shape in shapes]
    num_keep = sum(sizes) - round(sparsity * sum(sizes))
    # One weight per layer is held back and the rest rounded down, so no layer has too many yet; shares settle the rest.
    level = _water_level(max(0, num_keep - len(sizes)), sizes, dims)
    kept = [min(n, math.floor(level * d)) for n, d in zip(sizes, dims, strict=True)]
    shares = [(Fraction(2 * k + 1, d), i) for i, (k, n, d) in enumerate(zip(kept, sizes, dims, strict=True)) if k < n]
    heapq.heapify(shares)
    for _ in range(num_keep - sum(kept)):
        _, i = heapq.heappop(shares)
        kept[i] += 1
        if kept[i] < sizes[i]:
            heapq.heappush(shares, (Fraction(2 * kept[i] + 1, dims[i]), i))
    return [n - k for n, k in zip(sizes, kept, strict=True)]


def _water_level(num_keep: int, sizes: Sequence[int], dims: Sequence[int]) -> Fraction:
    """Return the level at which min(size, level * dims) add up to ``num_keep``: layers below it are dense."""
    kept_left, dims_left = num_keep, sum(dims)
    level = Fraction(0)
    for n, d in sorted(zip(sizes, dims, strict=True), key=lambda layer: Fraction(*layer)):
        level = Fraction(kept_left, dims_left)
        if level * d <= n:
            break
        kept_left -= n
        dims_left -= d
    return level


DISTRIBUTIONS: dict[str, Distribution] = {"uniform": uniform, "erk": erk}


def distribution_of(distribution: str, scope: str) -> Distribution:
    """Return how layers share a sparsity.

    Raises
    ------
    ValueError
        An unknown scope or distribution.
    TargetError
        Any but "uniform" in global scope.
    """
    check_choice("GMPScheduler", "scope", scope, get_args(Scope))
    check_choice("GMPScheduler", "distribution", distribution, tuple(DISTRIBUTIONS))
    if scope == "global" and distribution != "uniform":
        raise TargetError(
            f"GMPScheduler: expected distribution='uniform' with scope='global', got {distribution!r}; ranking all "
            "layers together decides what each gives up"
        )
    return together if scope == "global" else DISTRIBUTIONS[distribution]


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

    def num_prune(self, sparsity: float) -> dict[str, int]:
        """Return how many weights to prune, by layer; in global scope only the sum counts."""
        return dict(zip(self.shapes, self.distribute(sparsity, list(self.shapes.values())), strict=True))


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
    return Group(schedule, left, distribute), groups


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
