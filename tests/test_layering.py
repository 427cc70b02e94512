"""The house: who may import whom, what csrc may include, and how long a file may get."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from subprocesses import ROOT

PACKAGE = ROOT / "gmp_kernels"
CSRC = ROOT / "csrc"
EXTENSIONS = {"_C", "_cuda", "_simt"}
FACADE = "gmp_kernels"  # the package's own __init__

# From the ground up: a file imports from floors below its own, never from its own or above. A new file gets its place
# here.
FLOORS = [
    {"errors", "formats", "library"},
    {"masks", "model", "patterns", "reports", "schedules"},
    EXTENSIONS | {"plots"},
    {"backends"},
    {"checks", "search"},
    {"counts"},
    {"ops"},
    {"distributed"},
    {"checkpoints", "optim"},
    {"pruner"},
    {"scheduler"},
    {"run"},
    {"recipes", "stages"},
    {FACADE},
    {"integrations", "tools"},
    {"__main__"},
]
FLOOR = {name: height for height, names in enumerate(FLOORS) for name in names}

PYTHON_FILES = sorted(PACKAGE.rglob("*.py"))
BACKENDS = {"reference", "cpu", "cuda", "triton"}
BACKEND_FILES = [
    path for path in PYTHON_FILES if path.relative_to(PACKAGE).parts[:2][-1].removesuffix(".py") in BACKENDS
]
CXX_FILES = sorted(path for path in CSRC.rglob("*") if path.is_file())


def name_of(path: Path) -> str:
    """The part of the package that a file belongs to: a module, or a folder as a whole."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return FACADE if first == "__init__" else first


def modules_imported(path: Path) -> Iterator[str]:
    """Dotted names below ``gmp_kernels``, wherever in the file they are imported."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the module's full name"
            # `from gmp_kernels import masks` names a module, `from gmp_kernels import BitMask` the facade.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, module = name.partition(".")
            if package == "gmp_kernels":
                yield module


def parts_imported(path: Path) -> set[str]:
    firsts = {module.partition(".")[0] for module in modules_imported(path)}
    return {first if first in FLOOR else FACADE for first in firsts}


def test_every_part_has_its_place() -> None:
    assert {name_of(path) for path in PYTHON_FILES} | EXTENSIONS == set(FLOOR)


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    part = name_of(path)
    upward = {other for other in parts_imported(path) - {part} if FLOOR[other] >= FLOOR[part]}
    assert not upward, f"{part} is not above {sorted(upward)}"


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_backends_know_the_extension(path: Path) -> None:
    assert not EXTENSIONS & parts_imported(path) or name_of(path) == "backends"


@pytest.mark.parametrize("path", BACKEND_FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_backends_do_not_know_each_other(path: Path) -> None:
    own = path.relative_to(PACKAGE / "backends").parts[0].removesuffix(".py")
    known = {
        part for module in modules_imported(path) if module.startswith("backends.") for part in module.split(".")[1:2]
    }
    assert not known & (BACKENDS - {own})


@pytest.mark.parametrize("path", CXX_FILES, ids=lambda path: str(path.relative_to(CSRC)))
def test_csrc_knows_no_torch_and_only_the_bindings_know_python(path: Path) -> None:
    headers = re.findall(r"^\s*#\s*include\s*[<\"]([^>\"]+)", path.read_text(), re.MULTILINE)
    tops = {header.partition("/")[0].lower() for header in headers}
    assert not tops & {"torch", "aten", "c10", "caffe2"}
    if path.name not in ("bindings.cpp", "unchanged.h"):
        assert not tops & {"pybind11", "python.h"}
    if path.parent.name == "cpu":
        assert not [header for header in headers if "cuda" in header.lower()]


def test_the_bindings_do_know_python() -> None:
    """Or else the test above looks at nothing."""
    assert "#include <pybind11/pybind11.h>" in (CSRC / "bindings.cpp").read_text()


@pytest.mark.parametrize("folder", ["gmp_kernels", "csrc", "tests", "benchmarks"])
def test_no_file_is_longer_than_one_can_read(folder: str) -> None:
    files = [path for path in (ROOT / folder).rglob("*") if path.suffix in {".py", ".pyi", ".cpp", ".h", ".cu", ".cuh"}]
    lengths = {str(path): len(path.read_text().splitlines()) for path in files}
    assert max(lengths.values(), default=0) <= 500, max(lengths, key=lambda path: lengths[path])
