"""The same bytes from every instruction set and any number of threads, and the memory a prune step takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peak_memory import SCENARIOS
from subprocesses import run_python

from gmp_kernels.tools.testing import DTYPES, adversarial_cases, assert_same_pruning

DIGEST = Path(__file__).with_name("digest.py")
PEAK_MEMORY = Path(__file__).with_name("peak_memory.py")
ISA_NEEDS = {  # as csrc/cpu/dispatch.cpp has it
    "portable": set(),
    "avx2": {"avx2", "popcnt"},
    "avx512": {"avx2", "popcnt", "avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx512_vbmi2": {"avx2", "popcnt", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vbmi2"},
}


def cpu_flags() -> set[str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return {flag for line in lines if line.startswith("flags") for flag in line.split(":")[1].split()}


# Of a session and not a module: tests of one backend run together, across modules.
@pytest.fixture(scope="session")
def oracle_digest() -> str:
    done = run_python(DIGEST, "reference", "1")
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[1]


@pytest.mark.parametrize("isa", ISA_NEEDS)
def test_every_instruction_set_writes_the_bytes_of_the_oracle(isa: str, oracle_digest: str) -> None:
    done = run_python(DIGEST, "cpu", "2", GMP_KERNELS_ISA=isa)
    if cpu_flags() >= ISA_NEEDS[isa]:
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [isa, oracle_digest]
    else:
        assert f"GMP_KERNELS_ISA={isa}: this CPU cannot run it; unset it" in done.stderr


def test_the_number_of_threads_changes_nothing(oracle_digest: str) -> None:
    done = run_python(DIGEST, "cpu", "1", "3")
    assert done.stdout.split()[1::2] == [oracle_digest] * 2, done.stderr


def test_threads_share_layers_of_every_size(kernels: str, num_threads: int) -> None:
    for dtype in DTYPES:
        layers = [adversarial_cases(n, dtype)["small_integers"] for n in (3, 90_001, 16384, 40_000, 1)]
        assert_same_pruning(layers, backend=kernels, sparsity=0.7)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_prune_step_stays_within_its_memory(scenario: str) -> None:
    done = run_python(PEAK_MEMORY, "cpu", scenario)
    assert done.returncode == 0, done.stderr
    extra, largest_layer = map(int, done.stdout.split())
    assert extra <= 0.05 * largest_layer + 4e6


def test_threads_of_torch_are_left_as_they_were(kernels: str, num_threads: int) -> None:
    assert_same_pruning([torch.ones(100_000)], backend=kernels, num_prune=5)
    assert torch.get_num_threads() == num_threads
