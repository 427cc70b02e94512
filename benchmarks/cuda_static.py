"""What the CUDA kernels cost, found without a GPU; writes ``results/cuda-static.json`` and ``results/cuda-static.md``.

``python benchmarks/cuda_static.py`` counts launches and bytes with the host execution layer, which runs the kernels
themselves and counts every load and store of device memory; and it asks nvcc for registers and spills. Bytes are set
against the fewest that any kernel could move (expected over random masks), where memory is read and written in
sectors of 32 bytes.
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
from gmp_kernels.bench_gpu import SECTOR, llama_8b_sizes, resnet50_sizes

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "csrc"))
import cuda_toolkit  # noqa: E402

RESULTS = ROOT / "benchmarks/results"
N = 1 << 18
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIMT = {"backend": "simt"}


class Phase(NamedTuple):
    """Something that is counted: what it runs, and the fewest bytes per weight that it could move."""

    name: str
    run: Callable[[], object]
    floor: float | None = None


class Counted(NamedTuple):
    """A phase as counted; bytes per weight."""

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
    loads_of_16_bytes: int | None


def weights(n: int = N, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    # From numpy: torch's own normals depend on the instruction set in their last bits.
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(n)).to(dtype)


def mask(sparsity: float, n: int = N) -> BitMask:
    return BitMask.from_bool(np.random.default_rng(1).random(n) >= sparsity)


def live(sparsity: float, itemsize: int) -> float:
    """Share of the sectors that hold a kept weight."""
    return 1 - sparsity ** (SECTOR // itemsize)


def dirty(share: float, itemsize: int) -> float:
    """Share of the sectors in which one of so many weights changes."""
    return 1 - (1 - share) ** (SECTOR // itemsize)


def prune_phases() -> Iterator[Phase]:
    """Selection and application, apart and together."""
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
            (2 * live(0.88, size) + dirty(0.02, size)) * size + 2 / 8,
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
    """An optimizer step whose state is there already."""
    parameter = nn.Parameter(weights(dtype=dtype))
    parameter.grad = weights(dtype=dtype, seed=2)
    arguments = {"lr": 0.1, "momentum": 0.9} if kind == "SGD" else {}
    optimizer = getattr(optim, kind)([parameter], **arguments, **options, **SIMT)
    if sparsity:
        optimizer.set_masks({parameter: mask(sparsity)})
    optimizer.step()
    return optimizer.step


def step_phases() -> Iterator[Phase]:
    """Optimizer steps and averages."""
    for kind, state in (("SGD", 4), ("AdamW", 8)):
        dense = 3 * 4 + 2 * state  # weights and gradients in, weights out, state both ways
        yield Phase(f"{kind}, float32, 0", step(kind, 0.0), dense)
        yield Phase(f"{kind}, float32, 0.9", step(kind, 0.9), dense * live(0.9, 4) + 1 / 8)
        for sparsity in (0.9, 0.95):
            floor = 3 * 4 * live(sparsity, 4) + 2 * state * (1 - sparsity) + 1 / 8
            yield Phase(f"{kind}, float32, compact state, {sparsity}", step(kind, sparsity, compact_state=True), floor)
    bf16 = {"kind": "AdamW", "dtype": torch.bfloat16}
    yield Phase("AdamW, bfloat16, 0", step(sparsity=0.0, **bf16), 3 * 2 + 2 * 8)
    # The 16-bit weights are written only; their float32 copies go both ways.
    yield Phase("AdamW, bfloat16, master weights, 0", step(sparsity=0.0, master_weights=True, **bf16), 2 * 2 + 2 * 12)
    averages = [weights(seed=3)]
    yield Phase("average of weights, float32", partial(optim.ema_update_, averages, [weights()], 0.9, **SIMT), 3 * 4)


def model_phases() -> Iterator[Phase]:
    """As many tensors as real models have, with fewer weights in each: launches must not grow with them."""
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
    """Run every phase once; the same numbers on every machine."""
    rows = []
    for phases in (prune_phases, step_phases, model_phases):
        for phase in phases():
            _simt.take_traffic()
            phase.run()
            traffic = _simt.take_traffic()
            per_weight = N if phase.floor is not None else None
            loaded, stored = (sum(row[i] for row in traffic) / (per_weight or 1) for i in (2, 3))
            launches = sum(row[1] for row in traffic)
            rows.append(Counted(phase.name, launches, loaded, stored, phase.floor))
    return rows


def nvcc_flags() -> list[str]:
    """Those of setup.py, which cannot be imported without building; one architecture's report after the other."""
    return [*cuda_toolkit.FLAGS, *cuda_toolkit.gencode("nvcc")]


