"""Builds, tests, sanitizes and measures on this machine's GPU: what ``make gpu-check`` runs.

Everything is built in place with the Python that runs this file: no network, no virtual environment. Every step has
its own time, together less than ten minutes, and one that fails or runs out of it does not keep the later ones from
running. What they print goes to ``benchmarks/results/<gpu>.log``, the measurements to ``<gpu>.json``; both also to
``$OUT``, where that names a folder.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"

PYTHON = sys.executable
# Without the project's own options, which leave out tests/gpu; and one belongs to a plugin that may not be there.
PYTEST = (PYTHON, "-m", "pytest", "-o", "addopts=-q", "-p", "no:cacheprovider", "--maxfail=20")
IN_PARALLEL = ("-n", "6") if importlib.util.find_spec("xdist") else ()
# These two build wheels in isolation, which fetches what a build needs.
WITHOUT_NETWORK = ("--ignore=tests/test_build.py", "--ignore=tests/test_sanitizers.py")
# Few, because a sanitizer slows every launch down, but with every kernel among them.
CHOSEN = (
    "cuda and (large_sizes and (float32-random or bfloat16-constant) or ties_keep or one_mask_serves"
    " or too_small_to_sample or nothing_is_written and (amsgrad or nesterov) and (float32 or bfloat16))"
)
SANITIZED = ("tests/test_select.py", "tests/test_apply.py", "tests/test_optim_training.py", "-k", CHOSEN)


@dataclass(frozen=True)
class Step:
    """One command and the time it has.

    Attributes
    ----------
    stage, name : str
        What the command line selects by, and what the summary calls it.
    seconds : float
        After which it is ended.
    command : sequence of str
    environment : mapping of str to str
        Added to that of this process.
    """

    stage: str
    name: str
    seconds: float
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


class Outcome(NamedTuple):
    """How a step ended: "passed", or what went wrong."""

    step: Step
    result: str
    seconds: float


def sanitizing(tool: str, seconds: float, *options: str) -> Step:
    """One of compute-sanitizer's tools over a few tests, without the allocator that hides overruns within its pools."""
    command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *options, *PYTEST, *SANITIZED)
    backends = {"GMP_KERNELS_TEST_BACKENDS": "reference,cuda", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Step("sanitize", tool, seconds, command, backends)


def testing(backend: str, seconds: float, *selection: str) -> Step:
    """The suite, and what only a GPU can run, with the tensors of ``backend`` on the GPU."""
    environment = {
        "GMP_KERNELS_TEST_BACKENDS": f"reference,{backend}",
        "TRITON_INTERPRET": "0",
        "OMP_NUM_THREADS": "2",  # for each of the processes that share the cores
    }
    command = (*PYTEST, *IN_PARALLEL, "tests", *WITHOUT_NETWORK, *selection)
    return Step("test", backend, seconds, command, environment)


STEPS = (
    Step(
        "build",
        "compile",
        165,
        (PYTHON, "setup.py", "-q", "build_ext", "--inplace", "--parallel", "4"),
        {"GMP_KERNELS_BUILD_CUDA": "1", "GMP_KERNELS_BUILD_SIMT": "1"},
    ),
    Step("build", "info", 20, (PYTHON, "-m", "gmp_kernels", "info")),
    testing("cuda", 110),
    testing("triton", 85, "-k", "triton"),
    sanitizing("memcheck", 40),
    sanitizing("racecheck", 40),
    sanitizing("synccheck", 30),
    Step(
        "bench",
        "bench",
        105,
        (PYTHON, "-m", "gmp_kernels", "bench", "--device", "cuda", "--output", str(RESULTS)),
    ),
)
STAGES = tuple(dict.fromkeys(step.stage for step in STEPS))


def run(step: Step, write: Callable[[str], None]) -> Outcome:
    """Run one step to its end or the end of its time, handing on its output line by line."""
    write(f"== {step.stage}: {step.name} (at most {step.seconds:g} s)\n{' '.join(step.command)}\n")
    start = time.monotonic()
    try:
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160", **step.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        write(f"{error}\n")
        return Outcome(step, "could not start", 0.0)
    late = threading.Event()

    def end() -> None:
        late.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(step.seconds, end)
    timer.start()
    assert process.stdout is not None
    for line in process.stdout:
        write(line)
    code = process.wait()
    timer.cancel()
    result = "out of time" if late.is_set() else "passed" if code == 0 else f"exit code {code}"
    return Outcome(step, result, time.monotonic() - start)


def summary(outcomes: Sequence[Outcome]) -> str:
    """One line per step."""
    rows = [("stage", "step", "result", "seconds")]
    rows += [(o.step.stage, o.step.name, o.result, f"{o.seconds:.0f} of {o.step.seconds:g}") for o in outcomes]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "".join("  ".join(map(str.ljust, row, widths)).rstrip() + "\n" for row in rows)


class Machine(NamedTuple):
    """What is going to be checked, if there is a GPU at all, and with what."""

    gpu: str | None
    torch: str

    @classmethod
    def here(cls) -> Machine:
        """Describe this machine."""
        try:
            import torch
        except ModuleNotFoundError:
            return cls(None, f"no torch in {sys.executable}")
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        return cls(gpu, f"torch {torch.__version__}")


def main(arguments: Sequence[str], machine: Machine, *, steps: Sequence[Step] = STEPS, results: Path = RESULTS) -> int:
    """Run the stages that ``arguments`` name; return the exit code, 0 if every step of them passed."""
    parser = argparse.ArgumentParser(prog="gpu-check", description="Build, test, sanitize and measure on the GPU.")
    parser.add_argument("stage", nargs="?", default="all", choices=[*STAGES, "all"])
    stage = parser.parse_args(arguments).stage
    if machine.gpu is None:
        print(f"gpu-check: no GPU that torch can use on this machine ({machine.torch}); nothing was built or run.")
        return 1
    slug = re.sub(r"[^a-z0-9]+", "-", machine.gpu.lower()).strip("-")
    log_name = f"{slug}.log" if stage == "all" else f"{slug}-{stage}.log"
    folders = [results, *([Path(os.environ["OUT"])] if os.environ.get("OUT") else [])]
    with ExitStack() as stack:
        logs = [stack.enter_context((folder / log_name).open("w")) for folder in folders]

        def write(text: str) -> None:
            for stream in (*logs, sys.stdout):
                stream.write(text)
                stream.flush()

        write(f"{machine.gpu}, {machine.torch}, Python {sys.version.split()[0]}\n")
        outcomes = [run(step, write) for step in steps if stage in (step.stage, "all")]
        write("\n" + summary(outcomes))
    for folder in folders[1:]:
        for measured in (f"{slug}.json", f"{slug}.png"):
            if any(o.step.stage == "bench" for o in outcomes) and (results / measured).exists():
                shutil.copy(results / measured, folder)
    return int(any(o.result != "passed" for o in outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], Machine.here()))
