"""Every operation of the compiled extension, with each of its allocations failing in turn; run with a preloaded shim.

Prints a line per operation: its name, and how many allocations have failed. Arguments: path of the shim.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch

from gmp_kernels import BitMask, GMPError, NonFiniteError, apply_masks_, magnitude_threshold, prune_
from gmp_kernels.backends import choose
from gmp_kernels.backends.cpu import _C
from gmp_kernels.backends.dtypes import DTYPES
from gmp_kernels.backends.types import Brackets, Layer, StateMove, Threshold
from gmp_kernels.checks import forget
from gmp_kernels.optim import SGD, Adam, AdamW, clip_grad_norm_, ema_update_

SIZES = (3, 1000, 17_000)  # of a chunk and more
VALUES = torch.randn(max(SIZES), generator=torch.Generator().manual_seed(0))
LIBRARY = _C.__file__.encode()


class Call(NamedTuple):
    """One call, ready to be made, and the tensors that it changes completely or not at all."""

    run: Callable[[], object]
    written: Callable[[], Iterable[torch.Tensor]]


def weights_of(*dtypes: torch.dtype, ties: bool = False) -> list[torch.Tensor]:
    weights = [VALUES[:n] for n in SIZES for _ in dtypes]
    return [(w.round() if ties else w.clone()).to(d) for w, d in zip(weights, itertools.cycle(dtypes), strict=False)]


@cache
def every(number: int, numel: int) -> BitMask:
    """One that prunes every so manieth weight."""
    return BitMask.from_bool(torch.arange(numel) % number != 0)


def prunes(*dtypes: torch.dtype, ties: bool = False, with_masks: bool = True, **request: Any) -> Callable[[], Call]:
    def make() -> Call:
        weights = weights_of(*dtypes, ties=ties)
        masks = [every(5, w.numel()).clone() for w in weights] if with_masks else None
        bits = [mask.packed for mask in masks or []]
        return Call(lambda: prune_(weights, sparsity=0.6, masks=masks, **request)[1:], lambda: [*weights, *bits])

    return make


def prunes_by_bins() -> Call:
    """A threshold that was moved since makes the bracket miss, and what is missed is looked for by bins."""
    weights = weights_of(torch.float32)
    elsewhere = [Threshold(50.0, round(w.numel() * 0.6), 1, 1) for w in weights]
    return Call(lambda: prune_(weights, sparsity=0.6, previous=elsewhere)[1:], lambda: weights)


def refuses_nan() -> Call:
    weights = weights_of(torch.float32, torch.float64)
    weights[-1][-1] = torch.nan

    def run() -> str:
        try:
            prune_(weights, sparsity=0.5)
        except NonFiniteError as error:
            return str(error)
        return "pruned"

    return Call(run, lambda: weights)


def ranks_nan() -> Call:
    weights = weights_of(torch.float32, torch.float16)
    weights[-1][-3:] = torch.nan
    return Call(lambda: prune_(weights, sparsity=1.0, nonfinite="keep")[1:], lambda: weights)


def finds_threshold() -> Call:
    weight = weights_of(torch.bfloat16)[-1]
    return Call(lambda: magnitude_threshold(weight, 777), lambda: [weight])


def applies_masks() -> Call:
    weights = weights_of(*DTYPES)
    masks = [every(3, w.numel()).clone() for w in weights]
    return Call(lambda: apply_masks_(weights, masks), lambda: weights)


def counts() -> Call:
    weights, backend = weights_of(torch.float32), choose("cpu", torch.device("cpu"))
    layers = [Layer(w, BitMask.ones(w.shape).packed) for w in weights]
    brackets = Brackets.of([0x3F000000] * len(layers), [0x3F800000] * len(layers))

    def run() -> object:
        found = backend.count(layers, brackets, 16, [None, torch.empty(1000), torch.empty(5)])
        return [column.tolist() for column in found]

    return Call(run, lambda: weights)


Optimizer = Callable[[list[torch.nn.Parameter]], Any]


def optimizer_with(kind: Optimizer, dtype: torch.dtype) -> tuple[Any, dict[torch.Tensor, BitMask]]:
    """An optimizer that has taken two steps, the second with masks."""
    parameters = [torch.nn.Parameter(w.to(dtype)) for w in weights_of(torch.float32)]
    for p in parameters:
        p.grad = torch.sin(torch.arange(p.numel()) * 0.7).to(dtype)
    optimizer = kind(parameters)
    masks = {p: every(4, p.numel()).clone() for p in parameters[1:]}
    optimizer.step()
    optimizer.set_masks(masks)
    optimizer.step()
    return optimizer, {
        p: prune_(p.detach().clone(), sparsity=0.6, masks=mask.clone()).masks[0] for p, mask in masks.items()
    }


def tensors_in(optimizer: Any) -> Iterator[torch.Tensor]:
    for p, state in optimizer.state.items():
        yield from (p.detach(), *(value for value in state.values() if isinstance(value, torch.Tensor)))


def steps(kind: Optimizer, dtype: torch.dtype = torch.float32) -> Callable[[], Call]:
    def make() -> Call:
        optimizer, _ = optimizer_with(kind, dtype)
        optimizer._batch = None  # what it knows of the parameters is then made anew
        return Call(optimizer.step, lambda: tensors_in(optimizer))

    return make


def sets_masks(kind: Optimizer) -> Callable[[], Call]:
    def make() -> Call:
        optimizer, masks = optimizer_with(kind, torch.float32)
        return Call(lambda: optimizer.set_masks(masks), lambda: tensors_in(optimizer))

    return make


def moves_state() -> Call:
    """From one compact layout to another, and to a dense one."""
    backend, values = choose("cpu", torch.device("cpu")), VALUES.clone()
    n = values.numel()
    old, new = every(4, n), every(3, n)

    def run() -> object:
        before, after = backend.compactions([(old.packed, n), (new.packed, n)])
        compact, moved, dense = (torch.empty(size) for size in (before.num_kept, after.num_kept, n))
        backend.move_state([StateMove(values, None, compact, before, n)])
        backend.move_state([StateMove(compact, before, moved, after, n), StateMove(compact, before, dense, None, n)])
        return moved.tolist(), dense.tolist()

    return Call(run, lambda: [values, old.packed, new.packed])


def saves_state(kind: Optimizer) -> Callable[[], Call]:
    def make() -> Call:
        optimizer, _ = optimizer_with(kind, torch.float32)
        return Call(
            lambda: [[v.tolist() for v in state.values()] for state in optimizer.state_dict()["state"].values()],
            lambda: tensors_in(optimizer),
        )

    return make


def averages() -> Call:
    targets, sources = weights_of(*DTYPES), weights_of(*DTYPES, ties=True)
    masks = [every(3, w.numel()).clone() for w in targets]
    return Call(lambda: ema_update_(targets, sources, 0.75, masks=masks), lambda: targets)


def clips() -> Call:
    parameters = [torch.nn.Parameter(w) for w in weights_of(*DTYPES)]
    for p in parameters:
        p.grad = p.detach().clone()
    masks = [every(3, p.numel()).clone() for p in parameters]
    return Call(
        lambda: float(clip_grad_norm_(parameters, 0.5, masks=masks)),
        lambda: [p.grad for p in parameters if p.grad is not None],
    )


def momentum(parameters: list[torch.nn.Parameter]) -> Any:
    return SGD(parameters, lr=0.1, momentum=0.9)


def compact_momentum(parameters: list[torch.nn.Parameter]) -> Any:
    return SGD(parameters, lr=0.1, momentum=0.9, compact_state=True)


def compact_adamw(parameters: list[torch.nn.Parameter]) -> Any:
    return AdamW(parameters, lr=0.1, compact_state=True)


CALLS: dict[str, Callable[[], Call]] = {
    **{f"prune_ {dtype}": prunes(dtype) for dtype in DTYPES},
    "prune_ of several dtypes": prunes(torch.float32, torch.float16),
    "prune_ with ties": prunes(torch.float32, ties=True),
    "prune_ with new masks": prunes(torch.float32, torch.float16, with_masks=False),
    "prune_ of all layers": prunes(torch.float32, scope="global"),
    "prune_ of all layers with ties": prunes(torch.float16, ties=True, scope="global"),
    "prune_ by bins": prunes_by_bins,
    "prune_ of NaN": refuses_nan,
    "prune_ that ranks NaN": ranks_nan,
    "magnitude_threshold": finds_threshold,
    "apply_masks_": applies_masks,
    "count": counts,
    "SGD": steps(momentum),
    "Adam": steps(lambda p: Adam(p, amsgrad=True)),
    "AdamW with master weights": steps(lambda p: AdamW(p, master_weights=True), torch.bfloat16),
    "compact SGD": steps(compact_momentum, torch.float64),
    "compact AdamW": steps(compact_adamw),
    "masks of SGD": sets_masks(momentum),
    "state on its way": moves_state,
    "state of compact AdamW": saves_state(compact_adamw),
    "ema_update_": averages,
    "clip_grad_norm_": clips,
}


def bytes_of(tensors: Iterable[torch.Tensor]) -> list[bytes]:
    return [tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors]


def failures(make: Callable[[], Call], shim: ctypes.CDLL) -> int:
    """Fail every allocation in turn; return how many there are."""
    call = make()
    before, result = bytes_of(call.written()), repr(call.run())  # in which NaN is NaN
    after = bytes_of(call.written())
    for number in itertools.count():
        call = make()
        forget()
        assert bytes_of(call.written()) == before
        assert shim.fail_allocation(LIBRARY, number)
        try:
            found = repr(call.run())
        except (MemoryError, GMPError):
            assert shim.stop_failing(), "it raised, and no allocation had failed"
            assert bytes_of(call.written()) == before, f"changed, although allocation {number} failed"
            assert repr(call.run()) == result
        else:
            assert found == result, f"another result, after allocation {number} failed"
            if not shim.stop_failing():
                assert bytes_of(call.written()) == after
                return number
        assert bytes_of(call.written()) == after
    raise AssertionError


def main(path: str) -> None:
    shim = ctypes.CDLL(path)
    shim.fail_allocation.argtypes = [ctypes.c_char_p, ctypes.c_long]
    shim.fail_allocation.restype = shim.stop_failing.restype = ctypes.c_bool
    for name, make in CALLS.items():
        print(f"{name}: ", end="", flush=True)
        print(failures(make, shim), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
