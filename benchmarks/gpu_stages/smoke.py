"""Stages ``smoke`` and ``triton``: a test that the kernels run and give the same bits as the CPU.

It makes prunes, steps and a captured step, each from the same start on the device and on the CPU. A wrong bit fails a
check, with a message that says where. ``sanitize.py`` runs it with fewer weights, because a sanitizer slows every
access down.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import torch
from torch import nn

from gmp_kernels import BitMask, apply_masks_, magnitude_threshold, optim, prune_
from gmp_kernels.errors import GMPError
from gmp_kernels.tools.testing import assert_bitwise_equal
from gpu_stages.facts import tell

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Sizes around the edges of chunks and samples, and one of less than a vector.
SIZES, FEW_SIZES = (3_000_017, 70_001, 3 * 16384 + 5, 7), (40_003, 16384 + 5, 7)
STEPS = 20
CPU = torch.device("cpu")


class Side(NamedTuple):
    """A device and the backend that computes on it."""

    device: torch.device
    backend: str

    @property
    def is_gpu(self) -> bool:
        """Whether there are graphs to capture."""
        return self.device.type == "cuda"


EXPECTED = Side(CPU, "cpu")


@cache
def random(size: int, seed: int) -> torch.Tensor:
    """Return random numbers, made once, because that takes longer than everything else here."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def tensors(sizes: Sequence[int], dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    """Return weights or gradients on the CPU, the same every time."""
    return [random(size, seed).to(dtype, copy=True) for size in sizes]


def assert_same(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], what: str) -> None:
    """Compare bit by bit."""
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert_bitwise_equal(a.detach().cpu(), b.detach().cpu(), f"{what}[{i}]")


def pruned(side: Side, sizes: Sequence[int], dtype: torch.dtype) -> list[torch.Tensor]:
    """Return weights, masks and thresholds after two prunes, one in global scope, and after masks are applied."""
    weights = [tensor.to(side.device) for tensor in tensors(sizes, dtype, 0)]
    options = {"backend": side.backend}
    first = prune_(weights, sparsity=0.7, scope="global", **options)
    second = prune_(weights, sparsity=0.9, masks=first.masks, **options)
    regrown = [tensor.to(side.device) for tensor in tensors(sizes, dtype, 1)]
    apply_masks_(regrown, second.masks, **options)
    single = magnitude_threshold(regrown[0], sizes[0] - 5, **options)
    counted = [*first.thresholds, *second.thresholds, single]
    numbers = [torch.tensor([t.value, t.num_below, t.num_ties, t.num_ties_kept], dtype=torch.float64) for t in counted]
    return [*weights, *(mask.packed for mask in second.masks), *regrown, *numbers]


def trained(side: Side, sizes: Sequence[int], dtype: torch.dtype, compact: bool, steps: int) -> list[torch.Tensor]:
    """Return weights and state after AdamW steps, with updates of the masks in between."""
    params = [nn.Parameter(tensor.to(side.device)) for tensor in tensors(sizes, dtype, 0)]
    optimizer = optim.AdamW(params, lr=0.01, weight_decay=0.1, compact_state=compact, backend=side.backend)
    masks: dict[torch.Tensor, BitMask] = {}
    for step in range(steps):
        if step in (steps // 4, steps // 2):
            masks = updated(side, params, masks, 0.5 + step / steps / 2)
            optimizer.set_masks(masks)
        for p, gradient in zip(params, tensors(sizes, dtype, 100 + step), strict=True):
            p.grad = gradient.to(side.device)
        optimizer.step()
    state = optimizer.state_dict()["state"]
    return [*params, *(state[i][key] for i in sorted(state) for key in ("exp_avg", "exp_avg_sq"))]


def updated(
    side: Side, params: Sequence[nn.Parameter], masks: dict[torch.Tensor, BitMask], sparsity: float
) -> dict[torch.Tensor, BitMask]:
    """Prune all parameters further."""
    before = [masks[p] for p in params] if masks else None
    result = prune_(list(params), sparsity=sparsity, masks=before, backend=side.backend)
    return dict(zip(params, result.masks, strict=True))


def replayed(side: Side, sizes: Sequence[int]) -> list[torch.Tensor]:
    """Return weights after captured steps with prunes between the replays; without a GPU, after the same plain steps.

    The graph holds addresses. If an update moved a mask, the next replay would bring pruned weights back.
    """
    params = [nn.Parameter(tensor.to(side.device)) for tensor in tensors(sizes, torch.float32, 0)]
    gradients = [tensors(sizes, torch.float32, 200 + step) for step in range(6)]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer = optim.AdamW(params, lr=0.01, capturable=side.is_gpu, backend=side.backend)
    masks = updated(side, params, {}, 0.5)
    optimizer.set_masks(masks)

    def hand_out(step: int) -> None:
        for p, gradient in zip(params, gradients[step], strict=True):
            p.grad.copy_(gradient)

    hand_out(0)
    optimizer.step()
    take_step: Callable[[], object] = optimizer.step
    if side.is_gpu:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        take_step = graph.replay
    for step in range(1, 6):
        if step in (2, 4):
            masks = updated(side, params, masks, 0.5 + step / 10)
            optimizer.set_masks(masks)
        hand_out(step)
        take_step()
    zeros = [(p == 0).sum() for p in params]
    return [*params, *zeros]


def check(name: str, side: Side, compute: Callable[[Side], list[torch.Tensor]]) -> bool:
    """Compute something on both sides, compare, and report the result."""
    start = time.monotonic()
    try:
        assert_same(compute(side), compute(EXPECTED), name)
    except (AssertionError, GMPError, RuntimeError) as error:
        tell(f"FAILED {name}: {type(error).__name__}: {error}", check=name, passed=False)
        return False
    tell(f"{name}: the CPU's bits, {time.monotonic() - start:.1f} s", check=name, passed=True)
    return True


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype on the command line and in reports."""
    return str(dtype).removeprefix("torch.")


