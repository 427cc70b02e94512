"""The stubs of the extension modules list what the modules have: the same names, the same numbers of arguments."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from conftest import BACKENDS, needs_simt

import gmp_kernels

PACKAGE = Path(gmp_kernels.__file__).parent


def stub_of(name: str) -> dict[str, ast.stmt]:
    """Return {name: definition} of a stub, with those of the stub that it takes over."""
    found: dict[str, ast.stmt] = {}
    for node in ast.parse((PACKAGE / f"{name}.pyi").read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            assert node.module is not None
            found |= stub_of(node.module.rpartition(".")[2])
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, ast.AnnAssign):
            assert isinstance(node.target, ast.Name)
            found[node.target.id] = node
    return {name: node for name, node in found.items() if not name.startswith("_")}


def number_of_arguments(function: Callable[..., object]) -> int:
    """Count the arguments in the signature that pybind11 writes into the docstring."""
    assert function.__doc__ is not None
    signature, _, _ = function.__doc__.partition(" -> ")
    return len(re.findall(r"\barg\d+: ", signature))


def check(name: str, module: ModuleType) -> None:
    stub = stub_of(name)
    assert set(stub) == {name for name in vars(module) if not name.startswith("_")}
    for name, node in stub.items():
        value = getattr(module, name)
        if isinstance(node, ast.FunctionDef):
            assert len(node.args.args) == number_of_arguments(value), name
        else:
            assert isinstance(value, type) == isinstance(node, ast.ClassDef), name


def test_of_the_cpu_kernels() -> None:
    check("_C", importlib.import_module("gmp_kernels._C"))


@needs_simt
def test_of_the_cuda_kernels_on_the_host() -> None:
    """Both modules are compiled from one file, so this holds the stub of _cuda as well where that is not built."""
    check("_simt", importlib.import_module("gmp_kernels._simt"))


@pytest.mark.skipif("cuda" not in BACKENDS, reason="needs the backend cuda, which GMP_KERNELS_TEST_BACKENDS leaves out")
def test_of_the_cuda_kernels() -> None:
    check("_cuda", importlib.import_module("gmp_kernels._cuda"))
