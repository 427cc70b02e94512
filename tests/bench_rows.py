"""Rows for tests of the command ``bench``. They are built in other processes, so they lie in a module."""

from __future__ import annotations

import json
import os
import time
from functools import partial
from pathlib import Path

import torch

from gmp_kernels.tools.bench.measurement import Case, Pair

SLOWER = (1.0, 1.4, 1.1)


def row(name: str, ours: float, baseline: float, must: float = 1.0, aim: float | None = None, unit: str = "s") -> Case:
    return Case(name, "other", must, aim, partial(known, ours, baseline), unit)


def known(ours: float, baseline: float, _shrink: int) -> Pair:
    return Pair(ours, baseline)


def raises(_shrink: int) -> Pair:
    raise RuntimeError("no [memory] left")


def dies(_shrink: int) -> Pair:
    os._exit(7)


def waits(marker: Path, _shrink: int) -> Pair:
    """Write the number of the process, and wait for longer than a test may take."""
    marker.with_suffix(".new").write_text(str(os.getpid()))
    marker.with_suffix(".new").rename(marker)
    time.sleep(600)
    return Pair(1.0, 1.0)


def seen(output: Path, json_file: Path, _shrink: int) -> Pair:
    """Return how many lines of the output, and how many rows of the file, tell of the row ``first`` by now."""
    lines = [line for line in output.read_text().splitlines() if line.startswith("first")]
    return Pair(float(len(lines)), float(len(json.loads(json_file.read_text())["cases"])))


def setting(shrink: int) -> Pair:
    """Return what a row is built with, and the threads that it has."""
    return Pair(float(shrink), float(torch.get_num_threads()))


def in_turn(folder: Path, _shrink: int) -> Pair:
    """Return another ratio in each process, and leave the number of the process."""
    before = len(list(folder.iterdir()))
    (folder / str(os.getpid())).touch()
    return Pair(SLOWER[before], 1.0)
