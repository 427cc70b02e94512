"""Layouts of tensors, for a fast test of whether the tensors of a call are those of an earlier one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any, TypeAlias

import torch

try:
    from gmp_kernels import _C
except ImportError:
    _C = None  # type: ignore[assignment]

__all__ = ["BY_DLPACK", "EXCHANGE", "by_getters", "gradients_if_unchanged", "has_settings", "layouts_of", "sees_life"]

Layouts: TypeAlias = Callable[..., object]  # with the parameters of ``by_getters``
_dtype, _shape = attrgetter("dtype"), attrgetter("shape")


def by_getters(
    tensors: list[torch.Tensor], with_addresses: bool, with_storages: bool = False
) -> list[list[Any]] | None:
    """Return device, dtype, shape and strides of all tensors; with their addresses and the sizes of their storages.

    Returns None if a tensor has elements but no address, or is a view that negates its memory.
    """
    of = torch.Tensor
    try:
        if any(map(of.is_neg, tensors)):
            return None
        addresses = list(map(of.data_ptr, tensors))
        sizes = list(map(torch.UntypedStorage.nbytes, map(of.untyped_storage, tensors))) if with_storages else []
    except (RuntimeError, TypeError):
        return None  # a sparse tensor, which has no memory of its own, or no tensor at all
    if not all(addresses) and any(tensor.numel() for tensor in tensors if not tensor.data_ptr()):
        return None
    layouts: list[list[Any]] = [list(map(f, tensors)) for f in (of.get_device, _dtype, _shape, of.stride)]
    return [*layouts, addresses, sizes] if with_addresses else [*layouts, sizes]


def _exchange() -> object | None:
    """Return the table of C functions by which tensors tell their layouts (from torch 2.10 on); None if it is no use.

    It does not distinguish torch's integers of 1 to 7 bits from those of 8 bits, in which they are stored.
    """
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    is_known = _C is not None and exchange is not None
    return (
        exchange if is_known and _C.describe(exchange, [torch.ones(1, device="cpu")], True, False) is not None else None
    )


EXCHANGE = _exchange()


def _by_dlpack(tensors: list[torch.Tensor], with_addresses: bool, with_storages: bool = False) -> bytes | None:
    """Do what ``by_getters`` does in a third of the time."""
    return _C.describe(EXCHANGE, tensors, with_addresses, with_storages)


BY_DLPACK: Layouts | None = None if EXCHANGE is None else _by_dlpack
layouts_of: Layouts = BY_DLPACK or by_getters
# Looks at a few pruned weights; None if they do not lie on the host as their mask does (see csrc/bindings.cpp).
sees_life: Callable[..., bool | None] = (lambda *_: None) if EXCHANGE is None else partial(_C.sees_life, EXCHANGE)
# Whether parameter groups have the settings they had, so that what follows from these need not be found again.
has_settings: Callable[..., bool] = (lambda *_: False) if _C is None else _C.has_settings
# Looks at all parameters of an optimizer, and returns their gradients if each has one and nothing else has changed.
# None means that this needs a closer look, which takes more time. See csrc/unchanged.h.
gradients_if_unchanged: Callable[..., list[torch.Tensor] | None] = (
    (lambda *_: None) if EXCHANGE is None else partial(_C.gradients_if_unchanged, EXCHANGE)
)
