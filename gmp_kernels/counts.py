"""How many weights a call prunes, and how that translates into counts of what is ranked."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from operator import le
from typing import NamedTuple

import numpy as np

from gmp_kernels.backends.types import Threshold
from gmp_kernels.checks import label_of
from gmp_kernels.errors import ShapeError, SparsityError
from gmp_kernels.patterns import Pattern
from gmp_kernels.schedules import check_sparsity

__all__ = ["Ranking", "counts_to_prune"]


class Ranking(NamedTuple):
    """What is ranked in groups of layers that are ranked together, column by column: a list has an entry per group.

    Attributes
    ----------
    units : list of int
        Weights that are pruned together.
    protected : list of int
        How many weights are kept whatever their rank. Selections count them as pruned.
    sizes : list of int
        How many weights or blocks are ranked.
    most : list of int
        How many weights can be pruned.
    """

    units: list[int]
    protected: list[int]
    sizes: list[int]
    most: list[int]

    @classmethod
    def of(cls, patterns: Sequence[Pattern | None], shapes: Sequence[Sequence[int]], *, is_global: bool) -> Ranking:
        """Return the ranking of layers of these patterns and whole shapes, all of them one group or each its own."""
        pairs = list(zip(patterns, shapes, strict=True))
        units = [1 if pattern is None else pattern.unit for pattern, _ in pairs]
        protected = [0 if pattern is None else pattern.num_protected(shape) for pattern, shape in pairs]
        numels = [math.prod(shape) for _, shape in pairs]
        if is_global and pairs:
            units, protected, numels = units[:1], [sum(protected)], [sum(numels)]
        columns = list(zip(units, protected, numels, strict=True))
        return cls(units, protected, [n // unit for unit, _, n in columns], [n - kept for _, kept, n in columns])

    def counts(self, num_prune: Sequence[int]) -> list[int]:
        """Return what selections count for these numbers of weights, one per group."""
        return [n // unit + kept for n, unit, kept in zip(num_prune, self.units, self.protected, strict=True)]

    def threshold(self, found: Threshold, group: int) -> Threshold:
        """Return a threshold whose counts do not include what is protected. Of blocks they count blocks.

        If the pattern alone decides, because all is pruned that it allows, the threshold is Inf.
        """
        decides = found.num_ties == 0 and math.isnan(found.value)  # the pattern alone
        value = math.inf if decides else found.value
        return found._replace(value=value, num_below=found.num_below - self.protected[group])

    def check(
        self, op: str, num_prune: Sequence[int], patterns: Sequence[Pattern | None], names: Sequence[str] | None
    ) -> None:
        """Refuse counts above those that the patterns of the layers allow."""
        for group, (n, most) in enumerate(zip(num_prune, self.most, strict=True)):
            if n <= most:
                continue
            is_alone = len(self.most) == len(patterns)
            label = label_of(names, group) if is_alone else "all weights together"
            words = {str(p or "unstructured") for p in (patterns[group : group + 1] if is_alone else patterns)}
            found = ", ".join(sorted(words))
            total = self.sizes[group] * self.units[group]
            raise SparsityError(
                f"{op}: expected a sparsity of at most {most / total:.6g} for {label} ({found}), got {n} of {total} "
                f"weights to prune; the pattern allows {most}"
            )


def counts_to_prune(
    op: str,
    sizes: Sequence[int],
    sparsity: float | Sequence[float] | None,
    num_prune: int | Sequence[int] | None,
    scope: str,
    unit: int | Sequence[int] = 1,
) -> list[int]:
    """Return the counts to prune: one per layer, or a single one in global scope.

    A count is a multiple of the ``unit`` of its layer, the weights that are pruned together.
    """
    if (sparsity is None) == (num_prune is None):
        number = "neither" if sparsity is None else "both"
        raise SparsityError(f"{op}: expected exactly one of sparsity and num_prune, got {number}")
    if scope == "global":
        sizes, unit = [sum(sizes)], unit if isinstance(unit, int) else unit[0]
    units = [unit] * len(sizes) if isinstance(unit, int) else unit
    given = num_prune if sparsity is None else sparsity
    if not isinstance(given, (Sequence, np.ndarray)):
        if sparsity is None:
            return [_exact_count(op, given, min(sizes), u) for u in units] if sizes else []
        share = check_sparsity(op, given)
        count_of = {(n, u): round(share * (n // u)) * u for n, u in set(zip(sizes, units, strict=True))}
        return list(map(count_of.__getitem__, zip(sizes, units, strict=True)))
    if len(given) != len(sizes):
        expected = "a single value for scope='global'" if scope == "global" else f"1 or {len(sizes)} values"
        raise ShapeError(f"{op}: expected {expected} of sparsity or num_prune, got {len(given)}")
    if sparsity is None:
        are_plain = {int}.issuperset(map(type, given)) and max(units, default=1) == 1
        if are_plain and all(map(le, given, sizes)) and min(given, default=0) >= 0:
            return list(given)  # type: ignore[arg-type]  # fast for the counts of a schedule, as a GPU waits for them
        return [_exact_count(op, value, n, u) for value, n, u in zip(given, sizes, units, strict=True)]
    return [round(check_sparsity(op, value) * (n // u)) * u for value, n, u in zip(given, sizes, units, strict=True)]


def _exact_count(op: str, value: object, n: int, unit: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer, numbers.Integral)):
        raise SparsityError(f"{op}: expected an integer num_prune, got {value!r}; a fraction goes in sparsity=")
    if not 0 <= int(value) <= n:
        raise SparsityError(f"{op}: expected 0 <= num_prune <= {n} (the number of weights), got {int(value)}")
    if int(value) % unit:
        near = int(value) // unit * unit
        raise SparsityError(
            f"{op}: expected a num_prune of whole blocks of {unit} weights, got {int(value)}; give {near} or "
            f"{near + unit}"
        )
    return int(value)
