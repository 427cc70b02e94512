"""Processes that talk through gloo, forked from one that has imported everything already."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

TIMEOUT = timedelta(seconds=60)


def run(world_size: int, job: Callable[..., None], *arguments: object, timeout: timedelta = TIMEOUT) -> None:
    """Call ``job(*arguments)`` in so many processes of one group; raise if one of them does."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(
            _rank, (world_size, Path(folder, "store"), timeout, job, arguments), nprocs=world_size, start_method="fork"
        )


def _rank(
    rank: int, world_size: int, store: Path, timeout: timedelta, job: Callable[..., None], arguments: tuple[object, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timeout)
    job(*arguments)
    sys.stdout.flush()
    dist.destroy_process_group()
