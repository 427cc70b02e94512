"""Tables of rows in a device's memory, uploaded without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy.typing as npt
import torch

from gmp_kernels.backends import devices

__all__ = ["Table", "put", "upload"]


def upload(values: Sequence[Any] | npt.NDArray[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Copy numbers to a device without waiting for it. Torch keeps the memory copied from until that is done."""
    devices.refuse_capture(device)
    # The host whatever torch's default device is.
    host = torch.as_tensor(values, dtype=dtype, device="cpu")
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def put(module: Any, launch: Any, values: npt.NDArray[Any], table: torch.Tensor) -> None:
    """Copy eight-byte numbers to the front of a table as ``upload`` does. A few of them go as arguments of launches.

    Launches (of _cuda or _simt) take less of the host's time than pinning memory.
    """
    device = table.device
    devices.refuse_capture(device)
    if values.size <= module.MOST_STORED:
        module.store(launch, table.data_ptr(), values)
    else:
        host = torch.from_numpy(values.reshape(-1))
        table.view(-1)[: values.size].copy_(host if device.type == "cpu" else host.pin_memory(), non_blocking=True)


class Table:
    """A table that is uploaded only when it changes, so that most steps upload nothing.

    A CUDA graph has a table of its own, whose words it holds as arguments of launches.
    """

    def __init__(self) -> None:
        self._contents: object = None
        self._table: torch.Tensor | None = None

    def at(
        self, contents: object, make: Callable[[], npt.NDArray[Any]], device: torch.device, module: Any, launch: Any
    ) -> torch.Tensor:
        """Return the table that ``make`` returns on the host, and that is the same for as long as ``contents`` is."""
        is_captured = devices.is_capturing(device)
        # Another stream gets another table, because freed memory is reused in the order of its own stream.
        contents = (contents, device, devices.stream_of(device))
        # A graph does not take part in this even if nothing has changed: what it stores is there after its replays
        # only, and what the caller writes to the table of other steps has to stay out of it.
        if not is_captured and self._table is not None and self._contents == contents:
            return self._table
        host = make()
        table = torch.from_numpy(host).new_empty(host.shape, device=device)
        if is_captured:
            module.store(launch, table.data_ptr(), host)
        else:
            put(module, launch, host, table)
            self._table, self._contents = table, contents
        return table
