"""The driver of ``make gpu-check``, with stages that stand in for compilers, tests and GPUs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from subprocesses import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import gpu_check
from gpu_stages import record as records
from gpu_stages import running
from gpu_stages.facts import MARK, parsed, tell
from gpu_stages.running import Outcome, Stage, run

GPU = "NVIDIA H100 80GB HBM3"
SLUG = "nvidia-h100-80gb-hbm3"
TELL = "from gpu_stages.facts import tell; "


def stage(name: str, program: str, seconds: float = 30, **options) -> Stage:
    return Stage(name, seconds, (sys.executable, "-c", program), **{"least": 0.1, **options})


INFO = stage("info", TELL + f"tell(machine={{'gpu': {GPU!r}, 'torch': 'torch 2.11.0'}})")


class Run:
    """Files and output that a run left behind."""

    def __init__(self, code: int, folder: Path) -> None:
        self.code = code
        self.document = json.loads((folder / f"{SLUG}.json").read_text())
        self.log = (folder / f"{SLUG}.log").read_text()
        self.markdown = (folder / f"{SLUG}.md").read_text()
        self.results = {entry["name"]: entry["result"] for entry in self.document["stages"]}


@pytest.fixture
def check(tmp_path: Path):
    """Run with fake stages after one that names a GPU."""

    def check(*stages: Stage, arguments=()) -> Run:
        return Run(gpu_check.main(arguments, stages=[INFO, *stages], results=tmp_path), tmp_path)

    return check


def with_child(path: Path) -> str:
    """Program that starts another one, which would take a minute, and leaves its number in a file."""
    return (
        "import subprocess, sys, pathlib\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(path)!r}).write_text(str(child.pid))\n"
    )


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pid: int) -> bool:
    end = time.monotonic() + 5
    while is_running(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not is_running(pid)


def test_a_stage_that_fails_does_not_hide_the_later_ones(check, capsys: pytest.CaptureFixture[str]) -> None:
    result = check(
        stage("suite", "import sys; print('two failed'); sys.exit(3)"),
        stage("profile", "print('measured')"),
        stage("crash", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"),
        Stage("absent", 9, ("no-such-program",)),
        Stage("ncu", 9, ("true",), tool="no-such-tool"),
        stage("last", ""),
    )
    assert result.code == 1
    assert result.results == {
        "info": "passed",
        "suite": "exit code 3",
        "profile": "passed",
        "crash": "killed by SIGSEGV",
        "absent": "could not start: No such file or directory",
        "ncu": "not run: no-such-tool is not on the PATH",
        "last": "passed",
    }
    assert "two failed\n" in result.log and "measured\n" in result.log
    summary = capsys.readouterr().out.partition("SUMMARY ")[2]
    assert summary.startswith(GPU) and "two failed" in summary and "measured" not in summary
    assert all(f"{name}  " in summary and words in summary for name, words in result.results.items())


def test_what_an_encoding_lacks_is_written_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    program = TELL + "tell('5 \\u00b5s \\ud800'); import sys; sys.stdout.buffer.write('\\u00d7'.encode())"
    process = started(tmp_path, ("bench", program))
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and "5 \\xb5s \\ud800" in out
    log = (tmp_path / f"{SLUG}.log").read_text(encoding="utf-8")
    assert "5 \u00b5s \\ud800" in log and "\u00d7" in log
    assert "5 \u00b5s \\ud800" in (tmp_path / f"{SLUG}.md").read_text(encoding="utf-8")


def test_a_signal_without_a_name_is_told_by_its_number(check) -> None:
    result = check(stage("crash", "import os; os.kill(os.getpid(), 35)"), stage("last", ""))
    assert result.results == {"info": "passed", "crash": "killed by signal 35", "last": "passed"}


def test_a_process_that_no_signal_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "GRACE", 0.2)
    monkeypatch.setattr(running, "_signal", lambda process, number: None)
    lines: list[str] = []
    outcome = run(stage("stuck", "import time; time.sleep(5)"), 0.3, lines.append)
    assert outcome.result == "still running 0.2 s after SIGKILL" and outcome.seconds < 4
    assert any("is still there" in line for line in lines)


def test_stages_import_from_where_the_user_does(check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/of/the/user:/and/another")
    program = "import sys, gpu_stages; sys.exit(not {'/of/the/user', '/and/another'} <= {*sys.path})"
    assert check(stage("path", program)).code == 0


def test_all_passed_is_exit_code_0(check) -> None:
    assert check(stage("build", ""), stage("bench", "")).code == 0


def test_a_stage_out_of_its_time_is_ended_with_its_children(check, tmp_path: Path) -> None:
    program = with_child(tmp_path / "child") + "child.wait()"
    start = time.monotonic()
    result = check(stage("suite", program, seconds=1), stage("bench", "print('measured')"))
    assert time.monotonic() - start < 20
    assert result.results["suite"] == "out of time" and result.results["bench"] == "passed"
    assert wait_until_gone(int((tmp_path / "child").read_text()))


def test_a_stage_that_ignores_sigterm_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "GRACE", 0.3)
    program = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    )
    lines: list[str] = []
    outcome = run(stage("deaf", program), 1.0, lines.append)
    assert outcome.result == "out of time" and "deaf\n" in lines
    assert 1.0 < outcome.seconds < 10


def test_what_a_stage_says_while_it_is_ended_is_kept() -> None:
    program = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit('late words')); time.sleep(60)"
    )
    lines: list[str] = []
    assert run(stage("polite", program), 0.7, lines.append).result == "out of time"
    assert "late words\n" in lines


def test_a_child_left_behind_neither_delays_the_stage_nor_outlives_it(tmp_path: Path) -> None:
    program = with_child(tmp_path / "child") + "print('done')"
    outcome = run(stage("parent", program), 30, lambda _: None)
    assert outcome.result == "passed" and outcome.seconds < 20
    assert wait_until_gone(int((tmp_path / "child").read_text()))


@pytest.mark.parametrize("end", ["\\n", ""], ids=["lines", "one endless line"])
def test_of_megabytes_the_beginning_and_the_end_are_kept(check, capsys: pytest.CaptureFixture[str], end: str) -> None:
    program = f"print('first words')\nfor i in range(60_000): print(f'{{i:0100}}', end='{end}')\nprint('last words')"
    result = check(stage("suite", program), stage("bench", "print('measured')"))
    assert result.code == 0
    assert "first words" in result.log and "last words" in result.log and "measured" in result.log
    assert "bytes left out" in result.log
    assert len(result.log) < running.HEAD + running.TAIL + 3 * running.LONGEST_LINE
    assert len(capsys.readouterr().out) < 3000


def test_a_stage_that_never_stops_printing_is_ended_in_time() -> None:
    outcome = run(stage("flood", "while True: print('x' * 1000)"), 0.7, lambda _: None)
    assert outcome.result == "out of time" and outcome.seconds < 15


def test_the_budget_is_for_all_stages(check) -> None:
    result = check(
        stage("hangs", "import time; time.sleep(60)", seconds=60),
        stage("needs more", "print('ran')", least=20),
        arguments=["--budget", str(gpu_check.RESERVE + 2)],
    )
    assert result.results["hangs"] == "out of time"
    assert result.results["needs more"].startswith("not run: ") and "of 8 s left" in result.results["needs more"]
    assert "ran" not in result.log


def test_facts_are_shown_and_written_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = "tell('fast', case={'name': 'prune'}, cells=['prune', '1 ms', 'copy', '2 ms', '0.50', '1', '', 'must', '9'])"
    waits = f"""
