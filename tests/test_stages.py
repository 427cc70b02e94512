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


def learning_rates(stages: Stages, finetuning: Any = None, resume_at: int | None = None, **shape: Any) -> list[float]:
    """The learning rate each optimizer step is taken with."""
    optimizer = sgd()
    scheduler = stages.lr_scheduler(optimizer, finetuning, **shape)
    rates = []
    for step in range(stages.total_steps):
        if step == resume_at:
            saved = optimizer.state_dict(), scheduler.state_dict()
            optimizer = sgd(lr=0.5)
            scheduler = stages.lr_scheduler(optimizer, finetuning, **shape)
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
    last = stages.total_steps - 1
    assert schedule.begin_step == min(stages.pruning_begin_step, last)
    assert schedule.end_step == min(stages.pruning_end_step, last)


@settings(deadline=None)
@given(st.floats(1, 1000))
def test_from_total_keeps_the_shares(epochs: float) -> None:
    stages = Stages.from_total(epochs, steps_per_epoch=100)
    assert stages.epochs == pytest.approx(epochs)
    assert 0 < stages.stabilization <= 1
    assert stages.pruning == pytest.approx(epochs / 2)
    assert stages.finetuning >= epochs / 4 * (1 - 1e-12)


@settings(deadline=None)
@given(st.integers(1, 10**7))
def test_from_steps_keeps_the_fractions(total: int) -> None:
    stages = Stages.from_steps(total)
    assert stages.total_steps == total
    assert stages.pruning_begin_step == round(total / 60)
    assert stages.pruning_end_step == round(total * (1 / 60 + 34 / 60))
    schedule = stages.schedule()
    assert schedule.begin_step == min(stages.pruning_begin_step, total - 1)
    assert schedule.end_step < total


def test_a_run_known_by_its_steps_has_about_a_hundred_updates() -> None:
    stages = Stages.from_steps(6000)
    assert stages.schedule() == Cubic(0.05, 0.9, 100, 3500, frequency=34)
    assert stages.schedule(frequency=10).frequency == 10
    assert Stages.from_steps(10, stabilization=0, pruning=1).schedule() == Cubic(0.05, 0.9, 0, 9, frequency=1)


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


def test_linear_over_fine_tuning() -> None:
    rates = learning_rates(Stages(1, 2, 2, steps_per_epoch=2), "linear")
    assert rates == pytest.approx([0.01] * 7 + [0.0075, 0.005, 0.0025])


