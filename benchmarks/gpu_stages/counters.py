"""Stage ``ncu``: the hardware's counters for every kernel of one call, read by Nsight Compute.

Without arguments, the program starts ncu, which starts it again with ``--work``; then it reads the table that ncu has
written. Clocks are left as they are, because the card's settings are not ours.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from gpu_stages.facts import tell

DURATION, READ, WRITTEN = "gpu__time_duration.sum", "dram__bytes_read.sum", "dram__bytes_write.sum"
BASE = {
    DURATION: "time",
    READ: "read",
    WRITTEN: "written",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM %",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "SM %",
    "launch__registers_per_thread": "registers",
}
# Some chips do not have these counters; if they are requested there, ncu reads none at all.
MORE = {
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps %",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio": "waiting for memory",
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio": "waiting at barriers",
}
SHRINK = 4  # a quarter of the weights, as each kernel runs, with its memory restored, once for every group of counters
UNITS = {"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}
UNITS |= {"nsecond": 1e-9, "usecond": 1e-6, "msecond": 1e-3, "second": 1.0}


def ncu(metrics: Sequence[str], log: Path) -> list[str]:
    """Return the command that reads ``metrics`` of this project's kernels."""
    command = ["ncu", "--clock-control", "none", "--csv", "--page", "raw", "--log-file", str(log)]
    command += ["--kernel-name-base", "demangled", "--kernel-name", "regex:gmp::", "--metrics", ",".join(metrics)]
    return [*command, sys.executable, "-m", "gpu_stages.counters", "--work"]


def rows(report: str) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield the kernels and their counts, in base units, from ncu's table with its row of units."""
    lines = report.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if first is None:
        return
    table = csv.DictReader(lines[first:])
    units: dict[str, str] = next(table, {})
    for row in table:
        counted = {}
        for metric in (*BASE, *MORE):
            text = (row.get(metric) or "").replace(",", "")
            try:
                counted[metric] = float(text) * UNITS.get(units.get(metric, ""), 1.0)
            except ValueError:
                continue
        yield row.get("Kernel Name", "?"), counted


def described(counted: dict[str, float]) -> str:
    """Return the counts as one line of text."""
    parts = []
    for metric, name in (BASE | MORE).items():
        if metric not in counted:
            continue
        value = counted[metric]
        if metric == DURATION:
            parts.append(f"{value * 1e6:.1f} us")
        elif metric in (READ, WRITTEN):
            parts.append(f"{name} {value / 1e6:.1f} MB")
        else:
            parts.append(f"{name} {value:.4g}")
    return ", ".join(parts)


def work(device_name: str, backend: str, shrink: int) -> int:
    """Make every call once, for ncu to observe."""
    import torch

    from gpu_stages.work import Work

    device = torch.device(device_name)
    for make in Work(device, backend, shrink).large.values():
        call = make()
        call.run()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the counters; if that fails, leave out those that not every chip has."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", action="store_true", help="make the calls")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--shrink", type=int, default=SHRINK)
    options = parser.parse_args(arguments)
    if options.work:
        return work(options.device, options.backend, options.shrink)
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "ncu.csv"
        for metrics in ((*BASE, *MORE), tuple(BASE)):
            code = subprocess.run(ncu(metrics, log), check=False).returncode
            report = log.read_text(errors="replace") if log.exists() else ""
            found = list(rows(report))
            if found:
                break
            print(report[-4000:], flush=True)
    for kernel, counted in found:
        tell(f"{kernel.partition('(')[0][-70:]}: {described(counted)}", kernel=kernel, counted=counted)
    if not found:
        tell(f"ncu counted nothing (exit code {code}); its messages are in the log")
    return int(code != 0 or not found)


if __name__ == "__main__":
    sys.exit(main())
