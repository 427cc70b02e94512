"""Patterns: which weights of a layer may be pruned beside each other, and which only together.

Everything that a pattern is in Python is a class here. Its kernels are in ``csrc/order/pattern.h``, its definition for
the tests in ``backends/reference.py``.
"""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch

__all__ = ["NM", "Block", "Pattern", "Unstructured"]

MOST = 32  # weights of a group, and rows or columns of a block
NONE, GROUPS, BLOCKS = 0, 1, 2  # kinds, as in csrc/order/pattern.h

Box: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]  # first indices and lengths


class Pattern(ABC):
    """Base class of patterns. Use ``Unstructured``, ``NM`` or ``Block``.

    A pattern says what of a layer is ranked, weights or blocks of them, and which of these are protected: they are kept
    whatever their rank.
    """

    unit = 1  # weights that are pruned together
    depth = 1  # how far along the first dimension a group or block reaches

    @abstractmethod
    def misfit(self, shape: Sequence[int]) -> str | None:
        """Return why a weight of this shape cannot have the pattern; None if it can."""

    def ranked_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of what is ranked: that of the weight, or its numbers of blocks."""
        return tuple(shape)

    @abstractmethod
    def part_misfit(self, shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]) -> str | None:
        """Return why a box of a weight that fits cannot be ranked by itself; None if it can.

        The box has the first indices ``offsets`` and lengths ``sizes``, and is not empty.
        """

    def ranked_part(self, offsets: Sequence[int], sizes: Sequence[int], shape: Sequence[int]) -> Box:
        """Return the box, in the ranked shape, of what is ranked of such a box of a weight of this shape."""
        return tuple(offsets), tuple(sizes)

    @abstractmethod
    def band(self, shape: Sequence[int]) -> tuple[Pattern, tuple[int, ...]]:
        """Return pattern and shape of the shortest run of flat indices that can be ranked by itself.

        Several of them that follow each other are one such weight, longer along its first dimension, as is the whole.
        """

    def num_protected(self, shape: Sequence[int]) -> int:
        """Return how many weights are kept whatever their rank."""
        return 0

    def most(self, shape: Sequence[int]) -> int:
        """Return how many weights can be pruned."""
        return math.prod(shape) - self.num_protected(shape)

    @abstractmethod
    def row(self, shape: Sequence[int], *, is_channels_last: bool) -> tuple[int, int, int, int]:
        """Return the pattern of a weight as kernels get it: its kind and three numbers (csrc/order/pattern.h)."""

    @abstractmethod
    def broken(self, kept: torch.Tensor) -> torch.Tensor:
        """Return a bool per group or block: whether a mask (True = kept) breaks the pattern in it.

        They are in the order of their first weights. ``kept`` has the shape of the weight.
        """

    @abstractmethod
    def eligible(self, keys: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """Return which of the ranked are neither pruned nor protected, as bool.

        Both have the shape of the weight; keys are signed integers, ordered as magnitudes are, and ``kept`` is bool.
        """

    def ranked(self, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores of what is ranked, given those of the weights, contiguous."""
        return scores

    def spread(self, units: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """Return for each weight the value of its unit."""
        return units


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Any weight may be pruned: the default, if nothing is asked for.

    Parameters
    ----------
    min_kept_per_row : int, optional
        How many weights of each row, the last in the order, are kept whatever their rank. A row holds the weights of
        one output: ``weight[i]``.

    References
    ----------
    L. Gao et al., "Weight-sparse transformers have interpretable circuits", 2025, arXiv:2511.13653, keep 4 per neuron.
    """

    min_kept_per_row: int = 0

    def __post_init__(self) -> None:
        kept = _whole("min_kept_per_row", self.min_kept_per_row)
        if kept < 0:
            raise ValueError(f"Unstructured: expected min_kept_per_row of 0 or more, got {kept}")
        object.__setattr__(self, "min_kept_per_row", kept)

    def __str__(self) -> str:
        return f"unstructured, {self.min_kept_per_row} kept per row" if self.min_kept_per_row else "unstructured"

    def misfit(self, shape: Sequence[int]) -> str | None:
        if not self.min_kept_per_row:
            return None
        if len(shape) < 2:
            return f"shape {tuple(shape)} has no rows"
        row = math.prod(shape[1:])
        return None if row >= self.min_kept_per_row else f"rows of {row} weights"

    def part_misfit(self, shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]) -> str | None:
        if not self.min_kept_per_row or tuple(sizes[1:]) == tuple(shape[1:]):
            return None
        dim = next(d for d in range(1, len(shape)) if sizes[d] != shape[d])
        return f"its rows are divided: it has {sizes[dim]} of {shape[dim]} along dim {dim}"

    def band(self, shape: Sequence[int]) -> tuple[Pattern, tuple[int, ...]]:
        return self, (1, math.prod(shape[1:]) if self.min_kept_per_row else 1)

    def num_protected(self, shape: Sequence[int]) -> int:
        return self.min_kept_per_row * shape[0] if self.min_kept_per_row else 0

    def row(self, shape: Sequence[int], *, is_channels_last: bool) -> tuple[int, int, int, int]:
        kind = GROUPS if self.min_kept_per_row else NONE
        return kind, self.min_kept_per_row, math.prod(shape[1:]), 1

    def broken(self, kept: torch.Tensor) -> torch.Tensor:
        return kept.flatten(1).sum(1) < self.min_kept_per_row

    def eligible(self, keys: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        protected = _last_of(self.min_kept_per_row, keys.flatten(1), kept.flatten(1))
        return kept & ~protected.view(kept.shape)


@dataclass(frozen=True)
class NM(Pattern):
    """Of each ``of`` consecutive weights along a dimension, ``keep`` or more stay: ``NM(2, 4)`` is the 2:4 of NVIDIA.

    Up to 1 - keep/of any sparsity is exact: in each group the ``keep`` last in the order are protected, and of the
    others those that come first are pruned. At 1 - keep/of every group keeps exactly ``keep``.

    Parameters
    ----------
    keep, of : int
        1 <= keep < of <= 32. Some libraries name the zeros first; here it is the weights that stay.
    dim : int
        Dimension of the groups: 1, the input channels, for ``Linear`` and convolutions. Weights stored the other way
        round, such as those of transposed convolutions and of Hugging Face's ``Conv1D``, need 0.
    """

    keep: int = 2
    of: int = 4
    dim: int = 1

    def __post_init__(self) -> None:
        for name in ("keep", "of", "dim"):
            object.__setattr__(self, name, _whole(name, getattr(self, name)))
        if not 1 <= self.keep < self.of <= MOST:
            raise ValueError(
                f"NM: expected 1 <= keep < of <= {MOST}, got keep={self.keep}, of={self.of}; keep is how many weights "
                "of a group stay"
            )
        if self.dim < 0:
            raise ValueError(f"NM: expected dim of 0 or more, got {self.dim}")

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}" + (f" along dim {self.dim}" if self.dim != 1 else "")

    @property
    def depth(self) -> int:  # type: ignore[override]
        return self.of if self.dim == 0 else 1

    @property
    def sparsity(self) -> float:
        """Fraction of weights pruned where every group keeps exactly ``keep``: 1 - keep/of."""
        return 1 - self.keep / self.of

    def misfit(self, shape: Sequence[int]) -> str | None:
        if len(shape) < 2 or self.dim >= len(shape):
            return f"shape {tuple(shape)} has no dim {self.dim} to group" if self.dim >= len(shape) else "one dimension"
        size = shape[self.dim]
        return None if size % self.of == 0 else f"size {size} of dim {self.dim} is not divisible by {self.of}"

    def part_misfit(self, shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]) -> str | None:
        first, size = offsets[self.dim], sizes[self.dim]
        if first % self.of == 0 and size % self.of == 0:
            return None
        part = f"{first} to {first + size} of {shape[self.dim]} along dim {self.dim}"
        return f"it has {part}, which cuts groups of {self.of}"

    def band(self, shape: Sequence[int]) -> tuple[Pattern, tuple[int, ...]]:
        return replace(self, dim=1), (1, self.of, math.prod(shape[self.dim + 1 :]))

    def num_protected(self, shape: Sequence[int]) -> int:
        return math.prod(shape) // self.of * self.keep

    def row(self, shape: Sequence[int], *, is_channels_last: bool) -> tuple[int, int, int, int]:
        order = list(range(len(shape)))  # of the dimensions in memory
        if is_channels_last:
            order.append(order.pop(1))
        return GROUPS, self.keep, self.of, math.prod(shape[d] for d in order[order.index(self.dim) + 1 :])

    def _groups(self, values: torch.Tensor) -> torch.Tensor:
        last = values.movedim(self.dim, -1)
        return last.reshape(*last.shape[:-1], -1, self.of)

    def broken(self, kept: torch.Tensor) -> torch.Tensor:
        groups = kept.reshape(*kept.shape[: self.dim], -1, self.of, *kept.shape[self.dim + 1 :])
        return (groups.sum(self.dim + 1) < self.keep).flatten()

    def eligible(self, keys: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        protected = _last_of(self.keep, self._groups(keys), self._groups(kept))
        return kept & ~protected.flatten(-2).movedim(-1, self.dim)


@dataclass(frozen=True)
class Block(Pattern):
    """Weights are pruned in whole blocks of ``rows`` x ``cols``, ranked by the sums of their magnitudes.

    A weight of more than two dimensions is seen as a matrix of its first dimension by all others. The sum is taken in
    float32 (for float64 weights in float64), in row-major order; of tied blocks the first are kept.

    Parameters
    ----------
    rows, cols : int
        1 to 32 each, not both 1.
    """

    rows: int
    cols: int

    def __post_init__(self) -> None:
        for name in ("rows", "cols"):
            object.__setattr__(self, name, _whole(name, getattr(self, name)))
        if not (1 <= self.rows <= MOST and 1 <= self.cols <= MOST) or self.unit == 1:
            raise ValueError(
                f"Block: expected 1 to {MOST} rows and cols, not both 1, got {self.rows} x {self.cols}; single weights "
                "are Unstructured()"
            )

    def __str__(self) -> str:
        return f"blocks of {self.rows} x {self.cols}"

    @property
    def unit(self) -> int:  # type: ignore[override]
        return self.rows * self.cols

    @property
    def depth(self) -> int:  # type: ignore[override]
        return self.rows

    def misfit(self, shape: Sequence[int]) -> str | None:
        if len(shape) < 2:
            return "one dimension"
        height, width = shape[0], math.prod(shape[1:])
        if height % self.rows == 0 and width % self.cols == 0:
            return None
        return f"{height} x {width} is no whole number of blocks"

    def part_misfit(self, shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]) -> str | None:
        (top, left), (height, width) = self._in_matrix(offsets, sizes, shape)
        if width != math.prod(sizes[1:]):
            return f"its part of each row, {' x '.join(map(str, sizes[1:]))} of shape {tuple(shape[1:])}, is in pieces"
        if top % self.rows == 0 and height % self.rows == 0 and left % self.cols == 0 and width % self.cols == 0:
            return None
        return f"it has rows {top} to {top + height} and columns {left} to {left + width}, which cuts blocks"

    def ranked_part(self, offsets: Sequence[int], sizes: Sequence[int], shape: Sequence[int]) -> Box:
        (top, left), (height, width) = self._in_matrix(offsets, sizes, shape)
        return (top // self.rows, left // self.cols), (height // self.rows, width // self.cols)

    def _in_matrix(self, offsets: Sequence[int], sizes: Sequence[int], shape: Sequence[int]) -> Box:
        """Return the box of the matrix that encloses the box of a weight."""
        if not math.prod(sizes):
            return (0, 0), (0, 0)
        strides = [math.prod(shape[dim + 1 :]) for dim in range(1, len(shape))]
        first = sum(offset * stride for offset, stride in zip(offsets[1:], strides, strict=True))
        length = 1 + sum((size - 1) * stride for size, stride in zip(sizes[1:], strides, strict=True))
        return (offsets[0], first), (sizes[0], length)

    def band(self, shape: Sequence[int]) -> tuple[Pattern, tuple[int, ...]]:
        return self, (self.rows, math.prod(shape[1:]) if self.rows > 1 else self.cols)

    def ranked_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return shape[0] // self.rows, math.prod(shape[1:]) // self.cols

    def row(self, shape: Sequence[int], *, is_channels_last: bool) -> tuple[int, int, int, int]:
        return BLOCKS, self.rows, self.cols, math.prod(shape[1:])

    def _blocks(self, values: torch.Tensor) -> torch.Tensor:
        """Return a view or copy with a row per block, and the weights of a block in it, in row-major order."""
        down, across = self.ranked_shape(values.shape)
        return values.reshape(down, self.rows, across, self.cols).transpose(1, 2).reshape(down * across, self.unit)

    def broken(self, kept: torch.Tensor) -> torch.Tensor:
        number = self._blocks(kept).sum(1)
        return (number > 0) & (number < self.unit)

    def eligible(self, keys: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        return self._blocks(kept)[:, 0].reshape(self.ranked_shape(kept.shape))

    def ranked(self, scores: torch.Tensor) -> torch.Tensor:
        dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
        blocks = self._blocks(scores)
        total = torch.zeros(len(blocks), dtype=dtype, device=scores.device)
        for column in range(self.unit):  # in the order of the contract, whatever the device
            total += blocks[:, column].to(dtype).abs()
        return total.view(self.ranked_shape(scores.shape))

    def spread(self, units: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        rows = units.repeat_interleave(self.rows, 0).repeat_interleave(self.cols, 1)
        return rows.view(tuple(shape))


def _last_of(keep: int, keys: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return which weights are the ``keep`` last in the order of their group, the last dimension."""
    keys = keys.masked_fill(~kept, -1)
    # Of equal keys the sort leaves the lower index first, which is the later one in the order.
    order = keys.sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(kept, memory_format=torch.contiguous_format).scatter_(-1, order[..., :keep], True)


def _whole(name: str, value: object) -> int:
    """Return an integer of any type as an int; refuse all else, and bools."""
    if isinstance(value, bool):
        raise TypeError(f"expected an integer {name}, got {value!r}")
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"expected an integer {name}, got {value!r}") from None
