"""Tables in device memory that the Triton kernels read; most steps reuse those of the last one."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Generic, TypeAlias, TypeVar

import torch

from gmp_kernels.backends.uploads import upload

__all__ = ["BLOCK", "INTERPRETED", "Recent", "Table", "table_of"]

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
# Weights per chunk: as many as registers hold. Under the interpreter a program of any size takes milliseconds, and the
# tests' sizes lie around this one.
BLOCK = 16384 if INTERPRETED else 2048
FIELDS = 9  # of a table's rows, as in tiles.py

T = TypeVar("T")
# Rows in device memory, and whose row each chunk is; chunks of all rows are numbered through.
Table: TypeAlias = tuple[torch.Tensor, torch.Tensor]


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


def table_of(sizes: Sequence[int], fields: Sequence[Sequence[int]], device: torch.device) -> Table:
    """Upload the table of tensors of these sizes; a row holds the size, the first chunk and then ``fields``."""
    rows, chunks, total = [], [], 0
    for n, given in zip(sizes, fields, strict=True):
        rows.append([n, total, *given, *[0] * (FIELDS - 2 - len(given))])
        chunks.append(-(-n // BLOCK))
        total += chunks[-1]
    counts = upload(chunks, torch.int32, device)
    return upload(rows, torch.int64, device), torch.repeat_interleave(counts, output_size=total)
