"""Places of tensors in memory, to tell whether those of a call are those of an earlier one, as cheaply as can be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from typing import Any, TypeAlias

import torch

try:
    from gmp_kernels._C import describe
except ImportError:
    describe = None  # type: ignore[assignment]

__all__ = ["BY_DLPACK", "by_getters", "layouts_of"]

Layouts: TypeAlias = Callable[[list[torch.Tensor]], object]
_dtype, _shape = attrgetter("dtype"), attrgetter("shape")


def by_getters(tensors: Sequence[torch.Tensor]) -> list[list[Any]] | None:
    """Return address, dtype, shape and contiguity of all tensors; None where one has no address."""
    of = torch.Tensor
    layouts: list[list[Any]] = [list(map(f, tensors)) for f in (of.data_ptr, _dtype, _shape, of.is_contiguous)]
    return layouts if all(layouts[0]) else None


def _by_dlpack() -> Layouts | None:
    """Return what tells the same in a third of the time, from torch 2.10 on; None where it cannot be had.

    To it torch's integers of 1 to 7 bits are those of 8, whose bytes they lie in.
    """
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if describe is None or exchange is None or describe(exchange, [torch.ones(1, device="cpu")]) is None:
        return None
    return partial(describe, exchange)


BY_DLPACK = _by_dlpack()
layouts_of: Layouts = BY_DLPACK or by_getters
