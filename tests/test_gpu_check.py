"""The driver of ``make gpu-check``, with commands that stand in for compilers, tests and GPUs."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path

import pytest
from subprocesses import ROOT, run_python

PROGRAM = ROOT / "benchmarks/gpu_check.py"
spec = importlib.util.spec_from_file_location("gpu_check", PROGRAM)
gpu_check = importlib.util.module_from_spec(spec)
sys.modules["gpu_check"] = gpu_check
spec.loader.exec_module(gpu_check)

GPU = gpu_check.Machine("NVIDIA H100 80GB HBM3", "torch 2.11.0")


def step(stage: str, program: str, seconds: float = 60, name: str = "fake", **environment: str):
    return gpu_check.Step(stage, name, seconds, (sys.executable, "-c", program), environment)


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run with fake steps; the exit code and the log."""
    monkeypatch.delenv("OUT", raising=False)

    def check(*arguments: str, steps) -> tuple[int, str]:
        code = gpu_check.main(arguments, GPU, steps=steps, results=tmp_path)
        (log,) = tmp_path.glob("*.log")
        return code, log.read_text()

    return check


def test_a_stage_that_fails_does_not_hide_the_later_ones(check, capsys: pytest.CaptureFixture[str]) -> None:
    steps = [
        step("build", "print('built')"),
        step("test", "import sys; print('two failed'); sys.exit(3)"),
        step("bench", "print('measured')"),
    ]
    code, log = check(steps=steps)
    assert code == 1
    assert capsys.readouterr().out == log
    assert "built\n" in log and "two failed\n" in log and "measured\n" in log
    rows = [line.split() for line in log.splitlines()[-4:]]
    assert [row[:-3] for row in rows[1:]] == [
        ["build", "fake", "passed"],
        ["test", "fake", "exit", "code", "3"],
        ["bench", "fake", "passed"],
    ]


def test_all_passed_is_exit_code_0(check) -> None:
    assert check(steps=[step("build", ""), step("bench", "")])[0] == 0


def test_a_step_out_of_its_time_is_ended_with_its_children(check) -> None:
    sleeper = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    start = time.monotonic()
    code, log = check(steps=[step("test", sleeper, seconds=1), step("bench", "print('measured')")])
    assert time.monotonic() - start < 50
    assert code == 1
    assert "out of time" in log.splitlines()[-2] and "measured\n" in log


def test_a_command_that_is_not_there_is_a_failure(check) -> None:
    code, log = check(steps=[gpu_check.Step("sanitize", "memcheck", 9, ("no-such-sanitizer",)), step("bench", "")])
    assert code == 1
    assert "could not start" in log.splitlines()[-2] and "passed" in log.splitlines()[-1]


def test_one_stage_alone(check, tmp_path: Path) -> None:
    steps = [step("build", "print('built')"), step("test", "print('tested')"), step("test", "print('again')")]
    code, log = check("test", steps=steps)
    assert code == 0
    assert "tested\n" in log and "again\n" in log and "built\n" not in log
    assert [path.name for path in tmp_path.iterdir()] == ["nvidia-h100-80gb-hbm3-test.log"]


def test_an_unknown_stage_is_refused(check, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main(["everything"], GPU)
    assert "invalid choice: 'everything'" in capsys.readouterr().err


def test_the_environment_reaches_the_command(check) -> None:
    program = "import os; print(os.environ['WHERE'], os.getcwd())"
    assert f"here {ROOT}\n" in check(steps=[step("test", program, WHERE="here")])[1]


def test_log_and_measurements_also_go_where_out_says(check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setenv("OUT", str(out))
    results = tmp_path / "nvidia-h100-80gb-hbm3.json"
    _, log = check(steps=[step("bench", f"open({str(results)!r}, 'w').write('42')")])
    assert {path.name: path.read_text() for path in out.iterdir()} == {
        "nvidia-h100-80gb-hbm3.json": "42",
        "nvidia-h100-80gb-hbm3.log": log,
    }


def test_the_real_steps_fit_into_ten_minutes() -> None:
    assert gpu_check.STAGES == ("build", "test", "sanitize", "bench")
    assert sum(s.seconds for s in gpu_check.STEPS) < 600
    assert len({(s.stage, s.name) for s in gpu_check.STEPS}) == len(gpu_check.STEPS)


def test_the_tests_that_are_sanitized_are_there() -> None:
    """Collected with the backend of the host that runs the same kernels."""
    chosen = [argument.replace("cuda", "simt") for argument in gpu_check.SANITIZED]
    done = run_python(
        *("-m", "pytest", "-p", "no:cacheprovider", "--collect-only", *chosen),
        GMP_KERNELS_TEST_BACKENDS="reference,simt",
    )
    assert done.returncode == 0, done.stdout
    for name in ("large_sizes", "ties_keep", "one_mask_serves", "too_small_to_sample", "nothing_is_written"):
        assert name in done.stdout
    assert 10 < done.stdout.count("::") < 40


def test_without_a_gpu_one_sentence_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([], gpu_check.Machine(None, "torch 2.11.0+cpu"), results=tmp_path) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line == (
        "gpu-check: no GPU that torch can use on this machine (torch 2.11.0+cpu); nothing was built or run."
    )
    assert list(tmp_path.iterdir()) == []
