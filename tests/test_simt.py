"""The CUDA kernels on the host execution layer: any schedule gives the same bits; and the layer finds what it must."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from subprocesses import ROOT

from gmp_kernels import BitMask, _simt, magnitude_threshold, prune_
from gmp_kernels.optim import AdamW
from gmp_kernels.testing import adversarial_cases, assert_same_pruning

SIMT = ROOT / "csrc/simt"


@pytest.fixture(params=[1, 2, 3])
def shuffled(request: pytest.FixtureRequest) -> Iterator[None]:
    """Blocks and threads run in an order of this seed, and stop in between."""
    _simt.set_seed(request.param)
    yield
    _simt.set_seed(0)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_order_of_blocks_and_threads_gives_the_same_masks(shuffled: None, dtype: torch.dtype, scope: str) -> None:
    for name in ("random", "small_integers", "constant"):
        layers = [adversarial_cases(n, dtype)[name] for n in (7, 40_000, 1, 20_011)]
        assert_same_pruning(layers, backend="simt", sparsity=0.7, scope=scope)


def test_any_order_gives_the_same_steps(shuffled: None) -> None:
    results = []
    for backend in ("simt", "cpu"):
        parameter = torch.nn.Parameter(torch.randn(40_000, generator=torch.Generator().manual_seed(0)))
        optimizer = AdamW([parameter], compact_state=True, backend=backend)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            optimizer.set_masks({parameter: BitMask.from_bool(torch.rand(40_000, generator=generator) < 0.4)})
            parameter.grad = torch.randn(40_000, generator=generator)
            optimizer.step()
        results.append([parameter.detach(), *optimizer.state_dict()["state"][0].values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


FAULTS = {
    # Threads read what their neighbour has yet to write.
    "race": """
__shared__ int values[64];
values[threadIdx.x] = 0;
__syncthreads();
values[threadIdx.x] = static_cast<int>(threadIdx.x) + 1;
BARRIER
result[threadIdx.x] = values[63 - threadIdx.x];
""",
    # Half of the block waits for the other half.
    "deadlock": "if (threadIdx.x < 32) __syncthreads(); else __syncwarp(), simt::exchange(0); if (threadIdx.x == 40) "
    "while (true) __syncthreads();",
}
PROGRAM = """
#include <cstdio>
#include <exception>
#include "simt.h"
int main(int argc, char**) {{
  int result[64] = {{}};
  for (unsigned seed = 0; seed < 20; ++seed) {{
    simt::set_seed(seed);
    try {{
      simt::launch("kernel", 1, 64, [&] {{ {body} }});
    }} catch (const std::exception& error) {{
      std::printf("%s\\n", error.what());
      return 0;
    }}
    for (int t = 0; t < 64; ++t) if (result[t] != 64 - t) {{ std::printf("wrong\\n"); return 0; }}
  }}
  std::printf("right\\n");
}}
"""


def output_of(body: str, scratch: Path) -> str:
    (scratch / "main.cpp").write_text(PROGRAM.format(body=body))
    program = scratch / "main"
    sources = [scratch / "main.cpp", SIMT / "simt.cpp"]
    subprocess.run(["g++", "-std=c++17", "-O1", "-fopenmp", f"-I{SIMT}", *sources, "-o", program], check=True)
    return subprocess.run([program], capture_output=True, text=True, check=True, timeout=60).stdout.strip()


def test_a_barrier_that_is_missing_shows(tmp_path: Path) -> None:
    assert output_of(FAULTS["race"].replace("BARRIER", "__syncthreads();"), tmp_path) == "right"
    assert output_of(FAULTS["race"].replace("BARRIER", ""), tmp_path) == "wrong"


def test_a_block_that_cannot_go_on_is_an_error(tmp_path: Path) -> None:
    assert output_of("if (threadIdx.x % 2) __syncwarp();", tmp_path).startswith("kernel: a block cannot go on")


def traffic_of(run) -> tuple[int, float]:
    _simt.take_traffic()
    run()
    rows = _simt.take_traffic()
    return sum(row[1] for row in rows), sum(row[2] + row[3] for row in rows)


N = 1 << 18


def test_a_selection_reads_the_weights_once() -> None:
    weight = torch.randn(N)
    launches, moved = traffic_of(lambda: magnitude_threshold(weight, N // 2, backend="simt"))
    assert launches == 6
    assert 4 * N <= moved < 4.3 * N  # the weights and a sample of them


def test_many_layers_take_no_more_launches_than_one() -> None:
    layers = [torch.randn(n) for n in (3, 1000, 70_000, 16384, 5)] * 20
    launches, _ = traffic_of(lambda: prune_(layers, sparsity=0.5, backend="simt"))
    assert launches == 7


def test_apply_writes_only_what_changes() -> None:
    weight = torch.randn(N)
    masks = prune_(weight, sparsity=0.9, backend="simt").masks
    _, first = traffic_of(lambda: prune_(weight, sparsity=0.9, masks=masks, backend="simt"))
    # Nothing is left to prune: selection reads masks and what they keep, apply reads all and writes the mask only.
    assert first < 8 * N


def test_a_step_over_dead_weights_reads_the_mask_only() -> None:
    parameter = torch.nn.Parameter(torch.randn(N))
    parameter.grad = torch.randn(N)
    optimizer = AdamW([parameter], backend="simt")
    optimizer.step()
    dense = traffic_of(optimizer.step)
    assert dense == (1, 28 * N)
    optimizer.set_masks({parameter: BitMask.from_bool(torch.arange(N) < N // 4)})
    _, moved = traffic_of(optimizer.step)
    assert moved == 28 * N // 4 + N // 8
