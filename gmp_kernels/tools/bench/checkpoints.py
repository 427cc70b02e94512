"""Rows of the speed table on checkpoints: the time to prune one, compared with ``cp``, and the memory it takes.

Ours waits until everything is on the disk, and ``cp`` does not. This makes the bound stricter, and on a slow disk the
ratio depends mostly on the disk. Both sides read the input from the page cache.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
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


def checkpoint_cases() -> list[Case]:
    """Return the cases that prune a checkpoint in one file; their ``shrink`` divides its bytes."""
    return [
        Case("prune a 4 GB checkpoint, layer scope", "cp", 2.0, 1.2, partial(_prune_and_cp, "layer")),
        Case("prune a 4 GB checkpoint, global scope", "cp", 3.0, 1.8, partial(_prune_and_cp, "global")),
        Case("peak memory of pruning it", "512 MB + 5% of largest tensor", 1.0, None, _memory, "B"),
    ]


class _Folder:
    """A temporary folder with a checkpoint, removed with this object."""

    def __init__(self, shrink: int) -> None:
        self._owner = tempfile.TemporaryDirectory(prefix="gmp_kernels_bench_", ignore_cleanup_errors=True)
        self.source = Path(self._owner.name, "in.safetensors")
        self.target = Path(self._owner.name, "out.safetensors")
        generator = torch.Generator().manual_seed(0)
        tensors: dict[str, torch.Tensor] = {}
        self.largest = num_bytes = 0
        while num_bytes < NUM_BYTES // shrink:
            rows, columns = LAYERS[len(tensors) % len(LAYERS)]
            # Shrinking makes the layers smaller and keeps their number.
            tensor = torch.randn(max(1, rows // shrink), columns, generator=generator).mul_(STD).bfloat16()
            tensors[f"{len(tensors)}.weight"] = tensor
            num_bytes += tensor.nbytes
            self.largest = max(self.largest, tensor.nbytes)
        save_file(tensors, self.source)

    def clear(self) -> None:
        """Remove the output, and wait until the disk is idle."""
        self.target.unlink(missing_ok=True)
        os.sync()


def _prune_and_cp(scope: Scope, shrink: int) -> Pair:
    folder = _Folder(shrink)

    def prune() -> None:
        PruneJob(folder.source, folder.target, sparsity=SPARSITY, scope=scope).run()

    def cp() -> None:
        subprocess.run(["cp", folder.source, folder.target], check=True)

    return Pair(Timed(prune, folder.clear), Timed(cp, folder.clear))


def _memory(shrink: int) -> Pair:
    folder = _Folder(shrink)
    # A process of its own has the peak of the command alone.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        peak = pool.submit(_peak_bytes, folder.source, folder.target, torch.get_num_threads()).result()
    return Pair(float(peak), MEMORY_LIMIT + 0.05 * folder.largest)


def _peak_bytes(source: Path, target: Path, num_threads: int) -> int:
    torch.set_num_threads(num_threads)
    PruneJob(source, target, sparsity=SPARSITY).run()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])
