"""Division of one sparsity among layers: how many weights each of them gives up."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple, TypeAlias, get_args

from gmp_kernels.checks import check_choice
from gmp_kernels.errors import TargetError
from gmp_kernels.ops import Scope

__all__ = ["Distribution", "Limit", "distribution_of", "emptied_layers", "erk", "together", "total_to_prune", "uniform"]

Shapes: TypeAlias = Sequence[Sequence[int]]


class Limit(NamedTuple):
    """Most weights that a layer may give up, and its units.

    Attributes
    ----------
    unit : int
        Number of weights that are pruned together.
    most : int
        Number of weights that may be pruned, whole units.
    """

    unit: int
    most: int


Limits: TypeAlias = Sequence[Limit] | None  # None: all weights may be pruned, one by one

# Returns num_prune per layer, for a sparsity, the shapes of the layers and their limits.
Distribution: TypeAlias = Callable[[float, Shapes, Limits], list[int]]


def uniform(sparsity: float, shapes: Shapes, limits: Limits = None) -> list[int]:
    """Return num_prune per layer with every layer at the same sparsity: round(sparsity * n), counted in units.

    Rounding may reach one unit above a limit, which then counts.

    Parameters
    ----------
    sparsity : float
        Fraction of weights to prune, in [0, 1].
    shapes : sequence of shapes
        One per layer, none empty.
    limits : sequence of Limit, optional
        One per layer.
    """
    if limits is None:
        return [round(sparsity * math.prod(shape)) for shape in shapes]
    counts = []
    for shape, (unit, most) in zip(shapes, limits, strict=True):
        counts.append(min(round(sparsity * (math.prod(shape) // unit)) * unit, most))
    return counts


def together(sparsity: float, shapes: Shapes, limits: Limits = None) -> list[int]:
    """Return counts whose sum is round(sparsity * N), N being all weights: where layers are ranked together.

    All layers have the same unit, in which the sum is counted.
    """
    units = [1] if limits is None else [limit.unit for limit in limits]
    return [total_to_prune(sparsity, list(map(math.prod, shapes)), units), *[0] * (len(shapes) - 1)]


def total_to_prune(sparsity: float, sizes: Sequence[int], units: Sequence[int]) -> int:
    """Return round(sparsity * N), counted in units if all layers have the same."""
    unit = units[0] if len(set(units)) == 1 else 1
    return round(sparsity * (sum(sizes) // unit)) * unit


def emptied_layers(names: Sequence[str], sizes: Sequence[int], num_pruned: Sequence[int]) -> list[str]:
    """Return the names of the layers that have no weight left: whatever goes in, their output is a constant."""
    return [name for name, n, pruned in zip(names, sizes, num_pruned, strict=True) if pruned >= n]


def erk(sparsity: float, shapes: Shapes, limits: Limits = None) -> list[int]:
    """Return num_prune per layer with densities after Erdos-Renyi-Kernel: small layers keep more of their weights.

    The density of a layer is proportional to sum(dims) / prod(dims), so the number of weights it keeps is
    proportional to sum(dims). If that is more than it has, the other layers keep the excess instead; if it is less than
    its limit asks it to keep, the others keep less.
    The total is exactly round(sparsity * N), N being all weights of all layers, or all of their blocks. If there are
    blocks of several sizes, it may fall short of that by less than the largest.

    Parameters
    ----------
    sparsity : float
        Fraction of all weights to prune, in [0, 1]. Not more than the limits allow together.
    shapes : sequence of shapes
        One per layer, none empty.
    limits : sequence of Limit, optional
        One per layer.

    Notes
    -----
    Whole numbers come from Webster's divisor method, with each layer capped at its size. The j-th unit that a layer
    would keep has the share (j - 1/2) * unit / sum(dims). The smallest shares are granted; ties go to the earlier
    layer. What a limit asks for is granted first. Pruned weights cannot come back, so no layer may lose less when more
    is pruned in total. This method ensures that, unlike rounding by largest remainders.

    References
    ----------
    .. [1] U. Evci et al., "Rigging the lottery: making all tickets winners", ICML 2020, arXiv:1911.11134.
    .. [2] M. Balinski and H. P. Young, "Fair representation", 1982: divisor methods are house monotone.
    """
    sizes = [math.prod(shape) for shape in shapes]
    dims = [sum(shape) for shape in shapes]
    units = [1] * len(sizes) if limits is None else [limit.unit for limit in limits]
    least = [0] * len(sizes) if limits is None else [n - limit.most for n, limit in zip(sizes, limits, strict=True)]
    num_keep = sum(sizes) - total_to_prune(sparsity, sizes, units)
    # One unit per layer is held back and the rest rounded down, so no layer has too many yet; shares settle the rest.
    level = _water_level(num_keep - sum(units), least, sizes, dims)
    layers = list(zip(sizes, dims, units, least, strict=True))
    kept = [min(n, max(low, math.floor(level * d / unit) * unit)) for n, d, unit, low in layers]
    shares = [(_share(k, layers[i]), i) for i, k in enumerate(kept) if k < sizes[i]]
    heapq.heapify(shares)
    left = num_keep - sum(kept)
    while left > 0:
        _, i = heapq.heappop(shares)
        kept[i] += units[i]
        left -= units[i]
        if kept[i] < sizes[i]:
            heapq.heappush(shares, (_share(kept[i], layers[i]), i))
    return [n - k for n, k in zip(sizes, kept, strict=True)]


def _share(kept: int, layer: tuple[int, int, int, int]) -> Fraction:
    """Return the share of the next unit of a layer, twice, which keeps the order."""
    _, dims, unit, _ = layer
    return Fraction(2 * kept + unit, dims)


def _water_level(num_keep: int, least: Sequence[int], sizes: Sequence[int], dims: Sequence[int]) -> Fraction:
    """Return the level at which min(size, max(least, level * dims)) add up to ``num_keep``, 0 if they exceed it."""
    kept, rising = sum(least), 0  # weights of layers that do not rise with the level, dims of those that do
    if num_keep <= kept:
        return Fraction(0)
    bends = [(Fraction(low, d), -low, d) for low, d in zip(least, dims, strict=True)]
    bends += [(Fraction(n, d), n, -d) for n, d in zip(sizes, dims, strict=True)]
    level = Fraction(0)
    for bend, more, slope in sorted(bends):
        if rising:
            level = Fraction(num_keep - kept, rising)
            if level <= bend:
                break
        kept += more
        rising += slope
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
