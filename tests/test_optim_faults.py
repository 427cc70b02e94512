"""A fault at every point of every call that writes: what follows is what follows without the call, or after all of it.

The interrupts come between instructions of Python, after every `STRIDE`-th of them. Memory runs out at every
allocation.
"""

from __future__ import annotations

import _thread
import copy
import signal
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from faults import OutOfMemory, interrupted
from optim_cases import LAYOUTS, clones, masked, parameters, random_gradients, random_masks, set_gradients
from optim_cases import one_thread as one_thread

from gmp_kernels import GMPScheduler
from gmp_kernels.backends import cpu
from gmp_kernels.backends.at_once import at_once
from gmp_kernels.optim import masking
from gmp_kernels.pruner.watch import Watch
from gmp_kernels.schedules import Linear
from gmp_kernels.tools.testing import assert_bitwise_equal

SHAPES = [(6, 7), (5,), (0,)]
STRIDE = 31  # instructions between two interrupts that are tried

Run = tuple[list[Any], Any]
Event = Callable[[list[Any], Any], object]


def step(params: list[Any], optimizer: Any, number: int = 7) -> None:
    set_gradients(params, random_gradients(params, number), {})
    optimizer.step()


def fresh(case: str, compact: bool) -> Run:
    params = parameters(SHAPES)
    optimizer = masked(case, params, compact_state=compact)
    optimizer.set_masks(random_masks(params[:1], 0.4))
    return params, optimizer


def running(case: str, compact: bool) -> Run:
    params, optimizer = fresh(case, compact)
    for number in range(2):
        step(params, optimizer, number)
    return params, optimizer


def just_loaded(case: str, compact: bool) -> Run:
    params, optimizer = running(case, compact)
    earlier = optimizer.state_dict()
    optimizer.set_masks(random_masks(params[:2], 0.8))
    optimizer.load_state_dict(earlier)
    return params, optimizer


def other_masks(params: list[Any], optimizer: Any) -> None:
    optimizer.set_masks(random_masks(params[:2], 0.7, seed=1))


def no_masks(params: list[Any], optimizer: Any) -> None:
    optimizer.forget_masks(params)


@cache
def saved(case: str) -> dict[str, Any]:
    params, optimizer = running(case, False)
    step(params, optimizer)
    return optimizer.state_dict()


def loaded(params: list[Any], optimizer: Any) -> None:
    optimizer.load_state_dict(saved("adamw" if isinstance(optimizer, torch.optim.Adam) else "momentum_maximize"))


CALLS: dict[str, tuple[Callable[[str, bool], Run], Event]] = {
    "first step": (fresh, step),
    "step": (running, step),
    "step after loading": (just_loaded, step),
    "set_masks": (running, other_masks),
    "set_masks after loading": (just_loaded, other_masks),
    "set_masks before the first step": (fresh, other_masks),
    "forget_masks": (running, no_masks),
    "load_state_dict": (running, loaded),
}


def outcome(params: list[Any], optimizer: Any) -> list[torch.Tensor]:
    """All that can be seen after another step."""
    step(params, optimizer, 11)
    states = optimizer.state_dict()["state"]
    return [*clones(params), *(v for i in sorted(states) for _, v in sorted(states[i].items())), *masks_of(optimizer)]


def masks_of(optimizer: Any) -> list[torch.Tensor]:
    return [mask.packed for _, mask in sorted(optimizer._masks.items(), key=lambda item: item[0].numel())]


