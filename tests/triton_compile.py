"""Compiles launches of Triton kernels for a GPU that need not be there, and prints what each takes, one a line.

A program and not a test, for a process without the interpreter: ``python triton_compile.py TARGET < launches.json``
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import MockTensor

from gmp_kernels.backends.triton import kernels as triton_kernels
from gmp_kernels.backends.triton import options_of
from gmp_kernels.backends.triton.tables import BLOCK

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def constant(name: str, value: Any) -> Any:
    """As launched on a GPU: the interpreter's sizes are its own."""
    if name == "BLOCK":
        return BLOCK
    return tl.dtype(value["tl"]) if isinstance(value, dict) else value


def argument(value: Any) -> Any:
    return MockTensor(getattr(torch, value["torch"])) if isinstance(value, dict) else value


def resources(asm: dict[str, Any]) -> dict[str, int]:
    """Registers, and bytes per thread in memory because registers did not suffice."""
    if "amdgcn" in asm:
        names = {"registers": "vgpr_count", "spilled": "private_segment_fixed_size"}
        return {ours: int(re.search(rf"\.{theirs}:\s*(\d+)", asm["amdgcn"])[1]) for ours, theirs in names.items()}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {"registers": int(re.search(r"REG:(\d+)", usage)[1]), "spilled": int(re.search(r"STACK:(\d+)", usage)[1])}


if __name__ == "__main__":
    target = TARGETS[sys.argv[1]]
    current = {"get_current_device": 0, "get_current_stream": 0, "get_current_target": target}
    triton.runtime.driver.set_active(
        SimpleNamespace(**{name: lambda *_, value=value: value for name, value in current.items()})
    )
    for name, arguments, constants in json.load(sys.stdin):
        kernel = getattr(triton_kernels, name)
        options = {key: constant(key, value) for key, value in constants.items()}
        compiled = kernel.warmup(*map(argument, arguments), grid=(1,), **options, **options_of(name))
        print(json.dumps([name, constants, resources(compiled.asm)]), flush=True)
