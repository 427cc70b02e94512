"""Communication between processes that work on one call together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from gmp_kernels.errors import DistributedError, GMPError

__all__ = ["Communicator", "of_torchrun"]

T = TypeVar("T")

# Smallest first: a sum is sent as the first one that holds its upper bound.
DTYPES = (torch.uint8, torch.int32, torch.int64)
# Bytes up to which the values of all ranks go to the first one, which sends back what they make together. Gloo's
# all_reduce passes them around a ring twice, and each hop waits until its process gets a core.
MOST_GATHERED = 4 << 20


class Communicator:
    """The ranks of a process group, or this process alone.

    Parameters
    ----------
    group : ProcessGroup or None
        None: no process but this one.
    call, advice : str
        For errors: the call that all ranks are in, and why one of them may not answer.

    Attributes
    ----------
    size, rank : int
        Number of processes, and the position of this one.
    num_collectives, num_bytes : int
        Reductions so far, and the bytes that this rank has put into them.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        call: str = "GMPScheduler.step",
        advice: str = "a process has died, or calls step() less often than the others. Start again from the last "
        "checkpoint",
    ) -> None:
        self._group, self._call, self._advice = group, call, advice
        self.size, self.rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
        has_cpu = group is None or "cpu:" in dist.get_backend_config(group)
        self._device = torch.device("cpu" if has_cpu else "cuda")
        self.num_collectives = self.num_bytes = 0
        # The tensors of the last reduction. A thread of gloo may hold them for a moment after it. If it were the last
        # to do so when Python ends, it would need Python to free them, which aborts the process.
        self._last: list[torch.Tensor] = []

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
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.size
        with self._answered():
            dist.all_gather_object(values, value, group=self._group)
        return values

    def together(self, work: Callable[[], T]) -> T:
        """Do the work of this rank. If any rank fails, raise on every rank the error of the first that did."""
        if self._group is None:
            return work()
        result, error = None, None
        try:
            result = work()
        except GMPError as raised:
            error = raised
        found = next((other for other in self.gather(error) if other is not None), None)
        if found is not None:
            raise found
        return cast(T, result)

    def merged(self, rows: torch.Tensor, merge: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Return on every rank what ``merge`` makes of the stacked rows of all ranks, an int64 for each. On the CPU."""
        if self._group is None:
            return merge(rows[None])
        buffer = rows.to(self._device, copy=True)
        result = torch.empty(len(rows), dtype=torch.int64, device=self._device)
        self._last = [buffer, result]
        with self._answered():
            gathered = self._gathered(buffer)
            if gathered is not None:
                result.copy_(merge(gathered.cpu()))
            dist.broadcast(result, group=self._group, group_src=0)
            found = result.cpu()
        self.num_collectives += 1
        self.num_bytes += buffer.nbytes
        return found

    def _reduce(self, values: torch.Tensor, op: dist.ReduceOp.RedOpType, dtype: torch.dtype) -> torch.Tensor:
        if self._group is None:
            return values
        buffer = values.to(self._device, dtype, copy=True)
        self._last = [buffer]
        with self._answered():
            if self._device.type == "cpu" and self.size * buffer.nbytes <= MOST_GATHERED:
                gathered = self._gathered(buffer)
                if gathered is not None:
                    buffer.copy_(gathered.sum(0) if op == dist.ReduceOp.SUM else gathered.amax(0))
                dist.broadcast(buffer, group=self._group, group_src=0)
            else:
                dist.all_reduce(buffer, op, group=self._group)
            result = buffer.to("cpu", torch.int64)
        self.num_collectives += 1
        self.num_bytes += buffer.nbytes
        return result

    def _gathered(self, buffer: torch.Tensor) -> torch.Tensor | None:
        """Return the buffers of all ranks on the first, and None elsewhere."""
        gathered = buffer.new_empty(self.size, *buffer.shape) if self.rank == 0 else None
        received = None if gathered is None else list(gathered)
        self._last += received or []
        dist.gather(buffer, received, group=self._group, group_dst=0)
        return gathered

    @contextmanager
    def _answered(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise DistributedError(
                f"{self._call}: expected an answer from each of {self.size} ranks, got none from some ({error}); "
                f"{self._advice}"
            ) from error


@contextmanager
def of_torchrun(call: str, advice: str) -> Iterator[Communicator]:
    """Join the processes that torchrun started beside this one, if it did.

    Raises
    ------
    DistributedError
        The environment names other processes that cannot be reached.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        yield Communicator(None)
        return
    try:
        dist.init_process_group("gloo")
    except (ValueError, RuntimeError) as error:
        raise DistributedError(
            f"{call}: expected {size} processes, as WORLD_SIZE says, got no connection ({error}); start them with "
            "torchrun, or unset WORLD_SIZE"
        ) from error
    communicator = Communicator(dist.group.WORLD, call, advice)
    try:
        yield communicator
    finally:
        # A group that is still referred to when Python ends aborts the process.
        communicator._group = None
        dist.destroy_process_group()
