"""Prunes a checkpoint again and again, killed with SIGKILL at a random moment each time; prints what was left behind.

A program and not a test: the runs are forks of a process in which no thread has started yet.
``python checkpoint_crashes.py FOLDER COUNT SEED``, FOLDER holding a checkpoint ``in``.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from checkpoint_cases import contents

from gmp_kernels.checkpoints import PruneJob

MEMORY = 5632  # holds each tensor of the first two shards as a whole, those of the third in pieces only


def prune(source: Path, target: Path, *, resume: bool = False, **settings: Any) -> None:
    PruneJob(source, target, masks=True, **settings).run(resume=resume, max_memory=MEMORY)


def start(*arguments: Any, **settings: Any) -> int:
    """Prune in a process of its own; return its id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            prune(*arguments, **settings)
            status = 0
        finally:
            os._exit(status)
    return child


def finish(child: int) -> None:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def crash(child: int, seconds: float) -> None:
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def main(folder: Path, count: int, seed: int) -> None:
    torch.set_num_threads(1)
    source, target, other = folder / "in", folder / "out", folder / "other"
    before = contents(source)
    expected = {}
    for scope in ("layer", "global"):
        begin = time.perf_counter()
        finish(start(source, target, sparsity=0.5, scope=scope))
        seconds = time.perf_counter() - begin
        expected[scope] = contents(target)
        shutil.rmtree(target)
    finish(start(source, other, sparsity=0.9))
    old = contents(other)
    left: Counter[str] = Counter()
    chance = random.Random(seed)
    for i in range(count):
        scope = chance.choice(["layer", "global"])
        settings = {"sparsity": 0.5, "scope": scope, "force": i % 2 == 1}
        if settings["force"]:
            shutil.copytree(other, target)
        resume = False
        # Some runs are killed again while they resume.
        for _ in range(chance.choice([1, 1, 2, 3])):
            crash(start(source, target, resume=resume, **settings), chance.uniform(0, 1.1 * seconds))
            resume = True
            assert contents(source) == before
            found = contents(target) if target.exists() else None
            assert found in (old if settings["force"] else None, expected[scope]), "half an output"
            left["whole" if found == expected[scope] else "begun" if finished(target) else "nothing"] += 1
        if found != expected[scope]:
            finish(start(source, target, resume=True, **settings))
            assert contents(target) == expected[scope], "resumed to something else"
        shutil.rmtree(target)
        # What is left of a run that was killed between its rename and its end.
        shutil.rmtree(folder / ".out.partial", ignore_errors=True)
    print(json.dumps(left))


def finished(target: Path) -> bool:
    return any(target.with_name(f".{target.name}.partial").glob("finished/*.json"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
