"""The programs of ``make gpu-check``: on the CPU with few weights and the same kernels, or with tools that pretend."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_runs import executed
from subprocesses import ROOT

sys.path.append(str(ROOT / "benchmarks"))
from gpu_stages import bench, build, counters, facts, info, pack, profile, smoke, stages
from gpu_stages.running import Stage

SIMT = ["--device", "cpu", "--backend", "simt"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from a second thread, and waiting for it is most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Facts that a program has told."""
    monkeypatch.setenv(facts.LISTENING, "1")

    def told() -> list[dict[str, Any]]:
        found = (facts.parsed(line) for line in capsys.readouterr().out.splitlines())
        return [fact for fact in found if fact is not None]

    return told


def test_the_smoke_test_compares_every_dtype_and_state(told) -> None:
    assert smoke.main([*SIMT, "--few"]) == 0
    checks = told()
    assert all(check["passed"] for check in checks)
    assert len(checks) == 4 * 3 + 1
    assert checks[-1]["check"] == "captured steps, prunes between"


def test_without_graphs_none_is_captured(told) -> None:
    assert "captured steps, prunes between" not in smoke.checks(smoke.FEW_SIZES, 4, False, smoke.DTYPES)


@pytest.mark.thorough
def test_a_process_for_each_dtype_tells_all_that_one_would() -> None:
    outcome, found, log = executed(Stage("smoke", 60, stages.program("smoke", *SIMT, "--few", "--processes")))
    assert outcome.passed, log
    assert {fact["check"] for fact in found} == set(smoke.checks(smoke.FEW_SIZES, 4, True, smoke.DTYPES))
    assert all(fact["passed"] for fact in found) and len(found) == 4 * 3 + 1


def test_one_process_that_fails_fails_the_smoke_test(told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoke, "passed_on", lambda command: int(command[-2:] == ["--dtype", "bfloat16"]) * 5)
    assert smoke.main([*SIMT, "--processes"]) == 1
    monkeypatch.setattr(smoke, "passed_on", lambda command: int("--processes" in command))
    assert smoke.main([*SIMT, "--processes"]) == 0


