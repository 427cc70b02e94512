"""One pruner per parameter: a register of who holds which."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol
from weakref import WeakSet

import torch

__all__ = ["let_go", "owners_of", "register"]


class Owner(Protocol):
    """Holder of parameters, for as long as it lives and is registered."""

    @property
    def held(self) -> Iterable[torch.Tensor]:
        """The parameters."""
        ...


# References to the parameters themselves, weak ones too, would keep torch from swapping them when a model is converted.
_owners: WeakSet[Any] = WeakSet()


def owners_of(parameters: Iterable[torch.Tensor]) -> set[Any]:
    """Return all that hold one of these parameters."""
    wanted = set(map(id, parameters))
    return {owner for owner in _owners if not wanted.isdisjoint(map(id, owner.held))}


def register(owner: Owner) -> None:
    """Make it the owner of the parameters that it holds."""
    _owners.add(owner)


def let_go(owner: Owner) -> None:
    """Make it the owner of nothing."""
    _owners.discard(owner)
