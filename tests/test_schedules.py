"""Sparsity schedules: the published formula, exact ends, no fall, update steps, and every way to get one wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmp_kernels.errors import ScheduleError, SparsityError
from gmp_kernels.schedules import (
    Constant,
    Cosine,
    Cubic,
    Exponential,
    InverseCubic,
    Linear,
    MultiStep,
    OneShot,
    Polynomial,
    Ramp,
    Schedule,
)

RAMPS: list[type[Ramp]] = [Polynomial, Linear, Cubic, InverseCubic, Exponential, Cosine]

# Exponential decay reaches every density but 0.
sparsities = st.floats(0.0, 1.0, exclude_max=True)


@st.composite
def ramps(draw: st.DrawFn) -> Ramp:
    low, high = sorted((draw(sparsities), draw(sparsities)))
    begin = draw(st.integers(0, 50))
    end, frequency = begin + draw(st.integers(0, 60)), draw(st.integers(1, 9))
    return draw(st.sampled_from(RAMPS))(low, high, begin, end, frequency=frequency)


@st.composite
def multi_steps(draw: st.DrawFn) -> MultiStep:
    steps = draw(st.lists(st.integers(0, 100), min_size=1, max_size=5, unique=True))
    values = draw(st.lists(sparsities, min_size=len(steps), max_size=len(steps)))
    return MultiStep(dict(zip(sorted(steps), sorted(values), strict=True)))


single = st.builds(Constant, sparsities, st.integers(0, 100)) | st.builds(OneShot, sparsities, st.integers(0, 100))
schedules = ramps() | multi_steps() | single


def zhu_gupta(si: str, sf: str, begin: int, end: int, step: int) -> Fraction:
    """s = sf + (si - sf) (1 - (t - t0) / (n dt))^3, arXiv:1710.01878, in exact fractions."""
    return Fraction(sf) + (Fraction(si) - Fraction(sf)) * (1 - Fraction(step - begin, end - begin)) ** 3


@pytest.mark.parametrize("kind", [Cubic, Polynomial])
@pytest.mark.parametrize(("si", "sf", "begin", "end"), [("0.05", "0.9", 1, 35), ("0", "0.875", 2000, 50000)])
def test_cubic_is_the_formula_of_zhu_and_gupta(kind: type[Ramp], si: str, sf: str, begin: int, end: int) -> None:
    schedule = kind(float(si), float(sf), begin, end)
    for step in range(begin, end + 1, max(1, (end - begin) // 97)):
        assert schedule.sparsity_at(step) == pytest.approx(float(zhu_gupta(si, sf, begin, end, step)), abs=1e-15)


def decimal_power(p: Fraction, exponent: Decimal) -> Decimal:
    remaining = Decimal((1 - p).numerator) / Decimal((1 - p).denominator)
    return remaining**exponent if remaining else Decimal(0)


def decimal_exponential(p: Fraction, si: str, sf: str) -> Decimal:
    start, end = 1 - Decimal(si), 1 - Decimal(sf)
    density = start * (end / start) ** (Decimal(p.numerator) / Decimal(p.denominator))
    return (density - end) / (start - end)


@pytest.mark.parametrize(
    ("schedule", "remaining"),
    [
        (Linear(0.1, 0.8, 10, 30), lambda p: decimal_power(p, Decimal(1))),
        (InverseCubic(0.1, 0.8, 10, 30), lambda p: decimal_power(p, Decimal(1) / 3)),
        (Polynomial(0.1, 0.8, 10, 30, power=2.5), lambda p: decimal_power(p, Decimal("2.5"))),
        (Exponential(0.1, 0.8, 10, 30), lambda p: decimal_exponential(p, "0.1", "0.8")),
    ],
)
def test_values_against_decimal_arithmetic(schedule: Ramp, remaining: Callable[[Fraction], Decimal]) -> None:
    with localcontext(prec=40):
        for step in range(10, 31):
            expected = Decimal("0.8") + (Decimal("0.1") - Decimal("0.8")) * remaining(Fraction(step - 10, 20))
            assert schedule.sparsity_at(step) == pytest.approx(float(expected), abs=1e-15)


def test_inverse_cubic_as_sparseml_writes_it() -> None:
    schedule = InverseCubic(0.05, 0.9, 0, 100)
    for step in range(101):
        expected = 0.05 + (0.9 - 0.05) * (1 - (1 - step / 100) ** (1 / 3))
        assert schedule.sparsity_at(step) == pytest.approx(expected, abs=1e-15)


def test_exponential_prunes_the_same_fraction_of_what_is_left() -> None:
    schedule = Exponential(0.0, 0.9, 0, 10)
    density = [1 - schedule.sparsity_at(step) for step in range(11)]
    assert [b / a for a, b in pairwise(density)] == pytest.approx([0.1 ** (1 / 10)] * 10)


def test_cosine_at_thirds() -> None:
    schedule = Cosine(0.1, 0.9, 0, 6)
    assert [schedule.sparsity_at(step) for step in (0, 2, 3, 4, 6)] == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])


@settings(deadline=None)
@given(schedules)
def test_ends_are_exact_and_sparsity_never_falls(schedule: Schedule) -> None:
    values = [schedule.sparsity_at(step) for step in range(schedule.end_step + 3)]
    assert values[: schedule.begin_step] == [0.0] * schedule.begin_step
    assert values[schedule.end_step :] == [schedule.final_sparsity] * 3
    assert all(low <= high for low, high in pairwise(values))
    if isinstance(schedule, Ramp):
        expected = schedule.initial_sparsity if schedule.begin_step < schedule.end_step else schedule.final_sparsity
        assert values[schedule.begin_step] == expected


@settings(deadline=None)
@given(schedules)
def test_first_and_last_step_update_and_none_outside(schedule: Schedule) -> None:
    updates = [step for step in range(-2, schedule.end_step + 20) if schedule.is_update_step(step)]
    assert (updates[0], updates[-1]) == (schedule.begin_step, schedule.end_step)


@settings(deadline=None)
@given(schedules, sparsities)
def test_another_final_sparsity_keeps_the_update_steps(schedule: Schedule, sparsity: float) -> None:
    other = schedule.with_final_sparsity(sparsity)
    assert type(other) is type(schedule)
    assert other.sparsity_at(other.end_step) == other.final_sparsity == sparsity
    for step in range(schedule.end_step + 2):
        assert other.is_update_step(step) == schedule.is_update_step(step)


@pytest.mark.parametrize("kind", RAMPS)
def test_updates_every_frequency_steps_and_at_the_end(kind: type[Ramp]) -> None:
    schedule = kind(0.1, 0.5, 3, 14, frequency=4)
    assert [step for step in range(30) if schedule.is_update_step(step)] == [3, 7, 11, 14]


@pytest.mark.parametrize("kind", RAMPS)
def test_a_ramp_of_no_length_is_one_update_to_the_final_sparsity(kind: type[Ramp]) -> None:
    schedule = kind(0.1, 0.5, 3, 3)
    assert [schedule.sparsity_at(step) for step in (2, 3, 4)] == [0.0, 0.5, 0.5]
    assert [step for step in range(10) if schedule.is_update_step(step)] == [3]


def test_a_long_ramp_does_not_fall_by_a_rounding() -> None:
    # 0.47 + (0.1 - 0.47) is just below 0.1 in floating point, and so is the curve close to its start.
    schedule = Cosine(0.1, 0.47, 0, 10**9)
    assert schedule.sparsity_at(1) >= schedule.sparsity_at(0) == 0.1


@pytest.mark.parametrize("kind", RAMPS)
@pytest.mark.parametrize("level", [0.0, 0.3])
def test_a_flat_ramp_stays_at_its_sparsity(kind: type[Ramp], level: float) -> None:
    assert {kind(level, level, 0, 7).sparsity_at(step) for step in range(9)} == {level}


def test_a_ramp_aimed_below_its_start_starts_lower() -> None:
    assert Cubic(0.3, 0.9, 0, 10).with_final_sparsity(0.2) == Cubic(0.2, 0.2, 0, 10)
    assert Polynomial(0.3, 0.9, 0, 10, power=2.0).with_final_sparsity(0.8) == Polynomial(0.3, 0.8, 0, 10, power=2.0)


def test_multi_step_holds_each_value_and_copies_its_argument() -> None:
    milestones = {20: 0.9, 10: 0.5}
    schedule = MultiStep(milestones)
    milestones[0] = 1.0
    assert (schedule.begin_step, schedule.end_step, schedule.final_sparsity) == (10, 20, 0.9)
    assert [schedule.sparsity_at(step) for step in (9, 10, 19, 20, 21)] == [0.0, 0.5, 0.5, 0.9, 0.9]
    assert [step for step in range(40) if schedule.is_update_step(step)] == [10, 20]


def test_multi_step_rescales_every_value() -> None:
    assert MultiStep({0: 0.25, 5: 0.5}).with_final_sparsity(1.0) == MultiStep({0: 0.5, 5: 1.0})
    assert MultiStep({0: 0.0, 5: 0.0}).with_final_sparsity(0.5).final_sparsity == 0.5


@pytest.mark.parametrize("kind", RAMPS)
def test_ramps_from_epochs(kind: type[Ramp]) -> None:
    schedule = kind.from_epochs(0.05, 0.9, begin=1, end=2.5, frequency=0.25, steps_per_epoch=10)
    assert schedule == kind(0.05, 0.9, 10, 25, frequency=2)
    assert kind.from_epochs(0.05, 0.9, begin=0, end=1, frequency=0.001, steps_per_epoch=10).frequency == 1


def test_the_others_from_epochs() -> None:
    made = Polynomial.from_epochs(0.0, 0.9, begin=0, end=1, steps_per_epoch=7, power=2.0)
    assert made == Polynomial(0.0, 0.9, 0, 7, frequency=7, power=2.0)
    assert MultiStep.from_epochs({2: 0.9, 0.5: 0.5}, steps_per_epoch=10) == MultiStep({5: 0.5, 20: 0.9})
    assert Constant.from_epochs(0.5, begin=1.5, steps_per_epoch=10) == Constant(0.5, 15)
    assert OneShot.from_epochs(0.5, epoch=2, steps_per_epoch=10) == OneShot(0.5, 20)


@settings(deadline=None)
@given(schedules, schedules)
def test_plain_data_tells_schedules_apart(one: Schedule, other: Schedule) -> None:
    assert (one.to_dict() == other.to_dict()) == (one == other)
    assert one.to_dict()["kind"] == type(one).__name__


@pytest.mark.parametrize("kind", RAMPS)
def test_what_other_libraries_order_otherwise_goes_by_name(kind: type[Ramp]) -> None:
    with pytest.raises(TypeError, match="positional"):
        kind(0.0, 0.9, 0, 10, 3)  # type: ignore[call-arg,misc]


def test_none_prunes_nothing() -> None:
    schedule = Constant(None)
    assert not any(schedule.is_update_step(step) for step in range(5))
    assert schedule.sparsity_at(3) == 0.0
    assert schedule.with_final_sparsity(0.5) == Constant(0.5)


def test_plain_data_is_a_copy() -> None:
    schedule = MultiStep({10: 0.5})
    schedule.to_dict()["milestones"].clear()
    assert schedule.to_dict() == {"kind": "MultiStep", "milestones": {10: 0.5}}


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, 90, math.nan, math.inf, True, "0.5", 1j])
def test_what_is_no_sparsity(sparsity: object) -> None:
    for make in (
        lambda: Cubic(sparsity, 0.9, 0, 1),
        lambda: Cubic(0.0, sparsity, 0, 1),
        lambda: MultiStep({0: sparsity}),
        lambda: Constant(sparsity),
        lambda: OneShot(sparsity),
        lambda: Cubic(0.0, 0.9, 0, 1).with_final_sparsity(sparsity),
        lambda: MultiStep({0: 0.5}).with_final_sparsity(sparsity),
        lambda: OneShot(0.5).with_final_sparsity(sparsity),
    ):
        with pytest.raises(SparsityError, match=r"expected a sparsity in \[0, 1\] \(a fraction, .*got"):
            make()


@pytest.mark.parametrize("step", [-1, 1.0, 0.5, True, "3", None, math.nan])
def test_what_is_no_step(step: object) -> None:
    for make in (
        lambda: Linear(0.1, 0.9, step, 10),
        lambda: Linear(0.1, 0.9, 0, step),
        lambda: Linear(0.1, 0.9, 0, 10, frequency=step),
        lambda: MultiStep({step: 0.5}),
        lambda: Constant(0.5, step),
        lambda: OneShot(0.5, step),
    ):
        with pytest.raises(ScheduleError, match=r"expected a whole number >= [01], got .*optimizer steps"):
            make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cubic(0.0, 0.9, 10, 9), "begin_step <= end_step, got 10 and 9"),
        (lambda: Cubic(0.9, 0.5, 0, 9), "initial_sparsity <= final_sparsity, got 0.9 and 0.5; .*never come back"),
        (lambda: Cubic(0.0, 0.9, 0, 9, frequency=0), "frequency: expected a whole number >= 1, got 0"),
        (lambda: Polynomial(0.0, 0.9, 0, 9, power=0.0), "power > 0, got 0.0"),
        (lambda: Polynomial(0.0, 0.9, 0, 9, power=-1.0), "power > 0, got -1.0"),
        (lambda: Polynomial(0.0, 0.9, 0, 9, power=math.nan), "power > 0, got nan"),
        (lambda: Polynomial(0.0, 0.9, 0, 9, power=math.inf), "power > 0, got inf"),
        (lambda: MultiStep({}), "no milestones"),
        (lambda: MultiStep({0: 0.5, 9: 0.4}), "got 0.5 at step 0 and 0.4 at step 9"),
        (lambda: MultiStep.from_epochs({0.1: 0.5, 0.2: 0.6}, steps_per_epoch=1), "epochs on distinct steps"),
        (lambda: Cubic.from_epochs(0.0, 0.9, begin=-1, end=1, steps_per_epoch=10), "begin: expected a finite"),
        (lambda: Cubic.from_epochs(0.0, 0.9, begin=0, end=math.nan, steps_per_epoch=10), "end: expected a finite"),
        (lambda: Cubic.from_epochs(0.0, 0.9, begin=0, end=1, steps_per_epoch=0), "steps_per_epoch: expected a whole"),
        (lambda: OneShot.from_epochs(0.5, epoch=math.inf, steps_per_epoch=10), "epoch: expected a finite"),
    ],
)
def test_what_is_no_schedule(make: Callable[[], Schedule], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        make()


def test_exponential_decay_does_not_reach_full_sparsity() -> None:
    with pytest.raises(SparsityError, match="final_sparsity < 1"):
        Exponential(0.0, 1.0, 0, 10)


def test_numbers_of_other_types_are_stored_plain() -> None:
    schedule = Cubic(Fraction(1, 4), 1, 0, 4)
    assert schedule.to_dict() == Cubic(0.25, 1.0, 0, 4).to_dict()
    assert type(schedule.final_sparsity) is float
