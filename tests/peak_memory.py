"""Prints by how many bytes a prune step raised the peak memory of this process, and the bytes of the largest layer.

A program and not a test, for a process of its own. ``python peak_memory.py BACKEND SCENARIO``
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

from gmp_kernels import BitMask, Threshold, prune_

Scenario = tuple[list[torch.Tensor], list[Threshold | None]]


def random(*sizes: int) -> Scenario:
    return [torch.randn(n) for n in sizes], [None] * len(sizes)


def neighbours(*sizes: int) -> Scenario:
    """Every weight is a candidate for the threshold."""
    layers = [torch.ones(n) for n in sizes]
    for layer in layers:
        layer[::3] = 1.0 + 2**-23
    return layers, [None] * len(sizes)


def wrong_hints(*sizes: int) -> Scenario:
    """Credible, but every bracket fails."""
    layers, _ = random(*sizes)
    return layers, [Threshold(3.0, round(0.9 * n) - 1, 1, 0) for n in sizes]


SCENARIOS: dict[str, Callable[[], Scenario]] = {
    "one_large_layer": lambda: random(2**24),
    "one_large_layer_of_candidates": lambda: neighbours(2**24),
    "forty_layers": lambda: random(*[2**20] * 40),
    "forty_layers_of_candidates": lambda: neighbours(*[2**20] * 40),
    "forty_layers_with_wrong_hints": lambda: wrong_hints(*[2**20] * 40),
    "many_small_layers_with_wrong_hints": lambda: wrong_hints(*[20_000] * 1000),
}


def peak() -> int:
    # Not getrusage: that peak is inherited from whoever started this process.
    (line,) = (row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    backend, scenario = sys.argv[1:]
    warm_up = torch.randn(2**17)
    prune_(warm_up, sparsity=0.5, backend=backend)  # threads and their stacks come once
    layers, hints = SCENARIOS[scenario]()
    masks = [BitMask.ones(layer.shape) for layer in layers]
    reset_peak()  # or the step could hide under an earlier one
    before = peak()
    prune_(layers, sparsity=0.9, masks=masks, previous=hints, backend=backend)
    print(peak() - before, max(layer.nbytes for layer in layers))
