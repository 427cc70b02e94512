"""Recognition of patterns: those that all zeros of a tensor keep to, found piece by piece."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from gmp_kernels.patterns import NM, Block, Pattern

__all__ = ["Recognition"]

# Each chain goes from the tightest pattern to the loosest. What keeps to one keeps to those after it that fit. Of the
# chains of a kind, the first that holds anything tells.
SIDES = (32, 16, 8, 4)
GROUPS = [[NM(1, 4, dim), NM(2, 4, dim), NM(4, 8, dim)] for dim in (1, 0)]
BLOCKS = [[Block(n, n) for n in SIDES], [Block(1, n) for n in SIDES], [Block(n, 1) for n in SIDES]]
KINDS: list[list[Sequence[Pattern]]] = [[*GROUPS], [*BLOCKS]]


class Recognition:
    """Patterns that fit the zeros of a tensor, whose elements come in pieces.

    Parameters
    ----------
    shape : tuple of int
    most : int
        Elements of a piece. Patterns are left out whose groups or bands of blocks are longer.

    Attributes
    ----------
    unit : int
        Elements of which each piece has a multiple, except for the last.
    """

    def __init__(self, shape: tuple[int, ...], most: int) -> None:
        self.unit = 1
        self._shape = shape
        self._kinds = [[self._fitting(chain, most) for chain in kind] for kind in KINDS]
        self._has_zeros = self._has_others = False

    def _fitting(self, chain: Sequence[Pattern], most: int) -> list[Pattern]:
        """Return the patterns of a chain that can be looked for, the loosest first."""
        fitting = []
        for pattern in reversed(chain):
            if pattern.misfit(self._shape) is None:
                unit = math.lcm(self.unit, math.prod(pattern.band(self._shape)[1]))
                if 0 < unit <= most:
                    self.unit = unit
                    fitting.append(pattern)
        return fitting

    def add(self, values: torch.Tensor, num_zeros: int) -> None:
        """Look at the next piece, which has so many zeros. Numbers that rule a pattern out save a look."""
        self._has_zeros |= num_zeros > 0
        self._has_others |= num_zeros < len(values)
        zeros = None
        for chain in (chain for kind in self._kinds for chain in kind):
            # What came before keeps to the patterns that are left, because they are looser.
            while chain and not _can_keep(chain[-1], len(values), num_zeros):
                chain.pop()
            if not chain or num_zeros in (0, len(values)):
                continue
            zeros = values == 0 if zeros is None else zeros
            while chain and not self._keeps(chain[-1], zeros):
                chain.pop()

    def found(self) -> tuple[str, ...]:
        """Return the tightest pattern of each kind; none if there are no zeros or nothing else, which keeps to all."""
        if not (self._has_zeros and self._has_others):
            return ()
        held = [[str(chain[-1]) for chain in kind if chain] for kind in self._kinds]
        return tuple(names[0] for names in held if names)

    def _keeps(self, pattern: Pattern, zeros: torch.Tensor) -> bool:
        of_run, shape = pattern.band(self._shape)
        if isinstance(of_run, NM):
            return bool((_sums(zeros, *shape[1:]) >= of_run.of - of_run.keep).all())
        assert isinstance(of_run, Block)
        if of_run.rows > 1:
            rows = zeros.view(-1, *shape)
            if not rows[:, 1:].eq(rows[:, :1]).all():
                return False
            zeros = rows[:, 0].contiguous()
        sums = _sums(zeros, of_run.cols)
        return bool(((sums == 0) | (sums == of_run.cols)).all())


def _sums(flags: torch.Tensor, size: int, stride: int = 1) -> torch.Tensor:
    """Return how many are set of each group of so many, which lie a stride apart."""
    # A sum of torch takes nearly twice as long.
    first, *others = flags.view(torch.uint8).view(-1, size, stride).unbind(1)
    total = first.clone()
    for other in others:
        total += other
    return total


def _can_keep(pattern: Pattern, size: int, num_zeros: int) -> bool:
    """Whether so many zeros among whole groups or blocks can keep to a pattern."""
    if isinstance(pattern, NM):
        return num_zeros * pattern.of >= (pattern.of - pattern.keep) * size
    return num_zeros % pattern.unit == 0
