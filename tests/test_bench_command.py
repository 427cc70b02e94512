"""The command ``bench``: rows as they come, from processes of their own, chosen by name, and kept in a file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import bench_rows
import pytest
import torch
from bench_rows import row
from subprocesses import ROOT, run_python
from typer.testing import CliRunner, Result

from gmp_kernels import _C
from gmp_kernels.tools import plots
from gmp_kernels.tools.bench.measurement import Case
from gmp_kernels.tools.bench.record import Machine
from gmp_kernels.tools.cli import bench as command
from gmp_kernels.tools.cli import main as cli

RUNNER = CliRunner(env={"COLUMNS": "140"})
DRIVER = """
import sys
from functools import partial
from pathlib import Path
sys.path.append("tests")
import bench_rows
from gmp_kernels.tools.cli import bench, main

kind, folder, *sys.argv[1:] = sys.argv[1:]
folder = Path(folder)
second = {
    "seen": partial(bench_rows.seen, folder / "output", folder / "a.json"),
    "waits": partial(bench_rows.waits, folder / "marker"),
}[kind]
bench.all_cases = lambda _: [bench_rows.row("first", 1.0, 2.0), bench_rows.Case("second", "other", 1.0, None, second)]
main.main()
"""


def bench(monkeypatch: pytest.MonkeyPatch, cases: list[Case], *arguments: str | Path) -> Result:
    """Run the command for these rows, in one process unless the arguments say otherwise."""
    monkeypatch.setattr(command, "all_cases", lambda folder: cases)
    return RUNNER.invoke(cli.app, ["bench", "--processes", "1", *map(str, arguments)])


def rows_of(output: str) -> list[list[str]]:
    return [line.split() for line in output.splitlines()]


def test_the_table_the_numbers_and_the_plot_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [
        row("halved", 2.0, 4.0, 0.5, 0.4),
        row("small", 1.5e6, 3e7, 1 / 8, 1 / 15, "B"),
        row("slow", 8e-6, 5e-6, 1.3),
        Case("fails", "other", 1.5, 1.1, bench_rows.raises),
        Case("dies", "other", 1.5, None, bench_rows.dies),
        row("last", 1.0, 2.0),
    ]
    result = bench(monkeypatch, cases, "--output", tmp_path / "new")
    assert result.exit_code == 1, result.output
    rows = rows_of(result.output)
    assert ["halved", "2000.00", "ms", "other", "4000.00", "ms", "0.50", "0.50", "0.40", "must"] in rows
    assert ["small", "1.50", "MB", "other", "30.00", "MB", "1/20", "1/8", "1/15", "aim"] in rows
    assert ["slow", "8.00", "us", "other", "5.00", "us", "1.60", "1.30", "missed"] in rows
    assert ["fails", "other", "1.50", "1.10", "failed"] in rows and ["dies", "other", "1.50", "failed"] in rows
    assert ["last", "1000.00", "ms", "other", "2000.00", "ms", "0.50", "1.00", "must"] in rows
    assert "fails: RuntimeError: no [memory] left" in result.output
    assert "dies: its process ended with exit code 7" in result.output

    machine = Machine.here()
    assert result.output.startswith(f"{machine.device}, {machine.cores} cores, {machine.threads} threads, kernels for ")
    document = json.loads((tmp_path / "new" / f"{machine.slug}.json").read_text())
    assert document["machine"].keys() == machine.to_dict().keys()
    assert document["shrink"] == 1
    assert [found["name"] for found in document["cases"]] == [case.name for case in cases]
    assert document["cases"][0]["ratios"] == [0.5] and document["cases"][0]["verdict"] == "must"
    assert document["cases"][3]["error"] == "RuntimeError: no [memory] left"
    assert {path.name for path in (tmp_path / "new").iterdir()} == {f"{machine.slug}.json", f"{machine.slug}.png"}
    assert (tmp_path / "new" / f"{machine.slug}.png").read_bytes().startswith(b"\x89PNG")


def test_every_process_measures_a_row_once_and_both_modes_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "seen").mkdir()
    turns = partial(bench_rows.in_turn, tmp_path / "seen")
    cases = [
        Case("wide", "other", 2.0, None, turns),
        Case("few", "other", 1.0, None, bench_rows.setting, most_processes=2),
    ]
    drawn = []
    monkeypatch.setattr(plots, "plot_ratios", lambda path, bars, title: drawn.append(bars))
    arguments = ("--processes", "3", "--json", tmp_path / "a.json", "--plot", tmp_path / "a.png", "--threads", "1")
    threads = torch.get_num_threads()
    try:
        result = bench(monkeypatch, cases, *arguments)
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    assert "1.05 in 2, 1.40 in 1 (1.00-1.40)" in result.output
    wide, few = json.loads((tmp_path / "a.json").read_text())["cases"]
    assert wide["ratios"] == list(bench_rows.SLOWER) and wide["ratio"] == 1.1
    assert few["ratios"] == [1.0, 1.0]  # built whole, with one thread, in two processes
    processes = {int(path.name) for path in (tmp_path / "seen").iterdir()}
    assert len(processes) == 3 and os.getpid() not in processes
    (bars,) = drawn
    assert bars["wide / other"] == plots.Bar(list(bench_rows.SLOWER), "1.05 in 2, 1.40 in 1", 2.0, None, False)


def test_a_trial_has_no_verdicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(plots, "plot_ratios", lambda path, bars, title: drawn.append(bars))
    cases = [Case("a", "b", 1.0, 0.5, bench_rows.setting)]
    result = bench(monkeypatch, cases, "--quick", "--json", tmp_path / "a.json", "--plot", tmp_path / "a.png")
    assert result.exit_code == 0, result.output
    assert "the ratios are not held to their bounds" in result.output
    assert ["ours", "median", "baseline", "median", "ratio"] in rows_of(result.output)
    document = json.loads((tmp_path / "a.json").read_text())
    assert document["shrink"] == document["cases"][0]["ours"]["median"] == 16
    assert document["cases"][0]["verdict"] is None
    bar = drawn[0]["a / b"]
    assert (bar.must, bar.aim, bar.is_missed) == (None, None, False)


def started(kind: str, folder: Path) -> subprocess.Popen[bytes]:
    arguments = ["bench", "--processes", "1", "--json", folder / "a.json"]
    with (folder / "output").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-c", DRIVER, kind, folder, *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder / "tmp")},
        )


def test_a_row_is_printed_and_written_before_the_next_is_measured(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    assert started("seen", tmp_path).wait() == 0, (tmp_path / "output").read_text()
    first, second = json.loads((tmp_path / "a.json").read_text())["cases"]
    assert (first["name"], second["name"]) == ("first", "second")
    assert (second["ours"]["median"], second["baseline"]["median"]) == (1, 1)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_end_from_outside_leaves_the_rows_so_far_and_nothing_else(sent: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    process = started("waits", tmp_path)
    while not (tmp_path / "marker").exists():
        assert process.poll() is None, (tmp_path / "output").read_text()
        time.sleep(0.02)
    process.send_signal(sent)
    assert process.wait() == 130
    output = (tmp_path / "output").read_text()
    assert output.splitlines()[-1].startswith("first ") and "Traceback" not in output
    assert [found["name"] for found in json.loads((tmp_path / "a.json").read_text())["cases"]] == ["first"]
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "marker").read_text()), 0)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_rows_are_chosen_by_parts_of_their_names() -> None:
    cases = [row("AdamW, dense", 1.0, 1.0), row("AdamW, compact", 1.0, 1.0), row("threshold", 1.0, 1.0)]
    assert command._selected(cases, []) == cases
    assert command._selected(cases, ["adamw"]) == cases[:2]
    assert command._selected(cases, ["THRESH", "dense"]) == [cases[0], cases[2]]
    assert command._selected(cases, ["threshold / other"]) == cases[2:]


def test_a_row_that_is_not_there_is_refused_with_those_nearest(tmp_path: Path) -> None:
    done = run_python("-m", "gmp_kernels", "bench", "AdamV, dense state", "--output", tmp_path / "new")
    assert done.returncode == 2
    assert "expected part of the name of a row, got 'AdamV, dense state'; the nearest are 'AdamW, " in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_rows_of_an_earlier_run_stay_unless_all_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("a", "b", "c")
    monkeypatch.setattr(command, "measure_in_processes", in_this_process)
    bench(monkeypatch, [row(name, 1.0, 4.0) for name in names], "b", "--output", tmp_path)
    bench(monkeypatch, [row(name, 2.0, 4.0) for name in names], "a", "c", "--output", tmp_path)
    (path,) = tmp_path.glob("*.json")

    def ratios() -> list[float]:
        return [found["ratio"] for found in json.loads(path.read_text())["cases"]]

    assert ratios() == [0.5, 0.25, 0.5]
    before = path.read_text()
    other = bench(monkeypatch, [row("a", 1.0, 4.0)], "a", "--quick", "--output", tmp_path)
    assert "expected rows measured in this setting" in str(other.exception) and path.read_text() == before
    bench(monkeypatch, [row(name, 3.0, 4.0) for name in names[1:]], "--output", tmp_path)
    assert ratios() == [0.75, 0.75]


def in_this_process(cases: list[Case], num_processes: int, **options: object) -> object:
    from gmp_kernels.tools.bench.measurement import measure_all

    return measure_all(cases, shrink=options["shrink"], seconds=0)  # type: ignore[arg-type]


def test_a_chosen_instruction_set_is_in_the_file_and_in_its_name(tmp_path: Path) -> None:
    arguments = ("scheduler.step", "--quick", "--processes", "1", "--output", tmp_path)
    done = run_python("-m", "gmp_kernels", "bench", *arguments, GMP_KERNELS_ISA="portable")
    assert done.returncode == 0, done.stderr
    assert " threads, kernels for portable, torch " in done.stdout
    (path,) = tmp_path.glob("*.json")
    assert path.name.endswith("-cores-portable.json") and json.loads(path.read_text())["machine"]["isa"] == "portable"
    assert Machine.here().isa == _C.isa()


def test_a_gpu_takes_no_number_of_processes() -> None:
    result = RUNNER.invoke(cli.app, ["bench", "--device", "cuda", "--processes", "2"])
    assert result.exit_code == 2 and "expected no number of processes for a GPU" in result.output
