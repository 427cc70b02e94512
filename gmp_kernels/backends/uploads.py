"""Tables of rows in a device's memory, uploaded without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy.typing as npt
import torch

from gmp_kernels.backends import devices
from gmp_kernels.errors import CaptureError

__all__ = ["Table", "pinned_like", "put", "upload"]


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


def pinned_like(table: torch.Tensor) -> torch.Tensor:
    """Return host memory for a table, from which its device copies without the host waiting."""
    return torch.empty_like(table, device="cpu", pin_memory=table.device.type == "cuda")


class Table:
    """A table that is uploaded only when it changes, so that most steps upload nothing.

    A CUDA graph uploads its own table at every replay, from memory that stays as long as ``captured``. No memory can be
    pinned during a capture, so earlier uploads set some aside, for ``SPARES`` captures without a step between them.
    """

    SPARES = 2

    def __init__(self) -> None:
        self._contents: object = None
        self._table: torch.Tensor | None = None
        self._spares: list[torch.Tensor] = []

    def at(
        self,
        contents: object,
        make: Callable[[], npt.NDArray[Any]],
        device: torch.device,
        captured: list[torch.Tensor],
        module: Any,
        launch: Any,
    ) -> torch.Tensor:
        """Return the table that ``make`` returns on the host, and that is the same for as long as ``contents`` is."""
        if devices.is_capturing(device):
            # Even if nothing has changed: what another graph uploads is there after its replays only, and what the
            # caller writes to the table of other steps has to stay out of the graph.
            host = torch.from_numpy(make())
            spare = next((spare for spare in self._spares if spare.shape == host.shape), None)
            if spare is None:
                raise CaptureError(
                    "expected a step outside of CUDA graphs, with these parameters, before one is captured, and after "
                    f"every {self.SPARES} captures; take one"
                )
            self._spares = [other for other in self._spares if other is not spare]
            captured.append(spare.copy_(host))
            return spare.to(device, non_blocking=True)
        # Another stream gets another table, because freed memory is reused in the order of its own stream.
        contents = (contents, device, devices.stream_of(device))
        if self._table is None or self._contents != contents:
            host = torch.from_numpy(make())
            table = torch.empty(host.shape, dtype=host.dtype, device=device)
            put(module, launch, host.numpy(), table)
            self._table, self._contents = table, contents
            self._spares = [spare for spare in self._spares if spare.shape == host.shape]
        while len(self._spares) < self.SPARES:
            self._spares.append(pinned_like(self._table))
        return self._table
