"""Rows of the speed table, and their measurement.

The two sides of a ``Case`` are run in turn (ours, baseline, ours, baseline, ...), so that other load on the machine
affects both, and compared by their medians. Ratios are always ours / baseline: below 1 ours is faster or smaller.

Where the arrays of a process happen to lie in memory changes times by a third, and stays for the life of the process.
So a row is measured in several processes (``processes``), and its ratio is the median of theirs.

On a GPU the time is measured between two of its events, while the host is ahead of it: work before each run keeps the
device busy for longer than a call takes to launch its kernels. So these rows give the time of the device. They include
time of the host only where a call waits for a result and goes on. Rows with ``wall`` give the time that a caller waits:
the host's clock runs from an idle device until the device is idle again, launches included.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple, TypeAlias

import torch

__all__ = [
    "HEADINGS",
    "Case",
    "Failure",
    "Pair",
    "Result",
    "Spread",
    "Timed",
    "bounds_of",
    "measure",
    "measure_all",
    "shown_modes",
    "time_once",
    "try_to_measure",
]

MIN_ROUNDS = 3
LONG = 0.2  # seconds
# If the ratio of one process is that many times the ratio of another, a row shows both and not one number.
WIDE = 1.25
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
    highest : float, optional
        Bound on the ratio of every process, not only on their median.
    warm : bool
        Whether the caches are warm: every timed run follows an untimed one of the same side.
    once : bool
        Whether a process runs a side that takes long only once, and has no more rounds than needed.
    most_processes : int, optional
        The most processes to measure the row in.
    """

    name: str
    baseline: str
    must: float
    aim: float | None
    build: Callable[[int], Pair]
    unit: Literal["s", "B", "launches"] = "s"
    min_bytes: float | None = None
    wall: bool = False
    highest: float | None = None
    warm: bool = False
    once: bool = False
    most_processes: int | None = None

    @property
    def title(self) -> str:
        """Both sides of the row, as one name that no other row has."""
        return f"{self.name} / {self.baseline}"

    def verdict(self, ratios: Sequence[float]) -> Literal["aim", "must", "missed"]:
        """Return the strictest bound that the processes, which have these ratios (ours / baseline), meet."""
        ratio = statistics.median(ratios)
        if self.highest is not None and max(ratios) > self.highest:
            return "missed"
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
    """Measurement of a case, with the number of weights divided by ``shrink``.

    Attributes
    ----------
    case : Case
    processes : tuple of (Spread, Spread)
        Ours and the baseline in each process that measured the case.
    shrink : int
    """

    case: Case
    processes: tuple[tuple[Spread, Spread], ...]
    shrink: int = 1

    @property
    def ours(self) -> Spread:
        """Our side: median of the processes' medians, lowest and highest of their percentiles, rounds of all."""
        return _joined([ours for ours, _ in self.processes])

    @property
    def baseline(self) -> Spread:
        """The other side, likewise."""
        return _joined([baseline for _, baseline in self.processes])

    @property
    def ratios(self) -> list[float]:
        """Of every process, median of ours / median of the baseline."""
        return [ours.median / baseline.median for ours, baseline in self.processes]

    @property
    def ratio(self) -> float:
        """Median of the processes' ratios."""
        return statistics.median(self.ratios)

    @property
    def modes(self) -> list[tuple[int, float]]:
        """(number of processes, median of their ratios): one entry, or two if the ratios lie far apart.

        They are divided at the widest gap.
        """
        ordered = sorted(self.ratios)
        if ordered[-1] <= WIDE * ordered[0]:
            return [(len(ordered), self.ratio)]
        cut = max(range(1, len(ordered)), key=lambda i: ordered[i] / ordered[i - 1])
        return [(len(part), statistics.median(part)) for part in (ordered[:cut], ordered[cut:])]

    @property
    def verdict(self) -> Literal["aim", "must", "missed"] | None:
        """The strictest bound met; None for a trial with fewer weights, to which the bounds do not apply."""
        return self.case.verdict(self.ratios) if self.shrink == 1 else None

    @property
    def bytes_per_second(self) -> float | None:
        """Rate of ours, counting only the bytes it must move; None if these are not known."""
        return None if self.case.min_bytes is None else self.case.min_bytes / self.shrink / self.ours.median

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data, ready for JSON."""
        return {
            **_described(self.case),
            "ours": self.ours._asdict(),
            "baseline": self.baseline._asdict(),
            "ratio": self.ratio,
            "ratios": self.ratios,
            "modes": self.modes,
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
            shown_modes(self.modes) + _range(self.ratios),
            *bounds_of(case, self.shrink),
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
        return {**_described(self.case), "error": self.error}

    def cells(self) -> list[str]:
        """Return the row of the table under ``HEADINGS``."""
        return [self.case.name, "", self.case.baseline, "", "", *bounds_of(self.case, self.shrink), "failed", ""]


def shown_modes(modes: Sequence[tuple[int, float]]) -> str:
    """Return the ratio of a row, or both of its modes with their numbers of processes."""
    shown = [(count, _as_ratio(ratio)) for count, ratio in modes]
    return shown[0][1] if len(shown) == 1 else ", ".join(f"{ratio} in {count}" for count, ratio in shown)


def _range(ratios: Sequence[float]) -> str:
    lowest, highest = _as_ratio(min(ratios)), _as_ratio(max(ratios))
    return "" if lowest == highest else f" ({lowest}-{highest})"


def bounds_of(case: Case, shrink: int = 1) -> list[str]:
    """Return must and aim for the table: empty for a trial with fewer weights."""
    if shrink > 1:
        return ["", ""]
    highest = "" if case.highest is None else f", all {_as_ratio(case.highest)}"
    return [_as_ratio(case.must) + highest, "" if case.aim is None else _as_ratio(case.aim)]


def _described(case: Case) -> dict[str, Any]:
    names = {"name": case.name, "baseline_name": case.baseline, "unit": case.unit}
    return {
        **names,
        "must": case.must,
        "aim": case.aim,
        "highest": case.highest,
        "caches": "warm" if case.warm else "cold",
    }


def _joined(spreads: Sequence[Spread]) -> Spread:
    medians, lowest, highest, rounds = zip(*spreads, strict=True)
    return Spread(statistics.median(medians), min(lowest), max(highest), sum(rounds))


def _quantity(value: float, unit: str) -> str:
    if unit == "launches":
        return f"{value:g}"
    if unit == "B":
        return f"{value / 1e6:.2f} MB"
    return f"{value * 1e3:.2f} ms" if value >= 1e-4 else f"{value * 1e6:.2f} us"


def _as_ratio(ratio: float) -> str:
    """Format ours as a multiple of the baseline; if it is far below 1, as one over the inverse."""
    return f"1/{1 / ratio:.3g}" if 0 < ratio <= 0.25 else f"{ratio:.2f}"


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
        Time for which the two sides take turns, preparation included. There are at least 3 rounds, however slow,
        unless the case runs ``once``.
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
    # Every run starts from the same state: every thread is awake, and the caches hold no lines of the other side, in
    # particular no modified ones that must still be written back. If they are to be warm, they hold those of this side.
    buffer = _settle_buffer(device)

    def settle(side: Timed) -> None:
        if case.warm:
            side.run()
            side.prepare()
        else:
            for _ in range(num_reads):
                buffer.sum()

    def timed_run(side: Timed) -> float:
        return time_once(side, stopwatch, partial(settle, side))

    # The first run touches the pages and wakes the threads. In a run that takes long that is little.
    first = [timed_run(side) for side in timed]
    if case.once:
        samples = [
            [taken] if taken >= LONG else [timed_run(side) for _ in range(MIN_ROUNDS)]
            for side, taken in zip(timed, first, strict=True)
        ]
    else:
        samples = [[] for _ in timed]
        end = clock() + seconds
        while timed and (len(samples[0]) < MIN_ROUNDS or clock() < end):
            for side, taken_before in zip(timed, samples, strict=True):
                taken_before.append(timed_run(side))
    measured = iter(samples)
    ours, baseline = (_spread(next(measured)) if isinstance(s, Timed) else Spread(s, s, s, 0) for s in pair)
    return Result(case, ((ours, baseline),), shrink)


def try_to_measure(
    case: Case, *, shrink: int = 1, seconds: float = 3.0, device: torch.device = CPU
) -> Result | Failure:
    """Measure a case, and give its memory back. A case that raises gives a ``Failure``."""
    outcome: Result | Failure
    try:
        outcome = measure(case, shrink=shrink, seconds=seconds, device=device)
    except Exception as error:
        outcome = Failure(case, f"{type(error).__name__}: {error}", shrink)
    # Free the memory of this case before the next one allocates as much.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return outcome


def measure_all(
    cases: Iterable[Case], *, shrink: int = 1, seconds: float = 3.0, device: torch.device = CPU
) -> Generator[Result | Failure, None, None]:
    """Measure one case after the other, in this process."""
    for case in cases:
        yield try_to_measure(case, shrink=shrink, seconds=seconds, device=device)


@lru_cache(1)
def _settle_buffer(device: Device) -> torch.Tensor:
    return torch.ones(SETTLE_BYTES[device.type] // 4, device=device)


def _spread(samples: Sequence[float]) -> Spread:
    deciles = statistics.quantiles(samples, n=10, method="inclusive") if len(samples) > 1 else samples
    return Spread(statistics.median(samples), deciles[0], deciles[-1], len(samples))
