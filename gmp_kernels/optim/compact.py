"""Compact state: stored for the kept weights only, and laid out by the bits that tell which those are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from gmp_kernels.backends import Compaction
from gmp_kernels.distributed.placement import local
from gmp_kernels.errors import StateError

__all__ = ["CompactState", "check_layout", "compact_names", "layout_of", "version_of"]


class CompactState(dict[str, Any]):
    """The state of one parameter, stored for the kept weights only, and the bits that tell which those are.

    State and layout are one object, so that whoever replaces the one replaces the other.

    Attributes
    ----------
    layout : Compaction
        Nobody may write its bits meanwhile; if somebody has, they are not at ``version`` any more.
    names : frozenset of str
        The entries that are laid out by it.
    shape : torch.Size
        Of what this process holds of the parameter.
    version : int
    """

    def __init__(self, values: Mapping[str, Any], layout: Compaction, names: Iterable[str], shape: torch.Size) -> None:
        super().__init__(values)
        self.layout = layout
        self.names = frozenset(names)
        self.shape = shape
        self.version = version_of(layout.mask)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the bits counts its versions from 0, and could not tell that they were written before.
        _check_bits("copying an optimizer", self)
        return self.__dict__

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        self.__dict__.update(attributes)
        self.version = version_of(self.layout.mask)


def version_of(tensor: torch.Tensor) -> int:
    """Return how often it was written in place; inference tensors do not count that."""
    return 0 if tensor.is_inference() else tensor._version


def layout_of(state: Mapping[str, Any] | None) -> Compaction | None:
    """Return the layout of a parameter's state; None if it is dense."""
    return state.layout if isinstance(state, CompactState) else None


def compact_names(state: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of the entries that are stored for the kept weights only."""
    return state.names if isinstance(state, CompactState) else frozenset()


def check_layout(optimizer: str, p: torch.Tensor, state: Mapping[str, Any] | None) -> None:
    """Refuse compact state whose bits were written, or that is not of as many weights as the parameter.

    Raises
    ------
    StateError
    """
    if not isinstance(state, CompactState):
        return
    _check_bits(optimizer, state)
    if state.shape.numel() != local(p).numel():
        raise StateError(
            f"{optimizer}: expected a parameter of the size for which its compact state was laid out, got one of "
            f"shape {tuple(p.shape)}; make a new optimizer, or a new parameter group, for a layer that has grown"
        )


def _check_bits(optimizer: str, state: CompactState) -> None:
    if state.version != version_of(state.layout.mask):
        raise StateError(
            f"{optimizer}: expected the mask of a parameter of shape {tuple(state.shape)} as it was when its compact "
            "state was laid out, got one that was written in place; let the scheduler prune, or prune a clone of its "
            "mask and give that to set_masks"
        )
