"""KeyboardInterrupt at every line of a call: weights and masks are as before or as after, and a retry works."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from conftest import BACKENDS

import gmp_kernels
from gmp_kernels import BitMask, apply_masks_, checks, prune_
from gmp_kernels.backends import choose
from gmp_kernels.ops import PruneResult, begin_prune
from gmp_kernels.optim import ema_update_

PACKAGE = str(Path(gmp_kernels.__file__).parent)
# Triton starts kernels from Python: of several dtypes, an interrupt can come between two of them.
INTERRUPTED = sorted({"reference", "cpu", "simt"} & set(BACKENDS))


class Interrupt:
    """A trace function that raises at line or return number ``left``, from 0 on, of the package."""

    def __init__(self, left: int) -> None:
        self.left = left

    def __call__(self, frame: FrameType, event: str, _: object) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event in ("line", "return"):
            self.left -= 1
            if self.left == -1:
                raise KeyboardInterrupt
        return self


def interrupted(call: Callable[[], object], line: int) -> bool:
    """Make the call; return whether the interrupt came."""
    sys.settrace(Interrupt(line))
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def bytes_of(tensors: Sequence[torch.Tensor]) -> list[list[int]]:
    return [tensor.view(torch.uint8).tolist() for tensor in tensors]


Made = tuple[Callable[[], object], list[torch.Tensor]]


def weights_and_masks() -> tuple[list[torch.Tensor], list[BitMask]]:
    generator = torch.Generator().manual_seed(0)
    dtypes = (torch.float32, torch.bfloat16, torch.float32)
    weights = [torch.randn(n, generator=generator).to(dtype) for n, dtype in zip((40, 9, 64), dtypes, strict=True)]
    return weights, [BitMask.from_bool(torch.arange(w.numel()) % 5 != 0) for w in weights]


def pruning(backend: str) -> Made:
    weights, masks = weights_and_masks()
    bits = [mask.packed for mask in masks]
    return lambda: prune_(weights, sparsity=0.5, masks=masks, backend=backend), [*weights, *bits]


def pruning_to_new_masks(backend: str) -> Made:
    weights, _ = weights_and_masks()
    return lambda: prune_(weights, sparsity=0.5, backend=backend), weights


def pruning_together(backend: str) -> Made:
    weights, masks = weights_and_masks()
    weights, masks = weights[::2], masks[::2]
    bits = [mask.packed for mask in masks]
    return lambda: prune_(weights, sparsity=0.5, masks=masks, scope="global", backend=backend), [*weights, *bits]


def applying(backend: str) -> Made:
    weights, masks = weights_and_masks()
    return lambda: apply_masks_(weights, masks, backend=backend), weights


def averaging(backend: str) -> Made:
    averages, masks = weights_and_masks()
    weights = [average.flip(0) for average in averages]
    apply_masks_(averages, masks)
    return lambda: ema_update_(averages, weights, 0.5, masks=masks, backend=backend), averages


@pytest.mark.parametrize("known", [False, True], ids=["at the first call", "at a later one"])
@pytest.mark.parametrize("make", [pruning, pruning_to_new_masks, pruning_together, applying, averaging])
@pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.sampled(3) if name == "simt" else ()) for name in INTERRUPTED]
)
def test_an_interrupt_leaves_all_as_before_or_all_as_after(
    backend: str, make: Callable[[str], Made], known: bool
) -> None:
    choose(backend, torch.device("cpu"))
    call, written = make(backend)
    before = bytes_of(written)
    call()
    after = bytes_of(written)
    assert before != after
    found = {"before": 0, "after": 0}
    for line in itertools.count():
        for tensor, values in zip(written, before, strict=True):
            tensor.view(torch.uint8).copy_(torch.tensor(values, dtype=torch.uint8))
        if not known:
            checks.forget()
        versions = [tensor._version for tensor in written]
        if not interrupted(call, line):
            break
        now = bytes_of(written)
        assert now in (before, after), line
        found["before" if now == before else "after"] += 1
        if now == after:
            assert all(tensor._version > version for tensor, version in zip(written, versions, strict=True)), line
        if now == before or make is not averaging:
            call()
            assert bytes_of(written) == after
    assert bytes_of(written) == after
    assert min(found.values()) > 0  # the write is between two lines, and both sides of it were interrupted


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("backend", INTERRUPTED)
def test_what_was_interrupted_is_finished_with_the_result_it_would_have_had(backend: str, scope: Any) -> None:
    def begin() -> tuple[Callable[[], PruneResult], list[torch.Tensor]]:
        weights, masks = weights_and_masks()
        weights, masks = (weights[::2], masks[::2]) if scope == "global" else (weights, masks)
        options = {"scope": scope, "nonfinite": "error", "previous": None, "names": None, "backend": backend}
        return begin_prune(weights, sparsity=0.5, masks=masks, **options), [*weights, *(mask.packed for mask in masks)]

    write, written = begin()
    expected, after = write(), bytes_of(written)
    for line in itertools.count():
        write, written = begin()
        if not interrupted(write, line):
            break
        result = write()
        assert bytes_of(written) == after
        assert (result.thresholds, result.num_pruned) == (expected.thresholds, expected.num_pruned), line
    assert line > 10
