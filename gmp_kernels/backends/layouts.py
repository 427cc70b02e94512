"""Layouts of tensors, for a fast test of whether the tensors of a call are those of an earlier one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any, TypeAlias

import torch

try:
    from gmp_kernels._C import describe
except ImportError:
    describe = None  # type: ignore[assignment]

__all__ = ["BY_DLPACK", "by_getters", "layouts_of"]

Layouts: TypeAlias = Callable[[list[torch.Tensor], bool], object]
_dtype, _shape = attrgetter("dtype"), attrgetter("shape")


def by_getters(tensors: list[torch.Tensor], with_addresses: bool) -> list[list[Any]] | None:
    """Return device, dtype, shape and strides of all tensors and, ``with_addresses``, their addresses.

    Returns None if a tensor has elements but no address.
    """
    of = torch.Tensor
    try:
        addresses = list(map(of.data_ptr, tensors))
    except (RuntimeError, TypeError):
        return None  # a sparse tensor, which has no memory of its own, or no tensor at all
    if not all(addresses) and any(tensor.numel() for tensor in tensors if not tensor.data_ptr()):
        return None
    layouts: list[list[Any]] = [list(map(f, tensors)) for f in (of.get_device, _dtype, _shape, of.stride)]
    return [*layouts, addresses] if with_addresses else layouts


def _by_dlpack() -> Layouts | None:
    """Return a function that does the same in a third of the time (from torch 2.10 on); None if there is none.

    It does not distinguish torch's integers of 1 to 7 bits from those of 8 bits, in which they are stored.
    """
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if describe is None or exchange is None or describe(exchange, [torch.ones(1, device="cpu")], True) is None:
        return None
    return partial(describe, exchange)


BY_DLPACK = _by_dlpack()
layouts_of: Layouts = BY_DLPACK or by_getters
