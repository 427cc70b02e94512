"""Compares a prune step of shards on several processes with one process that has the same weights and all cores.

    python benchmarks/distributed.py [--ranks 4] [--layers 160] [--rows 1024] [--columns 1024] [--output FILE.json]

The two take turns, so that other load on the machine affects both. The time of the ranks is that of the slowest. Bytes
are those of the collectives' results on one rank. The program needs memory for twice the weights, and for the masks.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.multiprocessing.spawn import start_processes

from gmp_kernels import GMPScheduler, schedules

ROUNDS = 8
# As in the middle of gradual pruning, every update prunes about two or three per cent more of the weights.
SCHEDULE = schedules.Linear(0.7, 0.9, begin_step=0, end_step=ROUNDS - 1)
PLACEMENTS: dict[str, Placement] = {"rows": Shard(0), "columns": Shard(1)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def scheduler(weights: list[torch.Tensor]) -> GMPScheduler:
    model = nn.ParameterList(nn.Parameter(weight) for weight in weights)
    return GMPScheduler(model, torch.optim.SGD(model.parameters(), lr=0.1), SCHEDULE, targets="re:.", count="calls")


def measure(rank: int, store: str, options: argparse.Namespace, dtype: str, placement: str) -> None:
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=options.ranks, timeout=timedelta(minutes=10)
    )
    mesh = init_device_mesh("cpu", (options.ranks,))
    shape = [options.rows, options.columns]
    shape[PLACEMENTS[placement].dim] //= options.ranks
    torch.manual_seed(rank)
    pieces = [torch.randn(shape).mul_(0.02).to(DTYPES[dtype]) for _ in range(options.layers)]
    shards = scheduler([DTensor.from_local(piece, mesh, [PLACEMENTS[placement]], run_check=False) for piece in pieces])
    gathered = [piece.new_empty(options.rows, options.columns) for piece in pieces] if rank == 0 else []
    for i, piece in enumerate(pieces):
        parts = list(gathered[i].chunk(options.ranks, PLACEMENTS[placement].dim)) if rank == 0 else None
        received = None if parts is None else [torch.empty_like(piece) for _ in parts]
        dist.gather(piece, received)
        for part, values in zip(parts or [], received or [], strict=True):
            part.copy_(values)
    whole = scheduler(gathered) if rank == 0 else None

    seconds: dict[str, list[float]] = {"one process": [], "ranks": []}
    traffic = []
    for _ in range(ROUNDS):
        if whole is not None:
            torch.set_num_threads(os.cpu_count() or 1)
            start = time.perf_counter()
            whole.step()
            seconds["one process"].append(time.perf_counter() - start)
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.ranks))
        dist.barrier()
        ranks = shards._held.shards.communicator
        before = ranks.num_collectives, ranks.num_bytes
        start = time.perf_counter()
        shards.step()
        slowest = torch.tensor(time.perf_counter() - start)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        seconds["ranks"].append(float(slowest))
        traffic.append((ranks.num_collectives - before[0], (ranks.num_bytes - before[1]) / options.layers))
    if whole is not None:
        assert whole.sparsity == shards.sparsity
        # The first update is left out: it sets up buffers, connections and threads on both sides.
        one, several = (statistics.median(times[1:]) for times in seconds.values())
        Path(options.scratch).write_text(
            json.dumps(
                {
                    "dtype": dtype,
                    "shards": placement,
                    "one_process_seconds": one,
                    "ranks_seconds": several,
                    "ratio": several / one,
                    "collectives": max(collectives for collectives, _ in traffic),
                    "bytes_per_layer": max(size for _, size in traffic),
                }
            )
        )
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("ranks", 4), ("layers", 160), ("rows", 1024), ("columns", 1024)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    results = []
    print(
        f"{'dtype':<10}{'shards':<10}{'one process':>12}{'ranks':>10}{'ratio':>8}{'collectives':>13}{'bytes/layer':>13}"
    )
    for dtype in DTYPES:
        for placement in PLACEMENTS:
            with tempfile.TemporaryDirectory() as folder:
                options.scratch = f"{folder}/result.json"
                arguments = (f"file://{folder}/store", options, dtype, placement)
                start_processes(measure, arguments, nprocs=options.ranks, start_method="fork")
                row = json.loads(Path(options.scratch).read_text())
            results.append(row)
            print(
                f"{dtype:<10}{placement:<10}"
                f"{row['one_process_seconds'] * 1e3:>9.1f} ms{row['ranks_seconds'] * 1e3:>7.1f} ms"
                f"{row['ratio']:>7.2f}x{row['collectives']:>13}{row['bytes_per_layer']:>13.0f}"
            )
    if options.output:
        sizes = {name: getattr(options, name) for name in ("ranks", "layers", "rows", "columns")}
        options.output.write_text(json.dumps({"sizes": sizes, "rows": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
