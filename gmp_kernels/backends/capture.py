"""Test whether work on a device is being recorded into a CUDA graph rather than run."""

from __future__ import annotations

import torch

__all__ = ["is_capturing"]


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph records the current stream. Call it as ``capture.is_capturing``, so tests can replace it."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
