"""What ranks the layers of a pruner, and how much of them it may prune."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeAlias

import torch

from gmp_kernels.checks import check_fit
from gmp_kernels.counts import broken_in, patterns_of
from gmp_kernels.distributed.placement import region_of, sum_over_shards
from gmp_kernels.errors import SparsityError, StateError
from gmp_kernels.masks import BitMask
from gmp_kernels.model.targets import Entry, ParameterIndex
from gmp_kernels.ops import Scope
from gmp_kernels.patterns import Pattern, Unstructured
from gmp_kernels.pruner.distributions import Limit
from gmp_kernels.schedules import check_sparsity

__all__ = ["Limits", "Patterns", "Scores", "check_kept"]

Patterns: TypeAlias = Pattern | Mapping[Entry, Pattern] | None
# Called with the name of a parameter, the parameter, and its optimizer state.
Scores: TypeAlias = Callable[[str, torch.Tensor, Mapping[str, Any]], Any]


@dataclass(frozen=True)
class Limits:
    """Patterns, caps and scores of the layers of a pruner.

    Attributes
    ----------
    patterns : dict of str to Pattern
        Of the layers that have one.
    max_sparsity : float or None
        Of each layer.
    scores : callable or None
        As in ``GMPScheduler``.
    regrow : bool
        Whether each update ranks all weights anew.
    """

    patterns: Mapping[str, Pattern]
    max_sparsity: float | None = None
    scores: Scores | None = None
    regrow: bool = False

    @classmethod
    def of(
        cls,
        index: ParameterIndex,
        shapes: Mapping[str, Sequence[int]],
        scope: Scope,
        pattern: Patterns,
        max_sparsity: float | None,
        min_kept_per_row: int | None,
        scores: Scores | None,
        regrow: bool,
    ) -> Limits:
        """Check these arguments of a pruner whose targets have these shapes, in the order of the model of ``index``.

        Raises
        ------
        TargetError
            An entry of ``pattern`` reaches no target.
        ShapeError
            Targets do not fit their patterns, all of them named; or they cannot be ranked together.
        SparsityError
            ``max_sparsity`` is not above 0, or above 1.
        TypeError
            Anything but a pattern, or scores that cannot be called.
        ValueError
            ``min_kept_per_row`` beside patterns.
        """
        if min_kept_per_row is not None:
            if pattern is not None:
                raise ValueError(
                    "GMPScheduler: expected pattern or min_kept_per_row, got both; patterns keep weights of their own, "
                    "and Unstructured(min_kept_per_row) is one"
                )
            pattern = Unstructured(min_kept_per_row)
        if scores is not None and not callable(scores):
            raise TypeError(
                f"GMPScheduler: expected scores to be a function of name, parameter and optimizer state, got a "
                f"{type(scores).__name__}; it is called at every update, because scores change"
            )
        if max_sparsity is not None:
            max_sparsity = check_sparsity("GMPScheduler: max_sparsity", max_sparsity)
            if max_sparsity == 0.0:
                raise SparsityError("GMPScheduler: expected max_sparsity above 0, got 0.0; name layers in ignore=")
        given = dict.fromkeys(shapes, None if isinstance(pattern, Mapping) else pattern)
        if isinstance(pattern, Mapping):
            for own, names in index.assigned("pattern", pattern, shapes):
                given |= dict.fromkeys(names, own)
        found = patterns_of("GMPScheduler", list(given.values()), len(given), scope) or [None] * len(given)
        check_fit("GMPScheduler", found, list(shapes.values()), list(shapes))
        patterns = {name: own for name, own in zip(given, found, strict=True) if own is not None}
        return cls(patterns, max_sparsity, scores, bool(regrow))

    def of_layers(self, shapes: Mapping[str, Sequence[int]]) -> list[Limit] | None:
        """Return the limit of each layer; None if all weights may be pruned, one by one."""
        if not self.patterns and self.max_sparsity is None:
            return None
        return [self._of(name, shape) for name, shape in shapes.items()]

    def _of(self, name: str, shape: Sequence[int]) -> Limit:
        pattern, n = self.patterns.get(name), math.prod(shape)
        unit, most = (1, n) if pattern is None else (pattern.unit, pattern.most(shape))
        if self.max_sparsity is not None:
            # 0.29 means 29 of 100, although the float is a little less.
            most = min(most, math.floor(Fraction(repr(self.max_sparsity)) * (n // unit)) * unit)
        return Limit(unit, most)

    def settings(self) -> dict[str, object]:
        """Return all this as plain data, None for what is not used, as in the state of earlier versions."""
        words: object = {name: repr(pattern) for name, pattern in self.patterns.items()} or None
        return {
            "pattern": words,
            "max_sparsity": self.max_sparsity,
            "scores": None if self.scores is None else "given",
            "regrow": self.regrow or None,
        }

    def __str__(self) -> str:
        """Return what is used, as arguments of a pruner; empty if nothing is."""
        kinds = ", ".join(dict.fromkeys(map(str, self.patterns.values())))
        words = [f"pattern={kinds}"] if kinds else []
        words += [] if self.max_sparsity is None else [f"max_sparsity={self.max_sparsity}"]
        words += ["regrow=True"] if self.regrow else []
        words += [] if self.scores is None else [f"scores={getattr(self.scores, '__qualname__', self.scores)}"]
        return ", ".join(words)


def check_kept(
    patterns: Mapping[str, Pattern],
    masks: Mapping[str, BitMask],
    parameters: Mapping[str, torch.Tensor],
    what: str,
    advice: str,
    kind: type[SparsityError] | type[StateError] = SparsityError,
) -> None:
    """Raise an error on every rank if masks, each the local part, break the patterns of their layers.

    ``what`` says where they are from. Where a part cannot be ranked by itself, the first step says so.
    """
    for name in (name for name in masks if name in patterns):
        pattern, parameter, num_broken = patterns[name], parameters[name], 0
        region = region_of(name, parameter)
        if region.numel and pattern.part_misfit(*region) is None:
            num_broken, _ = broken_in(pattern, masks[name])
        found = int(sum_over_shards(num_broken, parameter))
        if found:
            parts = "blocks" if pattern.unit > 1 else "groups"
            raise kind(
                f"GMPScheduler: expected {what} to keep to the pattern of '{name}' ({pattern}), got {found} {parts} "
                f"that do not; {advice}"
            )
