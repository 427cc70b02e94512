"""Rows of the speed table on shards: a prune step of several processes, compared with one that has the same weights.

The two take turns, so that other load on the machine affects both. The time of the ranks is that of the slowest. Both
sides have all cores. ``benchmarks/distributed.py`` runs the same with other sizes, and shows the traffic.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import tempfile
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import start_processes

from gmp_kernels import GMPScheduler, schedules
from gmp_kernels.tools.bench.measurement import Case, Pair

__all__ = ["DTYPES", "PLACEMENTS", "Setting", "measure_ranks", "sharded_cases"]

ROUNDS = 8
# As in the middle of gradual pruning, every update prunes about two or three per cent more of the weights.
SCHEDULE = schedules.Linear(0.7, 0.9, begin_step=0, end_step=ROUNDS - 1)
PLACEMENTS = {"rows": 0, "columns": 1}  # the dimension that is sharded
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Setting(NamedTuple):
    """Number of processes, and number and sizes of the layers, which all have the same shape."""

    ranks: int = 4
    layers: int = 160
    rows: int = 1024
    columns: int = 1024


def sharded_cases() -> list[Case]:
    """Return a row for each dtype and each way to shard."""
    return [
        Case(
            f"sharded prune step, {Setting().ranks} ranks, {dtype}, {placement}",
            "one process",
            1.8,
            1.3,
            partial(_ranks_and_one_process, dtype, placement),
            most_processes=2,
        )
        for dtype in DTYPES
        for placement in PLACEMENTS
    ]


def _ranks_and_one_process(dtype: str, placement: str, shrink: int) -> Pair:
    found = measure_ranks(Setting(layers=max(2, Setting().layers // shrink)), dtype, placement)
    return Pair(found["ranks_seconds"], found["one_process_seconds"])


def measure_ranks(setting: Setting, dtype: str, placement: str) -> dict[str, Any]:
    """Start the ranks, and return their seconds, those of one process, collectives, and bytes per layer on one rank.

    Bytes are those of the collectives' results. It needs memory for twice the weights, and for the masks.
    """
    # A fork of this process could not use its threads. One of a server without threads can, and imports nothing again.
    multiprocessing.set_forkserver_preload([__name__, "torch.distributed.tensor"])
    with tempfile.TemporaryDirectory() as folder:
        arguments = (Path(folder), setting, dtype, placement)
        start_processes(_rank, arguments, setting.ranks, start_method="forkserver")  # type: ignore[no-untyped-call]
        found: dict[str, Any] = json.loads(Path(folder, "result.json").read_text())
    return found


def _scheduler(weights: list[torch.Tensor]) -> GMPScheduler:
    model = nn.ParameterList(nn.Parameter(weight) for weight in weights)
    return GMPScheduler(model, torch.optim.SGD(model.parameters(), lr=0.1), SCHEDULE, targets="re:.", count="calls")


def _rank(rank: int, folder: Path, setting: Setting, dtype: str, placement: str) -> None:
    # Imported late, because it takes a second, and all commands import this module.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=setting.ranks,
        timeout=timedelta(minutes=10),
    )
    mesh = init_device_mesh("cpu", (setting.ranks,))
    shape = [setting.rows, setting.columns]
    dim = PLACEMENTS[placement]
    shape[dim] //= setting.ranks
    torch.manual_seed(rank)
    pieces = [torch.randn(shape).mul_(0.02).to(DTYPES[dtype]) for _ in range(setting.layers)]
    shards = _scheduler([DTensor.from_local(piece, mesh, [Shard(dim)], run_check=False) for piece in pieces])
    gathered = [piece.new_empty(setting.rows, setting.columns) for piece in pieces] if rank == 0 else []
    for i, piece in enumerate(pieces):
        parts = list(gathered[i].chunk(setting.ranks, dim)) if rank == 0 else None
        received = None if parts is None else [torch.empty_like(piece) for _ in parts]
        dist.gather(piece, received)
        for part, values in zip(parts or [], received or [], strict=True):
            part.copy_(values)
    whole = _scheduler(gathered) if rank == 0 else None

    seconds: dict[str, list[float]] = {"one process": [], "ranks": []}
    traffic = []
    held = shards._held.shards
    assert held is not None
    for _ in range(ROUNDS):
        if whole is not None:
            torch.set_num_threads(os.cpu_count() or 1)
            start = time.perf_counter()
            whole.step()
            seconds["one process"].append(time.perf_counter() - start)
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // setting.ranks))
        dist.barrier()
        ranks = held.communicator
        before = ranks.num_collectives, ranks.num_bytes
        start = time.perf_counter()
        shards.step()
        slowest = torch.tensor(time.perf_counter() - start)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        seconds["ranks"].append(float(slowest))
        traffic.append((ranks.num_collectives - before[0], (ranks.num_bytes - before[1]) / setting.layers))
    if whole is not None:
        assert whole.sparsity == shards.sparsity
        # The first update is left out: it sets up buffers, connections and threads on both sides.
        one, several = (statistics.median(times[1:]) for times in seconds.values())
        found = {
            "dtype": dtype,
            "shards": placement,
            "one_process_seconds": one,
            "ranks_seconds": several,
            "ratio": several / one,
            "collectives": max(collectives for collectives, _ in traffic),
            "bytes_per_layer": max(size for _, size in traffic),
        }
        (folder / "result.json").write_text(json.dumps(found))
    dist.destroy_process_group()
