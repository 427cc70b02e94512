"""Host cost of the GPU backends on many small tensors: ``prune_`` and ``AdamW.step`` without kernels.

Everything but the launches runs: checks, tables, uploads, result objects. The GPU backends keep their tables in host
memory here. Their torch operations on the device, such as zeroing counters, count as host time. The time to ask for the
stream, and to copy tables to a device and back, is not included; it is some microseconds a call. The baseline, torch's
step on the CPU, does run.
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import partial
from types import BuiltinFunctionType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gmp_kernels.backends import Backend, choose, cuda, register, triton
from gmp_kernels.backends.types import BracketCounts, Implementation
from gmp_kernels.optim import AdamW
from gmp_kernels.tools.bench.measurement import Case, Pair, Timed
from gmp_kernels.tools.bench.small import counted, fused_adamw, mask_tensors, pruning, small_parameters

__all__ = ["host_cases"]

BASELINE = "torch fused AdamW.step"
# Bounds (must, aim) of prune_ and of AdamW.step, by the number of tensors. Few tensors show the cost of a call.
BOUNDS = {
    1: ((2.0, 1.0), (1.5, 1.0)),
    25: ((1.2, 0.6), (1.2, 0.8)),
    161: ((1.0, 0.4), (1.0, 0.7)),
    291: ((1.0, 0.4), (1.0, 0.7)),
}


def host_cases() -> list[Case]:
    """Return the rows on the host time of a call, for every GPU backend whose host code is installed."""
    cases = []
    for backend, is_there in (
        ("cuda", bool(cuda._modules)),
        ("triton", importlib.util.find_spec("triton") is not None),
    ):
        if is_there:
            for num_tensors, (pruning, stepping) in BOUNDS.items():
                where = f"{counted(num_tensors)}, {backend}"
                build = partial(_prune_and_fused, backend, num_tensors)
                cases.append(Case(f"host time of prune_, {where}", BASELINE, *pruning, build))
                build = partial(_step_and_fused, backend, num_tensors)
                cases.append(Case(f"host time of AdamW.step, {where}", BASELINE, *stepping, build))
    if cuda._modules:
        cases += [
            Case(f"host time of AdamW.step {how}, 161 tensors, cuda", "the plain step", 1.2, None, partial(build_, 161))
            for how, build_ in (("with capturable", _capturable_and_plain), ("of a GradScaler", _scaled_and_plain))
        ]
    return cases


def _nothing(*_: object, **__: object) -> None:
    """Stand in for a launch."""


def _four(_: int) -> int:
    return 4


def _store(_: object, to: int, values: npt.NDArray[np.int64]) -> None:
    ctypes.memmove(to, values.tobytes(), values.nbytes)


def _fetch(_: object, place: int, into: npt.NDArray[np.int64]) -> None:
    into[:] = np.frombuffer(ctypes.string_at(place, into.nbytes), np.int64)


def _idle_cuda() -> Implementation:
    """Return the CUDA backend on a module that has the constants and classes of the extension but no kernels."""
    built: ModuleType = cuda._modules.get("simt") or cuda._modules["cuda"]
    idle = {
        name: _nothing if isinstance(f, BuiltinFunctionType) and name != "launch_on" else f
        for name, f in vars(built).items()
    }
    # The device counts with few blocks, because clearing their counters is not host time on a real GPU.
    idle |= {"load_kernels": _four, "READERS": 1}
    # Uploads in the arguments of launches are as large as with CUDA toolkits from 13.0 on.
    idle |= {"store": _store, "fetch": _fetch, "MOST_STORED": 4 * 4080}
    return cuda.Launches(SimpleNamespace(**idle))  # type: ignore[arg-type]


class _IdleTriton(triton.Triton):
    """Triton's backend without launches. The host counts in its place, because a search needs counts to end."""

    _launch = _nothing

    def count(self, *request: Any) -> BracketCounts:
        super().count(*request)
        return choose("cpu", torch.device("cpu")).count(*request)


def _backend(name: str) -> str:
    """Register a GPU backend without its kernels, and return the name to pass as ``backend``."""
    idle = f"{name} without kernels"
    load = {"cuda": _idle_cuda, "triton": _IdleTriton}[name]
    register(Backend(idle, priority=-100, probe=lambda: None, supports=lambda device: None, load=load))
    return idle


def _on_one_thread(side: Timed) -> Timed:
    """Return a side that runs on one thread, as calls are measured here. Setting the number of threads takes 0.2 us."""

    def run() -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            side.run()
        finally:
            torch.set_num_threads(before)

    return Timed(run, side.prepare)


def _fused(num_tensors: int) -> Timed:
    return _on_one_thread(Timed(fused_adamw(num_tensors).step))


def _prune_and_fused(backend: str, num_tensors: int, _shrink: int) -> Pair:
    return Pair(_on_one_thread(pruning(num_tensors, _backend(backend))), _fused(num_tensors))


def _optimizer(backend: str, num_tensors: int, **options: Any) -> AdamW:
    optimizer = AdamW(small_parameters(num_tensors), backend=_backend(backend), **options)
    mask_tensors(optimizer)
    return optimizer


def _stepping(optimizer: AdamW) -> Timed:
    return _on_one_thread(Timed(optimizer.step))


def _step_and_fused(backend: str, num_tensors: int, _shrink: int) -> Pair:
    return Pair(_stepping(_optimizer(backend, num_tensors)), _fused(num_tensors))


def _capturable_and_plain(num_tensors: int, _shrink: int) -> Pair:
    ours, plain = (_optimizer("cuda", num_tensors, capturable=capturable) for capturable in (True, False))
    return Pair(_stepping(ours), _stepping(plain))


def _scaled_and_plain(num_tensors: int, _shrink: int) -> Pair:
    # With capturable the host does not read the tensors of scale and flag, as on a GPU.
    ours, plain = (_optimizer("cuda", num_tensors, capturable=capturable) for capturable in (True, False))
    for name, value in (("grad_scale", 8.0), ("found_inf", 0.0)):
        setattr(ours, name, torch.tensor(value, device="cpu"))
    return Pair(_stepping(ours), _stepping(plain))
