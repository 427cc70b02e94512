"""Rows of the speed table measured in several processes, each with memory of its own.

The processes live as long as the table: importing torch takes longer than most rows. They take turns, so that only one
of them works at a time, and a row is complete when the last one has measured it.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection

import torch

from gmp_kernels.tools.bench.measurement import Case, Failure, Result, Spread, try_to_measure

__all__ = ["measure_in_processes"]


def measure_in_processes(
    cases: Sequence[Case],
    num_processes: int,
    *,
    shrink: int = 1,
    seconds: float = 0.3,
    before: Callable[[Case, int], object] = lambda case, process: None,
) -> Generator[Result | Failure, None, None]:
    """Measure one case after the other on the CPU, each in every process in turn.

    A case that raises in a process, or ends it, gives a ``Failure``. The next one is measured.

    Parameters
    ----------
    cases : sequence of Case
        They must be picklable, i.e. built by functions of modules.
    num_processes : int
        At least 1. Some cases are measured in fewer.
    shrink, seconds
        As in ``measure``, for each process.
    before : callable
        Called with the case and the number of the process, from 0 on, before each measurement.
    """
    with ExitStack() as stack:
        workers = [stack.enter_context(_Worker()) for _ in range(num_processes)]
        for worker in workers:
            worker.wait()
        for case in cases:
            yield _measure_in_turn(case, workers, shrink, seconds, before)


def _measure_in_turn(
    case: Case, workers: Sequence[_Worker], shrink: int, seconds: float, before: Callable[[Case, int], object]
) -> Result | Failure:
    processes: list[tuple[Spread, Spread]] = []
    for i, worker in enumerate(workers[: case.most_processes]):
        before(case, i)
        outcome = worker.measure(case, shrink, seconds)
        if isinstance(outcome, Failure):
            return outcome
        processes += outcome.processes
    return Result(case, tuple(processes), shrink)


class _Worker:
    """A process that measures what it is sent. It ends with the context, whatever it is doing then."""

    def __enter__(self) -> _Worker:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.join()

    def _start(self) -> None:
        # A new interpreter: a fork would have the memory of this process, and could not use its threads.
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, torch.get_num_threads()))
        self._process.start()
        theirs.close()

    def wait(self) -> None:
        """Wait until the process has imported everything. A process that starts would disturb a measurement."""
        self._connection.recv()

    def measure(self, case: Case, shrink: int, seconds: float) -> Result | Failure:
        """Measure a case; if the process ends meanwhile, start another one and return the failure."""
        self._connection.send((case, shrink, seconds))
        try:
            outcome: Result | Failure = self._connection.recv()
        except EOFError:
            self._process.join()
            failure = Failure(case, f"its process ended with exit code {self._process.exitcode}", shrink)
            self._start()
            self.wait()
            return failure
        return replace(outcome, case=case)


def _serve(connection: Connection, num_threads: int) -> None:
    # An interrupt from the terminal reaches every process. The one that started this one ends it then, by SIGTERM; and
    # an exit removes temporary files and stops the processes that a row has started.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    torch.set_num_threads(num_threads)
    gc.freeze()  # what is imported stays: without it every row would wait for a look through all of it
    connection.send(os.getpid())
    while True:
        try:
            case, shrink, seconds = connection.recv()
        except EOFError:
            return  # the other side has gone
        connection.send(try_to_measure(case, shrink=shrink, seconds=seconds))
