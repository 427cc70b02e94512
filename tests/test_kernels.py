"""The kernels of another processor, run by an emulator, against those of this one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
PROGRAM = Path(__file__).with_name("kernel_digest.cpp")
FLAGS = ["-O2", "-std=c++17", "-Wall", "-Wextra", "-Wno-psabi", "-Werror", "-fno-math-errno", "-ffp-contract=off"]
CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


def digest_of(compiler: str, instruction_set: str, folder: Path, *emulator: str) -> str:
    """Hash of all that the kernels of an instruction set write."""
    program = folder / f"{compiler}-{instruction_set}"
    macro = f"-DGMP_TESTED=k{instruction_set.title()}Kernels"
    sources = [PROGRAM, CSRC / "cpu" / f"isa_{instruction_set}.cpp"]
    subprocess.run([compiler, *FLAGS, macro, "-static", "-I", CSRC, *sources, "-o", program], check=True)
    done = subprocess.run([*emulator, program], capture_output=True, text=True, check=True)
    name, digest = done.stdout.split()
    assert name == instruction_set
    return digest


@pytest.mark.thorough
@pytest.mark.skipif(
    not (shutil.which(CROSS) and shutil.which(EMULATOR)),
    reason="no cross compiler or emulator (Debian: apt install g++-aarch64-linux-gnu qemu-user)",
)
@pytest.mark.parametrize("instruction_set", ["neon", "portable"])
def test_kernels_of_aarch64_write_the_same_bits(instruction_set: str, tmp_path: Path) -> None:
    expected = digest_of("g++", "portable", tmp_path)
    assert digest_of(CROSS, instruction_set, tmp_path, EMULATOR) == expected
