"""The device that kernels run on: made current, its errors named, and whether a CUDA graph records its work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from gmp_kernels.errors import CaptureError, DeviceError

__all__ = ["current", "is_capturing", "on_device", "refuse_capture", "stream_of"]


def current(device: torch.device) -> AbstractContextManager[object]:
    """Make a device current: launches and copies do so, and torch's would stay another one.

    To make current what is so already takes longer than to ask.
    """
    if device.type == "cpu" or torch.cuda.current_device() == device.index:
        return nullcontext()
    return torch.cuda.device(device)


@contextmanager
def on_device(device: torch.device, what: str) -> Iterator[None]:
    """Make a device current and give errors the name of an operation."""
    try:
        with current(device):
            yield
    except torch.OutOfMemoryError as error:
        raise DeviceError(
            f"{what}: no memory left on {device} for the workspace, nothing was changed ({error}); free some, or "
            "prune fewer layers at a time"
        ) from error
    except CaptureError as error:
        raise CaptureError(f"{what}: {error}") from None
    except RuntimeError as error:
        raise DeviceError(
            f"{what}: {device} reports an error, of this call or of an earlier one ({error}); run again with "
            "CUDA_LAUNCH_BLOCKING=1 to see which"
        ) from error


def stream_of(device: torch.device) -> int:
    """Return the handle of the device's current stream; 0 on the host."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph records what goes to the current stream. Callers look it up here, where tests replace it."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def refuse_capture(device: torch.device) -> None:
    """Raise CaptureError while a CUDA graph is captured: its replays would find the numbers of this call."""
    if is_capturing(device):
        raise CaptureError(
            "expected an operation that a CUDA graph can hold, got one that uploads numbers of this call; call it "
            "outside of the capture"
        )
