"""One pruner per parameter: a register of who holds which."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["let_go", "owners_of", "set_owner"]

# Neither parameters nor owners live longer for it. Tensors compare by value, so that ordinary weak dictionaries cannot
# have them as keys.
_owners: Any = WeakIdKeyDictionary()


def owners_of(parameters: Iterable[torch.Tensor]) -> set[Any]:
    """Return all that hold one of these parameters."""
    found = (reference() for p in parameters if (reference := _owners.get(p)) is not None)
    return {owner for owner in found if owner is not None}


def set_owner(parameters: Iterable[torch.Tensor], owner: object) -> None:
    """Make one the owner of these parameters."""
    for p in parameters:
        _owners[p] = weakref.ref(owner)


def let_go(parameters: Iterable[torch.Tensor], owner: object) -> None:
    """Leave those of these parameters without an owner that this one holds."""
    for p in parameters:
        if (reference := _owners.get(p)) is not None and reference() is owner:
            del _owners[p]