STRETCH = Stages(1, 12, 2, steps_per_epoch=1)
# By hand, for learning rates from 1 down to 0.1: one cosine, and triangles and ramps of four steps each.
SHAPES = {
    "constant": [1.0] * 12,
    "cosine": [0.1 + 0.9 * (1 + math.cos(math.pi * k / 12)) / 2 for k in range(12)],
    "cyclic": [1.0, 0.55, 0.1, 0.55] * 3,
    "rewind": [1.0, 0.775, 0.55, 0.325] * 3,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_learning_rate_within_the_pruning_stage(shape: str) -> None:
    rates = learning_rates(STRETCH, [], pruning=shape, cycles=3)
    end = 0.1 if shape == "cosine" else 1.0  # a cosine ends at its lowest, cycles end with the full learning rate
    assert rates == pytest.approx([0.01 * factor for factor in [1.0, *SHAPES[shape], end, end]])


def test_fine_tuning_begins_where_the_pruning_stage_ends() -> None:
    rates = learning_rates(STRETCH, "linear", pruning="cosine", low=0.4)
    assert rates[13:] == pytest.approx([0.004, 0.002])
    rates = learning_rates(STRETCH, [14], pruning="cosine", low=0.4, gamma=0.5)
    assert rates[13:] == pytest.approx([0.004, 0.002])


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 400), st.integers(1, 50))
def test_every_rewind_is_to_the_full_learning_rate(steps: int, cycles: int) -> None:
    """Also where a cycle is no whole number of steps: a cycle begins with the first step in it."""
    stages = Stages(0, steps, 0, steps_per_epoch=1)
    rates = learning_rates(stages, [], pruning="rewind", cycles=cycles, low=0.0)
    begins = {-(-k * steps // cycles) for k in range(cycles)}
    for step, rate in enumerate(rates):
        assert (rate > rates[step - 1] or step == 0 or steps <= cycles) == (step in begins)
        if step * cycles % steps == 0:
            assert rate == 0.01


def test_any_torch_scheduler_over_fine_tuning() -> None:
    rates = learning_rates(Stages(1, 2, 2, steps_per_epoch=2), lambda optimizer: ExponentialLR(optimizer, 0.5))
    assert rates == pytest.approx([0.01] * 7 + [0.005, 0.0025, 0.00125])


@pytest.mark.parametrize("finetuning", [None, "cosine"])
def test_a_run_without_fine_tuning_keeps_its_learning_rate(finetuning: Any) -> None:
    assert learning_rates(Stages(1, 2, 0, steps_per_epoch=2), finetuning) == [0.01] * 6


@pytest.mark.parametrize("finetuning", [None, "cosine", lambda optimizer: ExponentialLR(optimizer, 0.5)])
@pytest.mark.parametrize("pruning", ["constant", "rewind"])
@pytest.mark.parametrize("resume_at", [1, 5, 6, 7, 9])
def test_learning_rate_survives_a_resume(finetuning: Any, resume_at: int, pruning: str) -> None:
    stages = Stages(1, 2, 3, steps_per_epoch=2)
    whole = learning_rates(stages, finetuning, pruning=pruning, cycles=2)
    assert learning_rates(stages, finetuning, resume_at, pruning=pruning, cycles=2) == whole


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


def test_weight_decay_ends_in_the_param_groups_that_are_named() -> None:
    optimizer = torch.optim.SGD(
        [{"params": [torch.zeros(1)], "weight_decay": decay} for decay in (0.1, 0.2, 0.3)], lr=0.1
    )
    stages = Stages(1, 2, 2, steps_per_epoch=2)
    stages.end_weight_decay(optimizer, 6, groups=[0, 2])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.2, 0.0]
    with pytest.raises(ScheduleError, match=r"indices of the 3 param groups of the optimizer, got \[3\]"):
        stages.end_weight_decay(optimizer, 0, groups=[3])


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
        (lambda: Stages.from_steps(0), "total_steps: expected a whole number >= 1, got 0"),
        (lambda: Stages.from_steps(90.0), "total_steps: expected a whole number"),
        (lambda: Stages.from_steps(60, pruning=34), "fractions of the run"),
        (lambda: Stages.from_steps(60, stabilization=-0.1), "fractions of the run"),
        (lambda: Stages.from_steps(60, pruning=math.nan), "fractions of the run"),
    ],
)
def test_lengths_that_describe_no_run(make: Callable[[], Stages], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        make()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"pruning": "cosin"}, "expected pruning to be one of .*'cosine'.*, got 'cosin'"),
        ({"pruning": "rewind", "cycles": 0}, "cycles: expected a whole number >= 1, got 0"),
        ({"gamma": "0.1"}, "expected gamma to be a number >= 0, got '0.1'"),
        ({"gamma": math.nan}, "expected gamma to be a number >= 0, got nan"),
        ({"pruning": "cosine", "low": 10}, r"expected low to be a fraction in \[0, 1\], got 10"),
    ],
)
def test_invalid_shape(shape: dict[str, Any], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        Stages(steps_per_epoch=2).lr_scheduler(sgd(), **shape)


@pytest.mark.parametrize(
    ("finetuning", "message"),
    [
        ([30], "within fine-tuning, epochs 35 to 60, got 30"),
        ([43, 61], "within fine-tuning, epochs 35 to 60, got 61"),
        ([math.nan], "milestone: expected a finite number"),
        (43, "expected epochs, 'linear', 'cosine' or a function, got 43"),
        ("step", "expected epochs, 'linear', 'cosine' or a function, got 'step'"),
    ],
)
def test_invalid_learning_rate(finetuning: Any, message: str) -> None:
    optimizer = sgd()
    before = optimizer.state_dict()
    with pytest.raises(ScheduleError, match=message):
        Stages(1, 34, 25, steps_per_epoch=2).lr_scheduler(optimizer, finetuning)
    assert optimizer.state_dict() == before


def test_an_invalid_sparsity_is_named() -> None:
    with pytest.raises(SparsityError, match="final_sparsity: expected a sparsity in"):
        Stages(steps_per_epoch=2).schedule(final_sparsity=90)
