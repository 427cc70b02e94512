"""The processes that share one job under torchrun; alone, a single one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist

from gmp_kernels.errors import DistributedError, GMPError

T = TypeVar("T")

__all__ = ["Ranks"]


class Ranks(NamedTuple):
    """Place of this process among those of a run."""

    rank: int
    size: int

    @classmethod
    @contextlib.contextmanager
    def joined(cls) -> Iterator[Ranks]:
        """Join the processes that torchrun started beside this one, if it did.

        Raises
        ------
        DistributedError
            The environment speaks of others that cannot be reached.
        """
        size = os.environ.get("WORLD_SIZE", "1")
        if size == "1":
            yield cls(0, 1)
            return
        try:
            dist.init_process_group("gloo")
        except (ValueError, RuntimeError) as error:
            raise DistributedError(
                f"prune: expected {size} processes, as WORLD_SIZE says, got no connection ({error}); start them with "
                "torchrun, or unset WORLD_SIZE"
            ) from error
        try:
            yield cls(dist.get_rank(), dist.get_world_size())
        finally:
            dist.destroy_process_group()

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in order, on every rank; waits for all."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def total(self, values: torch.Tensor, bound: int) -> torch.Tensor:
        """Add up the values of all ranks."""
        return torch.stack(self.gather(values)).sum(0)

    def largest(self, values: torch.Tensor) -> torch.Tensor:
        """Take the maximum over all ranks."""
        return torch.stack(self.gather(values)).amax(0)

    def together(self, work: Callable[[], T]) -> T:
        """Do the work of this rank; if it fails on any, raise on every rank what it raised on the first of them."""
        if self.size == 1:
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
