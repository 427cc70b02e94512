"""A pytest plugin that reports every failure at once, selects the tests of a backend, and runs the longest first.

pytest prints failures at the end, so a run that is stopped before would have reported nothing.
"""

from __future__ import annotations

import os
import re
import signal
from collections import Counter
from pathlib import Path

import pytest

from gpu_stages.facts import as_line, tell

# Words in the names of tests that take long. The shorter tests run later, and fill the gaps between the processes.
LONGEST = ("hundred_times", "hypothesis", "properties", "large", "many", "every", "training", "process", "memory")
MOST_CHARACTERS = 400


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--only", metavar="BACKEND", help="tests with this backend among their parameters, and tests/gpu")


def has_parameter(name: str, backend: str) -> bool:
    """Whether a test's name has the backend between its brackets."""
    return re.search(rf"(?<![a-z]){backend}(?![a-z:])", name.partition("[")[2]) is not None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if backend := config.getoption("--only"):
        kept = [item for item in items if "gpu" in Path(item.path).parts or has_parameter(item.name, backend)]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept
    items.sort(key=lambda item: not any(word in item.nodeid for word in LONGEST))


def message(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Return one line that says what went wrong: the exception's message, or the end of the report."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(crash.message) if crash is not None else str(report.longrepr or "")[-MOST_CHARACTERS:]
    return " ".join(text.split())[:MOST_CHARACTERS]


class Facts:
    """Counts of tests, kept in the process that prints."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._seconds: dict[str, float] = {}
        self._stdout = os.dup(1)  # before pytest captures it

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[report.nodeid] = self._seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self._counts["failed"] += 1
            tell(f"FAILED {report.nodeid} ({report.when}): {message(report)}", test=report.nodeid, when=report.when)
        elif report.when == "call" or report.skipped:
            self._counts["skipped" if report.skipped else "passed"] += 1

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._counts["not collected"] += 1
            tell(f"NOT COLLECTED {report.nodeid}: {message(report)}", test=report.nodeid, when="collect")

    def pytest_sessionfinish(self) -> None:
        tell(self.counts(), counts=dict(self._counts))

    def end_early(self, number: int, _frame: object) -> None:
        """Report the progress and exit at once. Writes past pytest, which captures the output of the running test."""
        text = "then the time was over; before that " + self.counts()
        os.write(self._stdout, f"{as_line(text)}\n".encode())
        os._exit(128 + number)

    def counts(self) -> str:
        """Return the results of the tests so far as text, and which took longest."""
        longest = sorted(self._seconds.items(), key=lambda entry: -entry[1])[:5]
        times = "".join(f"\n  {seconds:.1f} s {test}" for test, seconds in longest if seconds > 1)
        return (", ".join(f"{number} {result}" for result, number in self._counts.items()) or "no tests") + times


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # not in processes of xdist, whose results reach the one that prints
        facts = Facts()
        config.pluginmanager.register(facts, "gpu_stages_facts")
        signal.signal(signal.SIGTERM, facts.end_early)
