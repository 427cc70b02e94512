"""Costs of the CUDA kernels, found without a GPU; writes ``results/cuda-static.json`` and ``results/cuda-static.md``.

``python benchmarks/cuda_static.py`` counts launches and bytes with the host execution layer. That layer runs the
kernels and counts every load and store of device memory in sectors of 32 bytes; a sector that a block uses again counts
once. Bytes are compared with the fewest that any kernel could move (expected over random masks). Registers and spills
come from nvcc, and instructions from the machine code.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from gmp_kernels import BitMask, _simt, apply_masks_, magnitude_threshold, optim, prune_
from gmp_kernels.tools.bench.gpu import SECTOR, llama_8b_sizes, resnet50_sizes

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "csrc"))
import cuda_toolkit  # noqa: E402

RESULTS = ROOT / "benchmarks/results"
SOURCES = [*sorted((ROOT / "csrc/cuda").glob("*.cu")), ROOT / "benchmarks/whole_tiles.cu"]
# Only accesses to masks should be single bytes. For this architecture the files are compiled once more without them, to
# count the others.
WITHOUT_MASK_BYTES = 90
N = 1 << 18
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIMT = {"backend": "simt"}


class Phase(NamedTuple):
    """One phase to count: its code, and the fewest bytes per weight that it could move."""

    name: str
    run: Callable[[], object]
    floor: float | None = None


class Counted(NamedTuple):
    """Counts of a phase: launches, and bytes per weight."""

    name: str
    launches: int
    loaded: float
    stored: float
    floor: float | None


class Compiled(NamedTuple):
    """A kernel as nvcc compiled it for one architecture; stack, spills and shared memory in bytes."""

    kernel: str
    arch: str
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int
    instructions: int | None
    loads_of_16_bytes: int | None
    bytewide: int | None  # loads and stores of single bytes, except those of masks; None if they were not counted


def weights(n: int = N, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    # numpy's, because the last bits of torch's normals depend on the instruction set.
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(n)).to(dtype)


def mask(sparsity: float, n: int = N) -> BitMask:
    return BitMask.from_bool(np.random.default_rng(1).random(n) >= sparsity)


def live(sparsity: float, itemsize: int) -> float:
    """Return the share of the sectors that hold a kept weight."""
    return 1 - sparsity ** (SECTOR // itemsize)


def dirty(share: float, itemsize: int) -> float:
    """Return the share of the sectors in which a weight changes, if this share of all weights does."""
    return 1 - (1 - share) ** (SECTOR // itemsize)


def prune_phases() -> Iterator[Phase]:
    """Yield the phases of selecting and applying, apart and together."""
    for dtype in DTYPES:
        name, size = str(dtype).removeprefix("torch."), dtype.itemsize
        dense = weights(dtype=dtype)
        yield Phase(f"threshold, {name}, 0.9", partial(magnitude_threshold, dense, round(0.9 * N), **SIMT), size)
        yield Phase(
            f"prune step, {name}, 0 to 0.9",
            partial(prune_, dense.clone(), sparsity=0.9, **SIMT),
            2 * size + dirty(0.9, size) * size + 1 / 8,
        )
        pruned = dense.clone()
        masks = prune_(pruned, sparsity=0.88, **SIMT).masks
        yield Phase(
            f"prune step, {name}, 0.88 to 0.9",
            partial(prune_, pruned, sparsity=0.9, masks=masks, **SIMT),
            # Every weight is read once, to find pruned weights that are not zero any more.
            (1 + 2 * dirty(0.02, size)) * size + 2 / 8,
        )
        bits = mask(0.9)
        changed = dense.clone()
        yield Phase(
            f"apply, {name}, 0.9 of dense weights",
            partial(apply_masks_, changed, bits, **SIMT),
            size + dirty(0.9, size) * size + 1 / 8,
        )
        yield Phase(f"apply, {name}, nothing to change", partial(apply_masks_, changed, bits, **SIMT), size + 1 / 8)


def step(kind: str, sparsity: float, dtype: torch.dtype = torch.float32, **options: Any) -> Callable[[], object]:
    """Return an optimizer step that has its state already."""
    parameter = nn.Parameter(weights(dtype=dtype))
    parameter.grad = weights(dtype=dtype, seed=2)
    arguments = {"lr": 0.1, "momentum": 0.9} if kind == "SGD" else {}
    optimizer = getattr(optim, kind)([parameter], **arguments, **options, **SIMT)
    if sparsity:
        optimizer.set_masks({parameter: mask(sparsity)})
    optimizer.step()
    return optimizer.step


def step_phases() -> Iterator[Phase]:
    """Yield the phases of optimizer steps and averages."""
    for kind, state in (("SGD", 4), ("AdamW", 8)):
        dense = 3 * 4 + 2 * state  # reads weights and gradients, writes weights, reads and writes state
        yield Phase(f"{kind}, float32, 0", step(kind, 0.0), dense)
        yield Phase(f"{kind}, float32, 0.9", step(kind, 0.9), dense * live(0.9, 4) + 1 / 8)
        for sparsity in (0.9, 0.95):
            floor = 3 * 4 * live(sparsity, 4) + 2 * state * (1 - sparsity) + 1 / 8
            yield Phase(f"{kind}, float32, compact state, {sparsity}", step(kind, sparsity, compact_state=True), floor)
    bf16 = {"kind": "AdamW", "dtype": torch.bfloat16}
    yield Phase("AdamW, bfloat16, 0", step(sparsity=0.0, **bf16), 3 * 2 + 2 * 8)
    # The 16-bit weights are only written; their float32 copies are read and written.
    yield Phase("AdamW, bfloat16, master weights, 0", step(sparsity=0.0, master_weights=True, **bf16), 2 * 2 + 2 * 12)
    averages = [weights(seed=3)]
    yield Phase("average of weights, float32", partial(optim.ema_update_, averages, [weights()], 0.9, **SIMT), 3 * 4)


def model_phases() -> Iterator[Phase]:
    """Yield phases on as many tensors as real models have, with fewer weights in each, to count their launches."""
    for name, sizes, shrink in (("ResNet-50", resnet50_sizes(), 256), ("Llama 3 8B", llama_8b_sizes(), 16384)):
        layers = [weights(max(1, n // shrink)) for n in sizes]
        yield Phase(f"prune step, {name}, {len(layers)} tensors", partial(prune_, layers, sparsity=0.9, **SIMT))
        parameters = [nn.Parameter(layer.clone()) for layer in layers]
        for parameter in parameters:
            parameter.grad = parameter.detach().clone()
        optimizer = optim.AdamW(parameters, **SIMT)
        optimizer.step()
        yield Phase(f"AdamW, {name}, {len(layers)} tensors", optimizer.step)


def counted() -> list[Counted]:
    """Run every phase once and return its counts, which are the same on every machine."""
    rows = []
    for phases in (prune_phases, step_phases, model_phases):
        for phase in phases():
            _simt.take_traffic()
            phase.run()
            traffic = _simt.take_traffic()
            per_weight = N if phase.floor is not None else None
            loaded, stored = (sum(row[i] for row in traffic) / (per_weight or 1) for i in (2, 3))
            launches = sum(row[1] for row in traffic if "store<" not in row[0])  # stores are uploads
            rows.append(Counted(phase.name, launches, loaded, stored, phase.floor))
    return rows


REPORT = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for '(?P<arch>\w+)'"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<spill_stores>\d+) bytes spill stores, (?P<spill_loads>\d+) bytes spill"
    r" loads.*?Used (?P<registers>\d+) registers(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)


def parsed(report: str) -> list[dict[str, str]]:
    """Return the values that ptxas reports for every kernel."""
    return [{key: value or "0" for key, value in match.groupdict().items()} for match in REPORT.finditer(report)]


class Code(NamedTuple):
    """Counts from a kernel's machine code."""

    instructions: int
    loads_of_16_bytes: int
    bytewide: int


INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")


def counted_code(listing: str) -> dict[str, Code]:
    """Count the instructions of every kernel, without padding, in the output of cuobjdump."""
    found: dict[str, Counter[str]] = {}
    for line in listing.splitlines():
        if name := re.search(r"Function : (\w+)", line):
            counts = found[name[1]] = Counter()
        elif (match := INSTRUCTION.match(line)) and match[1] != "NOP":
            counts["instructions"] += 1
            operation, *kinds = match[1].split(".")
            if operation in ("LD", "LDG", "ST", "STG"):
                counts["wide"] += operation.startswith("LD") and "128" in kinds
                counts["bytewide"] += "U8" in kinds or "S8" in kinds
    return {
        kernel: Code(*(counts[key] for key in ("instructions", "wide", "bytewide"))) for kernel, counts in found.items()
    }


def disassembled(path: Path) -> dict[str, Code]:
    """Count the instructions in a compiled file; empty without cuobjdump."""
    triton = importlib.util.find_spec("triton")  # has a cuobjdump of its own
    brought = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton else None
    cuobjdump = shutil.which("cuobjdump") or brought
    if cuobjdump is None:
        return {}
    run = subprocess.run([cuobjdump, "--dump-sass", path], capture_output=True, text=True, check=True)
    return counted_code(run.stdout)


