"""Whether work on a device is being recorded into a CUDA graph rather than run."""

from __future__ import annotations

import torch

__all__ = ["is_capturing"]


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph records what goes to the current stream. Callers look it up here, where tests replace it."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
