"""Every argument of a recipe's modifiers means in a run what it means in SparseML."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_jobs import STEPS_PER_EPOCH, Job, gmp_modifier, item, network, recipe_of
from recipe_semantics import INTERPOLATIONS, sparsity_at, train_step, updates, zeros_of
from torch import nn

import gmp_kernels as gmp
from gmp_kernels.errors import GMPWarning, RecipeError, ScheduleError, TargetError
from gmp_kernels.recipes.modifiers import GradualPruning
from gmp_kernels.recipes.pruners import schedule_of
from gmp_kernels.recipes.timing import EpochRamp

ALL = [name for name, _ in network().named_parameters()]
PRUNABLE = [f"{name}.weight" for name in ("embed", "conv", "line", "volume", "up", "up2", "up3", "proj", "fc", "fc2")]


# -- timing ------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=300)
@given(
    start=st.sampled_from([-1.0, 0.0]) | st.floats(0, 4).map(lambda x: round(x, 2)),
    length=st.sampled_from([None, 0.0]) | st.floats(0, 6).map(lambda x: round(x, 2)),
    frequency=st.sampled_from([-1.0, 0.0, 0.01, 0.1, 0.5, 1.0]) | st.floats(0.001, 3),
    steps_per_epoch=st.integers(1, 120),
    initial=st.floats(0, 0.5),
    final=st.floats(0.5, 1),
    inter_func=st.sampled_from(sorted(INTERPOLATIONS)),
)
def test_updates_are_those_of_a_loop_over_the_steps(
    start: float,
    length: float | None,
    frequency: float,
    steps_per_epoch: int,
    initial: float,
    final: float,
    inter_func: str,
) -> None:
    """A length of None stands for an end of -1, where each update sets the sparsity that is there."""
    end = -1.0 if length is None else max(start, 0.0) + length
    modifier = GradualPruning(
        "ramp", start, end, entries=(), initial=initial, frequency=frequency, curve=inter_func, leave_enabled=True,
        is_global=False,
    )  # fmt: skip
    schedule = schedule_of(modifier, initial, final, steps_per_epoch)
    num_steps = math.ceil((max(start, end, 0.0) + 1) * steps_per_epoch)
    expected = updates(
        num_steps=num_steps,
        steps_per_epoch=steps_per_epoch,
        start=start,
        end=end,
        frequency=frequency,
        initial=initial,
        final=final,
        inter_func=inter_func,
    )
    found = {step: schedule.sparsity_at(step) for step in range(num_steps) if schedule.is_update_step(step)}
    if length is None:
        assert set(expected.values()) == {initial}
        expected = dict([min(expected.items())])  # the others change nothing
    assert found == expected
    assert (schedule.begin_step, schedule.end_step) == (min(expected), max(expected))
    assert sorted(found.values()) == list(found.values())


@pytest.mark.parametrize("inter_func", sorted(INTERPOLATIONS))
@pytest.mark.parametrize(
    ("start", "end", "frequency"),
    [(1.0, 3.0, 0.5), (0.9, 2.1, 0.3), (0.0, 2.0, -1), (1.5, 1.5, 1.0), (-1, 2.0, 0.25)],
)
def test_a_ramp(inter_func: str, start: float, end: float, frequency: float) -> None:
    job = Job(gmp_modifier(start_epoch=start, end_epoch=end, update_frequency=frequency, inter_func=inter_func)).train(
        4
    )
    expected = updates(
        num_steps=16,
        steps_per_epoch=STEPS_PER_EPOCH,
        start=start,
        end=end,
        frequency=frequency,
        initial=0.1,
        final=0.8,
        inter_func=inter_func,
    )
    num_pruned = 0
    for step in range(16):
        num_pruned = round(expected[step] * 40) if step in expected else num_pruned
        assert job.zeros[step]["fc.weight"] == num_pruned, step
        assert len(job.reports[step]) == (step in expected)
    assert num_pruned == 32


def test_rounding_does_not_keep_a_ramp_from_its_end() -> None:
    """Epoch 1 is no more than a rounding error before the end."""
    schedule = EpochRamp(0.1, 0.9, 0.0, math.nextafter(1.0, 2.0), -1.0, "linear", 4)
    assert schedule.end_step == 5
    assert schedule.sparsity_at(4) == 0.9


def test_without_an_end_it_stays_at_the_start() -> None:
    with pytest.warns(GMPWarning, match="has no end"):
        job = Job(gmp_modifier(end_epoch=-1, leave_enabled=False)).train(6)
    assert [zeros["fc.weight"] for zeros in job.zeros] == [0] * 4 + [4] * 20


@pytest.mark.parametrize(
    ("end", "epochs", "is_late"),
    [(3.0, 3, True), (2.8, 3, True), (2.75, 3, False), (3.0, 4, False), (1.0, 3, False)],
)
def test_an_end_that_the_run_does_not_reach_is_warned_about(end: float, epochs: int, is_late: bool) -> None:
    """The update of step n comes with step n, and a run of 12 steps takes those from 0 to 11."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    in_time = gmp_modifier(params=["fc2.weight"], end_epoch=2.0)
    recipe = recipe_of(gmp_modifier(end_epoch=end), in_time, item("EpochRangeModifier", end_epoch=epochs))
    assert recipe.epochs == epochs
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run = recipe.attach(model, optimizer, STEPS_PER_EPOCH)
    expected = (
        "Recipe.attach: modifier 1, GMPruningModifier: expected an end_epoch that the run of 12 steps reaches, got "
        f"{end:g}: its update is due at step 12, counted from 0; call run.step() once more after the last step, or "
        "train an epoch more"
    )
    assert [str(warning.message) for warning in said] == [expected] * is_late
    for step in range(epochs * STEPS_PER_EPOCH):
        train_step(model, optimizer, step)
        run.step()
    assert run.finished == (not is_late)
    run.step()
    assert run.finished
    assert int((model["fc"].weight == 0).sum()) == 32