@pytest.mark.parametrize("operation", ["prune_", "apply_masks_", "optimizer"])
def test_one_wrong_bit_fails_the_smoke_test(told, monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
    def last_bit(weights: Sequence[torch.Tensor]) -> None:
        whole = weights[-1].detach().view(torch.uint8)
        whole[-1] += 1  # steps that flipped it would undo each other

    def wrong(real):
        def call(weights, *arguments: Any, backend: str, **options: Any) -> Any:
            result = real(weights, *arguments, backend=backend, **options)
            if backend == "simt":
                last_bit(weights)
            return result

        return call

    if operation == "optimizer":
        step = smoke.optim.AdamW.step

        def wrong_step(self, closure=None):
            step(self, closure)
            if self._backend == "simt":
                last_bit(self.param_groups[0]["params"])

        monkeypatch.setattr(smoke.optim.AdamW, "step", wrong_step)
    else:
        monkeypatch.setattr(smoke, operation, wrong(getattr(smoke, operation)))
    monkeypatch.setattr(smoke, "DTYPES", (torch.float32,))
    assert smoke.main([*SIMT, "--few"]) == 1
    failed = [fact["text"] for fact in told() if not fact["passed"]]
    assert failed and all("elements differ, first at flat index" in text for text in failed)


def test_every_row_of_the_bench_is_told(told) -> None:
    arguments = ["--device", "cpu", "--backends", "simt", "simt", "--shrink", "65536", "--seconds", "0"]
    assert bench.main([*arguments, "--only", "threshold", "--without", "triton"]) == 0
    rows = told()
    assert [row["case"]["name"] for row in rows] == ["threshold fp32, 1e9, 0.9", "threshold bf16, 1e9, 0.9"]
    assert all(row["cells"][0] == row["case"]["name"] and row["case"]["name"] in row["text"] for row in rows)
    assert bench.main([*arguments, "--only", "no such row"]) == 1


def test_a_row_that_fails_is_told_and_the_next_is_measured(told) -> None:
    arguments = ["--device", "cpu", "--backends", "simt", "no-such-backend", "--shrink", "65536", "--seconds", "0"]
    assert bench.main([*arguments, "--only", "apply"]) == 1
    (row,) = told()
    assert row["case"]["error"].startswith("BackendUnavailableError") and "no-such-backend" in row["text"]
    assert row["cells"][7] == "failed"


@pytest.mark.thorough
def test_the_profile_goes_through_every_call(told) -> None:
    assert profile.main([*SIMT, "--shrink", "4000000"]) == 0
    names = [fact["profiled"] for fact in told()]
    assert names[:2] == ["prune fp32", "prune bf16"] and "AdamW, 291 tensors" in names and len(names) == 11


NCU_CSV = """==PROF== Connected to process 1234
"ID","Process ID","Kernel Name","dram__bytes_read.sum","gpu__time_duration.sum","launch__registers_per_thread"
"","","","Mbyte","us","register/thread"
"0","1234","void gmp::cuda::kernels::count<unsigned int>(LayerRow *)","1,073.7","412.5","72"
"1","1234","void gmp::cuda::kernels::ties<unsigned int>(LayerRow *)","12","n/a","55"
"""


def test_the_counters_are_read_with_their_units() -> None:
    (count, ties) = counters.rows(NCU_CSV)
    assert count[1] == pytest.approx(
        {counters.READ: 1073.7e6, counters.DURATION: 412.5e-6, "launch__registers_per_thread": 72}
    )
    assert counters.described(count[1]) == "412.5 us, read 1073.7 MB, registers 72"
    assert set(ties[1]) == {counters.READ, "launch__registers_per_thread"}
    assert list(counters.rows("==ERROR== no permission\n")) == []


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Put a program on the PATH, before all others."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    def add(name: str, text: str) -> Path:
        path = tmp_path / "bin" / name
        path.write_text(f"#!{sys.executable}\nimport sys\nfrom pathlib import Path\n{text}")
        path.chmod(0o755)
        return path

    return add


def test_counters_that_a_chip_lacks_are_left_out(tool) -> None:
    tool(
        "ncu",
        f"""
assert sys.argv[1:3] == ["--clock-control", "none"] and sys.argv[-1] == "--work"
log = Path(sys.argv[sys.argv.index("--log-file") + 1])
if "stalled_barrier" in " ".join(sys.argv):
    log.write_text("==ERROR== Failed to find metric")
    sys.exit(1)
log.write_text({NCU_CSV!r})
""",
    )
    outcome, found, log = executed(Stage("ncu", 30, stages.program("counters"), tool="ncu"))
    assert outcome.passed, log
    assert found[0]["text"].startswith("void gmp::cuda::kernels::count<unsigned int>: 412.5 us, read 1073.7 MB")
    assert len(found) == 2 and "Failed to find metric" in log


def test_what_ncu_looks_into_runs() -> None:
    assert counters.main(["--work", *SIMT, "--shrink", "4000000"]) == 0


SANITIZER = """
if "--help" in sys.argv:
    sys.exit(print("  --kernel-name-exclude arg\\n  {option} arg   kernels to check"))
smoke = [sys.executable, "-m", "gpu_stages.smoke", "--few", "--no-graph"]
assert sys.argv[1:] == ["--tool", "racecheck", "--error-exitcode", "9", {filter}*smoke], sys.argv
print("========= COMPUTE-SANITIZER")
print("smoke: fine")
{then}
"""


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--kernel-name", '"--kernel-name", "kns=gmp", '),
        ("--kernel-regex", '"--kernel-regex", "kns=gmp", '),
        ("--other", ""),
    ],
)
def test_the_sanitizer_looks_at_our_kernels_alone(tool, option: str, expected: str) -> None:
    then = "print('========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)')"
    tool("compute-sanitizer", SANITIZER.format(option=option, filter=expected, then=then))
    outcome, found, log = executed(Stage("racecheck", 30, stages.program("sanitize", "racecheck", "--no-graph")))
    assert outcome.passed, log
    texts = [fact["text"] for fact in found]
    assert texts[-1] == "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
    assert (len(texts) == 1) == bool(expected), "that torch's kernels are checked as well must be said"


