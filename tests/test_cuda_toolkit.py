"""GPUs that are compiled for, and the runtime that is found: with compilers of other versions and packagings."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from subprocesses import ROOT

sys.path.append(str(ROOT / "csrc"))
import cuda_toolkit
from cuda_toolkit import gencode, ptx_for, runs_on, runtime_library

# What nvcc --list-gpu-code says.
NVCC_13_0 = (75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121)
NVCC_12_4 = (50, 52, 60, 70, 75, 80, 86, 87, 89, 90)
NVCC_11_0 = (52, 60, 70, 75, 80)


@pytest.fixture
def nvcc(tmp_path: Path) -> Callable[..., str]:
    """Make a compiler that knows some GPUs and links from some folders."""

    def make(known: tuple[int, ...] = NVCC_13_0, libraries: str = "", top: str | None = None) -> str:
        path = tmp_path / "bin/nvcc"
        path.parent.mkdir()
        dry_run = "".join([f"#$ TOP={top}\n" if top else "", f"#$ LIBRARIES={libraries}\n" if libraries else ""])
        listing = "\n".join(f"sm_{number}" for number in known)
        path.write_text(
            f"#!{sys.executable}\nimport sys\n"
            f"if sys.argv[1] == '--list-gpu-code': print({listing!r})\n"
            f"elif sys.argv[1] == '-dryrun': sys.stderr.write({dry_run!r})\n"
            "else: sys.exit('unknown option')\n"
        )
        path.chmod(0o755)
        return str(path)

    return make


def with_runtime(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / cuda_toolkit.RUNTIME).touch()
    return folder / cuda_toolkit.RUNTIME


def test_every_generation_has_code_and_those_between_have_ptx(nvcc) -> None:
    assert gencode(nvcc(NVCC_13_0)) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_100,code=[sm_100,compute_100]",
        "-gencode=arch=compute_120,code=sm_120",
    ]


@pytest.mark.parametrize("known", [NVCC_13_0, NVCC_12_4, NVCC_11_0])
def test_no_gpu_newer_than_the_oldest_is_left_out(known: tuple[int, ...]) -> None:
    archs = [arch for arch in cuda_toolkit.ARCHS if arch in known]
    ptx = ptx_for(archs, known)
    for gpu in (*known, 130):
        if gpu >= min(archs):
            assert runs_on(gpu, archs) or gpu >= ptx


def test_what_runs_on_what() -> None:
    assert runs_on(86, [80]) and runs_on(89, [80]) and runs_on(103, [100]) and runs_on(121, [120])
    assert not runs_on(80, [86]) and not runs_on(110, [100, 120]) and not runs_on(90, [80])


def test_an_older_compiler_does_what_it_can(nvcc) -> None:
    assert gencode(nvcc(NVCC_12_4)) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=[sm_90,compute_90]",
    ]


@pytest.mark.parametrize(
    ("chosen", "flags"),
    [
        ("90", ["-gencode=arch=compute_90,code=[sm_90,compute_90]"]),
        (" 90, 86", ["-gencode=arch=compute_86,code=sm_86", "-gencode=arch=compute_90,code=[sm_90,compute_90]"]),
    ],
)
def test_chosen_gpus_alone(nvcc, chosen: str, flags: list[str]) -> None:
    assert gencode(nvcc(), chosen) == flags


@pytest.mark.parametrize("chosen", ["sm_90", "9.0", "90+PTX"])
def test_what_is_no_number_is_refused(nvcc, chosen: str) -> None:
    with pytest.raises(RuntimeError, match="GMP_KERNELS_CUDA_ARCHS: expected numbers such as 90 or 80,90, got"):
        gencode(nvcc(), chosen)


def test_a_gpu_that_the_compiler_does_not_know_is_named(nvcc) -> None:
    with pytest.raises(RuntimeError, match=r"to compile for sm_80, sm_120; it knows sm_50, .*sm_90"):
        gencode(nvcc(NVCC_12_4), "80,120")


def test_a_compiler_of_none_of_them_is_refused(nvcc) -> None:
    with pytest.raises(RuntimeError, match="to compile for sm_80, sm_90, sm_100, sm_120; it knows sm_50"):
        gencode(nvcc((50, 60)))


def test_a_compiler_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no-nvcc --list-gpu-code"):
        gencode(str(tmp_path / "no-nvcc"))
    path = tmp_path / "nvcc"
    path.write_text("#!/bin/sh\necho 'no host compiler' >&2; exit 1\n")
    path.chmod(0o755)
    with pytest.raises(RuntimeError, match="failed: no host compiler"):
        runtime_library(str(path))


def test_the_runtime_is_where_the_compiler_links_from(nvcc, tmp_path: Path) -> None:
    expected = with_runtime(tmp_path / "a folder/lib")
    with_runtime(tmp_path / "top/lib64")
    libraries = f'  "-L{tmp_path}/stubs" "-L{expected.parent}"'
    assert runtime_library(nvcc(libraries=libraries, top=str(tmp_path / "top"))) == expected


@pytest.mark.parametrize("folder", ["targets/x86_64-linux/lib", "lib64", "lib"])
def test_the_runtime_is_found_in_every_packaging(nvcc, tmp_path: Path, folder: str) -> None:
    expected = with_runtime(tmp_path / "top" / folder)
    assert runtime_library(nvcc(top=str(tmp_path / "top"))) == expected


@pytest.mark.parametrize("top", [None, "/nowhere"])
def test_a_missing_runtime_is_said_with_where_it_was_looked_for(nvcc, top: str | None) -> None:
    looked = "/nowhere/targets/x86_64-linux/lib, /nowhere/lib64, /nowhere/lib" if top else "nothing, since"
    with pytest.raises(RuntimeError, match=f"libcudart_static.a is missing; looked in {looked}"):
        runtime_library(nvcc(top=top))
