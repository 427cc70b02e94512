"""Stage ``info``: a description of this machine, and how fast its memory is copied and read."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime

from gpu_stages.facts import tell

TOOLS = {
    "nvcc": ("nvcc", "--version"),
    "ncu": ("ncu", "--version"),
    "compute-sanitizer": ("compute-sanitizer", "--version"),
    "g++": ("g++", "--version"),
}
PACKAGES = ("numpy", "triton", "pytest", "xdist", "pytest_timeout", "hypothesis", "setuptools", "pybind11", "typer")
GIGABYTE = 1 << 30


def tool_version(command: tuple[str, ...]) -> str:
    """Return the line of a tool's output that names its version, or "missing"."""
    if shutil.which(command[0]) is None:
        return "missing"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return next((line for line in lines if "ersion" in line or "elease" in line), lines[0] if lines else "silent")


def package_version(name: str) -> str:
    """Return the version of a package, or "missing"."""
    try:
        return str(getattr(__import__(name), "__version__", "there"))
    except ImportError:
        return "missing"


def main() -> int:
    """Report the machine first, because the names of all files depend on it."""
    try:
        import numpy
        import torch
    except ImportError as error:
        tell(machine={"gpu": None, "reason": f"{sys.executable}: {error}"})
        return 1
    if not torch.cuda.is_available():
        tell(machine={"gpu": None, "reason": f"torch {torch.__version__}"})
        return 1
    properties = torch.cuda.get_device_properties(0)
    tell(
        f"{properties.name}, {properties.total_memory / GIGABYTE:.0f} GiB, {properties.multi_processor_count} SMs",
        machine={
            # The entries of gmp-kernels bench, except those that need a built extension.
            "gpu": properties.name,
            "device": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load": os.getloadavg()[0],
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "cuda": torch.version.cuda,
            "capability": f"{properties.major}.{properties.minor}",
        },
    )
    measure_bandwidth()
    packages = {name: package_version(name) for name in PACKAGES}
    tell(", ".join(f"{name} {version}" for name, version in packages.items()), packages=packages)
    for name, command in TOOLS.items():
        tell(f"{name}: {tool_version(command)}")
    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu,mig.mode.current"
    if shutil.which("nvidia-smi"):
        subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv"], check=False, timeout=15)
    return 0


def measure_bandwidth() -> None:
    """Copy and read 4 GiB: the floors with which everything else is compared."""
    import torch

    source = torch.empty(GIGABYTE, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    for name, moved, run in (
        ("copy", 2 * source.nbytes, lambda: target.copy_(source)),
        ("read (sum)", source.nbytes, lambda: source.sum()),
        ("read (amax)", source.nbytes, lambda: source.amax()),
    ):
        milliseconds = []
        for _ in range(11):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            milliseconds.append(begin.elapsed_time(end))
        rate = moved / sorted(milliseconds)[5] / 1e6
        tell(f"{name}: {rate:.0f} GB/s", bandwidth=name, gigabytes_per_second=rate)


if __name__ == "__main__":
    sys.exit(main())
