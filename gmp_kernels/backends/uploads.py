"""Tables of rows in a device's memory: uploaded without waiting for the device, and kept for calls that need them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import numpy.typing as npt
import torch

from gmp_kernels.backends import devices

__all__ = ["Recent", "put", "upload"]

T = TypeVar("T")


def upload(values: Sequence[Any] | npt.NDArray[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Copy numbers to a device without waiting for it. Torch keeps the memory copied from until that is done."""
    devices.refuse_capture(device)
    # The host whatever torch's default device is.
    host = torch.as_tensor(values, dtype=dtype, device="cpu")
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def put(module: Any, launch: Any, values: npt.NDArray[Any], table: torch.Tensor) -> None:
    """Copy eight-byte numbers to the front of a table as ``upload`` does. A few of them go as arguments of launches.

    Launches (of _cuda or _simt) take less of the host's time than pinning memory. A CUDA graph holds their arguments,
    and no memory can be pinned while one is captured.
    """
    device = table.device
    if values.size <= module.MOST_STORED or devices.is_capturing(device):
        module.store(launch, table.data_ptr(), values)
    else:
        host = torch.from_numpy(values.reshape(-1))
        table.view(-1)[: values.size].copy_(host if device.type == "cpu" else host.pin_memory(), non_blocking=True)


class Recent(Generic[T]):
    """A cache of the latest few results, by the key they were made for."""

    def __init__(self, size: int = 8) -> None:
        self._size = size
        self._entries: list[tuple[object, T]] = []  # replaced, never changed: other threads may be reading

    def get(self, key: object, make: Callable[[], T]) -> T:
        """Return the result for an equal key, or make it."""
        entries = self._entries
        for entry in entries:
            if entry[0] == key:
                if entry is not entries[0]:
                    self._entries = [entry, *(other for other in entries if other is not entry)]
                return entry[1]
        made = make()
        self._entries = [(key, made), *entries[: self._size - 1]]
        return made
