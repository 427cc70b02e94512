"""Learning rate, weight decay and trainable parameters of recipes, at every step of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from recipe_jobs import STEPS_PER_EPOCH, Job, gmp_modifier, item, network, recipe_of
from recipe_semantics import cosine, train_step

from gmp_kernels import recipes
from gmp_kernels.errors import RecipeError


def lr_modifier(kind: str, start: float = 1.0, end: float = -1.0, **kwargs: object) -> str:
    given = ", ".join(f"{key}: {value}" for key, value in kwargs.items())
    return item(
        "LearningRateModifier",
        lr_class=kind,
        lr_kwargs=f"{{{given}}}",
        init_lr=0.2,
        start_epoch=start,
        end_epoch=end,
        update_frequency=-1.0,
    )


def function(name: str, end: float = 4.0, **more: object) -> str:
    return item(
        "LearningRateFunctionModifier", lr_func=name, init_lr=0.2, final_lr=0.02, start_epoch=1.0, end_epoch=end, **more
    )


def by_torch(make: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler], epoch_is_step: bool) -> Any:
    """Rates of a torch lr_scheduler from step 4 on, stepped by steps, or told the epoch."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.2)
    lr_scheduler = make(optimizer)
    optimizer.step()
    rates = []
    for step in range(20):
        if not epoch_is_step:
            lr_scheduler.step(step / STEPS_PER_EPOCH)
        rates.append(optimizer.param_groups[0]["lr"])
        if epoch_is_step:
            lr_scheduler.step()
    return [0.5] * 4 + rates


LR = torch.optim.lr_scheduler
SCHEDULERS = {
    "StepLR": (
        lr_modifier("StepLR", step_size=1.5, gamma=0.5),
        by_torch(lambda optimizer: LR.StepLR(optimizer, 6, 0.5), True),
    ),
    "MultiStepLR": (
        lr_modifier("MultiStepLR", milestones=[2.0, 3.3, 3.3], gamma=0.5),
        by_torch(lambda optimizer: LR.MultiStepLR(optimizer, [4, 9, 9], 0.5), True),
    ),
    "ExponentialLR": (
        lr_modifier("ExponentialLR", gamma=0.8),
        by_torch(lambda optimizer: LR.StepLR(optimizer, 4, 0.8), True),
    ),
    "CosineAnnealingWarmRestarts": (
        lr_modifier("CosineAnnealingWarmRestarts", lr_min=0.01, cycle_epochs=2),
        by_torch(lambda optimizer: LR.CosineAnnealingWarmRestarts(optimizer, 2, eta_min=0.01), False),
    ),
    "linear": (function("linear"), [0.5] * 4 + [0.2 - 0.18 * step / 12 for step in range(12)] + [0.02] * 8),
    "cosine": (
        function("cosine"),
        [0.5] * 4 + [cosine(1 + step / 4, 1.0, 4.0, 0.2, 0.02) for step in range(12)] + [0.02] * 8,
    ),
    # Cycles of 5 steps, and one of 2.
    "cyclic_linear": (
        function("cyclic_linear", cycle_epochs=1.25),
        [0.5] * 4 + [0.2 - 0.18 * part / 4 for part in range(5)] * 2 + [0.2, 0.02] + [0.02] * 8,
    ),
    "one cycle": (function("cyclic_linear"), [0.5] * 4 + [0.2 - 0.18 * step / 11 for step in range(12)] + [0.02] * 8),
    "ends": (
        lr_modifier("StepLR", end=3.0, step_size=1.0, gamma=0.5),
        [0.5] * 4 + [0.2] * 4 + [0.1] * 4 + [0.1] * 12,
    ),
    # The one that ends later overwrites the other; what is set is overwritten by what goes on.
    "several": (
        function("linear", end=2.0)
        + item("SetLearningRateModifier", learning_rate=0.07, start_epoch=3.0)
        + item("SetLearningRateModifier", learning_rate=0.09)
        + lr_modifier("ExponentialLR", start=4.0, gamma=1.0),
        [0.09] * 4 + [0.2 - 0.18 * step / 4 for step in range(4)] + [0.02] * 4 + [0.07] * 4 + [0.2] * 8,
    ),
    # Whatever the order in the recipe, the one without an end comes last, at the step that both set: SparseML's
    # BaseManager sorts its modifiers by BaseModifier.comparator, by end, where -1 is last, then by start.
    "order": (
        item("SetLearningRateModifier", learning_rate=0.07, start_epoch=1.0) + function("linear"),
        [0.5] * 4 + [0.07] + [0.2 - 0.18 * step / 12 for step in range(1, 12)] + [0.02] * 8,
    ),
    "at once": (item("SetLearningRateModifier", learning_rate=0.07), [0.07] * 24),
}