def readable(mangled: str) -> str:
    """Return a kernel's name with its template arguments, without namespaces and parameters."""
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    name = re.sub(r"\((?:gmp::cuda::|gmp::)*(\w+)\)(\d+)", r"\1 \2", name)
    return re.sub(r"\b(?:gmp|cuda|kernels)::", "", name.partition("(")[0]).replace("> >", ">>")


def compile_one(source: Path, arch: int, *flags: str) -> tuple[list[dict[str, str]], dict[str, Code]]:
    """Compile one file for one architecture; return the compiler's report and the counts of its code."""
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "code.cubin"
        gencode = f"-gencode=arch=compute_{arch},code=sm_{arch}"
        command = ["nvcc", *cuda_toolkit.FLAGS, gencode, *flags, f"-I{ROOT / 'csrc'}", "-cubin", source, "-o", target]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        return parsed(report), disassembled(target)


def compiled() -> list[Compiled]:
    """Compile every .cu file as setup.py does and read the compiler's report and the machine code."""
    rows = []
    for source in SOURCES:
        for arch in cuda_toolkit.ARCHS:
            report, code = compile_one(source, arch)
            others = {}
            if arch == WITHOUT_MASK_BYTES:
                others = compile_one(source, arch, "-DGMP_WITHOUT_MASK_BYTES")[1]
            for row in report:
                found = code.get(row["kernel"])
                rows.append(
                    Compiled(
                        readable(row["kernel"]),
                        row["arch"],
                        *(int(row[key]) for key in ("registers", "spill_stores", "spill_loads", "stack", "shared")),
                        found and found.instructions,
                        found and found.loads_of_16_bytes,
                        others[row["kernel"]].bytewide if others else None,
                    )
                )
    return sorted(rows, key=lambda row: (row.kernel, int(row.arch.removeprefix("sm_"))))


def markdown(document: dict[str, Any]) -> str:
    """Return both tables as Markdown."""
    lines = [
        "# The CUDA kernels without a GPU",
        "",
        "Written by `python benchmarks/cuda_static.py`; nothing here is a time.",
        "",
        f"## Launches, and bytes per weight of {document['num_weights']}, counted by the host execution layer",
        "",
        "The floor is the fewest bytes any kernel could move, in sectors of 32 bytes and expected over random masks.",
        "",
        "| phase | launches | loaded | stored | both | floor | both / floor |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in (Counted(**values) for values in document["counted"]):
        if row.floor is None:
            lines.append(f"| {row.name} | {row.launches} | | | | | |")
        else:
            both = row.loaded + row.stored
            numbers = (row.loaded, row.stored, both, row.floor, both / row.floor)
            lines.append(f"| {row.name} | {row.launches} | " + " | ".join(f"{x:.2f}" for x in numbers) + " |")
    lines += [
        "",
        f"## Registers, memory and machine code by the compiler's report ({document['nvcc']})",
        "",
        "Single bytes: loads and stores one byte wide, but for those of masks. `whole_tiles`: whole tiles in `update`.",
        "",
        "| kernel | arch | registers | spilled bytes | stack | shared | instructions | 16-byte loads | single bytes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kernel in (Compiled(**values) for values in document["compiled"]):
        spilled = kernel.spill_stores + kernel.spill_loads
        code = (kernel.instructions, kernel.loads_of_16_bytes, kernel.bytewide)
        numbers = (kernel.registers, spilled, kernel.stack, kernel.shared, *("" if x is None else x for x in code))
        lines.append(f"| `{kernel.kernel}` | {kernel.arch} | " + " | ".join(map(str, numbers)) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write both files."""
    if shutil.which("nvcc") is None:
        print("cuda_static: expected nvcc on the PATH, found none; install the CUDA toolkit")
        return 1
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    document = {
        "num_weights": N,
        "nvcc": "nvcc " + re.search(r"V([\d.]+)", version)[1],
        "counted": [row._asdict() for row in counted()],
        "compiled": [row._asdict() for row in compiled()],
    }
    (RESULTS / "cuda-static.json").write_text(json.dumps(document, indent=1) + "\n")
    (RESULTS / "cuda-static.md").write_text(markdown(document))
    print(markdown(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
