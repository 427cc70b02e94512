"""Rows of the speed table, and their measurement.

The two sides of a ``Case`` are run in turn (ours, baseline, ours, baseline, ...), so that other load on the machine
affects both, and compared by their medians. Ratios are always ours / baseline: below 1 ours is faster or smaller.

On a GPU the time is measured between two of its events, while the host is ahead of it: work before each run keeps the
device busy for longer than a call takes to launch its kernels. So these rows give the time of the device. They include
time of the host only where a call waits for a result and goes on. Rows with ``wall`` give the time that a caller waits:
the host's clock runs from an idle device until the device is idle again, launches included.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch

from gmp_kernels.errors import DeviceError

__all__ = [
    "HEADINGS",
    "Case",
    "Failure",
    "Machine",
    "Pair",
    "Result",
    "Spread",
    "Timed",
    "measure",
    "measure_all",
    "time_once",
    "write_results",
]

MIN_ROUNDS = 5
SETTLE_BYTES = {"cpu": 1 << 26, "cuda": 1 << 28}  # more than fits into the caches of the device
# So many reads take a millisecond with the fastest memory. Launching a step of one tensor takes a third of that.
READS_AHEAD = 20
CPU = torch.device("cpu")
HEADINGS = ("ours", "median", "baseline", "median", "ratio", "must", "aim", "verdict", "GB/s")

Device: TypeAlias = torch.device
Clock = Callable[[], Any]  # returns moments; the difference of two is in seconds


def _nothing() -> None:
    pass


class _Event:
    """A moment on the current stream of a GPU, reached when all work before it is done."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._event.record()

    def __sub__(self, earlier: _Event) -> float:
        self._event.synchronize()
        return float(earlier._event.elapsed_time(self._event)) / 1e3


def _idle_device() -> float:
    """Wait until the GPU is idle and return the time on the host's clock."""
    torch.cuda.synchronize()
    return time.perf_counter()


class Timed(NamedTuple):
    """One side of a case: ``run`` is timed; ``prepare`` is called before every run and not timed."""

    run: Callable[[], object]
    prepare: Callable[[], object] = _nothing


class Pair(NamedTuple):
    """Both sides of a case, ready to run. A number is a quantity known without timing, in the unit of the case."""

    ours: Timed | float
    baseline: Timed | float


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes
    ----------
    name : str
        Our side of the row.
    baseline : str
        The other side, with which ours is compared.
    must, aim : float
        Bounds on ours / baseline, both inclusive; ``aim`` is None if there is no second bound.
    build : callable
        Allocates everything and returns the two sides. Its argument divides the number of weights: 1 for the table,
        more for a trial.
    unit : {"s", "B", "launches"}
        Seconds, bytes, or kernels launched.
    min_bytes : float, optional
        The fewest bytes that ours could read and write at full size, if that is known.
    wall : bool
        Whether a GPU is timed by the host's clock, so that the host's work for each launch is included.
    """

    name: str
    baseline: str
    must: float
    aim: float | None
    build: Callable[[int], Pair]
    unit: Literal["s", "B", "launches"] = "s"
    min_bytes: float | None = None
    wall: bool = False

    def verdict(self, ratio: float) -> Literal["aim", "must", "missed"]:
        """Return the strictest bound that ``ratio`` (ours / baseline) meets."""
        if self.aim is not None and ratio <= self.aim:
            return "aim"
        return "must" if ratio <= self.must else "missed"


class Spread(NamedTuple):
    """Median, 10th and 90th percentile of one side, in the unit of the case; ``rounds`` is 0 for a known quantity."""

    median: float
    p10: float
    p90: float
    rounds: int


@dataclass(frozen=True)
class Result:
    """Measurement of a case, with the number of weights divided by ``shrink``."""

    case: Case
    ours: Spread
    baseline: Spread
    shrink: int = 1

    @property
    def ratio(self) -> float:
        """Median of ours / median of the baseline."""
        return self.ours.median / self.baseline.median

    @property
    def verdict(self) -> Literal["aim", "must", "missed"] | None:
        """The strictest bound met; None for a trial with fewer weights, to which the bounds do not apply."""
        return self.case.verdict(self.ratio) if self.shrink == 1 else None

    @property
    def bytes_per_second(self) -> float | None:
        """Rate of ours, counting only the bytes it must move; None if these are not known."""
        return None if self.case.min_bytes is None else self.case.min_bytes / self.shrink / self.ours.median

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
            "min_bytes": self.case.min_bytes,
            "bytes_per_second": self.bytes_per_second,
        }

    def cells(self) -> list[str]:
        """Return the row of the table under ``HEADINGS``."""
        case, rate = self.case, self.bytes_per_second
        return [
            case.name,
            _quantity(self.ours.median, case.unit),
            case.baseline,
            _quantity(self.baseline.median, case.unit),
            *_bounds(self.ratio, case, self.shrink),
            self.verdict or "",
            f"{rate / 1e9:.0f}" if rate else "",
        ]


@dataclass(frozen=True)
class Failure:
    """A case that could not be measured, and the error."""

    case: Case
    error: str
    shrink: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Return the failure as plain data, ready for JSON."""
        case = self.case
        bounds = {"must": case.must, "aim": case.aim}
        return {"name": case.name, "baseline_name": case.baseline, "unit": case.unit, **bounds, "error": self.error}

    def cells(self) -> list[str]:
        """Return the row of the table under ``HEADINGS``."""
        return [self.case.name, "", self.case.baseline, "", *_bounds(None, self.case, self.shrink), "failed", ""]