def test_a_warning_that_is_an_error_has_changed_nothing() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    recipe = recipe_of(gmp_modifier(start_epoch=0.0), item("SetLearningRateModifier", learning_rate=0.25))
    with warnings.catch_warnings(), pytest.raises(GMPWarning, match="reaches, got 3"):
        warnings.simplefilter("error")
        recipe.attach(model, optimizer, STEPS_PER_EPOCH)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert not optimizer._optimizer_step_post_hooks
    assert not any(zeros_of(model).values())


def test_halves_round_to_even() -> None:
    job = Job(gmp_modifier(init_sparsity=0.0625, final_sparsity=0.1625, inter_func="linear", update_frequency=2)).train(
        4
    )
    # 2.5 and 6.5 of 40
    assert [zeros["fc.weight"] for zeros in job.zeros] == [0] * 4 + [2] * 8 + [6] * 4


def test_too_many_updates_are_refused() -> None:
    recipe = recipe_of(gmp_modifier(update_frequency=1e-7, end_epoch=1e6))
    with pytest.raises(ScheduleError, match="raise update_frequency"):
        recipe.trace(5000)


# -- parameters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "targets"),
    [
        ("__ALL_PRUNABLE__", PRUNABLE),
        ("[]", PRUNABLE),
        (None, PRUNABLE),
        ("__ALL__", ALL),
        (["__ALL__", "fc.weight"], ALL),
        ("__all__", ALL),
        (["fc.weight", "fc.bias", "norm.bias"], ["norm.bias", "fc.weight", "fc.bias"]),
        (["re:fc"], ["fc.weight", "fc.bias", "fc2.weight"]),
        (["re:fc$", "re:f.*weight"], None),
        (["re:.*weight$"], [name for name in ALL if name.endswith("weight")]),
        (["re:c.w", ["fc.bias"]], None),
        (["re:bias"], None),
        (["fc"], None),
        (["FC.weight"], None),
        (["re:("], None),
        ("re:fc2", ["fc2.weight"]),
        ("[Linear, norm.weight]", ["norm.weight", "fc.weight", "fc2.weight"]),
    ],
    ids=str,
)
def test_params(params: object, targets: list[str] | None) -> None:
    if targets is None:
        with pytest.raises(RecipeError, match=r"expected names that the model has|regular expression"):
            Job(gmp_modifier(params=params))
        return
    job = Job(gmp_modifier(params=params, leave_enabled=True)).train(4)
    assert job.targets == targets
    sizes = {name: parameter.numel() for name, parameter in job.model.named_parameters()}
    assert job.zeros[-1] == {name: round(0.8 * n) if name in targets else 0 for name, n in sizes.items()}


def test_an_entry_that_matches_nothing_is_named_with_what_is_near() -> None:
    with pytest.raises(RecipeError, match=r"modifier 1, GMPruningModifier: .* 'fc.weigth'.*did you mean 'fc.weight'"):
        Job(gmp_modifier(params=["fc.weigth"]))
    with pytest.raises(RecipeError, match="is it a recipe for another model"):
        Job(gmp_modifier(params=["re:bert.encoder.*"]))


