"""Numbers of weights to prune per layer, so that all layers together reach one sparsity."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TypeAlias

__all__ = ["DISTRIBUTIONS", "Distribution", "emptied_layers", "erk", "together", "uniform"]

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
    """Return the one num_prune of layers that are ranked together: round(sparsity * N), N being all their weights."""
    return [round(sparsity * sum(map(math.prod, shapes)))]


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
