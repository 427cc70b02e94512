"""The three stages: their steps, the learning rate at every step of them, and the end of weight decay."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import ExponentialLR

from gmp_kernels.errors import ScheduleError, SparsityError
from gmp_kernels.schedules import Cubic, Linear
from gmp_kernels.stages import Stages


def sgd(lr: float = 0.01) -> torch.optim.SGD:
    return torch.optim.SGD([torch.zeros(1)], lr=lr, weight_decay=1e-4)


def learning_rates(stages: Stages, finetuning: Any = None, resume_at: int | None = None) -> list[float]:
    """The learning rate each optimizer step is taken with."""
    optimizer = sgd()
    scheduler = stages.lr_scheduler(optimizer, finetuning)
    rates = []
    for step in range(stages.total_steps):
        if step == resume_at:
            saved = optimizer.state_dict(), scheduler.state_dict()
            optimizer = sgd(lr=0.5)
            scheduler = stages.lr_scheduler(optimizer, finetuning)
            optimizer.load_state_dict(saved[0])
            scheduler.load_state_dict(saved[1])
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    return rates


def test_steps_of_the_seed_run() -> None:
    stages = Stages(steps_per_epoch=20)
    assert (stages.epochs, stages.total_steps) == (60, 1200)
    assert (stages.pruning_begin_step, stages.pruning_end_step, stages.weight_decay_end_step) == (20, 700, 700)
    names = [stages.stage_at(step) for step in (0, 19, 20, 699, 700, 1200)]
    assert names == ["stabilization"] * 2 + ["pruning"] * 2 + ["fine-tuning"] * 2


def test_schedule_fills_the_pruning_stage() -> None:
    stages = Stages(1, 34, 25, steps_per_epoch=20)
    assert stages.schedule() == Cubic(0.05, 0.9, 20, 700, frequency=20)
    half = stages.schedule(0.0, 0.8, kind=Linear, frequency=0.5)
    assert half == Linear(0.0, 0.8, 20, 700, frequency=10)


@settings(deadline=None)
@given(st.floats(0.5, 5), st.floats(0, 50), st.floats(0.5, 50), st.integers(1, 5000))
def test_schedule_and_stages_agree_on_steps(a: float, b: float, c: float, steps_per_epoch: int) -> None:
    stages = Stages(a, b, c, steps_per_epoch=steps_per_epoch)
    schedule = stages.schedule()
    assert (schedule.begin_step, schedule.end_step) == (stages.pruning_begin_step, stages.pruning_end_step)
    assert schedule.end_step <= stages.total_steps


@settings(deadline=None)
@given(st.floats(1, 1000))
def test_from_total_keeps_the_shares(epochs: float) -> None:
    stages = Stages.from_total(epochs, steps_per_epoch=100)
    assert stages.epochs == pytest.approx(epochs)
    assert 0 < stages.stabilization <= 1
    assert stages.pruning == pytest.approx(epochs / 2)
    assert stages.finetuning >= epochs / 4 * (1 - 1e-12)


def test_default_milestones_are_those_of_the_resnet50_run() -> None:
    rates = learning_rates(Stages(2, 35, 20, steps_per_epoch=3))
    assert rates == pytest.approx([0.01] * 3 * 43 + [0.001] * 3 * 7 + [0.0001] * 3 * 7)


def test_milestones_count_from_the_start_of_the_run() -> None:
    rates = learning_rates(Stages(1, 34, 25, steps_per_epoch=2), [35, 48.5])
    assert rates == pytest.approx([0.01] * 70 + [0.001] * 27 + [0.0001] * 23)


def test_no_milestones_hold_the_learning_rate() -> None:
    assert learning_rates(Stages(1, 2, 3, steps_per_epoch=2), []) == [0.01] * 12


def test_cosine_over_fine_tuning() -> None:
    rates = learning_rates(Stages(1, 2, 3, steps_per_epoch=2), "cosine")
    assert rates == pytest.approx([0.01] * 6 + [0.005 * (1 + math.cos(math.pi * k / 6)) for k in range(6)])


def test_any_torch_scheduler_over_fine_tuning() -> None:
    rates = learning_rates(Stages(1, 2, 2, steps_per_epoch=2), lambda optimizer: ExponentialLR(optimizer, 0.5))
    assert rates == pytest.approx([0.01] * 7 + [0.005, 0.0025, 0.00125])


@pytest.mark.parametrize("finetuning", [None, "cosine"])
def test_a_run_without_fine_tuning_keeps_its_learning_rate(finetuning: Any) -> None:
    assert learning_rates(Stages(1, 2, 0, steps_per_epoch=2), finetuning) == [0.01] * 6


@pytest.mark.parametrize("finetuning", [None, "cosine", lambda optimizer: ExponentialLR(optimizer, 0.5)])
@pytest.mark.parametrize("resume_at", [1, 5, 6, 7, 9])
def test_learning_rate_survives_a_resume(finetuning: Any, resume_at: int) -> None:
    stages = Stages(1, 2, 3, steps_per_epoch=2)
    assert learning_rates(stages, finetuning, resume_at) == learning_rates(stages, finetuning)


def test_weight_decay_ends_where_fine_tuning_begins() -> None:
    stages = Stages(1, 2, 2, steps_per_epoch=2)
    optimizer = torch.optim.SGD(
        [{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)], "weight_decay": 0.1}], lr=0.1, weight_decay=0.2
    )
    decays = []
    for step in range(stages.total_steps):
        stages.end_weight_decay(optimizer, step)
        decays.append([group["weight_decay"] for group in optimizer.param_groups])
    assert decays == [[0.2, 0.1]] * 6 + [[0.0, 0.0]] * 4


def test_weight_decay_is_off_in_a_run_resumed_in_fine_tuning() -> None:
    optimizer = sgd()
    Stages(1, 2, 2, steps_per_epoch=2).end_weight_decay(optimizer, 8)
    assert optimizer.param_groups[0]["weight_decay"] == 0.0


def test_an_optimizer_without_weight_decay_is_left_alone() -> None:
    optimizer = torch.optim.Rprop([torch.zeros(1)])
    before = set(optimizer.param_groups[0])
    Stages(1, 2, 2, steps_per_epoch=2).end_weight_decay(optimizer, 8)
    assert set(optimizer.param_groups[0]) == before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Stages(-1, 2, 3, steps_per_epoch=2), "Stages: stabilization: expected a finite number"),
        (lambda: Stages(1, math.nan, 3, steps_per_epoch=2), "Stages: pruning: expected a finite number"),
        (lambda: Stages(1, 2, math.inf, steps_per_epoch=2), "Stages: finetuning: expected a finite number"),
        (lambda: Stages(1, 2, 3, steps_per_epoch=0), "steps_per_epoch: expected a whole number >= 1, got 0"),
        (lambda: Stages(1, 2, 3, steps_per_epoch=2.5), "steps_per_epoch: expected a whole number"),
        (lambda: Stages(0, 0, 0, steps_per_epoch=2), "at least one step"),
        (lambda: Stages.from_total(-4, steps_per_epoch=2), "epochs: expected a finite number"),
    ],
)
def test_lengths_that_describe_no_run(make: Callable[[], Stages], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        make()


@pytest.mark.parametrize(
    ("finetuning", "message"),
    [
        ([30], "within fine-tuning, epochs 35 to 60, got 30"),
        ([43, 61], "within fine-tuning, epochs 35 to 60, got 61"),
        ([math.nan], "milestone: expected a finite number"),
        ("linear", "expected epochs, 'cosine' or a function, got 'linear'"),
    ],
)
def test_learning_rate_that_is_none(finetuning: Any, message: str) -> None:
    optimizer = sgd()
    before = optimizer.state_dict()
    with pytest.raises(ScheduleError, match=message):
        Stages(1, 34, 25, steps_per_epoch=2).lr_scheduler(optimizer, finetuning)
    assert optimizer.state_dict() == before


def test_a_sparsity_that_is_none_is_named() -> None:
    with pytest.raises(SparsityError, match="final_sparsity: expected a sparsity in"):
        Stages(steps_per_epoch=2).schedule(final_sparsity=90)
