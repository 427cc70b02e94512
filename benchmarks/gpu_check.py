"""Checks and measures everything on this machine's GPU, in less than nine minutes: ``make gpu-check``.

``python3 benchmarks/gpu_check.py [STAGE...] [--budget SECONDS]`` needs Python 3.11, torch and pytest, but no network,
pip, make or git. Stages run one after the other, each in its own process and with its own time limit, all within the
budget. A stage that fails does not stop the next one, except that a wrong bit in ``smoke`` ends the run, because later
results would mean nothing. Each result is written at once to ``<gpu>.json``, ``.md`` and ``.log``, in the folder
``$OUT`` or in ``benchmarks/results``. The last lines of output are a summary.

The extensions are built in place, unless a pack with a build is present. ``--pack`` makes one in ``build/gpu-pack``,
for Python 3.12, on a machine that need not have a GPU. Copy that folder together with the sources it was made from.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from gpu_stages import pack
from gpu_stages.record import Record
from gpu_stages.running import GRACE, ROOT, Outcome, Stage, Stopped, run
from gpu_stages.stages import STAGES, chosen

BUDGET = 520.0
RESERVE = 2 * GRACE + 2  # seconds to end the last stage and print the summary
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Check:
    """A run of stages within a budget."""

    def __init__(self, record: Record, budget: float) -> None:
        self._record, self._budget = record, budget
        self._start = time.monotonic()
        self.stop = ""  # the reason if no other stage runs

    def stage(self, stage: Stage) -> Outcome:
        """Run one stage, or record why it does not run."""
        record = self._record
        record.begin(stage.name)
        left = self._budget - RESERVE - (time.monotonic() - self._start)
        if self.stop:
            outcome = Outcome(f"not run: {self.stop}")
            record.end(outcome)
            return outcome
        if left < stage.least:
            outcome = Outcome(f"not run: {max(0, left):.0f} of {self._budget:.0f} s left, too few")
        else:
            limit = min(stage.seconds, left)
            record.say(f"== {stage.name}, at most {limit:.0f} s")
            try:
                outcome = run(stage, limit, record.log, record.fact)
            except Stopped as stopped:
                self.stop = f"stopped by {signal.Signals(stopped.number).name}"
                record.end(Outcome(self.stop))
                raise
        record.say(f"== {stage.name}: {outcome.result}" + (f", {outcome.seconds:.0f} s" if outcome.seconds else ""))
        record.end(outcome)
        return outcome

    def all(self, stages: Sequence[Stage]) -> bool:
        """Run the stages, and the diagnosis of one that failed; return whether all of them passed."""
        passed = True
        for stage in stages:
            began = not self.stop
            outcome = self.stage(stage)
            passed &= outcome.passed
            if outcome.passed or not began:
                continue
            if stage.diagnosis is not None:
                self.stage(stage.diagnosis)
            if stage.gate:
                self.stop = f"{stage.name} did not pass"
            elif "gpu" in self._record.machine and self._record.machine["gpu"] is None:
                self.stop = "no GPU"
        return passed


@contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Raise ``Stopped`` at the first signal that ends a process, and ignore further ones."""

    def stop(number: int, _frame: object) -> None:
        for other in SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def seconds(text: str) -> float:
    """Parse a time from the command line."""
    value = float(text)
    if not value > 0:  # refuses NaN too
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text}")
    return value


def main(arguments: Sequence[str], *, stages: Sequence[Stage] = STAGES, results: Path | None = None) -> int:
    """Run the stages named by ``arguments``; return the exit code, 0 if every one of them passed."""
    assert __doc__ is not None
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = argparse.ArgumentParser(prog="gpu_check.py", description=__doc__.partition("\n")[0])
    names = [stage.name for stage in stages]
    parser.add_argument("stage", nargs="*", metavar="STAGE", help=f"one of {', '.join(names)}; default: all")
    parser.add_argument("--budget", type=seconds, default=BUDGET, help="seconds for everything (default: %(default)g)")
    carried = "make a build to carry, in FOLDER"
    parser.add_argument("--pack", nargs="?", type=Path, const=pack.FOLDER, metavar="FOLDER", help=carried)
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.stage if name not in names]:
        parser.error(f"no stage {', '.join(unknown)}; expected some of {', '.join(names)}")
    if options.pack is not None:
        return pack.make(options.pack)
    folder = results or Path(os.environ.get("OUT") or ROOT / "benchmarks/results")
    try:
        opened = Record(folder, "-".join(["gpu-check", *options.stage]))
    except OSError as error:
        print(f"gpu_check: cannot write to {folder}: {error.strerror}", file=sys.stderr)
        return 2
    with opened as record:
        check = Check(record, options.budget)
        try:
            with stopping_on_signals():
                code = int(not check.all(chosen(stages, options.stage)))
        except Stopped as stopped:
            code = 128 + stopped.number
        if "gpu" in record.machine and record.machine["gpu"] is None:
            record.discard()
            reason = record.machine.get("reason", "no reason given")
            print(f"gpu_check: no GPU that torch can use ({reason}); nothing was built or measured.")
            return 1
        record.save()
        print(record.summary(), flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
