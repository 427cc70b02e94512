"""Wheels of this source tree, built from a copy so that nothing in it changes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from subprocesses import ROOT, run_python

NOT_SOURCE = shutil.ignore_patterns(".*", "build", "dist", "tests", "*.so", "*.egg-info", "__pycache__")


def build_wheel(scratch: Path, **environment: str) -> Path:
    """Build in isolation, as ``pip install .`` does, under ``scratch``."""
    source = shutil.copytree(ROOT, scratch / "source", ignore=NOT_SOURCE)
    # nvcc takes a minute, and what it makes is not run here.
    environment = {"GMP_KERNELS_BUILD_CUDA": "0", **environment}
    done = run_python("-m", "pip", "wheel", source, "--no-deps", "--wheel-dir", scratch, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = scratch.glob("*.whl")
    return wheel


def library(name: str) -> str:
    """Path of one of the compiler's own libraries."""
    return subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