def test_tied_and_wrapped_parameters() -> None:
    model = network()
    model["head"] = nn.Linear(3, 7, bias=False)
    model["head"].weight = model["embed"].weight
    job = Job(gmp_modifier(params=["head.weight", "embed.weight"]), model=nn.parallel.DataParallel(model)).train(4)
    assert job.targets == ["embed.weight"]
    with pytest.raises(RecipeError, match="one pruning modifier per parameter"):
        Job(gmp_modifier(params=["head.weight"]), gmp_modifier(params=["embed.weight"]), model=model)
    assert int((model["head"].weight == 0).sum()) == round(0.8 * 21)


def test_sparsities_by_name_and_the_first_entry_that_matches() -> None:
    final = "{0.5: [fc.weight], 0.75: ['re:fc', conv.weight], 0.9: ['re:conv', proj.weight]}"
    job = Job(gmp_modifier(params="[]", final_sparsity=final)).train(4)
    finals = {"fc.weight": 0.5, "fc.bias": 0.75, "fc2.weight": 0.75, "conv.weight": 0.75, "conv.bias": 0.9}
    finals["proj.weight"] = 0.9
    assert sorted(job.targets) == sorted(finals)
    sizes = {name: parameter.numel() for name, parameter in job.model.named_parameters()}
    for step in (4, 6, 8, 10, 12):
        expected = {
            name: round(sparsity_at(step / 4, 1.0, 3.0, 0.1, finals[name]) * n) if name in finals else 0
            for name, n in sizes.items()
        }
        assert job.zeros[step] == expected, step


def test_each_parameter_starts_at_its_own_zeros() -> None:
    model = network()
    with torch.no_grad():
        model["fc"].weight.view(-1)[3:13] = 0
        model["fc2"].weight.view(-1)[5:39] = 0
    params = "['re:.*fc.*weight', conv.weight]"
    with pytest.warns(GMPWarning, match=r"'fc2.weight' have more zeros than final_sparsity asks for"):
        job = Job(gmp_modifier(params=params, init_sparsity="__FROM_PARAM__"), model=model)
    job.train(4)
    for step, zeros in enumerate(job.zeros):
        update = min(12, step - step % 2)
        fc = round(sparsity_at(update / 4, 1.0, 3.0, 10 / 40, 0.8) * 40) if step >= 4 else 10
        conv = round(sparsity_at(update / 4, 1.0, 3.0, 0.0, 0.8) * 135) if step >= 4 else 0
        assert (zeros["fc.weight"], zeros["fc2.weight"], zeros["conv.weight"]) == (fc, 34, conv), step
    ramps = dict(job.run.pruner.state_dict()["settings"])["overrides"]
    assert ramps["fc2.weight"]["initial_sparsity"] == ramps["fc2.weight"]["final_sparsity"] == 34 / 40


def test_zeros_train_unless_the_recipe_asks_for_them() -> None:
    model = network()
    with torch.no_grad():
        model["fc"].weight[:5] = 0
    job = Job(gmp_modifier(), model=model).train(4)
    assert [zeros["fc.weight"] for zeros in job.zeros[:5]] == [0] * 4 + [4]


@pytest.mark.parametrize("by", ["flag", "class"])
def test_global_pruning_ranks_all_together(by: str) -> None:
    modifier = gmp_modifier(params="__ALL_PRUNABLE__", global_sparsity=True if by == "flag" else None)
    job = Job(modifier.replace("GMP", "GlobalMagnitudeP") if by == "class" else modifier).train(4)
    num_weights = sum(job.model.get_parameter(name).numel() for name in PRUNABLE)
    assert sum(job.zeros[-1].values()) == round(0.8 * num_weights)
    by_layer = {job.zeros[-1][name] - round(0.8 * job.model.get_parameter(name).numel()) for name in PRUNABLE}
    assert by_layer != {0}


def test_leave_enabled_false_lets_weights_train_again() -> None:
    job = Job(gmp_modifier(leave_enabled=False), gmp_modifier(params=["fc2.weight"], leave_enabled=True)).train(6)
    counts = [(zeros["fc.weight"], zeros["fc2.weight"]) for zeros in job.zeros]
    assert counts[12] == (32, 32)
    assert counts[13:] == [(0, 32)] * 11
    assert [pruner.sparsity for pruner in job.run.pruners] == [0.0, 0.8]
    assert job.run.step_count == 24


