"""Rows of the speed table on checkpoints: the time to prune one, compared with ``cp`` and ``sync``, and the memory.

Ours is the whole command, with the start of Python. Both sides end when everything is on the disk, and both read the
input from the page cache. Copies of 4 GB take so long that two processes measure them, once each.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from safetensors.torch import save_file

from gmp_kernels.checkpoints import PruneJob
from gmp_kernels.ops import Scope
from gmp_kernels.tools.bench.measurement import Case, Pair, Timed

__all__ = ["checkpoint_cases"]

NUM_BYTES = 4 << 30
LAYERS = ((4096, 4096), (11008, 4096))  # shapes in a transformer block, in bfloat16
SPARSITY = 0.9
STD = 0.02
MEMORY_LIMIT = 512e6


def checkpoint_cases(folder: Path) -> list[Case]:
    """Return the cases that prune a checkpoint in one file; their ``shrink`` divides its bytes.

    The first one writes it into ``folder``, where the others find it. Whoever made the folder removes it.
    """
    prune = "gmp-kernels prune of 4 GB"
    layer, whole = (partial(_prune_and_cp, folder, scope) for scope in ("layer", "global"))
    return [
        Case(f"{prune}, layer scope", "cp and sync", 1.3, 1.1, layer, once=True, most_processes=2),
        Case(f"{prune}, global scope", "cp and sync", 1.8, 1.5, whole, once=True, most_processes=2),
        Case(
            "peak memory of pruning 4 GB",
            "512 MB + 5% of largest tensor",
            1.0,
            None,
            partial(_memory, folder),
            "B",
            most_processes=1,
        ),
    ]


def _shapes(shrink: int) -> list[tuple[int, int]]:
    """Return the shapes of the layers. Shrinking makes them smaller and keeps their number."""
    shapes: list[tuple[int, int]] = []
    num_bytes = 0
    while num_bytes < NUM_BYTES // shrink:
        rows, columns = LAYERS[len(shapes) % len(LAYERS)]
        shapes.append((max(1, rows // shrink), columns))
        num_bytes += 2 * shapes[-1][0] * columns
    return shapes


def _checkpoint(folder: Path, shrink: int) -> Path:
    """Return the checkpoint, written if it is not there yet.

    Layers of one shape have the same random weights, but each its own standard deviation, so that a global ranking
    prunes each to another sparsity.
    """
    path = folder / "in.safetensors"
    if not path.exists():
        generator = torch.Generator().manual_seed(0)
        shapes = _shapes(shrink)
        drawn = {shape: torch.randn(shape, generator=generator) for shape in set(shapes)}
        stds = [STD * (1 + i / len(shapes)) for i in range(len(shapes))]
        save_file(
            {
                f"{i}.weight": (drawn[shape] * std).bfloat16()
                for i, (shape, std) in enumerate(zip(shapes, stds, strict=True))
            },
            path,
        )
    return path


def _prune_and_cp(folder: Path, scope: Scope, shrink: int) -> Pair:
    source, target = _checkpoint(folder, shrink), folder / "out.safetensors"
    prune: list[str | Path] = [
        sys.executable,
        "-m",
        "gmp_kernels",
        "prune",
        source,
        target,
        "--sparsity",
        str(SPARSITY),
        "--scope",
        scope,
    ]

    def run(command: list[str | Path]) -> None:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def cp_and_sync() -> None:
        run(["cp", source, target])
        os.sync()

    def clear() -> None:
        """Remove the output, and wait until the disk is idle."""
        target.unlink(missing_ok=True)
        os.sync()

    return Pair(Timed(partial(run, prune), clear), Timed(cp_and_sync, clear))


def _memory(folder: Path, shrink: int) -> Pair:
    source, target = _checkpoint(folder, shrink), folder / "out.safetensors"
    target.unlink(missing_ok=True)
    # A process of its own has the peak of the command alone.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        peak = pool.submit(_peak_bytes, source, target, torch.get_num_threads()).result()
    return Pair(float(peak), MEMORY_LIMIT + 0.05 * max(2 * rows * columns for rows, columns in _shapes(shrink)))


def _peak_bytes(source: Path, target: Path, num_threads: int) -> int:
    torch.set_num_threads(num_threads)
    PruneJob(source, target, sparsity=SPARSITY).run()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])
