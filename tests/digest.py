"""Prints the instruction set in use and one hash of all that a backend writes, for each number of threads.

A program and not a test: the instruction set is chosen once per process. ``python digest.py BACKEND THREADS...``
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from typing import Any

import torch

from gmp_kernels import _C, BitMask, Threshold, apply_masks_, prune_
from gmp_kernels.tools.testing import DTYPES, adversarial_cases


def requests() -> Iterator[tuple[list[torch.Tensor], dict[str, Any]]]:
    """Weights and what to do with them."""
    for dtype in DTYPES:
        for n in (7, 65, 1027, 16391):
            cases = list(adversarial_cases(n, dtype).values())
            yield cases, {"num_prune": n // 2}
            yield cases, {"num_prune": n * len(cases) // 3, "scope": "global"}
            # Wrong, but credible: the bracket fails, and what saves the result is counted by bins.
            yield cases, {"num_prune": n // 2, "previous": [Threshold(0.1, n // 2 - 1, 1, 0)] * len(cases)}
        large = [adversarial_cases(100_003, dtype)[name] for name in ("random", "small_integers", "any_bits")]
        yield large, {"sparsity": [0.1, 0.6, 0.9]}
        yield large, {"sparsity": 0.8, "scope": "global"}
    neighbours = torch.where(torch.arange(1_200_000) % 3 > 0, 1.0, 1.0 + 2**-23)
    yield [neighbours], {"sparsity": 0.5}
    yield list(neighbours.split(300_000)), {"sparsity": 0.9}


def digest(backend: str) -> str:
    """Weights, masks, thresholds and counts of all requests, with and without masks, and of applying them."""
    sha = hashlib.sha256()
    for weights, request in requests():
        kept = [torch.arange(weight.numel()) * 40503 % 65536 < 40000 for weight in weights]
        for masks in (None, [BitMask.from_bool(k) for k in kept]):
            pruned = [weight.clone() for weight in weights]
            result = prune_(pruned, masks=masks, nonfinite="keep", backend=backend, **request)
            sha.update(repr((result.thresholds, result.num_pruned, result.num_newly_pruned)).encode())
            applied = [weight.clone() for weight in weights]
            apply_masks_(applied, result.masks, backend=backend)
            for tensor in (*pruned, *applied, *(mask.packed for mask in result.masks)):
                sha.update(tensor.view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


if __name__ == "__main__":
    backend = sys.argv[1]
    for threads in map(int, sys.argv[2:]):
        torch.set_num_threads(threads)
        print(_C.isa() if backend == "cpu" else backend, digest(backend))
