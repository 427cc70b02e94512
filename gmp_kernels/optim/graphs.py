"""Refusals of what a CUDA graph that holds a step would repeat wrongly, or read no more."""

from __future__ import annotations

from typing import NoReturn

import torch

from gmp_kernels.errors import CaptureError
from gmp_kernels.masks import BitMask

__all__ = ["check_mask_of_graph", "refuse", "refuse_first_step"]


def check_mask_of_graph(optimizer: str, p: torch.Tensor, address: int | None, mask: BitMask | None) -> None:
    """Raise CaptureError for a mask other than the one that a graph reads at this address.

    The address is 0 where a graph reads none, and None where no graph holds a step of the parameter. A mask of None
    lets the mask go.
    """
    if mask is None and address:
        raise CaptureError(
            f"{optimizer}.forget_masks: expected a parameter whose mask no CUDA graph reads, got one of shape "
            f"{tuple(p.shape)} whose step was captured under it; fill the mask with ones, or build a new optimizer "
            "and capture again"
        )
    if mask is not None and address is not None and address != mask.packed.data_ptr():
        raise CaptureError(
            f"{optimizer}.set_masks: expected the mask that a parameter of shape {tuple(p.shape)} had when a CUDA "
            f"graph captured its step, got {'another one' if address else 'one where it had none'}; set masks, or "
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
