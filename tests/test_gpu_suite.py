"""The tests that ``make gpu-check`` runs: which, and what is known of them whenever they are ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from stage_runs import executed
from subprocesses import ROOT

sys.path.append(str(ROOT / "benchmarks"))
from gpu_stages import facts, ptx, stages
from gpu_stages.pytest_facts import has_parameter
from gpu_stages.running import Stage, Stopped, run

pytestmark = pytest.mark.thorough

PYTEST_FILE = """
import time, pytest
@pytest.mark.parametrize("backend", ["cuda", "cpu"])
def test_wrong(backend):
    assert 1 == 2, "bits differ"
@pytest.mark.parametrize("other", ["cpu", "cuda:1"])
def test_of_another_backend(other):
    assert False
@pytest.mark.parametrize("backend", ["cuda-float32"])
def test_hangs(backend):
    time.sleep(60)
"""


@pytest.mark.parametrize("parallel", [(), ("-n", "2", "--maxschedchunk", "1")], ids=["alone", "in parallel"])
def test_a_failing_test_is_told_before_the_stage_ends(tmp_path: Path, parallel: tuple[str, ...]) -> None:
    (tmp_path / "test_some.py").write_text(PYTEST_FILE)
    (tmp_path / "test_broken.py").write_text("import no_such_module")
    command = stages.tests(*parallel, "--only", "cuda", f"--rootdir={tmp_path}", str(tmp_path))
    texts: list[str] = []

    def hear(fact: dict[str, Any]) -> None:
        texts.append(fact["text"])
        if len(texts) == 2:
            raise Stopped(signal.SIGINT)

    with pytest.raises(Stopped):  # or else for as long as the test that hangs
        run(Stage("suite", 60, command), 60, lambda _: None, hear)
    broken, wrong = sorted(texts, reverse=True)
    assert broken.startswith("NOT COLLECTED") and "no_such_module" in broken
    assert "test_wrong[cuda] (call): AssertionError: bits differ assert 1 == 2" in wrong


@pytest.mark.parametrize("parallel", [(), ("-n", "2", "--maxschedchunk", "1")], ids=["alone", "in parallel"])
def test_a_suite_out_of_time_says_how_far_it_came(tmp_path: Path, parallel: tuple[str, ...]) -> None:
    passing = "def test_passes(): pass\n"
    hanging = (
        f"import os, time\ndef test_zzz():\n    open({str(tmp_path / 'begun')!r}, 'w').close()\n    time.sleep(60)\n"
    )
    (tmp_path / "test_some.py").write_text(passing + hanging)
    command = stages.tests(*parallel, f"--rootdir={tmp_path}", str(tmp_path))
    process = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}", facts.LISTENING: "1"},
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    end = time.monotonic() + 40
    while not (tmp_path / "begun").exists() and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.5)  # the test before has been reported by then
    os.killpg(process.pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    (fact,) = [fact for line in out.splitlines() if (fact := facts.parsed(line))]
    assert fact["text"].startswith("then the time was over; before that 1 passed")


def test_the_counts_of_a_suite_are_told(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(PYTEST_FILE.replace("60", "0"))
    outcome, found, _ = executed(Stage("suite", 60, stages.tests(f"--rootdir={tmp_path}", str(tmp_path))))
    assert outcome.result == "exit code 1"
    assert found[-1]["counts"] == {"failed": 4, "passed": 1}


def test_a_backends_name_is_looked_for_among_the_parameters() -> None:
    assert has_parameter("test_a[cuda]", "cuda") and has_parameter("test_a[float32-cuda-3]", "cuda")
    assert not has_parameter("test_cuda[cpu]", "cuda") and not has_parameter("test_a[cuda:1]", "cuda")


def test_the_suite_finds_tests_of_every_kind() -> None:
    """By the backend that runs the same kernels on the host."""
    files = ["tests/test_select.py", "tests/test_optim_training.py"]
    command = [word for word in stages.suite("simt") if word not in ("-n", "6", "--maxschedchunk", "1", "tests")]
    command += ["--collect-only", *files, "tests/gpu"]
    environment = {**stages.CUDA_TESTS, "GMP_KERNELS_TEST_BACKENDS": "reference,simt"}
    outcome, _, log = executed(Stage("suite", 60, command, environment))
    assert outcome.passed, log
    collected = [line.partition(":")[0] for line in log.splitlines() if line.startswith("tests/")]
    assert set(collected) >= {*files, "tests/gpu/test_graphs.py", "tests/gpu/test_streams.py"}
    assert not set(collected) & set(stages.NOT_IN_SUITE)


def test_the_suite_can_do_without_what_is_built_for_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's machine has _C and _cuda alone."""
    (tmp_path / "without_simt.py").write_text("import sys\nsys.modules['gmp_kernels._simt'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    command = [word for word in stages.suite("cpu") if word not in ("-n", "6", "--maxschedchunk", "1")]
    command += ["-p", "without_simt", "--collect-only"]
    environment = {**stages.CUDA_TESTS, "GMP_KERNELS_TEST_BACKENDS": "reference,cpu"}
    outcome, found, log = executed(Stage("suite", 60, command, environment))
    assert outcome.passed, [fact["text"] for fact in found]
    assert "tests/test_select.py::" in log and "tests/test_simt.py::" not in log


def test_what_the_suite_leaves_out_is_there() -> None:
    assert all((ROOT / name).exists() for name in stages.NOT_IN_SUITE)


def test_the_stages_are_told_apart_and_what_matters_most_comes_first() -> None:
    names = [stage.name for stage in stages.STAGES]
    assert len(set(names)) == len(names)
    assert names[:4] == ["info", "build", "smoke", "bench"]
    assert [stage.name for stage in stages.STAGES if stage.gate] == ["smoke"]
    assert all(stage.least < stage.seconds for stage in stages.STAGES)
    assert [stage.name for stage in stages.chosen(stages.STAGES, ["ncu"])] == ["info", "build", "ncu"]


@pytest.mark.parametrize("stage", [s for s in stages.STAGES if s.command[1] == "-m"], ids=lambda stage: stage.name)
def test_every_program_is_there(stage: Stage) -> None:
    name = stage.command[2]
    assert name == "pytest" or (ROOT / "benchmarks" / f"{name.replace('.', '/')}.py").exists()


COPY_EXTENSIONS = """
import pathlib, shutil, sys, os
assert os.environ["GMP_KERNELS_CUDA_ARCHS"] == "80"
target = pathlib.Path(sys.argv[sys.argv.index("--build-lib") + 1]) / "gmp_kernels"
assert not list(target.glob("*.so"))
for path in pathlib.Path("gmp_kernels").glob("*.so"):
    shutil.copy(path, target)
"""
WHERE = "import gmp_kernels, sys; print(gmp_kernels.__file__); sys.exit(int(sys.argv[1]))"


@pytest.mark.parametrize("code", [0, 3])
def test_the_smoke_test_runs_with_a_build_for_other_gpus(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], code: int
) -> None:
    monkeypatch.setattr(ptx, "capability", lambda: "90")
    monkeypatch.setattr(ptx, "BUILD", (sys.executable, "-c", COPY_EXTENSIONS))
    monkeypatch.setattr(ptx, "SMOKE", (sys.executable, "-c", WHERE, str(code)))
    assert ptx.main() == (code != 0)
    out = capfd.readouterr().out
    assert out.splitlines()[0].startswith(tempfile.gettempdir())
    assert ("PTX of compute_80 on sm_90: the CPU's bits" in out) == (code == 0)


def test_a_build_that_fails_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(ptx, "capability", lambda: "90")
    monkeypatch.setattr(ptx, "BUILD", (sys.executable, "-c", "import sys; sys.exit(4)"))
    assert ptx.main() == 1
    assert capsys.readouterr().out.splitlines()[-1] == "building for sm_80 failed with exit code 4"


def test_there_is_no_ptx_to_compile_where_code_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ptx, "capability", lambda: "86")
    assert ptx.main() == 0
    assert capsys.readouterr().out.splitlines()[-1] == "code for sm_80 runs on sm_86 as it is: nothing to compile"
