"""The stages, the most valuable first for somebody who has a GPU for a few minutes."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable

from gpu_stages.running import Stage

PYTHON = sys.executable
CUDA_TESTS = {
    "GMP_KERNELS_TEST_BACKENDS": "reference,cuda",
    "TRITON_INTERPRET": "0",
    "OMP_NUM_THREADS": "2",  # for each of the processes that share the cores
}
TRITON_TESTS = {**CUDA_TESTS, "GMP_KERNELS_TEST_BACKENDS": "reference,triton"}
# The first two have stages of their own. The others build wheels and sanitized extensions, read files, or compile for
# devices that are not here.
NOT_IN_SUITE = (
    *("tests/gpu/test_large.py", "tests/gpu/test_torch.py"),
    *("tests/test_build.py", "tests/test_setup.py", "tests/test_cuda_toolkit.py", "tests/test_sanitizers.py"),
    *("tests/test_gpu_check.py", "tests/test_gpu_profile.py", "tests/test_gpu_stages.py", "tests/test_gpu_suite.py"),
    *("tests/test_cuda_static.py", "tests/test_triton.py"),
)


def has(module: str) -> bool:
    """Whether the Python that runs the stages has this module."""
    return importlib.util.find_spec(module) is not None


def program(name: str, *arguments: str) -> tuple[str, ...]:
    """Return the command of one of the programs beside this file."""
    return (PYTHON, "-m", f"gpu_stages.{name}", *arguments)


def tests(*selection: str, timeout: int = 60) -> tuple[str, ...]:
    """Return a pytest command that reports failures at once, without the project's options, which skip tests/gpu."""
    command = [PYTHON, "-m", "pytest", "-p", "gpu_stages.pytest_facts", "-o", "addopts=-q --strict-markers"]
    command += ["-p", "no:cacheprovider", "--tb=short", "--continue-on-collection-errors", "--maxfail=60"]
    if has("pytest_timeout"):
        # By a thread, because a signal would not reach a process that waits for a GPU that hangs.
        command += [f"--timeout={timeout}", "--timeout-method=thread"]
    return (*command, *selection)


def parallel(processes: int) -> tuple[str, ...]:
    """Return options of pytest-xdist, if it is installed: each process takes one test at a time, in order."""
    return ("-n", str(processes), "--maxschedchunk", "1") if has("xdist") else ()


def suite(backend: str) -> tuple[str, ...]:
    """Return the command of all tests of a backend, in parallel and the longest first."""
    return tests(*parallel(6), "--only", backend, "tests", *(f"--ignore={path}" for path in NOT_IN_SUITE))


# The caching allocator would hide an overrun within its pools; graphs cannot be captured without it.
MEMCHECK = Stage(
    "memcheck",
    70,
    program("sanitize", "memcheck", "--no-graph"),
    {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    least=20,
    tool="compute-sanitizer",
)
STAGES = (
    Stage("info", 45, program("info")),
    Stage("build", 200, program("build")),
    Stage("smoke", 60, program("smoke"), least=15, gate=True, diagnosis=MEMCHECK),
    Stage("bench", 110, program("bench", "--without", "triton"), least=15),
    Stage("profile", 40, program("profile"), least=15),
    Stage("suite", 120, suite("cuda"), CUDA_TESTS, least=30),
    Stage("ncu", 75, program("counters"), least=25, tool="ncu"),
    MEMCHECK,
    Stage("racecheck", 70, program("sanitize", "racecheck"), least=20, tool="compute-sanitizer"),
    Stage("large", 60, tests("tests/gpu/test_large.py"), CUDA_TESTS, least=20),
    # Compiling takes most of the time. Each of its processes computes the expected results on so many threads.
    Stage("triton", 100, program("smoke", "--backend", "triton", "--processes"), {"OMP_NUM_THREADS": "4"}, least=15),
    Stage("triton-bench", 40, program("bench", "--only", "triton"), least=15),
    Stage("torch", 90, tests(*parallel(4), "tests/gpu/test_torch.py", timeout=80), CUDA_TESTS, least=20),
    Stage("triton-suite", 150, suite("triton"), TRITON_TESTS, least=30),
    Stage("ptx", 150, program("ptx"), least=60),
)
ALWAYS = ("info", "build")  # these run whatever is requested


def chosen(stages: Iterable[Stage], names: Iterable[str]) -> list[Stage]:
    """Return the requested stages and those that always run; all stages if none was requested."""
    wanted = {*names, *ALWAYS} if names else None
    return [stage for stage in stages if wanted is None or stage.name in wanted]
