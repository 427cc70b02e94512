"""What a row of the speed table is, and how it is measured.

The two sides of a ``Case`` are run in turn (ours, baseline, ours, baseline, ...), so that whatever else happens on the
machine happens to both, and compared by their medians. Ratios are always ours / baseline: below 1 ours is the faster or
smaller one.
"""

from __future__ import annotations

import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

__all__ = ["Case", "Machine", "Pair", "Result", "Spread", "Timed", "measure", "time_once"]

MIN_ROUNDS = 5
SETTLE_BYTES = 1 << 26  # more than the caches of the CPUs this is read for

Clock = Callable[[], float]


def _nothing() -> None:
    pass


class Timed(NamedTuple):
    """One side of a case: ``run`` is timed; ``prepare`` comes before every run and is not."""

    run: Callable[[], object]
    prepare: Callable[[], object] = _nothing


class Pair(NamedTuple):
    """Both sides of a case, ready to run; a number is a quantity that is known without timing, in the case's unit."""

    ours: Timed | float
    baseline: Timed | float


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes
    ----------
    name : str
        What ours runs.
    baseline : str
        What it is compared with.
    must, aim : float
        Bounds on ours / baseline, both inclusive; ``aim`` is None where nothing beyond ``must`` is wanted.
    build : callable
        Allocates everything and returns the two sides. Its argument divides the number of weights: 1 for the table,
        more to try it out.
    unit : {"s", "B"}
        Seconds or bytes.
    """

    name: str
    baseline: str
    must: float
    aim: float | None
    build: Callable[[int], Pair]
    unit: Literal["s", "B"] = "s"

    def verdict(self, ratio: float) -> Literal["aim", "must", "missed"]:
        """Return the strictest bound that ``ratio`` (ours / baseline) meets."""
        if self.aim is not None and ratio <= self.aim:
            return "aim"
        return "must" if ratio <= self.must else "missed"


class Spread(NamedTuple):
    """Median and the 10th and 90th percentile of one side, in the case's unit; ``rounds`` is 0 for a known quantity."""

    median: float
    p10: float
    p90: float
    rounds: int


@dataclass(frozen=True)
class Result:
    """A case as measured."""

    case: Case
    ours: Spread
    baseline: Spread

    @property
    def ratio(self) -> float:
        """Median of ours / median of the baseline."""
        return self.ours.median / self.baseline.median

    @property
    def verdict(self) -> Literal["aim", "must", "missed"]:
        """The strictest bound met."""
        return self.case.verdict(self.ratio)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data, ready for JSON."""
        return {
            "name": self.case.name,
            "baseline_name": self.case.baseline,
            "unit": self.case.unit,
            "ours": self.ours._asdict(),
            "baseline": self.baseline._asdict(),
            "ratio": self.ratio,
            "must": self.case.must,
            "aim": self.case.aim,
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class Machine:
    """What the numbers were measured on, and with.

    Attributes
    ----------
    device : str
        Name of the CPU.
    cores, threads : int
        That the machine has, and that both sides run on.
    load : float
        Processes that wanted a core in the minute before. Anything near 1 or above disturbs the measurement: a core
        taken away holds up every parallel loop, ours and torch's, for longer than the loop takes.
    python, torch, numpy : str
        Versions.
    date : str
        ISO 8601, UTC.
    """

    device: str
    cores: int
    threads: int
    load: float
    python: str
    torch: str
    numpy: str
    date: str

    @classmethod
    def here(cls) -> Machine:
        """Describe this machine and process."""
        cpuinfo = Path("/proc/cpuinfo")
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
        return cls(
            device=found[1].strip() if found else platform.machine(),
            cores=os.cpu_count() or 1,
            threads=torch.get_num_threads(),
            load=os.getloadavg()[0],
            python=platform.python_version(),
            torch=torch.__version__,
            numpy=np.__version__,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    @property
    def slug(self) -> str:
        """Device and cores as a file name, such as ``amd-epyc-2-cores``."""
        return re.sub(r"[^a-z0-9]+", "-", f"{self.device} {self.cores} cores".lower()).strip("-")

    def to_dict(self) -> dict[str, Any]:
        """Return the description as plain data, ready for JSON."""
        return asdict(self)


def time_once(side: Timed, clock: Clock = time.perf_counter, settle: Callable[[], object] = _nothing) -> float:
    """Prepare and settle, then run ``side`` once; return the seconds of the run alone."""
    side.prepare()
    settle()
    start = clock()
    side.run()
    return clock() - start


def measure(case: Case, *, shrink: int = 1, seconds: float = 3.0, clock: Clock = time.perf_counter) -> Result:
    """Build ``case`` and run its sides in turn.

    Parameters
    ----------
    case : Case
    shrink : int
        Divides the number of weights.
    seconds : float
        How long the two sides take turns, preparation included; at least 5 rounds, however slow they are.
    clock : callable
        Seconds from any fixed moment.
    """
    pair = case.build(shrink)
    timed = [side for side in pair if isinstance(side, Timed)]
    for side in timed:
        # Touches the pages and wakes the threads.
        time_once(side, clock)
    # Before every run the machine is brought into the same state: no lines of the other side in the caches, least of
    # all modified ones still to be written back, and every thread awake.
    settle = torch.ones(SETTLE_BYTES // 4).sum
    samples: list[list[float]] = [[] for _ in timed]
    end = clock() + seconds
    while timed and (len(samples[0]) < MIN_ROUNDS or clock() < end):
        for side, taken in zip(timed, samples, strict=True):
            taken.append(time_once(side, clock, settle))
    measured = iter(samples)
    return Result(case, *(_spread(next(measured)) if isinstance(s, Timed) else Spread(s, s, s, 0) for s in pair))


def _spread(samples: Sequence[float]) -> Spread:
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    return Spread(statistics.median(samples), deciles[0], deciles[-1], len(samples))
