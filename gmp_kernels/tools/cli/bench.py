"""The command ``gmp-kernels bench``: the speed table, row by row."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from gmp_kernels.tools.bench.gpu import gpu_cases
from gmp_kernels.tools.bench.measurement import (
    HEADINGS,
    Case,
    Failure,
    Result,
    bounds_of,
    measure_all,
    shown_modes,
)
from gmp_kernels.tools.bench.processes import measure_in_processes
from gmp_kernels.tools.bench.record import Machine, Record
from gmp_kernels.tools.bench.run import all_cases
from gmp_kernels.tools.cli.options import Command, drawing
from gmp_kernels.tools.cli.terminal import Table, say

__all__ = ["register"]

SECONDS = {"cpu": 0.2, "cuda": 1.5}  # for one row in one process
QUICK = 16  # divides the number of weights in a trial
NUM_PROCESSES = 5
# The columns of the table that are numbers, and the widest that can be in those not known before.
RIGHT = {1, 3, 4, 5, 6, 8}
WIDEST = {1: "8888.88 ms", 3: "8888.88 ms", 4: "0.88 in 4, 1.88 in 1 (0.88-1.88)", 7: "missed", 8: "8888"}


class Device(StrEnum):
    """Devices that the benchmarks run on."""

    CPU = "cpu"
    CUDA = "cuda"


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(cls=Command)(bench)


def bench(
    rows: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ROW]...", help="Parts of the names of the rows wanted; default: all."),
    ] = None,
    device: Annotated[Device, typer.Option(help="The CPU, or the GPU that torch uses.")] = Device.CPU,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help=f"Processes that measure each row of the CPU; default: {NUM_PROCESSES}."),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="A trial with a sixteenth of the weights and a tenth of the time, too short for verdicts."
        ),
    ] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Number of threads for both sides of a row; default: torch's.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the JSON file and the plot, which are named after the device. Rows that the file has "
            "already stay in it if they are not measured again."
        ),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="JSON file for all numbers.")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG or SVG file for the ratios.")] = None,
) -> None:
    """Measure every operation on this machine beside its usual alternative.

    Each row is printed, and written to the JSON file, as soon as it is measured.
    """
    if plot is not None or output is not None:
        drawing(plot)  # what prevents the picture is reported before minutes of measuring
    if processes is not None and device is Device.CUDA:
        raise typer.BadParameter("expected no number of processes for a GPU, which one process measures")
    if threads is not None:
        torch.set_num_threads(threads)
    torch_device = torch.device(device)
    machine = Machine.here(torch_device)
    setting = _setting_of(machine)
    say(setting)
    # Whoever ends it gets what an interrupt gets: no process and no file of gigabytes is left behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="gmp_kernels_bench_", ignore_cleanup_errors=True) as folder:
        every = all_cases(Path(folder)) if device is Device.CPU else gpu_cases(torch_device)
        cases = _selected(every, rows or [])
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            json_file, plot = output / f"{machine.slug}.json", output / f"{machine.slug}.png"
        shrink, seconds = (QUICK, SECONDS[device] / 10) if quick else (1, SECONDS[device])
        record = Record(json_file, machine, every, shrink, keeps=bool(rows))
        failures = _measure(cases, torch_device, processes or NUM_PROCESSES, shrink, seconds, record)
    for failure in failures:
        say(f"{failure.case.name}: {failure.error}")
    if quick:
        say(
            "This was a trial. So few weights fit into the cache, and so short a time is noisy, so the ratios are not "
            "held to their bounds. Run without --quick for that."
        )
    if json_file is not None:
        say(f"wrote {json_file}")
    if plot is not None and record.measured:
        drawing().plot_ratios(plot, _bars(record.measured, quick), f"{setting}{' (a quick trial)' if quick else ''}")
        say(f"wrote {plot}")
    if failures:
        raise typer.Exit(1)


def _setting_of(machine: Machine) -> str:
    """Return what the rows are measured on, in one line."""
    words = [machine.device, f"{machine.cores} cores", f"{machine.threads} threads"]
    if machine.isa is not None:
        words.append(f"kernels for {machine.isa}")
    words += [f"torch {machine.torch}", f"numpy {machine.numpy}", f"load {machine.load:.2f}"]
    return ", ".join(words if machine.gpu is None else [machine.gpu, *words])


def _selected(cases: Sequence[Case], wanted: Sequence[str]) -> list[Case]:
    """Return the cases whose names contain one of the words, in any case of letters; all of them if there are none."""
    titles = [case.title.lower() for case in cases]
    for row in wanted:
        if not any(row.lower() in title for title in titles):
            near = get_close_matches(row.lower(), titles, n=3, cutoff=0)
            names = ", ".join(repr(cases[titles.index(title)].title) for title in near)
            raise typer.BadParameter(f"expected part of the name of a row, got {row!r}; the nearest are {names}")
    return [
        case
        for case, title in zip(cases, titles, strict=True)
        if not wanted or any(row.lower() in title for row in wanted)
    ]


def _measure(
    cases: Sequence[Case], device: torch.device, num_processes: int, shrink: int, seconds: float, record: Record
) -> list[Failure]:
    """Measure, print and record one row after the other; return those that failed."""
    failures: list[Failure] = []
    # It is drawn between measurements only, because a thread that draws would disturb them.
    console = Console()
    with Progress(console=console, transient=True, auto_refresh=False, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(cases))

        def announce(case: Case, process: int) -> None:
            progress.update(task, description=f"{case.title}, process {process + 1}", refresh=True)

        def recorded(outcomes: Iterator[Result | Failure]) -> Iterator[list[str]]:
            for outcome in outcomes:
                record.add(outcome)
                if isinstance(outcome, Failure):
                    failures.append(outcome)
                yield [outcome.cells()[i] for i in shown]
                progress.advance(task)

        if device.type == "cpu":
            outcomes = measure_in_processes(cases, num_processes, shrink=shrink, seconds=seconds, before=announce)
        else:
            outcomes = measure_all(cases, shrink=shrink, seconds=seconds, device=device)
        table, shown = _empty_table(cases, shrink)
        with closing(outcomes):
            say("")
            for line in table.streamed(recorded(outcomes)):
                say(line, flush=True)
            say("")
    return failures


def _empty_table(cases: Sequence[Case], shrink: int) -> tuple[Table, list[int]]:
    """Return a table as wide as the rows can be, and the positions of its columns among ``HEADINGS``.

    A trial has neither bounds nor verdicts, and the CPU has no rates.
    """
    left_out = {5, 6, 7} if shrink > 1 else set()
    if all(case.min_bytes is None for case in cases):
        left_out.add(8)
    shown = [i for i in range(len(HEADINGS)) if i not in left_out]
    table = Table(*[HEADINGS[i] for i in shown], right=[at for at, i in enumerate(shown) if i in RIGHT])
    for case in cases:
        known = {0: case.name, 2: case.baseline, **dict(enumerate(bounds_of(case), 5))}
        table.add_row(*[(WIDEST | known)[i] for i in shown])
    return table, shown


def _bars(rows: Mapping[str, Mapping[str, Any]], quick: bool) -> dict[str, Any]:
    """Return the bars of the plot for rows as they are in the JSON file."""
    bar = drawing().Bar
    return {
        title: bar(
            row["ratios"],
            shown_modes(row["modes"]),
            *((None, None) if quick else (row["must"], row["aim"])),
            is_missed=row["verdict"] == "missed",
        )
        for title, row in rows.items()
    }