REPORT = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for '(?P<arch>\w+)'"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<spill_stores>\d+) bytes spill stores, (?P<spill_loads>\d+) bytes spill"
    r" loads.*?Used (?P<registers>\d+) registers(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)


def parsed(report: str) -> list[dict[str, str]]:
    """What ptxas says of every kernel."""
    return [{key: value or "0" for key, value in match.groupdict().items()} for match in REPORT.finditer(report)]


def wide_loads(objects: list[Path]) -> Counter[tuple[str, str]] | None:
    """Loads of 16 bytes in the machine code of every (kernel, architecture); None without cuobjdump."""
    triton = importlib.util.find_spec("triton")  # brings one along
    brought = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton else None
    cuobjdump = shutil.which("cuobjdump") or brought
    if cuobjdump is None:
        return None
    loads: Counter[tuple[str, str]] = Counter()
    for path in objects:
        listing = subprocess.run([cuobjdump, "--dump-sass", path], capture_output=True, text=True, check=True).stdout
        arch = kernel = ""
        for line in listing.splitlines():
            if found := re.match(r"arch = (\w+)", line):
                arch = found[1]
            elif found := re.search(r"Function : (\w+)", line):
                kernel = found[1]
            elif re.search(r"\bLDG?\.\S*\.128\b", line):
                loads[kernel, arch] += 1
    return loads


def readable(mangled: str) -> str:
    """A kernel's name with its template arguments, without namespaces and parameters."""
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    name = re.sub(r"\((?:gmp::cuda::|gmp::)*(\w+)\)(\d+)", r"\1 \2", name)
    return re.sub(r"\b(?:gmp|cuda|kernels)::", "", name.partition("(")[0])


def compiled() -> list[Compiled]:
    """Compile every .cu file as setup.py does and read the compiler's report."""
    with tempfile.TemporaryDirectory() as scratch:
        found, objects = [], []
        for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
            objects.append(Path(scratch) / f"{source.stem}.o")
            command = ["nvcc", *nvcc_flags(), f"-I{ROOT / 'csrc'}", "-c", source, "-o", objects[-1]]
            found += parsed(subprocess.run(command, capture_output=True, text=True, check=True).stderr)
        loads = wide_loads(objects)
    rows = [
        Compiled(
            readable(row["kernel"]),
            row["arch"],
            *(int(row[key]) for key in ("registers", "spill_stores", "spill_loads", "stack", "shared")),
            None if loads is None else loads[row["kernel"], row["arch"]],
        )
        for row in found
    ]
    return sorted(rows)


def markdown(document: dict[str, Any]) -> str:
    """Both tables."""
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
        f"## Registers and memory by the compiler's report ({document['nvcc']})",
        "",
        "| kernel | arch | registers | spilled bytes | stack | shared memory | loads of 16 bytes |",
        "|---|---|---|---|---|---|---|",
    ]
    for kernel in (Compiled(**values) for values in document["compiled"]):
        spilled = kernel.spill_stores + kernel.spill_loads
        loads = "" if kernel.loads_of_16_bytes is None else kernel.loads_of_16_bytes
        lines.append(
            f"| `{kernel.kernel}` | {kernel.arch} | {kernel.registers} | {spilled} | {kernel.stack} | {kernel.shared} "
            f"| {loads} |"
        )
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
