"""Requests of setup.py to compilers, by compilers that only write it down."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from subprocesses import ROOT

# Takes a moment, so that what is started in parallel overlaps; writes down its arguments, and makes what it should.
COMPILER = """#!{python}
import os, shlex, sys, time
from pathlib import Path
if sys.argv[1] == "--list-gpu-code":
    sys.exit(print("sm_80\\nsm_90"))
if sys.argv[1] == "-dryrun":
    sys.exit(sys.stderr.write("#$ LIBRARIES= -L{toolkit}\\n") and 0)
with open({log!r}, "a") as log:
    log.write(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]) + "\\n")
time.sleep(0.05)
Path(sys.argv[sys.argv.index("-o") + 1]).touch()
"""


class Build(NamedTuple):
    """Outcome of a build, and the commands it ran."""

    code: int
    errors: str
    commands: list[list[str]]

    def compiled(self, source: str) -> list[list[str]]:
        """Commands that compiled a file, those of its folder ``source`` names included."""
        return [command for command in self.commands if any(word.endswith(source) for word in command)]


@pytest.fixture
def build(tmp_path: Path):
    """Run setup.py with these compilers."""
    log, toolkit = tmp_path / "log", tmp_path / "toolkit"
    (tmp_path / "bin").mkdir()
    toolkit.mkdir()
    (toolkit / "libcudart_static.a").touch()
    for name in ("cc", "c++", "nvcc"):
        path = tmp_path / "bin" / name
        path.write_text(COMPILER.format(python=sys.executable, log=str(log), toolkit=toolkit))
        path.chmod(0o755)

    def build(*arguments: str, **environment: str) -> Build:
        compilers = {"CC": "cc", "CXX": "c++", "LDSHARED": "c++ -shared", "LDCXXSHARED": "c++ -shared"}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("GMP_KERNELS_")}
        path = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        folders = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "objects")]
        done = subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--force", *folders, *arguments],
            cwd=ROOT,
            env=inherited | path | compilers | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        lines = log.read_text().splitlines() if log.exists() else []
        return Build(done.returncode, done.stderr, [shlex.split(line) for line in lines])

    return build


@pytest.mark.parametrize("arguments", [(), ("--parallel", "3")], ids=["in turn", "in parallel"])
def test_every_file_is_compiled_as_it_must_be(build, arguments: tuple[str, ...]) -> None:
    done = build(*arguments, GMP_KERNELS_BUILD_CUDA="1", GMP_KERNELS_BUILD_SIMT="1")
    assert done.code == 0, done.errors
    for source in sorted((ROOT / "csrc").rglob("*.c*")):
        commands = done.compiled(str(source.relative_to(ROOT)))
        if source.suffix in (".cpp", ".cu"):
            assert commands, source
        for command in commands:
            assert command[0] == ("nvcc" if source.suffix == ".cu" else command[0])
            assert ("-mavx2" in command) == ("isa_avx" in source.name)
            assert ("-mavx512f" in command) == ("isa_avx512" in source.name)
            assert ("-mavx512vbmi2" in command) == ("vbmi2" in source.name)
    (cuda, simt) = sorted(done.compiled("csrc/cuda/bindings.cpp"), key=lambda command: "-DGMP_SIMT" in command)
    assert "-DGMP_MODULE=_cuda" in cuda and "-DGMP_SIMT" not in cuda
    assert "-DGMP_MODULE=_simt" in simt and "-DGMP_SIMT" in simt
    outputs = [command[command.index("-o") + 1] for command in done.commands]
    assert len(outputs) == len(set(outputs)), "two commands write the same file"


def test_nvcc_is_asked_for_the_gpus_it_knows_or_those_chosen(build) -> None:
    flags = {
        flag for command in build(GMP_KERNELS_BUILD_CUDA="1").compiled(".cu") for flag in command if "arch=" in flag
    }
    assert flags == {"-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=[sm_90,compute_90]"}


def test_one_gpu_alone(build) -> None:
    commands = build(GMP_KERNELS_BUILD_CUDA="1", GMP_KERNELS_CUDA_ARCHS="90").compiled(".cu")
    flags = [flag for command in commands for flag in command if "arch=" in flag]
    assert commands and set(flags) == {"-gencode=arch=compute_90,code=[sm_90,compute_90]"}


def test_the_runtime_is_linked_from_where_it_was_found(build, tmp_path: Path) -> None:
    (link,) = (
        command
        for command in build(GMP_KERNELS_BUILD_CUDA="1").commands
        if "_cuda." in " ".join(command) and "-shared" in command
    )
    assert str(tmp_path / "toolkit/libcudart_static.a") in link


def test_a_missing_runtime_ends_the_build_with_a_sentence(build, tmp_path: Path) -> None:
    (tmp_path / "toolkit/libcudart_static.a").unlink()
    done = build(GMP_KERNELS_BUILD_CUDA="1")
    assert done.code == 1 and done.commands == []
    last = done.errors.splitlines()[-1]
    assert last.startswith("setup.py: libcudart_static.a is missing; looked in") and str(tmp_path / "toolkit") in last
    assert last.endswith("GMP_KERNELS_BUILD_CUDA=0 builds without CUDA")


# Displays the project's name instead of building: that of pyproject.toml, if it was read.
SHOW_NAME = """
import runpy, sys, setuptools
setuptools.__version__ = sys.argv.pop(1)
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("version", "options", "name"),
    [
        ("70.0.0", ["build_ext", "--inplace"], "UNKNOWN"),
        ("77.0.1", ["build_ext", "--inplace"], "gmp-kernels"),
        ("70.0.0", ["build_ext"], "UNKNOWN"),
        ("70.0.0", ["build"], "gmp-kernels"),
    ],
)
def test_an_old_setuptools_reads_no_license_where_it_need_not(version: str, options: list[str], name: str) -> None:
    environment = {**os.environ, "GMP_KERNELS_BUILD_CUDA": "0"}
    command = [sys.executable, "-c", SHOW_NAME, version, "--name", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == [name], done.stdout + done.stderr
