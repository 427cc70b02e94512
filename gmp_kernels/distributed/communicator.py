"""The collectives of a prune update, counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from gmp_kernels.errors import DistributedError

__all__ = ["Communicator"]

# Smallest first: what a sum is sent as is chosen by what it cannot exceed.
DTYPES = (torch.uint8, torch.int32, torch.int64)


class Communicator:
    """The ranks that hold parts or copies of the same parameters, and their collectives.

    Attributes
    ----------
    size, rank : int
        Number of processes, and which of them this one is.
    num_collectives, num_bytes : int
        Reductions so far, and the bytes of their results.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self._device = torch.device("cpu" if "cpu:" in dist.get_backend_config(group) else "cuda")
        self.num_collectives = self.num_bytes = 0

    def total(self, values: torch.Tensor, bound: int) -> torch.Tensor:
        """Add up over the ranks, where no sum can exceed ``bound``. int64, on the CPU."""
        return self._reduce(
            values, dist.ReduceOp.SUM, next(dtype for dtype in DTYPES if bound <= torch.iinfo(dtype).max)
        )

    def largest(self, values: torch.Tensor) -> torch.Tensor:
        """Take the maximum over the ranks. int64, on the CPU."""
        return self._reduce(values, dist.ReduceOp.MAX, torch.int64)

    def gather(self, value: object) -> list[Any]:
        """Collect a picklable value of every rank, in their order."""
        values: list[Any] = [None] * self.size
        with self._answered():
            dist.all_gather_object(values, value, group=self._group)
        return values

    def _reduce(self, values: torch.Tensor, op: dist.ReduceOp.RedOpType, dtype: torch.dtype) -> torch.Tensor:
        buffer = values.to(self._device, dtype, copy=True)
        with self._answered():
            dist.all_reduce(buffer, op, group=self._group)
            result = buffer.to("cpu", torch.int64)
        self.num_collectives += 1
        self.num_bytes += buffer.nbytes
        return result

    @contextmanager
    def _answered(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise DistributedError(
                f"GMPScheduler.step: expected an answer from each of {self.size} ranks, got none from some ({error}); "
                "a process has died, or calls step() less often than the others. Start again from the last checkpoint"
            ) from error