@pytest.mark.parametrize(
    ("then", "result", "text"),
    [
        (
            "print('========= Invalid __global__ write\\n========= ERROR SUMMARY: 1 error'); sys.exit(9)",
            "exit code 9",
            "Invalid __global__ write",
        ),
        ("", "exit code 1", "racecheck ended without a summary (exit code 0): nothing can be concluded"),
        ("sys.exit(3)", "exit code 3", "racecheck ended without a summary (exit code 3): nothing can be concluded"),
    ],
    ids=["error", "silence", "crash"],
)
def test_what_the_sanitizer_finds_fails_the_stage(tool, then: str, result: str, text: str) -> None:
    tool(
        "compute-sanitizer", SANITIZER.format(option="--kernel-name", filter='"--kernel-name", "kns=gmp", ', then=then)
    )
    outcome, found, _ = executed(Stage("racecheck", 30, stages.program("sanitize", "racecheck", "--no-graph")))
    assert outcome.result == result
    assert found[0]["text"] == text


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")
def test_info_without_a_gpu(told) -> None:
    assert info.main() == 1
    assert told() == [{"text": "", "machine": {"gpu": None, "reason": f"torch {torch.__version__}"}}]


def test_versions_are_looked_up(tool) -> None:
    tool("nvcc", "print('nvcc: NVIDIA (R) Cuda compiler driver\\nCuda compilation tools, release 13.0, V13.0.88')")
    assert info.tool_version(("nvcc", "--version")) == "Cuda compilation tools, release 13.0, V13.0.88"
    assert info.tool_version(("no-such-tool",)) == "missing"
    assert info.package_version("numpy") and info.package_version("no_such_package") == "missing"


@pytest.fixture
def carried(tmp_path: Path) -> tuple[Path, Path]:
    """A pack of this Python and these sources, and the package that it goes into."""
    built, folder, package = tmp_path / "built", tmp_path / "pack", tmp_path / "gmp_kernels"
    built.mkdir()
    package.mkdir()
    (built / "_C.this-python.so").write_text("C")
    (built / "_cuda.this-python.so").write_text("cuda")
    pack.replace(folder, built, {"suffix": "this-python.so", "sources": pack.sources_digest()})
    return folder, package


def test_a_carried_build_is_put_into_the_package(carried) -> None:
    folder, package = carried
    assert sorted(pack.install(folder, package, "this-python.so")) == sorted(package.iterdir())
    assert (package / "_cuda.this-python.so").read_text() == "cuda"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"suffix": "another.so"}, "the build carried is for another.so, this Python takes this-python.so"),
        ({"sources": "0"}, "the build carried was made of other sources"),
        (None, "no build was carried in"),
    ],
)
def test_a_build_that_does_not_belong_here_is_not_taken(carried, change: dict[str, str] | None, words: str) -> None:
    folder, package = carried
    description = folder / "pack.json"
    if change is None:
        description.unlink()
    else:
        description.write_text(json.dumps(json.loads(description.read_text()) | change))
    with pytest.raises(pack.PackError, match=words):
        pack.install(folder, package, "this-python.so")
    assert list(package.iterdir()) == []


