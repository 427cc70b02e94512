"""Processes that talk through gloo: those that torchrun has started, or forks of one that has imported everything."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.multiprocessing import get_context


def run(world_size: int, job: Callable[..., None], *arguments: object, timeout: float = 60, dies: int = -1) -> None:
    """Call ``job(*arguments)`` in so many processes of one group; raise if it fails in one of them, or is not killed
    in the one that ``dies``. Collectives fail after ``timeout`` seconds."""
    limit = timedelta(seconds=timeout)
    if "RANK" in os.environ:
        _rank("env://", int(os.environ["RANK"]), world_size, limit, job, arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        # daemon: none outlives this process.
        ranks = [
            get_context("fork").Process(
                target=_rank, args=(store, rank, world_size, limit, job, arguments), daemon=True
            )
            for rank in range(world_size)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        ends = [rank.exitcode for rank in ranks]
        expected = [-9 if rank == dies else 0 for rank in range(world_size)]
        assert ends == expected, f"the ranks of {job.__name__}{arguments} ended with {ends}"


def leave() -> NoReturn:
    """End this rank, which torchrun has started and which has passed, at once.

    What torch has cached still refers to the group, so its threads run on. If one of them frees the tensors of the last
    exchange while Python ends, the process aborts.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _rank(
    store: str, rank: int, world_size: int, timeout: timedelta, job: Callable[..., None], arguments: tuple[object, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size, timeout=timeout)
    job(*arguments)
    if dist.is_initialized():
        dist.destroy_process_group()
