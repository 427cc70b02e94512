"""Facts about the CUDA toolkit for setup.py: the GPUs that its compiler knows, and the place of its runtime.

It is a file of its own because it needs only Python, while setup.py cannot be imported without the build's packages.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

# Code for one of these runs on every GPU of its generation with the same or a higher minor version.
ARCHS = (80, 90, 100, 120)
RUNTIME = "libcudart_static.a"

FLAGS = (
    *("-std=c++17", "-O3", "--fmad=false", "--expt-relaxed-constexpr"),
    "-Xptxas=-v",  # registers and spills are reported
    *("-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off", "-diag-suppress=128,177"),
)


def runs_on(gpu: int, archs: Iterable[int]) -> bool:
    """Whether code compiled for one of ``archs`` runs on ``gpu`` as it is."""
    return any(arch // 10 == gpu // 10 and arch <= gpu for arch in archs)


def ptx_for(archs: Sequence[int], known: Sequence[int]) -> int:
    """Choose the newest of ``archs`` whose PTX serves every GPU that is newer than the oldest of them.

    PTX runs on the GPU it was made for and on all newer ones. PTX for the very newest would leave out GPUs in between
    for which there is no code: sm_110 can compile PTX of compute_100, but not that of compute_120.
    """
    without_code = [gpu for gpu in known if gpu > min(archs) and not runs_on(gpu, archs)]
    return max(arch for arch in archs if all(arch <= gpu for gpu in without_code))


def known_archs(nvcc: str) -> list[int]:
    """Return the GPUs that ``nvcc`` makes code for, such as 90 for sm_90."""
    listed = _run(nvcc, "--list-gpu-code")
    return sorted(int(number) for number in re.findall(r"^sm_(\d+)$", listed, re.MULTILINE))


def gencode(nvcc: str, chosen: str = "") -> list[str]:
    """Return the flags that say which GPUs to compile for.

    Parameters
    ----------
    nvcc : str
        Path of the compiler.
    chosen : str
        GPUs to compile for, such as "90" or "80,90"; if empty, all of ``ARCHS`` that ``nvcc`` knows.

    Raises
    ------
    RuntimeError
        ``nvcc`` knows none of ``ARCHS``, or not all that was chosen.
    """
    known = known_archs(nvcc)
    numbers = re.split(r"[\s,;]+", chosen.strip()) if chosen.strip() else []
    if not all(number.isdecimal() for number in numbers):
        raise RuntimeError(f"GMP_KERNELS_CUDA_ARCHS: expected numbers such as 90 or 80,90, got {chosen!r}")
    archs = sorted({int(number) for number in numbers}) or [arch for arch in ARCHS if arch in known]
    if not archs or not set(archs) <= set(known):
        wanted = ", ".join(f"sm_{arch}" for arch in archs or ARCHS)
        has = ", ".join(f"sm_{arch}" for arch in known) or "none"
        raise RuntimeError(f"expected {nvcc} to compile for {wanted}; it knows {has}. Choose by GMP_KERNELS_CUDA_ARCHS")
    ptx = ptx_for(archs, known)
    return [
        f"-gencode=arch=compute_{arch},code=" + (f"[sm_{arch},compute_{arch}]" if arch == ptx else f"sm_{arch}")
        for arch in archs
    ]


def runtime_library(nvcc: str) -> Path:
    """Find the static CUDA runtime, in the folders that ``nvcc`` itself links from or in the usual ones of toolkits.

    Raises
    ------
    RuntimeError
        It is in none of these places, which the message lists.
    """
    dry_run = _run(nvcc, "-dryrun", "none.cu")
    said = dict(re.findall(r"^#\$ (TOP|LIBRARIES)=(.*)$", dry_run, re.MULTILINE))
    folders = [Path(word[2:]) for word in shlex.split(said.get("LIBRARIES", "")) if word.startswith("-L")]
    if "TOP" in said:
        folders += [Path(said["TOP"].strip()) / name for name in ("targets/x86_64-linux/lib", "lib64", "lib")]
    for folder in folders:
        if (folder / RUNTIME).exists():
            return folder / RUNTIME
    looked = ", ".join(map(str, folders)) or f"nothing, since {nvcc} -dryrun names no folder"
    raise RuntimeError(f"{RUNTIME} is missing; looked in {looked}. Install the static CUDA runtime (cuda-cudart-dev)")


def _run(*command: str) -> str:
    """Return both outputs of a command, because nvcc prints a dry run to the second."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise RuntimeError(f"{' '.join(command)}: {error}") from None
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout + done.stderr
