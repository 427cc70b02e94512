"""How many weights a call prunes, what patterns make of that, and the selection of what is ranked."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Sequence
from operator import le
from typing import Any, NamedTuple

import numpy as np

from gmp_kernels.backends.layers import Layers
from gmp_kernels.backends.types import Brackets, Implementation, Layer, Selection, Threshold
from gmp_kernels.checks import label_of
from gmp_kernels.errors import ShapeError, SparsityError
from gmp_kernels.formats import format_of
from gmp_kernels.masks import BitMask
from gmp_kernels.patterns import Pattern, Unstructured
from gmp_kernels.schedules import check_sparsity
from gmp_kernels.search.caps import select_capped
from gmp_kernels.search.driver import select_most, select_with

__all__ = ["Caps", "Ranking", "broken_in", "check_unbroken", "counts_to_prune", "patterns_of", "select"]


class Ranking(NamedTuple):
    """Units and counts of groups of layers that are ranked together, column by column: a list has an entry per group.

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
    columns : list of (int, int)
        Units and protected weights of each layer by itself.
    """

    units: list[int]
    protected: list[int]
    sizes: list[int]
    most: list[int]
    columns: list[tuple[int, int]]

    @classmethod
    def of(cls, patterns: Sequence[Pattern | None], shapes: Sequence[Sequence[int]], *, is_global: bool) -> Ranking:
        """Return the ranking of layers of these patterns and whole shapes, all of them one group or each its own."""
        pairs = list(zip(patterns, shapes, strict=True))
        units = [1 if pattern is None else pattern.unit for pattern, _ in pairs]
        protected = [0 if pattern is None else pattern.num_protected(shape) for pattern, shape in pairs]
        numels = [math.prod(shape) for _, shape in pairs]
        of_layers = list(zip(units, protected, strict=True))
        if is_global and pairs:
            units, protected, numels = units[:1], [sum(protected)], [sum(numels)]
        columns = list(zip(units, protected, numels, strict=True))
        return cls(
            units, protected, [n // unit for unit, _, n in columns], [n - kept for _, kept, n in columns], of_layers
        )

    def counts(self, num_prune: Sequence[int]) -> list[int]:
        """Return what selections count for these numbers of weights, one per group."""
        return [n // unit + kept for n, unit, kept in zip(num_prune, self.units, self.protected, strict=True)]

    def of_layers(self, numbers: Sequence[int]) -> list[int]:
        """Do what ``counts`` does for numbers of each layer by itself."""
        return [n // unit + kept for n, (unit, kept) in zip(numbers, self.columns, strict=True)]

    def thresholds(self, found: Sequence[Threshold], alone: Collection[int] = ()) -> list[Threshold]:
        """Return thresholds of layers whose counts do not include what is protected. Of blocks they count blocks.

        The layers at the positions ``alone`` are not ranked together with others. If the pattern alone decides, because
        all is pruned that it allows, a threshold is Inf.
        """
        own = [kept for _, kept in self.columns]
        is_global = len(self.units) < len(own)
        rest = sum(kept for i, kept in enumerate(own) if i not in alone)
        result = []
        for i, (threshold, kept) in enumerate(zip(found, own, strict=True)):
            decides = threshold.num_ties == 0 and math.isnan(threshold.value)  # the pattern alone
            kept = rest if is_global and i not in alone else kept
            value = math.inf if decides else threshold.value
            result.append(threshold._replace(value=value, num_below=threshold.num_below - kept))
        return result

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


class Caps(NamedTuple):
    """Limits of layers that are ranked together.

    Attributes
    ----------
    most : list of int
        How many weights of each layer may be pruned, whole blocks of them.
    num_pruned : list of int
        How many are pruned already.
    """

    most: list[int]
    num_pruned: list[int]


def select(
    implementation: Implementation,
    layers: Sequence[Layer],
    num_prune: Sequence[int],
    ranking: Ranking | None,
    is_global: bool,
    brackets: Brackets | None = None,
    caps: Caps | None = None,
    *,
    finite: bool = True,
) -> tuple[Selection, Sequence[int]]:
    """Select so many weights in each group of layers.

    Parameters
    ----------
    implementation : Implementation
    layers : sequence of Layer
    num_prune : sequence of int
        Of weights, per group.
    ranking : Ranking or None
        None if the layers have no patterns and no caps.
    is_global : bool
        Whether all layers are one group.
    brackets : Brackets, optional
        As in ``Implementation.select``.
    caps : Caps, optional
    finite : bool
        Whether to look for NaN and Inf where the patterns alone decide, which takes a read.

    Returns
    -------
    Selection
    sequence of int
        The layers at their caps.
    """
    group_sizes = [len(layers)] if is_global else [1] * len(layers)
    if ranking is None:
        return select_with(implementation)(layers, num_prune, group_sizes, brackets, prunes=True), ()
    wanted = ranking.counts(num_prune)
    if caps is not None:
        # Layers that are ranked anew come without masks.
        num_pruned = [0 if layer.mask is None else n for layer, n in zip(layers, caps.num_pruned, strict=True)]
        own = ranking.of_layers(caps.most), ranking.of_layers(num_pruned)
        selection, full = select_capped(implementation, layers, wanted[0], *own)
        return selection, list(full)
    if list(num_prune) == ranking.most:
        return select_most(implementation, layers, wanted, group_sizes, finite=finite), ()
    return select_with(implementation)(layers, wanted, group_sizes, brackets, prunes=True), ()


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


def patterns_of(op: str, given: Any, num_weights: int, scope: str) -> list[Pattern | None] | None:
    """Return one pattern per weight, None for those of which any weight may be pruned; None if all are such."""
    is_several = hasattr(given, "__iter__") and not isinstance(given, (str, type))
    patterns = list(given) if is_several else [given] * num_weights
    for entry in patterns:
        if entry is not None and not isinstance(entry, Pattern):
            raise TypeError(f"{op}: expected a pattern such as NM(2, 4) or Block(4, 4), got {entry!r}")
    if len(patterns) != num_weights:
        raise ShapeError(
            f"{op}: expected one pattern, or one per weight, got {len(patterns)} for {num_weights} weights"
        )
    patterns = [None if entry == Unstructured() else entry for entry in patterns]
    if patterns.count(None) == len(patterns):
        return None
    units = {entry if entry is not None and entry.unit > 1 else None for entry in patterns}
    if scope == "global" and len(units) > 1:
        found = ", ".join(sorted({str(entry or "single weights") for entry in units}))
        raise ShapeError(
            f"{op}: expected blocks of one size, or none at all, for scope='global', got {found}, whose scores cannot "
            "be compared; use scope='layer'"
        )
    return patterns


def check_unbroken(op: str, layers: Layers, names: Sequence[str] | None) -> None:
    """Refuse masks that break the pattern of their layer."""
    for i, layer in enumerate(layers):
        if layer.pattern is None or layer.mask is None:
            continue
        broken, first = broken_in(layer.pattern, BitMask.of(layer.mask, layer.tensor.shape, format_of(layer.tensor)))
        if broken:
            what = "block" if layer.pattern.unit > 1 else "group"
            raise SparsityError(
                f"{op}: expected a mask of {label_of(names, i)} that keeps to {layer.pattern}, got {broken} {what}s "
                f"that do not, the first being {what} {first}; start from another mask, or without one"
            )


def broken_in(pattern: Pattern, mask: BitMask) -> tuple[int, int]:
    """Return in how many groups or blocks a mask breaks a pattern, and in which of them first, or -1.

    Temporary memory: about 12 MB, more if a million weights are less than the first dimension lets one cut off.
    """
    total, number, first = 0, 0, -1
    for part in mask.parts(pattern.depth):
        broken = pattern.broken(part.to_bool())
        found = int(broken.count_nonzero())
        if found and first < 0:
            first = number + int(broken.nonzero()[0])
        total, number = total + found, number + len(broken)
    return total, first