def as_traced(values: list[list[float]], own: float) -> list[float | None]:
    """Return what a trace has of the first param group; None while the optimizer's own value holds."""
    return [None if group == own else group for group, *_ in values]


@pytest.mark.parametrize(("modifiers", "expected"), SCHEDULERS.values(), ids=SCHEDULERS)
def test_learning_rates(modifiers: str, expected: list[float]) -> None:
    job = Job(gmp_modifier(), modifiers).train(6)
    assert [rates[0] for rates in job.rates] == pytest.approx(expected, rel=1e-12)
    trace = recipe_of(gmp_modifier(), modifiers, item("EpochRangeModifier", end_epoch=6)).trace(STEPS_PER_EPOCH)
    assert trace.learning_rate == as_traced([*job.rates, [job.optimizer.param_groups[0]["lr"]]], 0.5)


def test_a_cycle_that_is_whole_steps_but_for_rounding() -> None:
    """0.07 epochs of 100 steps are a little more than 7 steps in floating point."""
    text = "modifiers:\n" + function("cyclic_linear", end=1.28, cycle_epochs=0.07)
    rates = recipes.load(text).trace(100).learning_rate
    assert rates[100:128] == pytest.approx([0.2 - 0.18 * part / 6 for part in range(7)] * 4)


def test_a_cycle_of_less_than_a_step() -> None:
    text = "modifiers:\n" + function("cyclic_linear", end=3.0, cycle_epochs=1e-320)
    assert recipes.load(text).trace(4).learning_rate == [None] * 4 + [0.2] * 8 + [pytest.approx(0.02)]


def test_learning_rates_by_group() -> None:
    second = item("SetLearningRateModifier", learning_rate=0.07, start_epoch=2.0, param_groups=[1])
    job = Job(gmp_modifier(), function("linear", param_groups="[0, 2]"), second, num_groups=3).train(6)
    linear = SCHEDULERS["linear"][1]
    for group, expected in enumerate([linear, [0.5] * 8 + [0.07] * 16, linear]):
        assert [rates[group] for rates in job.rates] == pytest.approx(expected, rel=1e-12)


def test_a_recipe_without_rates_takes_a_scheduler_of_torch() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    recipe = recipe_of(gmp_modifier(), item("EpochRangeModifier", end_epoch=4))
    run = recipe.attach(model, optimizer, 4, lr_scheduler=LR.StepLR(optimizer, 2, 0.5))
    for step in range(4):
        train_step(model, optimizer, step)
        run.step()
    assert optimizer.param_groups[0]["lr"] == 0.125
    with pytest.raises(RecipeError, match="no lr_scheduler for a recipe that sets the learning rate"):
        Job(gmp_modifier(), function("linear"), lr_scheduler=LR.StepLR(optimizer, 2))


def test_weight_decay_by_group() -> None:
    items = [
        gmp_modifier(),
        item("SetWeightDecayModifier", weight_decay=0.0, start_epoch=2.0),
        item("SetWeightDecayModifier", weight_decay=0.125, start_epoch=1.3, param_groups=[1], end_epoch=-1),
        item("SetWeightDecayModifier", weight_decay=0.5, param_groups="[0]", start_epoch=0.5),
    ]
    job = Job(*items, num_groups=2).train(4)
    assert [decay[0] for decay in job.decays] == [0.25] * 2 + [0.5] * 6 + [0.0] * 8
    assert [decay[1] for decay in job.decays] == [0.25] * 6 + [0.125] * 2 + [0.0] * 8
    trace = recipe_of(*items, item("EpochRangeModifier", end_epoch=4)).trace(STEPS_PER_EPOCH)
    assert trace.weight_decay == as_traced([*job.decays, [0.0]], 0.25)


def test_trainable_parameters() -> None:
    model = network()
    model["conv"].bias.requires_grad_(False)
    names = "[conv.weight, conv.bias, fc.weight]"
    job = Job(
        gmp_modifier(),
        item("TrainableParamsModifier", params=names, trainable=False, start_epoch=1.0, end_epoch=2.5),
        item("TrainableParamsModifier", params="['re:conv.bias', nothing]", trainable=True, params_strict=False),
        model=model,
    )
    trains = []
    for step in range(16):
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        train_step(model, job.optimizer, step)
        moved = {name for name in ("conv.weight", "conv.bias", "fc.weight", "up.weight") if not torch.equal(
            before[name], model.get_parameter(name))}  # fmt: skip
        trains.append(moved)
        job.run.step()
    everything = {"conv.weight", "conv.bias", "fc.weight", "up.weight"}
    # The modifier without an end comes last, so what it trains stays trained.
    assert trains == [everything] * 4 + [{"conv.bias", "up.weight"}] * 6 + [everything] * 6
    with pytest.raises(RecipeError, match="'nothing', which matches no parameter"):
        Job(gmp_modifier(), item("TrainableParamsModifier", params="[nothing]", trainable=True))
