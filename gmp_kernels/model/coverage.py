"""Coverage of a model by its targets: the share that is pruned, and a reason for everything that is not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gmp_kernels.errors import printable

__all__ = [
    "FROZEN",
    "IGNORED",
    "NOT_A_TARGET",
    "NOT_OPTIMIZED",
    "Coverage",
    "CoveredTensor",
    "gap_in",
    "shown_names",
    "shown_shape",
]

FROZEN = "frozen"
NOT_OPTIMIZED = "not in the optimizer"
NOT_A_TARGET = "not among targets="
IGNORED = "ignored by"  # the entry follows
ENOUGH = 0.5  # share of the weights in matrices; targets with less of it are worth a warning
MOST_NAMED = 3


@dataclass(frozen=True)
class CoveredTensor:
    """Tensor of a model, pruned or left out.

    Attributes
    ----------
    name : str
    shape : tuple of int
    dtype : str
    reason : str
        Why it is left out; empty for a target.
    can_be_target : bool
        Whether ``targets=`` would accept its name.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    reason: str = ""
    can_be_target: bool = True

    @property
    def num_weights(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Coverage:
    """All tensors of a model, divided into targets and those that are left out.

    ``str()`` is a table: one row per dtype and reason, with the largest tensor of each.

    Attributes
    ----------
    targets : tuple of CoveredTensor
        In the order of the model.
    left_out : tuple of CoveredTensor
        Each with one reason, in the order of the model. Tied parameters count once.

    Notes
    -----
    Holds names, shapes and reasons, but no tensors.
    """

    targets: tuple[CoveredTensor, ...]
    left_out: tuple[CoveredTensor, ...]

    @property
    def num_weights(self) -> int:
        """Weights of the targets."""
        return _total(self.targets)

    @property
    def share_of_model(self) -> float:
        """Weights of the targets over all weights, in [0, 1]."""
        return _share(self.num_weights, self.num_weights + _total(self.left_out))

    @property
    def share_of_matrices(self) -> float:
        """The same, of tensors of two or more dimensions alone."""
        targets = _total(_matrices(self.targets))
        return _share(targets, targets + _total(_matrices(self.left_out)))

    def largest_left_out(self, count: int) -> list[CoveredTensor]:
        """Return the largest matrices that are left out, the largest first."""
        return sorted(_matrices(self.left_out), key=lambda tensor: -tensor.num_weights)[:count]

    def __str__(self) -> str:
        """Return the table."""
        total = self.num_weights + _total(self.left_out)
        rows = [("", "dtype", "tensors", "weights", "share", "largest")]
        for label, dtype, tensors in [*_groups("targets", self.targets), *_groups("", self.left_out)]:
            weights, largest = _total(tensors), max(tensors, key=lambda tensor: tensor.num_weights)
            size = f"{printable(largest.name)} ({shown_shape(largest.shape)})"
            rows.append((label, dtype, str(len(tensors)), f"{weights:,}", f"{_share(weights, total):.1%}", size))
        a, b, c, d, e, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
        lines = [f"{r[0]:{a}}  {r[1]:{b}}  {r[2]:>{c}}  {r[3]:>{d}}  {r[4]:>{e}}  {r[5]}" for r in rows]
        lines.append(
            f"targets are {self.share_of_model:.1%} of the weights, {self.share_of_matrices:.1%} of those in matrices"
        )
        return "\n".join(lines)


def gap_in(coverage: Coverage, *, by_default: bool) -> str | None:
    """Return a warning if most weights in matrices are left out although the user has not asked for that.

    The user has asked to leave out what ``ignore=`` names, and what explicit targets do not reach, but not parameters
    that are frozen or not in the optimizer.
    """
    silent = [
        tensor
        for tensor in coverage.largest_left_out(len(coverage.left_out))
        if (not tensor.reason.startswith(IGNORED) if by_default else tensor.reason in (FROZEN, NOT_OPTIMIZED))
    ]
    share = _share(targets := _total(_matrices(coverage.targets)), targets + _total(silent))
    if share >= ENOUGH or not silent:
        return None
    named = ", ".join(f"'{printable(tensor.name)}' ({tensor.reason})" for tensor in silent[:MOST_NAMED])
    if any(tensor.reason in (FROZEN, NOT_OPTIMIZED) for tensor in silent[:MOST_NAMED]):
        advice = "give the optimizer what is to be pruned, with requires_grad, before the scheduler is built"
    elif any(tensor.can_be_target for tensor in silent):
        advice = "targets='*' means every matrix that can be pruned, and ignore= leaves some of them out"
    else:
        advice = "they cannot be pruned as they are"
    return (
        f"GMPScheduler: expected targets that hold at least half of the weights in matrices, got {share:.1%}; the "
        f"largest left out are {named}; {advice}"
    )


def shown_names(names: Sequence[str]) -> str:
    """Return the first few names, and the number of others."""
    others = f" and {len(names) - MOST_NAMED} others" if len(names) > MOST_NAMED else ""
    return ", ".join(f"'{printable(name)}'" for name in names[:MOST_NAMED]) + others


def _groups(label: str, tensors: Iterable[CoveredTensor]) -> list[tuple[str, str, list[CoveredTensor]]]:
    groups: dict[tuple[str, str], list[CoveredTensor]] = {}
    for tensor in tensors:
        groups.setdefault((label or tensor.reason, tensor.dtype), []).append(tensor)
    return sorted(((*key, found) for key, found in groups.items()), key=lambda group: -_total(group[2]))


def _matrices(tensors: Iterable[CoveredTensor]) -> list[CoveredTensor]:
    return [tensor for tensor in tensors if len(tensor.shape) >= 2]


def _total(tensors: Iterable[CoveredTensor]) -> int:
    return sum(tensor.num_weights for tensor in tensors)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def shown_shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"
