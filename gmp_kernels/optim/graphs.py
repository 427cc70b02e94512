"""CUDA graphs that hold steps of an optimizer: the steps they cannot hold, and the memory they read when replayed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

import torch

from gmp_kernels.errors import CaptureError
from gmp_kernels.masks import BitMask
from gmp_kernels.optim.checked import CheckedParameter

__all__ = ["Graphs", "refuse", "refuse_first_step"]


class Graphs:
    """Memory and masks that the graphs captured of an optimizer's steps rely on. Graphs do not tell when they go.

    Attributes
    ----------
    memory : list of torch.Tensor
        What they read beside parameters, gradients, state and masks.
    """

    def __init__(self) -> None:
        self.memory: list[torch.Tensor] = []
        self._bits: dict[torch.Tensor, int] = {}  # addresses of masks; 0: none

    def note(self, parameters: Iterable[CheckedParameter]) -> None:
        """Remember where a graph finds the masks of these parameters."""
        self._bits.update((c.parameter, 0 if c.bits is None else c.bits.data_ptr()) for c in parameters)

    def check_mask(self, optimizer: str, p: torch.Tensor, mask: BitMask | None) -> None:
        """Raise CaptureError for a mask other than the one that a graph reads; None lets that one go."""
        bits = self._bits.get(p)
        if mask is None and bits:
            raise CaptureError(
                f"{optimizer}.forget_masks: expected a parameter whose mask no CUDA graph reads, got one of shape "
                f"{tuple(p.shape)} whose step was captured under it; fill the mask with ones, or build a new optimizer "
                "and capture again"
            )
        if mask is not None and bits is not None and bits != mask.packed.data_ptr():
            raise CaptureError(
                f"{optimizer}.set_masks: expected the mask that a parameter of shape {tuple(p.shape)} had when a CUDA "
                f"graph captured its step, got {'another one' if bits else 'one where it had none'}; set masks, or "
                "build the GMPScheduler, before capturing, and change their bits in place"
            )


def refuse(optimizer: str, got: str) -> NoReturn:
    """Raise CaptureError for a step that a graph would repeat wrongly; ``got`` ends with what to build instead."""
    raise CaptureError(
        f"{optimizer}: expected a step that a CUDA graph can hold, got {got}, or take the step outside of the graph"
    )


def refuse_first_step(optimizer: str) -> NoReturn:
    """Raise CaptureError for a step that would make state, or bring it to the device."""
    raise CaptureError(
        f"{optimizer}: expected state that is on the device before a CUDA graph captures a step, got a parameter "
        "without; take a step outside of the graph first"
    )
