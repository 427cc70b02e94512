"""The wheel: what is in it, and that it works in an environment where nothing else of this project is."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import numpy
import pytest
import torch
from building import build_wheel
from subprocesses import run_python

import gmp_kernels

pytestmark = pytest.mark.thorough

SOURCES = {".py", ".pyi"}
PRUNE = """
import gmp_kernels, torch
weight = torch.arange(1.0, 101.0)
result = gmp_kernels.prune_(weight, sparsity=0.9, backend="cpu")
print(gmp_kernels.__file__)
print(gmp_kernels.__version__, result.num_pruned, weight.count_nonzero().item())
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    package = Path(gmp_kernels.__file__).parent
    expected = {str(path.relative_to(package.parent)) for path in package.rglob("*") if path.suffix in SOURCES}
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    (extension,) = (name for name in names if name.endswith(".so"))
    assert extension.startswith("gmp_kernels/_C.")
    assert names == expected | {"gmp_kernels/py.typed", extension}


def test_the_wheel_works_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "inner", with_pip=False)
    python = tmp_path / "inner/bin/python"
    # Without the path to the sources: pip would find the package there and call it installed.
    done = run_python("-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, PYTHONPATH="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "inner/bin/gmp-kernels").exists()
    # torch is hundreds of megabytes, so the one installed here is lent; only this line makes it visible.
    (site_packages,) = (tmp_path / "inner/lib").glob("python*/site-packages")
    lent = {str(Path(module.__file__).parent.parent) for module in (torch, numpy)}
    (site_packages / "lent.pth").write_text("\n".join(lent))

    done = subprocess.run([python, "-I", "-c", PRUNE], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    where, what = done.stdout.splitlines()
    assert Path(where) == site_packages / "gmp_kernels/__init__.py"
    assert what == f"{gmp_kernels.__version__} [90] 10"
    assert sys.prefix != str(tmp_path / "inner")