def checks(
    sizes: Sequence[int], steps: int, graph: bool, dtypes: Sequence[torch.dtype]
) -> dict[str, Callable[[Side], list[torch.Tensor]]]:
    """Return the computations to compare, by name."""
    found: dict[str, Callable[[Side], list[torch.Tensor]]] = {}
    for dtype in dtypes:
        name = name_of(dtype)
        found[f"prune {name}"] = lambda side, dtype=dtype: pruned(side, sizes, dtype)
        for compact in (False, True):
            state = "compact" if compact else "dense"
            found[f"{steps} AdamW steps {name} {state}"] = lambda side, dtype=dtype, compact=compact: trained(
                side, sizes, dtype, compact, steps
            )
    if graph:
        found["captured steps, prunes between"] = lambda side: replayed(side, sizes)
    return found


def passed_on(command: Sequence[str]) -> int:
    """Run a process and print its lines as they come, never mixed with others; return its exit code."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
    return process.returncode


def in_processes(arguments: Sequence[str]) -> int:
    """Run the checks of all dtypes side by side, because kernels compiled for one are of no use to another."""
    command = [sys.executable, "-m", "gpu_stages.smoke", *arguments]
    with ThreadPoolExecutor(len(DTYPES)) as threads:
        codes = list(threads.map(lambda dtype: passed_on([*command, "--dtype", name_of(dtype)]), DTYPES))
    return int(any(codes))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every check, even after a failure, because the set of failures shows what is wrong."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--few", action="store_true", help="few weights and steps")
    parser.add_argument("--no-graph", action="store_true", help="capture none")
    parser.add_argument("--dtype", choices=[name_of(dtype) for dtype in DTYPES], help="this one alone")
    parser.add_argument("--processes", action="store_true", help="one for each dtype")
    options = parser.parse_args(given)
    if options.processes:
        return in_processes([argument for argument in given if argument != "--processes"])
    side = Side(torch.device(options.device), options.backend)
    # Triton uploads tables from pageable memory in every step, which a graph cannot hold.
    dtypes = [dtype for dtype in DTYPES if options.dtype in (None, name_of(dtype))]
    graph = not options.no_graph and side.backend != "triton" and torch.float32 in dtypes
    sizes, steps = (FEW_SIZES, 4) if options.few else (SIZES, STEPS)
    results = [check(name, side, compute) for name, compute in checks(sizes, steps, graph, dtypes).items()]
    return int(not all(results))


if __name__ == "__main__":
    sys.exit(main())