@pytest.mark.parametrize("text", ["{", "{}", "[]", "\xff"], ids=["cut", "empty", "list", "bytes"])
def test_a_damaged_build_is_not_taken(carried, text: str) -> None:
    folder, package = carried
    (folder / "pack.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(pack.PackError, match="the build carried is damaged: "):
        pack.install(folder, package, "this-python.so")
    assert list(package.iterdir()) == []


def test_an_extension_in_use_keeps_its_bytes(carried) -> None:
    folder, package = carried
    (package / "_C.this-python.so").write_text("mapped")
    with (package / "_C.this-python.so").open() as mapped:
        pack.install(folder, package, "this-python.so")
        assert mapped.read() == "mapped"
    assert (package / "_C.this-python.so").read_text() == "C"


@pytest.mark.parametrize("step", ["copy", "rename"])
def test_an_interrupted_pack_leaves_the_last_one(carried, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    folder, _ = carried
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    rename = Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        if path.name.endswith(".new"):
            raise KeyboardInterrupt
        return rename(path, target)

    def copy(*_: Any) -> None:
        raise KeyboardInterrupt

    if step == "copy":
        monkeypatch.setattr(pack.shutil, "copy", copy)
    else:
        monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack.replace(folder, folder.parent / "built", {})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert {path.name for path in folder.parent.iterdir()} == {"pack", "built", "gmp_kernels"}


def test_a_file_is_refused_before_anything_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(pack, "build", lambda scratch: pytest.fail("compiled"))
    assert pack.make(tmp_path / "file") == pack.make(tmp_path / "file/pack") == 1
    assert "no pack was made: " in capsys.readouterr().out


def test_a_pack_takes_the_place_of_a_pack_and_of_nothing_else(carried, tmp_path: Path) -> None:
    folder, _ = carried
    (folder / "old.so").touch()
    pack.replace(folder, tmp_path / "built", {"suffix": "a", "sources": "b"})
    assert not (folder / "old.so").exists()
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter").touch()
    with pytest.raises(pack.PackError, match="is there and no pack"):
        pack.replace(other, tmp_path / "built", {})
    assert (other / "chapter").exists()


def test_a_pack_without_a_compiler_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert pack.make(tmp_path / "pack") == 1
    assert capsys.readouterr().out == "gpu_check: no pack was made: nvcc is not on the PATH; install the CUDA toolkit\n"
    monkeypatch.setattr(pack, "candidates", lambda: iter([Path(sys.executable)] * (sys.version_info[:2] != (3, 12))))
    with pytest.raises(pack.PackError, match=r"expected a Python 3\.12, as python3\.12 on the PATH or among pyenv's"):
        pack.python_to_build_for()


def test_a_pack_that_is_too_large_is_refused(tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool("nvcc", "print('release 13.0')")
    monkeypatch.setattr(pack, "python_to_build_for", lambda: Path("python"))
    monkeypatch.setattr(pack, "with_requirements", lambda python, scratch: python)

    def compiled(command: list[str], message: str, **options: Any) -> str:
        folder = tmp_path / "lib/gmp_kernels"
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("_C.a.so", "_cuda.a.so"):
            with (folder / name).open("wb") as file:
                file.truncate(21_000_000)
        return "release 13.0"

    monkeypatch.setattr(pack, "run", compiled)
    with pytest.raises(pack.PackError, match=r"42\.0 MB are more than the 40 MB"):
        pack.build(tmp_path)
    monkeypatch.setattr(pack, "MOST_BYTES", 50_000_000)
    assert pack.build(tmp_path)["suffix"] == "a.so"


def test_without_a_usable_pack_the_extensions_are_built(told, carried, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, package = carried
    commands: list[list[str]] = []
    suffix = str(build.sysconfig.get_config_var("EXT_SUFFIX")).lstrip(".")
    pack.replace(folder, package.parent / "built", {"suffix": suffix, "sources": pack.sources_digest()})
    monkeypatch.setattr(build, "PACKAGE", package)
    monkeypatch.setattr(build, "capability", lambda: "90")
    monkeypatch.setattr(build, "probe", lambda *needed: (bool(commands), "cuda: invalid ELF header"))

    def runs(command: list[str], env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert list(package.iterdir()) == [], "setuptools would take what was carried for its own"
        assert env["GMP_KERNELS_CUDA_ARCHS"] == "90" and env["GMP_KERNELS_BUILD_CUDA"] == "1"
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(build.subprocess, "run", runs)
    assert build.main(["--pack", str(folder)]) == 0
    assert told()[0]["text"] == "the carried build does not work here: cuda: invalid ELF header"
    assert "--inplace" in commands[0]


def test_a_carried_build_that_works_is_not_built_again(told, carried, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, package = carried
    suffix = str(build.sysconfig.get_config_var("EXT_SUFFIX")).lstrip(".")
    pack.replace(folder, package.parent / "built", {"suffix": suffix, "sources": pack.sources_digest()})
    monkeypatch.setattr(build, "PACKAGE", package)
    monkeypatch.setattr(build, "probe", lambda *needed: (True, "cuda: usable"))
    monkeypatch.setattr(build.subprocess, "run", lambda *_, **__: pytest.fail("built"))
    assert build.main(["--pack", str(folder)]) == 0
    assert told() == [{"text": "took the carried build; cuda: usable", "build": "carried"}]


def test_the_probe_says_why_a_backend_cannot_run() -> None:
    assert build.probe("cpu")[0]
    usable, said = build.probe("cpu", "cuda")
    assert usable == torch.cuda.is_available()
    assert "cpu: usable" in said and "cuda: " in said


def test_make_gpu_check_runs_the_stages_asked_for() -> None:
    make = shutil.which("make")
    if make is None:
        pytest.skip("no make here, which gpu_check.py does without")
    done = subprocess.run(
        [make, "-n", "--no-print-directory", "gpu-check", "STAGE=bench"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip().endswith("benchmarks/gpu_check.py bench")