def is_same(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


def snapshot(params: list[Any], optimizer: Any) -> list[Any]:
    """Everything there is, as it is."""
    entries = [(key, value) for p in params for key, value in sorted(optimizer.state.get(p, {}).items())]
    return [*clones(params), *(value.clone() for _, value in entries), *masks_of(optimizer), len(optimizer.state)]


@LAYOUTS
@pytest.mark.parametrize("case", ["momentum_maximize", "adamw"])
@pytest.mark.parametrize("call", CALLS)
def test_an_interrupt_anywhere_leaves_all_or_nothing(call: str, case: str, compact: bool) -> None:
    start, event = CALLS[call]
    before = start(case, compact)
    without, after = copy.deepcopy(before), copy.deepcopy(before)
    event(*after)
    expected = outcome(*without), outcome(*after)
    assert not is_same(*expected)
    at, found = STRIDE // 2, [0, 0]
    while True:
        run = copy.deepcopy(before)
        try:
            with interrupted(at):
                event(*run)
            break
        except KeyboardInterrupt:
            pass
        assert all(run[1].state.values())
        result = outcome(*run)
        which = [is_same(result, one) for one in expected]
        assert any(which), f"neither after an interrupt before instruction {at}"
        found[which.index(True)] += 1
        at += STRIDE
    assert found[0] > 5, found


def pruned_run(case: str, compact: bool, start: str | None) -> tuple[list[Any], Any, GMPScheduler]:
    """A run whose next call of the pruner makes an update, or that holds the zeros of its model at its first."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 9), torch.nn.Linear(9, 5))
    params = list(model.parameters())
    optimizer = masked(case, params, compact_state=compact)
    for number in range(2):
        step(params, optimizer, number)
    with torch.no_grad():
        params[0][::2] = 0.0
    pruner = GMPScheduler(model, optimizer, Linear(0.1, 0.9, begin_step=2, end_step=8, frequency=1), start=start)
    if start is not None:
        for number in range(3):
            step(params, optimizer, number)
            pruner.step()
        step(params, optimizer, 3)
    return params, optimizer, pruner


@LAYOUTS
@pytest.mark.parametrize("case", ["momentum_maximize", "adamw"])
@pytest.mark.parametrize("start", ["zeros", None])
@pytest.mark.filterwarnings("ignore:.*zero already and are held")
def test_an_interrupt_anywhere_in_an_update_leaves_a_run_that_goes_on(
    case: str, start: str | None, compact: bool
) -> None:
    without = pruned_run(case, compact, start)
    num_updates = len(without[2].history) + (start is not None)
    without[2].step()
    expected = [outcome(*without[:2]), without[2].layer_sparsities()]
    at = STRIDE // 2
    while True:
        params, optimizer, pruner = pruned_run(case, compact, start)
        try:
            with interrupted(at):
                pruner.step()
            break
        except KeyboardInterrupt:
            pass
        if len(pruner.history) < num_updates or start is None:
            pruner.step()
        pruner.verify()
        found = outcome(params, optimizer)
        assert is_same(found, expected[0]), at
        assert pruner.layer_sparsities() == expected[1]
        at += STRIDE
    assert at > 10 * STRIDE


@LAYOUTS
@pytest.mark.parametrize("start", ["zeros", None])
@pytest.mark.filterwarnings("ignore:.*zero already and are held")
def test_an_interrupt_when_state_follows_its_new_masks_already(
    start: str | None, compact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, optimizer, pruner = pruned_run("adamw", compact, start)
    without = pruned_run("adamw", compact, start)
    without[2].step()

    def interrupted_once(_: Watch) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(Watch, "record", interrupted_once)
    with pytest.raises(KeyboardInterrupt):
        pruner.step()
    if start is None:  # else the update is made
        pruner.step()
    pruner.verify()
    assert is_same(outcome(params, optimizer), outcome(*without[:2]))


@LAYOUTS
@pytest.mark.parametrize("case", ["momentum_maximize", "adamw"])
@pytest.mark.parametrize("call", CALLS)
def test_whatever_there_is_no_memory_for_nothing_has_changed(call: str, case: str, compact: bool) -> None:
    start, event = CALLS[call]
    before = start(case, compact)
    after = copy.deepcopy(before)
    event(*after)
    expected = outcome(*after)
    at = 0
    while True:
        run = copy.deepcopy(before)
        for p, gradient in zip(run[0], random_gradients(run[0], 7), strict=True):
            p.grad = gradient
        was = snapshot(*run)
        try:
            with OutOfMemory(at):
                run[1].step() if event is step else event(*run)
            break
        except MemoryError:
            pass
        now = snapshot(*run)
        if "after loading" not in call or event is not step:
            assert was[-1] == now[-1]
            for a, b in zip(was[:-1], now[:-1], strict=True):
                assert_bitwise_equal(a.detach(), b.detach())
        event(*run)
        assert is_same(outcome(*run), expected), at
        at += 1
    assert at or call in ("step", "step after loading", "forget_masks")


@pytest.fixture
def interrupts_are_raised() -> Iterator[None]:
    """Handle interrupts as a program in the foreground does; a shell starts others with interrupts ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@LAYOUTS
@pytest.mark.parametrize("call", ["first step", "step", "forget_masks"])
@pytest.mark.usefixtures("interrupts_are_raised")
def test_an_interrupt_that_arrives_while_memory_is_written_waits_for_all_of_it(
    call: str, compact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, state and counts, or state and masks, change in one call of C, in which Python looks at no signal."""
    start, event = CALLS[call]
    run = start("adamw", compact)
    expected = copy.deepcopy(run)
    event(*expected)

    def interrupted_at_once(calls: list[Callable[[], object]]) -> None:
        at_once([_thread.interrupt_main, *calls])

    with monkeypatch.context() as patch:
        for module in (cpu, masking):
            patch.setattr(module, "at_once", interrupted_at_once)
        with pytest.raises(KeyboardInterrupt):
            event(*run)
    assert is_same(outcome(*run), outcome(*expected))
