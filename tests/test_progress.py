"""Schedules count optimizer steps; each update that is due is made once."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from gmp_kernels import GMPScheduler, optim, schedules
from gmp_kernels.pruner.progress import Progress

EVERY_THIRD = schedules.Linear(0.1, 0.9, 0, 9, frequency=3)


class OnGpu:
    """The flag of a GradScaler as it lies on a GPU: comparing it is no wait, reading it is one."""

    waits = 0

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value
        self.device = torch.device("cuda")

    def __ne__(self, other: object) -> OnGpu:  # type: ignore[override]
        return OnGpu(self.value != other)

    def __add__(self, other: OnGpu) -> OnGpu:
        return OnGpu(self.value + other.value)

    def sum(self) -> OnGpu:
        return OnGpu(self.value.sum())

    def __int__(self) -> int:
        OnGpu.waits += 1
        return int(self.value)


def flag(is_found: bool, wrap: Any = torch.clone) -> Any:
    return wrap(torch.full((1,), float(is_found)))


def made(progress: Progress, schedule: schedules.Schedule = EVERY_THIRD) -> int | None:
    (step,), progress.position = progress.due([schedule])
    return step


def test_steps_and_updates_in_the_plain_loop() -> None:
    progress = Progress(counts_calls=False)
    found = []
    for _ in range(12):
        progress.add()
        found.append(made(progress))
    assert found == [0, None, None, 3, None, None, 6, None, None, 9, None, None]
    assert (progress.step_count, progress.position.num_calls) == (12, 12)


def test_an_update_is_made_as_soon_as_it_is_due_and_once() -> None:
    progress = Progress(counts_calls=False)
    assert [made(progress) for _ in range(3)] == [0, None, None]
    assert (progress.step_count, progress.position.num_idle) == (0, 3)
    for _ in range(3):
        progress.add()
        assert made(progress) is None
    # Three steps are counted: before the fourth.
    assert [made(progress) for _ in range(2)] == [3, None]
    progress.add()
    assert made(progress) is None
    assert (progress.step_count, progress.position.num_calls) == (4, 9)


def test_several_steps_between_calls_make_up_for_the_latest_update() -> None:
    progress = Progress(counts_calls=False)
    for _ in range(8):
        progress.add()
    assert made(progress) == 6
    assert made(progress) is None
    progress.add()
    assert made(progress) is None
    assert made(progress) == 9


def test_a_position_not_advanced_to_is_due_again() -> None:
    progress = Progress(counts_calls=False)
    progress.add()
    assert progress.due([EVERY_THIRD])[0] == [0]
    assert progress.step_count == 0
    assert made(progress) == 0


def test_calls_can_be_counted_instead() -> None:
    progress = Progress(counts_calls=True)
    assert [made(progress) for _ in range(5)] == [0, None, None, 3, None]
    assert (progress.step_count, progress.position.num_idle) == (5, 0)


@pytest.mark.parametrize("is_current", [False, True])
def test_restored_positions_go_on(is_current: bool) -> None:
    progress = Progress(counts_calls=False)
    for _ in range(7):
        progress.add()
    progress.restore(step_count=3, num_uncounted=0, num_calls=5, is_current=is_current)
    assert (progress.step_count, progress.state()["is_current"], progress.position.num_calls) == (3, is_current, 5)
    assert made(progress) == (None if is_current else 3)
    progress.add()
    assert made(progress) is None
    assert progress.step_count == 4


@pytest.mark.parametrize("wrap", [torch.clone, OnGpu], ids=["cpu", "gpu"])
@pytest.mark.parametrize("asks", [False, True], ids=["", "asked for its state"])
@pytest.mark.parametrize("first", [1, 2], ids="from step {} on".format)
def test_skipped_steps_do_not_count(wrap: Any, asks: bool, first: int) -> None:
    progress = Progress(counts_calls=False)
    found = []
    for i in range(16):
        progress.add(flag(i % 4 == first, wrap))
        found.append(made(progress))
        if asks:
            progress.state()
    # Every fourth step is skipped; an update due after such a call is made at once.
    taken = [i for i in range(16) if i % 4 != first]
    expected: list[int | None] = [None] * 16
    for update in (0, 3, 6, 9):
        before = taken[update - 1] if update else -1
        expected[before + 1] = update
    assert found == expected
    assert (progress.step_count, progress.position.num_idle) == (12, 0)


def test_a_gpu_is_waited_for_near_an_update_alone() -> None:
    rare = schedules.Linear(0.1, 0.9, 0, 200, frequency=100)
    progress = Progress(counts_calls=False)
    OnGpu.waits = 0
    found = []
    for i in range(120):
        progress.add(flag(i in (5, 50), OnGpu))
        found.append(made(progress, rare))
    assert [i for i, step in enumerate(found) if step is not None] == [0, 102]
    assert OnGpu.waits < 12
    assert progress.step_count == 118


@pytest.mark.parametrize("module", [torch.optim, optim])
def test_a_grad_scaler_that_skips_holds_the_schedule(module: Any) -> None:
    torch.manual_seed(0)
    model = nn.Linear(32, 32)
    optimizer = module.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)
    pruner = GMPScheduler(model, optimizer, schedules.Linear(0.1, 0.9, 0, 8))
    taken = 0
    for i in range(9):
        optimizer.zero_grad()
        before = model.weight.detach().clone()
        x = torch.randn(16, 32)
        scaler.scale(model(x * 1e32).sum() if i < 5 else model(x).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        taken += not torch.equal(before, model.weight.detach())
        pruner.step()
        assert pruner.step_count == taken
    assert 0 < taken < 9
    assert pruner.history[-1].num_calls == 9


@pytest.mark.parametrize("module", [torch.optim, optim])
def test_micro_batches_do_not_count(module: Any) -> None:
    model = nn.Linear(16, 16)
    optimizer = module.SGD(model.parameters(), lr=0.1)
    pruner = GMPScheduler(model, optimizer, schedules.Linear(0.1, 0.9, 0, 9))
    for i in range(40):
        model(torch.randn(4, 16)).square().mean().backward()
        if i % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
        pruner.step()
    assert pruner.step_count == 10
    assert [report.step for report in pruner.history] == list(range(10))
    assert [report.num_calls for report in pruner.history] == [1, *range(5, 38, 4)]
    assert pruner.sparsity == pytest.approx(0.9, abs=0.01)
    assert pruner.finished


def test_pruning_before_any_training() -> None:
    model = nn.Linear(16, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = GMPScheduler(model, optimizer, schedules.OneShot(0.5))
    assert not pruner.finished
    report = pruner.step()
    assert report is not None and report.step == 0
    assert (pruner.step_count, pruner.sparsity, pruner.finished) == (0, 0.5, True)


@pytest.mark.parametrize("compact", [False, True])
def test_steps_that_a_gpu_decides_about_are_counted_for_ours(compact: bool) -> None:
    """With capturable=True the flag is handed to the kernel, here as on a GPU."""
    model = nn.Linear(16, 16)
    optimizer = optim.Adam(model.parameters(), lr=0.1, capturable=True, compact_state=compact)
    pruner = GMPScheduler(model, optimizer, schedules.Linear(0.1, 0.9, 0, 9))
    for i in range(6):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.found_inf = torch.full((1,), float(i % 2))  # type: ignore[attr-defined]
        optimizer.step()
        pruner.step()
    assert pruner.step_count == 3


@pytest.mark.parametrize("schedule", [EVERY_THIRD, schedules.Linear(0.1, 0.9, 30, 90), schedules.Constant(None)])
def test_a_loop_that_never_calls_is_warned_about_once(schedule: schedules.Schedule) -> None:
    model = nn.Linear(4, 4)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = GMPScheduler(model, optimizer, schedule, targets="weight")
    found = []
    for step in range(300):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        found += [(step + 1, str(one.message)) for one in caught]
    due = schedule.begin_step + 100
    assert [step for step, _ in found] == ([due] if schedule.end_step >= 0 else [])
    assert all(f"got {due} optimizer steps without any" in message for _, message in found)
    assert pruner.step() is not None or schedule.end_step < 0


def test_a_loop_that_calls_once_per_epoch_gets_no_warning() -> None:
    model = nn.Linear(4, 4)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = GMPScheduler(model, optimizer, schedules.Linear(0.1, 0.9, 200, 800, frequency=200), targets="weight")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(1000):
            optimizer.step()
            if step % 200 == 199:
                pruner.step()
    assert pruner.finished