def _bounds(ratio: float | None, case: Case, shrink: int) -> list[str]:
    bounds = (case.must, case.aim) if shrink == 1 else (None, None)
    return ["" if value is None else _as_ratio(value) for value in (ratio, *bounds)]


def _quantity(value: float, unit: str) -> str:
    if unit == "launches":
        return f"{value:g}"
    if unit == "B":
        return f"{value / 1e6:.2f} MB"
    return f"{value * 1e3:.2f} ms" if value >= 1e-4 else f"{value * 1e6:.2f} us"


def _as_ratio(ratio: float) -> str:
    """Format ours as a multiple of the baseline; if it is far below 1, as one over the inverse."""
    return f"1/{1 / ratio:.3g}" if 0 < ratio <= 0.25 else f"{ratio:.2f}"


@dataclass(frozen=True)
class Machine:
    """Machine and versions of a measurement.

    Attributes
    ----------
    device : str
        Name of the CPU.
    cores, threads : int
        Cores of the machine, and threads of both sides.
    load : float
        Processes that wanted a core in the minute before. A load near 1 or above disturbs the measurement: if another
        process takes a core away, every parallel loop, ours or torch's, waits for longer than the loop takes.
    python, torch, numpy : str
        Versions.
    date : str
        ISO 8601, UTC.
    gpu : str, optional
        Name of the GPU, if the GPU was measured.
    """

    device: str
    cores: int
    threads: int
    load: float
    python: str
    torch: str
    numpy: str
    date: str
    gpu: str | None = None

    @classmethod
    def here(cls, device: Device = CPU) -> Machine:
        """Describe this machine and process, and the GPU if ``device`` is one.

        Raises
        ------
        DeviceError
            ``device`` is a GPU, but torch can use none.
        """
        if device.type == "cuda" and not torch.cuda.is_available():
            raise DeviceError(
                f"expected a GPU that torch can use, got none (torch {torch.__version__}); measure the CPU instead, or "
                "check nvidia-smi and that torch is a CUDA build"
            )
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
            gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        )

    @property
    def slug(self) -> str:
        """Device and cores as a file name, such as ``amd-epyc-2-cores``; for a GPU its name only."""
        return re.sub(r"[^a-z0-9]+", "-", (self.gpu or f"{self.device} {self.cores} cores").lower()).strip("-")

    def to_dict(self) -> dict[str, Any]:
        """Return the description as plain data, ready for JSON."""
        return asdict(self)


def time_once(side: Timed, clock: Clock = time.perf_counter, settle: Callable[[], object] = _nothing) -> float:
    """Prepare and settle, then run ``side`` once; return only the time of the run, in seconds."""
    side.prepare()
    settle()
    start = clock()
    side.run()
    return float(clock() - start)


def measure(
    case: Case,
    *,
    shrink: int = 1,
    seconds: float = 3.0,
    clock: Clock = time.perf_counter,
    device: torch.device = CPU,
) -> Result:
    """Build ``case`` and run its sides in turn.

    Parameters
    ----------
    case : Case
    shrink : int
        Divides the number of weights.
    seconds : float
        Time for which the two sides take turns, preparation included. There are at least 5 rounds, however slow.
    clock : callable
        Returns seconds from any fixed moment.
    device : torch.device
        Device that the sides run on. A GPU times them by its own events, unless the case has ``wall``.
    """
    stopwatch, num_reads = clock, 1
    if device.type == "cuda":
        stopwatch, num_reads = (_idle_device, 1) if case.wall else (_Event, READS_AHEAD)
    pair = case.build(shrink)
    timed = [side for side in pair if isinstance(side, Timed)]
    for side in timed:
        # The first run touches the pages and wakes the threads.
        time_once(side, stopwatch)
    # Every run starts from the same state: the caches hold no lines of the other side, in particular no modified ones
    # that must still be written back, and every thread is awake.
    buffer = torch.ones(SETTLE_BYTES[device.type] // 4, device=device)

    def settle() -> None:
        for _ in range(num_reads):
            buffer.sum()

    samples: list[list[float]] = [[] for _ in timed]
    end = clock() + seconds
    while timed and (len(samples[0]) < MIN_ROUNDS or clock() < end):
        for side, taken in zip(timed, samples, strict=True):
            taken.append(time_once(side, stopwatch, settle))
    measured = iter(samples)
    ours, baseline = (_spread(next(measured)) if isinstance(s, Timed) else Spread(s, s, s, 0) for s in pair)
    return Result(case, ours, baseline, shrink)


def measure_all(
    cases: Iterable[Case], *, shrink: int = 1, seconds: float = 3.0, device: torch.device = CPU
) -> Iterator[Result | Failure]:
    """Measure one case after the other. A case that raises gives a ``Failure``, and the next one is measured."""
    for case in cases:
        outcome: Result | Failure
        try:
            outcome = measure(case, shrink=shrink, seconds=seconds, device=device)
        except Exception as error:
            outcome = Failure(case, f"{type(error).__name__}: {error}", shrink)
        # Free the memory of this case before the next one allocates as much.
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        yield outcome


def write_results(path: Path, machine: Machine, shrink: int, outcomes: Sequence[Result | Failure]) -> None:
    """Replace a file of results as a whole, so that it can be written after every row."""
    document = {"machine": machine.to_dict(), "shrink": shrink, "cases": [outcome.to_dict() for outcome in outcomes]}
    scratch = path.with_name(path.name + ".new")
    scratch.write_text(json.dumps(document, indent=2) + "\n")
    scratch.replace(path)


def _spread(samples: Sequence[float]) -> Spread:
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    return Spread(statistics.median(samples), deciles[0], deciles[-1], len(samples))
