"""Tables of rows in a device's memory, uploaded without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["Table", "num_chunks_of", "upload"]


# What CUDA graphs read at every replay. Nothing tells when a graph is gone.
_captured: list[torch.Tensor] = []


def num_chunks_of(n: int, chunk: int) -> int:
    """Chunks of a tensor of ``n`` elements."""
    return -(-n // chunk)


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def upload(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Copy numbers to a device without waiting for it. Torch keeps the memory copied from until that is done."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=dtype, device="cpu")
    return torch.tensor(values, dtype=dtype, device="cpu", pin_memory=True).to(device, non_blocking=True)


class Table:
    """A table that is uploaded only when it changes, so that most steps upload nothing.

    While a CUDA graph is captured no memory can be pinned: it is set aside at the first upload, which happens before.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._contents: object = None
        self._table: torch.Tensor | None = None
        self._spare: torch.Tensor | None = None

    def at(self, rows: list[Any], device: torch.device, filled: object = None) -> torch.Tensor:
        """Return the table with these rows; ``filled`` says where the caller is going to write to it."""
        capturing = _is_capturing(device)
        # Another stream gets another table: freed memory is used again in the order of its own stream.
        contents = (rows, filled, device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)
        if self._table is None or self._contents != contents:
            if capturing and self._spare is not None and self._spare.shape == (len(rows), len(rows[0])):
                self._spare.copy_(torch.tensor(rows, dtype=self._dtype, device="cpu"))
                self._table = self._spare.to(device, non_blocking=True)
                _captured.append(self._spare)
                self._spare = None
            else:
                self._table = upload(rows, self._dtype, device)
            self._contents = contents
        if capturing:
            _captured.append(self._table)
        elif device.type == "cuda" and (self._spare is None or self._spare.shape != self._table.shape):
            self._spare = torch.empty_like(self._table, device="cpu", pin_memory=True)
        return self._table
