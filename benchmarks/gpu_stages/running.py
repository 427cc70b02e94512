"""Runs the command of a stage within its time and with bounded output, and leaves no process behind."""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from gpu_stages.facts import LISTENING, parsed

ROOT = Path(__file__).parent.parent.parent
GRACE = 2.0  # seconds between SIGTERM and SIGKILL
LONGEST_LINE = 1 << 16
HEAD, TAIL = 1 << 17, 1 << 16  # bytes of a stage's output that the log keeps
LAST_LINES = 15  # of a failed stage, in the summary
MOST_FACTS = 400
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Stage:
    """A command and the time it has.

    Attributes
    ----------
    name : str
        Name by which the command line selects it.
    seconds : float
        Time after which it is ended.
    command : sequence of str
    environment : mapping of str to str
        Added to that of this process.
    least : float
        It is not begun with less time than this, which would be too short for any finding.
    tool : str
        Program that must be on the PATH.
    gate : bool
        If this stage fails, no other runs afterwards.
    diagnosis : Stage, optional
        Stage that runs if this one fails.
    """

    name: str
    seconds: float
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    least: float = 5.0
    tool: str = ""
    gate: bool = False
    diagnosis: Stage | None = None


class Outcome(NamedTuple):
    """The end of a stage: "passed", or what went wrong. ``limit`` is the time it had."""

    result: str
    seconds: float = 0.0
    limit: float = 0.0
    last_lines: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether everything the stage checks holds."""
        return self.result == "passed"


class Stopped(BaseException):
    """This process was told to end, by the signal of this number."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Output:
    """Output of a stage: facts are handed on; the beginning and the end of everything else are logged."""

    def __init__(self, log: Callable[[str], None], fact: Callable[[dict[str, Any]], None]) -> None:
        self._log, self._fact = log, fact
        self._partial = b""
        self._head_left, self._facts_left = HEAD, MOST_FACTS
        self._tail: deque[str] = deque()
        self._tail_size = self._left_out = 0
        self._last: deque[str] = deque(maxlen=LAST_LINES)

    def feed(self, data: bytes) -> None:
        """Take the next bytes."""
        *lines, self._partial = (self._partial + data).split(b"\n")
        for line in lines:
            self._line(line)
        while len(self._partial) > LONGEST_LINE:
            self._line(self._partial[:LONGEST_LINE])
            self._partial = self._partial[LONGEST_LINE:]

    def close(self) -> tuple[str, ...]:
        """Log the end of the output; return the last lines."""
        if self._partial:
            self._line(self._partial)
        if self._left_out:
            self._log(f"... {self._left_out} bytes left out ...\n")
        for line in self._tail:
            self._log(line)
        return tuple(self._last)

    def _line(self, line: bytes) -> None:
        text = line[:LONGEST_LINE].decode(errors="replace").replace("\x00", "") + "\n"
        if (fact := parsed(text)) is not None:
            self._facts_left -= 1
            if self._facts_left == 0:
                self._fact({"text": f"more than {MOST_FACTS - 1} facts; the rest is left out"})
            elif self._facts_left > 0:
                self._fact(fact)
            return
        if text.strip():
            self._last.append(text.rstrip()[:400])
        if self._head_left > 0:
            self._head_left -= len(text)
            self._log(text)
            return
        self._tail.append(text)
        self._tail_size += len(text)
        while self._tail_size > TAIL:
            dropped = len(self._tail.popleft())
            self._tail_size -= dropped
            self._left_out += dropped


def run(
    stage: Stage, limit: float, log: Callable[[str], None], fact: Callable[[dict[str, Any]], None] = lambda _: None
) -> Outcome:
    """Run a stage to its end, or for ``limit`` seconds; the processes it started end with it.

    Raises
    ------
    Stopped
        Raised by a signal handler during the run; the stage has ended then, too.
    """
    if stage.tool and shutil.which(stage.tool) is None:
        return Outcome(f"not run: {stage.tool} is not on the PATH", 0.0, limit)
    log(" ".join(stage.command) + "\n")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            filter(None, (str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH")))
        ),
        "PYTHONUNBUFFERED": "1",
        LISTENING: "1",
        **stage.environment,
    }
    start = time.monotonic()
    try:
        # The stage is a process group, which can be ended as a whole. A session would outlive the end of ours.
        process = subprocess.Popen(
            stage.command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=0,
            preexec_fn=_ending_with(os.getpid()),
        )
    except OSError as error:
        log(f"{error}\n")
        return Outcome(f"could not start: {error.strerror}", 0.0, limit)
    output = Output(log, fact)
    try:
        in_time = _follow(process, output, start + limit)
        if not in_time:
            _signal(process, signal.SIGTERM)
            _follow(process, output, time.monotonic() + GRACE)
    finally:
        # The signal comes before the exit status is collected: until then no other process can get this group's number.
        _signal(process, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # a driver that hangs keeps the process
            process.wait(GRACE)
        if process.returncode is None:
            log(f"process {process.pid} is still there {GRACE:g} s after SIGKILL\n")
        _drain(process, output)
        process.stdout.close()
        last_lines = output.close()
    return Outcome(_result(process.returncode, in_time), time.monotonic() - start, limit, last_lines)


def _ending_with(parent: int) -> Callable[[], None] | None:
    """Return a function that a child calls first, to be killed when its parent ends; None if the system has none."""
    try:
        prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
    except (OSError, AttributeError):
        return None

    def end_with_parent() -> None:
        prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:  # the parent has ended already
            os._exit(1)

    return end_with_parent if prctl else None


def _result(code: int | None, in_time: bool) -> str:
    if code is None:
        return f"still running {GRACE:g} s after SIGKILL"
    if not in_time:
        return "out of time"
    if code < 0:
        return f"killed by {_name(-code)}"
    return f"exit code {code}" if code else "passed"


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # most real-time signals have none
        return f"signal {number}"


def _follow(process: subprocess.Popen[bytes], output: Output, end: float) -> bool:
    """Hand on the output until the process exits (True) or the time is over (False)."""
    is_open = True
    while (left := end - time.monotonic()) > 0:
        if is_open and select.select([process.stdout], [], [], min(left, 0.1))[0]:
            data = os.read(process.stdout.fileno(), 1 << 16)
            output.feed(data)
            is_open = bool(data)
            continue
        # Children of the process may hold the pipe open after it has ended.
        if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return True
        if not is_open:
            time.sleep(min(left, 0.02))
    return False


def _drain(process: subprocess.Popen[bytes], output: Output) -> None:
    """Hand on the contents of the pipe, without waiting for a process that left the group and still holds it open."""
    for _ in range(64):  # more than a pipe holds
        if not select.select([process.stdout], [], [], 0)[0] or not (data := os.read(process.stdout.fileno(), 1 << 16)):
            return
        output.feed(data)


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
