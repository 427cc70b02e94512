"""Python in a process of its own, with the package that is under test here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gmp_kernels

ROOT = Path(__file__).parent.parent


def run_python(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run it; of the settings of the package it sees only those given."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GMP_KERNELS_")}
    package = str(Path(gmp_kernels.__file__).parent.parent)
    return subprocess.run(
        [sys.executable, *arguments],
        env=inherited | {"PYTHONPATH": package} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
