"""Stage ``ptx``: the kernels as the driver compiles them for a GPU that this build has no code for.

GPUs newer than the newest that nvcc knew work this way. Here a build for sm_80 alone stands in for that case, because
on a later generation only its PTX can run. The smoke test then runs with that build.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from gpu_stages.build import PACKAGE, capability
from gpu_stages.facts import tell
from gpu_stages.running import ROOT

OLDEST = "80"
BUILD = (sys.executable, "setup.py", "-q", "build_ext", "--force", "--parallel", "2")
SMOKE = (sys.executable, "-m", "gpu_stages.smoke", "--few")


def package_in(folder: Path) -> None:
    """Copy the package into a folder, without its built extensions."""
    shutil.copytree(PACKAGE, folder / "gmp_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))


def main() -> int:
    """Build for the oldest GPUs in a temporary folder, and run the smoke test with that build."""
    gpu = capability()
    if gpu.startswith(OLDEST[0]):
        tell(f"code for sm_{OLDEST} runs on sm_{gpu} as it is: nothing to compile")
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        package_in(folder)
        places = ("--build-lib", str(folder), "--build-temp", str(folder / "objects"))
        build = {**os.environ, "GMP_KERNELS_BUILD_CUDA": "1", "GMP_KERNELS_CUDA_ARCHS": OLDEST}
        if code := subprocess.run([*BUILD, *places], cwd=ROOT, env=build, check=False).returncode:
            tell(f"building for sm_{OLDEST} failed with exit code {code}")
            return 1
        path = os.pathsep.join([str(folder), str(ROOT / "benchmarks")])
        code = subprocess.run(SMOKE, cwd=folder, env={**os.environ, "PYTHONPATH": path}, check=False).returncode
    tell(f"PTX of compute_{OLDEST} on sm_{gpu}: " + ("the CPU's bits" if code == 0 else f"exit code {code}"))
    return int(code != 0)


if __name__ == "__main__":
    sys.exit(main())