import sys, time
from pathlib import Path
{TELL}
{row}
for _ in range(500):
    text = Path({str(tmp_path / f"{SLUG}.md")!r}).read_text()
    if "| prune | 1 ms | copy | 2 ms | 0.50 | 1 |  | must | 9 |" in text and "| bench | running |" in text:
        sys.exit(0)
    time.sleep(0.01)
sys.exit("the table does not have the row")
"""
    assert gpu_check.main([], stages=[INFO, stage("bench", waits)], results=tmp_path) == 0
    document = json.loads((tmp_path / f"{SLUG}.json").read_text())
    assert document["cases"] == [{"name": "prune"}]
    assert document["machine"] == {"gpu": GPU, "torch": "torch 2.11.0"}
    assert "\n  fast\n" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {f"{SLUG}.{kind}" for kind in ("json", "md", "log")}


DRIVER = """
import sys
from pathlib import Path
sys.path[:0] = [{benchmarks!r}]
import gpu_check
from gpu_stages.running import Stage
stages = [Stage(name, 60, (sys.executable, "-c", program), least=0.1) for name, program in {stages!r}]
sys.exit(gpu_check.main([], stages=stages))
"""


def started(folder: Path, *programs: tuple[str, str]) -> subprocess.Popen[str]:
    """A process of its own that runs these stages after the one that names a GPU."""
    stages = [("info", INFO.command[-1]), *programs]
    text = DRIVER.format(benchmarks=str(ROOT / "benchmarks"), stages=stages)
    environment = {**os.environ, "OUT": str(folder)}
    return subprocess.Popen([sys.executable, "-c", text], env=environment, stdout=subprocess.PIPE, text=True)


def test_what_was_known_outlives_a_hard_kill(tmp_path: Path) -> None:
    """Of the driver itself: its files are complete as of the last fact."""
    killer = TELL + "import os, time; tell('known', known=1); time.sleep(0.5); os.kill(os.getppid(), 9)"
    process = started(tmp_path, ("first", "print('begun')"), ("killer", killer), ("never", "print('never')"))
    assert process.wait(30) == -signal.SIGKILL
    process.communicate()
    document = json.loads((tmp_path / f"{SLUG}.json").read_text())
    results = {entry["name"]: entry["result"] for entry in document["stages"]}
    assert results == {"info": "passed", "first": "passed", "killer": "running"}
    assert document["stages"][-1]["facts"] == [{"text": "known", "known": 1}]
    assert "known" in (tmp_path / f"{SLUG}.md").read_text()
    log = (tmp_path / f"{SLUG}.log").read_text()
    assert "begun\n" in log and "known\n" in log


def test_a_hard_kill_of_the_driver_ends_its_stage(tmp_path: Path) -> None:
    hangs = f"import os, pathlib, time; pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()));"
    process = started(tmp_path, ("killer", hangs + "os.kill(os.getppid(), 9); time.sleep(20)"))
    assert process.wait(30) == -signal.SIGKILL
    assert wait_until_gone(int((tmp_path / "pid").read_text()))
    process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_stage_and_still_gets_its_summary(tmp_path: Path, number: signal.Signals) -> None:
    child = tmp_path / "child"
    hangs = f"import os, pathlib, time; pathlib.Path({str(child)!r}).write_text(str(os.getpid())); time.sleep(60)"
    process = started(tmp_path, ("hangs", hangs), ("later", "print('later')"))
    end = time.monotonic() + 20
    while not (child.exists() and child.read_text()) and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(number)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert wait_until_gone(int(child.read_text()))
    assert f"stopped by {number.name}" in out.partition("SUMMARY")[2]
    stages = json.loads((tmp_path / f"{SLUG}.json").read_text())["stages"]
    assert {entry["name"]: entry["result"] for entry in stages} == {
        "info": "passed",
        "hangs": f"stopped by {number.name}",
    }


def test_a_wrong_bit_stops_everything_else(check) -> None:
    memcheck = stage("memcheck", TELL + "tell('Invalid __global__ write')")
    smoke = stage("smoke", TELL + "import sys; tell('FAILED prune'); sys.exit(1)", gate=True, diagnosis=memcheck)
    result = check(smoke, stage("bench", "print('measured')"), memcheck)
    assert result.code == 1
    assert [entry["name"] for entry in result.document["stages"]] == ["info", "smoke", "memcheck", "bench", "memcheck"]
    assert result.results["bench"] == "not run: smoke did not pass"
    assert "Invalid __global__ write" in result.markdown and "measured" not in result.log


def test_some_stages_alone_run_after_what_every_stage_needs(tmp_path: Path) -> None:
    stages = [
        INFO,
        stage("build", "print('built')"),
        stage("smoke", "print('run')"),
        stage("bench", "print('measured')"),
    ]
    assert gpu_check.main(["bench"], stages=stages, results=tmp_path) == 0
    log = (tmp_path / f"{SLUG}-bench.log").read_text()
    assert "built" in log and "measured" in log and "run\n" not in log
    assert {path.name for path in tmp_path.iterdir()} == {f"{SLUG}-bench.{kind}" for kind in ("json", "md", "log")}


def test_an_unknown_stage_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main(["everything"], stages=[INFO], results=tmp_path)
    assert "no stage everything; expected some of info" in capsys.readouterr().err


@pytest.mark.parametrize("budget", ["nan", "0", "-5"])
def test_a_budget_that_is_no_time_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], budget: str) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main([f"--budget={budget}"], stages=[INFO], results=tmp_path)
    assert f"expected seconds above 0, got {budget}" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_told_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for folder, reason in (("file", "File exists"), ("file/results", "Not a directory")):
        assert gpu_check.main([], stages=[INFO], results=tmp_path / folder) == 2
        assert capsys.readouterr().err == f"gpu_check: cannot write to {tmp_path / folder}: {reason}\n"


def test_without_a_gpu_one_sentence_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info = stage("info", TELL + "import sys; tell(machine={'gpu': None, 'reason': 'torch 2.11.0+cpu'}); sys.exit(1)")
    assert gpu_check.main([], stages=[info, stage("build", "print('built')")], results=tmp_path) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "gpu_check: no GPU that torch can use (torch 2.11.0+cpu); nothing was built or measured."
    assert list(tmp_path.iterdir()) == []


def test_a_machine_that_stays_unknown_is_checked_all_the_same(tmp_path: Path) -> None:
    stages = [stage("info", "import sys; sys.exit('the driver hangs')"), stage("smoke", "print('ran')")]
    assert gpu_check.main([], stages=stages, results=tmp_path) == 1
    assert "ran\n" in (tmp_path / "gpu-check.log").read_text()


@pytest.fixture
def record(tmp_path: Path):
    with records.Record(tmp_path, "gpu-check") as record:
        yield record


def test_two_runs_leave_each_other_what_they_are_writing(record, tmp_path: Path) -> None:
    (tmp_path / "gpu-check.json.new").write_text("of another run")
    record.save()
    assert (tmp_path / "gpu-check.json.new").read_text() == "of another run"
    assert json.loads((tmp_path / "gpu-check.json").read_text())["stages"] == []


def test_a_summary_has_room_for_every_stage(record, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("smoke", "bench", "suite", "ncu"):
        record.begin(name)
        for i in range(3 if name == "smoke" else 300):
            record.stages[-1].facts.append({"text": f"{name} fact {i} " + "x" * 5000 * (name == "suite")})
        record.end(Outcome("exit code 1", 12.3, 60, tuple("y" * 400 for _ in range(15))))
    summary = record.summary()
    assert 0.9 * records.MOST_CHARACTERS < len(summary) <= records.MOST_CHARACTERS
    for name in ("bench", "suite", "ncu"):
        section = summary.partition(f"-- {name}\n")[2].partition("\n\n--")[0]
        assert f"{name} fact 0 " in section and "more lines in the log" in section
    assert all(f"smoke fact {i} " in summary for i in range(3))
    assert str(record._path("log")) in summary


def test_a_summary_of_many_stages_is_no_longer(record) -> None:
    for i in range(500):
        record.begin(f"stage {i}")
        record.stages[-1].facts.append({"text": "fact"})
        record.stages[-1].outcome = Outcome("passed")
    assert len(record.summary()) <= records.MOST_CHARACTERS


def test_room_that_one_does_not_use_is_the_others() -> None:
    assert records.shared(100, [10, 200, 60]) == [10, 45, 45]
    assert records.shared(100, [10, 20]) == [10, 20]
    assert records.shared(0, [5, 5]) == [0, 0]


def test_a_stage_that_tells_too_much_is_cut_short(check) -> None:
    many = TELL + "\nfor i in range(2000): tell(f'fact {i} of many')"
    result = check(stage("suite", many))
    facts = result.document["stages"][-1]["facts"]
    assert len(facts) == running.MOST_FACTS and "the rest is left out" in facts[-1]["text"]


def test_facts_survive_what_is_printed_around_them(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("GMP_GPU_CHECK_FACTS", "1")
    print("no line break here", end="")
    tell("a\nb", number=1)
    lines = capsys.readouterr().out.splitlines()
    assert [parsed(line) for line in lines] == [None, {"text": "a\nb", "number": 1}]
    assert parsed(MARK + "{broken") is None and parsed(MARK + "[1]") is None


def test_a_person_reads_facts_without_their_data(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.delenv("GMP_GPU_CHECK_FACTS", raising=False)
    tell("as text", number=1)
    assert capsys.readouterr().out == "as text\n"


def test_records_name_paths_as_the_repository_has_them(record, tmp_path: Path) -> None:
    record.begin("build")
    record.fact({"text": f"cannot import it ({ROOT}/gmp_kernels/__init__.py)"})
    for kind in ("json", "md", "log"):
        text = (tmp_path / f"gpu-check.{kind}").read_text()
        assert "(gmp_kernels/__init__.py)" in text and str(ROOT) not in text