# -- constant pruning --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "end"), [(None, None), (0.0, -1), (-1, 2.0), (0.0, 1.3)])
def test_constant_pruning_holds_the_zeros(start: float | None, end: float | None) -> None:
    model = network()
    with torch.no_grad():
        model["fc"].weight[:3] = 0
    modifier = item(
        "ConstantPruningModifier",
        params=["fc.weight", "fc2.weight"],
        start_epoch=start,
        end_epoch=end,
        update_frequency=1,
    )
    job = Job(modifier, model=model).train(3)
    held = 12 if end in (None, -1) else math.ceil(end * 4) + 1  # type: ignore[operator]
    assert [zeros["fc.weight"] for zeros in job.zeros] == [15] * held + [0] * (12 - held)
    assert not any(zeros["fc2.weight"] or zeros["conv.weight"] for zeros in job.zeros)


def test_constant_pruning_after_a_ramp_adds_nothing() -> None:
    constant = item("ConstantPruningModifier", params="['re:fc.*weight']", start_epoch=3.0)
    with pytest.raises(RecipeError, match=r"zeros that are held from the start .* 'fc2.weight'"):
        Job(gmp_modifier(), constant)
    with pytest.raises(RecipeError, match="one pruning modifier per parameter"):
        Job(gmp_modifier(params=["re:fc.*weight"], leave_enabled=False), constant)
    job = Job(gmp_modifier(params=["re:fc.*weight"]), constant).train(5)
    assert job.targets == ["fc.weight", "fc2.weight"]
    assert job.zeros[-1]["fc.weight"] == 32


@pytest.mark.parametrize(
    "other",
    [
        gmp_modifier(start_epoch=3.0, end_epoch=5.0, init_sparsity=0.8, final_sparsity=0.9),
        item("ConstantPruningModifier", params=["fc.weight"]),
        item("ConstantPruningModifier", params=["fc.weight"], start_epoch=2.5),
    ],
)
def test_two_modifiers_of_one_parameter_are_refused(other: str) -> None:
    for items in ((gmp_modifier(), other), (other, gmp_modifier())):
        with pytest.raises(
            RecipeError, match=r"one pruning modifier per parameter, got modifier 1, .* for 'fc.weight'"
        ):
            Job(*items)


# -- refusals change nothing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("items", "arguments", "error", "said"),
    [
        ([item("EpochRangeModifier", end_epoch=3)], {}, RecipeError, "a recipe that prunes"),
        (
            [gmp_modifier(), item("SetLearningRateModifier", learning_rate=1, param_groups=[1])],
            {},
            RecipeError,
            "learning rate of 1 param groups",
        ),
        (
            [gmp_modifier(), item("SetWeightDecayModifier", weight_decay=0, param_groups=[2])],
            {},
            RecipeError,
            "weight decay of 1 param groups",
        ),
        ([gmp_modifier()], {"scope": "global"}, TypeError, "the recipe says the rest"),
        ([gmp_modifier(), gmp_modifier(params=["fc2.weight", "up.bias"])], {}, TargetError, "up.bias"),
    ],
)
def test_what_cannot_be_attached_changes_nothing(
    items: list[str], arguments: dict[str, Any], error: type[Exception], said: str
) -> None:
    model = network()
    optimizer = torch.optim.SGD([p for name, p in model.named_parameters() if name != "up.bias"], lr=0.5)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    length = item("EpochRangeModifier", end_epoch=4)
    recipe = recipe_of(*items, item("SetWeightDecayModifier", weight_decay=0.9), length)
    with pytest.raises(error, match=said):
        recipe.attach(model, optimizer, 4, **arguments)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert optimizer.param_groups[0]["weight_decay"] == 0
    assert not optimizer._optimizer_step_post_hooks
    # Nothing holds the parameters any more.
    gmp.GMPScheduler(model, optimizer, gmp.schedules.OneShot(0.5), targets=["fc.weight"])


@pytest.mark.parametrize("steps_per_epoch", [0, 2.5, True, "4"])
def test_steps_per_epoch_is_a_whole_number(steps_per_epoch: Any) -> None:
    model = network()
    with pytest.raises(ScheduleError, match="steps_per_epoch: expected a whole number >= 1"):
        recipe_of(gmp_modifier()).attach(model, torch.optim.SGD(model.parameters()), steps_per_epoch)
