"""Allocations of the compiled extension that fail, every one in turn: an error, nothing changed, and a retry works."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from failing_allocations import CALLS
from subprocesses import ROOT, run_python

pytestmark = pytest.mark.thorough

SOURCE = ROOT / "tests" / "failing_new.cpp"


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library to preload; a compiler that is missing fails the tests."""
    library = tmp_path_factory.mktemp("shim") / "failing_new.so"
    subprocess.run(["g++", "-std=c++17", "-O2", "-shared", "-fPIC", "-o", library, SOURCE], check=True)
    return library


# With two threads an exception that leaves a parallel region would end the process.
@pytest.mark.parametrize("threads", ["1", "2"])
def test_whichever_allocation_fails_nothing_has_changed(shim: Path, threads: str) -> None:
    done = run_python(
        *(ROOT / "tests" / "failing_allocations.py", shim),
        LD_PRELOAD=str(shim),
        OMP_NUM_THREADS=threads,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    failed = dict(line.rsplit(": ", 1) for line in done.stdout.splitlines())
    assert list(failed) == list(CALLS)
    # Those that are not counted would not be tested.
    assert all(int(number) > 5 for number in failed.values()), failed
