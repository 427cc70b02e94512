"""Stages of ``gpu_check.py`` in processes of their own."""

from __future__ import annotations

import sys
from typing import Any

from subprocesses import ROOT

sys.path.append(str(ROOT / "benchmarks"))
from gpu_stages.running import Stage, run


def executed(stage: Stage, seconds: float = 60) -> tuple[Any, list[dict[str, Any]], str]:
    """Outcome, facts and log of a stage in a process of its own."""
    log: list[str] = []
    found: list[dict[str, Any]] = []
    outcome = run(stage, seconds, log.append, found.append)
    return outcome, found, "".join(log)
