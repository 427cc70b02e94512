"""Stage ``build``: install the extensions of a carried build, or else build them in place for this GPU alone."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from gpu_stages import pack
from gpu_stages.facts import tell
from gpu_stages.running import ROOT

PACKAGE = ROOT / "gmp_kernels"
# Prints for each backend why it cannot run, if so; the exit code is 1 if one of the needed backends cannot.
PROBE = """
import sys, torch
from gmp_kernels import backends
reasons = {backend.name: backend.probe() for backend in backends.available()}
print("; ".join(f"{name}: {reason or 'usable'}" for name, reason in reasons.items()))
sys.exit(any(reasons[name] for name in sys.argv[1:]))
"""


def probe(*needed: str) -> tuple[bool, str]:
    """Return whether the needed backends can run in a new process, and the state of all backends as text."""
    done = subprocess.run([sys.executable, "-c", PROBE, *needed], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode == 0, (done.stdout.strip() or done.stderr.strip()[-400:])


def capability() -> str:
    """Return the compute capability of the GPU as nvcc writes it; empty if there is no GPU."""
    import torch

    return "".join(map(str, torch.cuda.get_device_capability())) if torch.cuda.is_available() else ""


def build_command() -> list[str]:
    """Return the command that builds in place."""
    return [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--force", "--parallel", "2"]


def main(arguments: list[str] | None = None) -> int:
    """Use the carried build if it works here; build otherwise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pack", type=Path, default=pack.FOLDER)
    options = parser.parse_args(arguments)
    copies: list[Path] = []
    try:
        copies = pack.install(options.pack, PACKAGE, str(sysconfig.get_config_var("EXT_SUFFIX")).lstrip("."))
        usable, said = probe("cpu", "cuda")
        if usable:
            tell(f"took the carried build; {said}", build="carried")
            return 0
        tell(f"the carried build does not work here: {said}")
    except pack.PackError as error:
        tell(str(error))
    for path in copies:
        path.unlink()
    start = time.monotonic()
    environment = {**os.environ, "GMP_KERNELS_BUILD_CUDA": "1", "GMP_KERNELS_CUDA_ARCHS": capability()}
    code = subprocess.run(build_command(), cwd=ROOT, env=environment, check=False).returncode
    if code:
        tell(f"building in place failed with exit code {code}", build="failed")
        return 1
    usable, said = probe("cpu", "cuda")
    tell(f"built in place in {time.monotonic() - start:.0f} s; {said}", build="in place")
    return int(not usable)


if __name__ == "__main__":
    sys.exit(main())
