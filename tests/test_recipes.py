"""Published recipes, retyped: at every step of a run, sparsity, learning rate and weight decay are SparseML's.

Layers of the models have the names that the recipes mean, and names that these must not reach.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterable
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from compared_runs import assert_same_bits, bits
from recipe_semantics import cosine, model_of, train_step, updates, zeros_of
from torch import nn

import gmp_kernels as gmp
from gmp_kernels import recipes
from gmp_kernels.errors import GMPWarning, StateError

RECIPES = Path(__file__).parent / "recipes"
Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
SGD: Optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.9, weight_decay=1e-3)  # noqa: E731
ADAMW: Optimizer = lambda parameters: gmp.optim.AdamW(parameters, lr=0.5, compact_state=True)  # noqa: E731


def small_conv() -> nn.Module:
    return nn.Conv2d(5, 13, 1, bias=False)


def resnet_sections() -> nn.Module:
    """All 52 weights of recipe A, and others beside them."""
    names = [
        f"sections.{section}.{block}.{part}.weight"
        for section, blocks in enumerate((3, 4, 6, 3))
        for block in range(blocks)
        for part in ("conv1", "conv2", "conv3", *(["identity.conv"] if block == 0 else []))
    ]
    assert len(names) == 52
    return model_of([*names, "input.conv.weight", "classifier.fc.weight"], small_conv)


def resnet_layers() -> nn.Module:
    names = [f"layer{layer}.{block}.conv{i}.weight" for layer in (1, 2, 3, 4) for block in (0, 1) for i in (1, 2, 3)]
    names += [f"layer{layer}.0.downsample.0.weight" for layer in (1, 2, 3, 4)]
    model = model_of(["conv1.weight", *names, "fc.weight"], small_conv)
    # The names that begin with what a pattern matches are meant too, those that begin with a full name are not.
    for conv in ("conv1", "layer1.0.conv1"):
        model.get_submodule(conv).register_parameter("weight_scale", nn.Parameter(torch.rand(13)))
    return model


BERT_PARTS = (
    *("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
    *("intermediate.dense", "output.dense"),
)


def bert() -> nn.Module:
    names = [f"bert.encoder.layer.{layer}.{part}.weight" for layer in (0, 1) for part in BERT_PARTS]
    model = model_of([*names, "bert.pooler.dense.weight", "qa_outputs.weight"], lambda: nn.Linear(5, 9))
    for layer in (0, 1):
        model.get_submodule(f"bert.encoder.layer.{layer}.attention.output").add_module("LayerNorm", nn.LayerNorm(9))
    return model


def load(name: str) -> recipes.Recipe:
    if name.startswith("bert"):
        with pytest.warns(GMPWarning, match="skipped DistillationModifier"):
            return recipes.load(RECIPES / name)
    return recipes.load(RECIPES / name)


def run_and_compare(
    recipe: recipes.Recipe,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps_per_epoch: int,
    num_steps: int,
    expected: dict[int, float],
    is_pruned: Callable[[str], bool],
    rate_at: Callable[[int], float],
) -> gmp.Run:
    """Train, and compare at every step; ``expected`` is {step: sparsity} of the updates, which are by layer."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    decay = [group["weight_decay"] for group in optimizer.param_groups]
    run = recipe.attach(model, optimizer, steps_per_epoch)
    assert sorted(run.pruner.masks) == sorted(filter(is_pruned, sizes))
    num_pruned = dict.fromkeys(sizes, 0)
    for step in range(num_steps):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate_at(step), rel=1e-12), step
        assert [group["weight_decay"] for group in optimizer.param_groups] == decay
        train_step(model, optimizer, step)
        reports = run.step()
        assert [report.step for report in reports] == ([step] if step in expected else [])
        if step in expected:
            num_pruned = {name: round(expected[step] * n) if is_pruned(name) else 0 for name, n in sizes.items()}
        assert zeros_of(model) == num_pruned, step
    assert run.step_count == num_steps
    return run


@pytest.mark.parametrize("make_optimizer", [SGD, ADAMW], ids=["torch-sgd", "compact-adamw"])
@pytest.mark.parametrize(
    ("steps_per_epoch", "epochs"), [(3, 44), *(pytest.param(n, 61, marks=pytest.mark.thorough) for n in (5, 7))]
)
@pytest.mark.filterwarnings("error:.*expected an end_epoch")
def test_recipe_a(make_optimizer: Optimizer, steps_per_epoch: int, epochs: int) -> None:
    recipe, model = load("resnet50-pruned.md"), resnet_sections()
    assert recipe.epochs == 90
    num_steps = epochs * steps_per_epoch
    expected = updates(
        num_steps=num_steps,
        steps_per_epoch=steps_per_epoch,
        start=0.0,
        end=40.0,
        frequency=0.4,
        initial=0.05,
        final=0.88,
    )
    assert len(expected) == {3: 61, 5: 96, 7: 95}[steps_per_epoch]
    assert (min(expected), max(expected), expected[40 * steps_per_epoch]) == (0, 40 * steps_per_epoch, 0.88)
    run = run_and_compare(
        recipe,
        model,
        make_optimizer(model.parameters()),
        steps_per_epoch,
        num_steps,
        expected,
        lambda name: name.startswith("sections."),
        lambda step: 0.0028 * 0.1 ** ((step >= 43 * steps_per_epoch) + (step >= 60 * steps_per_epoch)),
    )
    assert run.finished


@pytest.mark.parametrize("steps_per_epoch", [4, pytest.param(13, marks=pytest.mark.thorough)])
@pytest.mark.filterwarnings("error:.*expected an end_epoch")
def test_recipe_b(steps_per_epoch: int) -> None:
    recipe, model = load("resnet50-beans-pruning.yaml"), resnet_layers()
    assert recipe.epochs == 15
    optimizer = SGD(model.parameters())
    run = recipe.attach(model, optimizer, steps_per_epoch)
    num_steps = 15 * steps_per_epoch
    expected = updates(
        num_steps=num_steps,
        steps_per_epoch=steps_per_epoch,
        start=1.0,
        end=10.0,
        frequency=0.5,
        initial=0.05,
        final=0.9,
    )
    targets = [name for name, _ in model.named_parameters() if name not in ("conv1.weight_scale", "fc.weight")]
    assert list(run.pruner.masks) == targets
    num_weights = sum(model.get_parameter(name).numel() for name in targets)
    num_pruned = 0
    for step in range(num_steps + 1):
        epoch = step / steps_per_epoch
        if epoch < 1:
            rate = 1e-4
        else:
            begin, end = (1, 10) if epoch < 10 else (10, 15)
            rate = cosine(epoch, begin, end, 1e-4, 5e-5)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate, rel=1e-12), step
        train_step(model, optimizer, step)
        before = {name: model.get_parameter(name).detach().clone() for name in targets}
        reports = run.step()
        assert [report.step for report in reports] == ([step] if step in expected else [])
        if step in expected:
            num_pruned = round(expected[step] * num_weights)
            # One threshold over all: what was pruned is no larger than what was kept.
            after = {name: model.get_parameter(name).detach() for name in targets}
            kept = torch.cat([weight[weight != 0] for weight in after.values()]).abs().min()
            pruned = torch.cat([before[name][weight == 0] for name, weight in after.items()]).abs().max()
            assert pruned <= kept
        zeros = zeros_of(model)
        assert sum(zeros[name] for name in targets) == num_pruned
        assert zeros["fc.weight"] == zeros["conv1.weight_scale"] == 0
    assert num_pruned == round(0.9 * num_weights)


@pytest.mark.parametrize(
    ("steps_per_epoch", "epochs", "num_updates"),
    [
        (110, 3, 55),
        pytest.param(100, 21, 1625, marks=pytest.mark.thorough),
        pytest.param(250, 21, 1501, marks=pytest.mark.thorough),
    ],
)
@pytest.mark.filterwarnings("error:.*expected an end_epoch")
def test_recipe_c(steps_per_epoch: int, epochs: int, num_updates: int) -> None:
    recipe, model = load("bert-base-prune90.md"), bert()
    assert recipe.epochs == 30
    assert recipe.skipped == ("DistillationModifier",)
    num_steps = epochs * steps_per_epoch
    expected = updates(
        num_steps=num_steps, steps_per_epoch=steps_per_epoch, start=2, end=20, frequency=0.01, initial=0.0, final=0.9
    )
    # Epochs are floating point, so that an update may be due a step later than 0.01 epochs after the last.
    assert len(expected) == num_updates
    run = run_and_compare(
        recipe,
        model,
        SGD(model.parameters()),
        steps_per_epoch,
        num_steps,
        expected,
        lambda name: "encoder" in name and name.endswith("weight") and "LayerNorm" not in name,
        lambda step: 0.5,
    )
    assert run.finished == (epochs > 20)


def test_a_trace_is_the_course_of_the_run() -> None:
    recipe = load("resnet50-beans-pruning.yaml")
    trace = recipe.trace(4)
    expected = updates(num_steps=61, steps_per_epoch=4, start=1.0, end=10.0, frequency=0.5, initial=0.05, final=0.9)
    sparsity, values = 0.0, []
    for step in range(61):
        sparsity = expected.get(step, sparsity)
        values.append(sparsity)
    assert list(trace.sparsity.values()) == [values]
    assert trace.learning_rate[:5] == [1e-4] * 5
    assert trace.learning_rate[40] == pytest.approx(1e-4)
    assert trace.learning_rate[60] == pytest.approx(5e-5)
    assert trace.weight_decay == [None] * 61


# Everything that a run can hold: two ramps, weights let go at the end, frozen weights, rates and weight decay by group.
EVERYTHING = """
training_modifiers:
  - !EpochRangeModifier {start_epoch: 0, end_epoch: 8}
  - !LearningRateFunctionModifier
    {lr_func: cyclic_linear, init_lr: 0.1, final_lr: 0.01, start_epoch: 0, end_epoch: 6, cycle_epochs: 2}
  - !SetLearningRateModifier {start_epoch: 7, learning_rate: 0.02, param_groups: [1]}
  - !SetWeightDecayModifier {start_epoch: 3, weight_decay: 0.0, param_groups: [0]}
  - !TrainableParamsModifier {params: ['2.weight'], trainable: False, start_epoch: 4, end_epoch: 6}
pruning_modifiers:
  - !GMPruningModifier
    {params: ['0.weight'], init_sparsity: 0.1, final_sparsity: 0.8, start_epoch: 1, end_epoch: 5, update_frequency: 0.3}
  - !GMPruningModifier
    {params: ['2.weight'], init_sparsity: __FROM_PARAM__, final_sparsity: 0.5, start_epoch: 0, end_epoch: 3,
     update_frequency: -1, leave_enabled: False}
"""
HOLDING = EVERYTHING.replace(", leave_enabled: False", "")


class Training:
    """Training by a recipe, with all of its state."""

    def __init__(self, make_optimizer: Callable[[Any], torch.optim.Optimizer], recipe: str = EVERYTHING) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
        with torch.no_grad():
            self.model[2].weight.view(-1)[:7] = 0.0
        groups = [{"params": self.model[0].parameters()}, {"params": self.model[2].parameters(), "weight_decay": 0.2}]
        self.optimizer = make_optimizer(groups)
        self.run = recipes.load(recipe).attach(self.model, self.optimizer, 4)

    def train(self, begin: int, end: int) -> list[dict[str, Any]]:
        seen = []
        for step in range(begin, end):
            seen.append({key: [group[key] for group in self.optimizer.param_groups] for key in ("lr", "weight_decay")})
            train_step(self.model, self.optimizer, step)
            self.run.step()
        return seen

    def bits(self) -> dict[str, Any]:
        trained = {f"{name} trains": p.requires_grad for name, p in self.model.named_parameters()}
        return bits(self.model, self.optimizer, self.run) | trained

    def state(self) -> dict[str, Any]:
        return {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "run")}


MAKERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "torch-sgd": lambda groups: torch.optim.SGD(groups, lr=0.3, momentum=0.9, weight_decay=0.1),
    "torch-adam": lambda groups: torch.optim.Adam(groups, lr=0.3, weight_decay=0.1),
    "gmp-adamw": lambda groups: gmp.optim.AdamW(groups, lr=0.3, weight_decay=0.1),
    "gmp-compact": lambda groups: gmp.optim.AdamW(groups, lr=0.3, weight_decay=0.1, compact_state=True),
}


RECIPES_TO_RESUME = {"lets go": EVERYTHING, "holds": HOLDING}
ORDERS = list(permutations(("model", "optimizer", "run")))
# An optimizer with masks comes after a run that has let its weights go.
CASES = [
    pytest.param(recipe, name, order, marks=() if order in (ORDERS[0], ORDERS[-1]) else pytest.mark.thorough)
    for recipe in RECIPES_TO_RESUME
    for name in MAKERS
    for order in ORDERS
    if name.startswith("torch") or order.index("run") < order.index("optimizer") or recipe == "holds"
]


@pytest.mark.parametrize(("recipe", "name", "order"), CASES, ids=str)
@pytest.mark.filterwarnings("ignore:.*have become zero although their masks keep them")
def test_a_run_resumes_with_the_same_bits(recipe: str, name: str, order: tuple[str, ...]) -> None:
    make: Callable[[], Training] = partial(Training, MAKERS[name], RECIPES_TO_RESUME[recipe])
    total = 32
    whole = make()
    seen = whole.train(0, total)
    # In the first ramp, at the end of the second, while weights are frozen, and after all of it.
    for stop in (0, 5, 12, 13, 18, 22, 29):
        stopped = make()
        stopped.train(0, stop)
        file = io.BytesIO()
        torch.save(stopped.state(), file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        resumed = make()
        for part in order:
            getattr(resumed, part).load_state_dict(copy.deepcopy(saved[part]))
        assert resumed.train(stop, total) == seen[stop:]
        assert_same_bits(resumed.bits(), whole.bits())
        assert resumed.run.step_count == total
        assert [pruner.sparsity for pruner in resumed.run.pruners] == [pruner.sparsity for pruner in whole.run.pruners]


def test_state_that_masks_would_drop_is_not_loaded_first() -> None:
    """The zeros that the second ramp starts from were let go, and an optimizer with masks would lose their state."""
    stopped, resumed = Training(MAKERS["gmp-compact"]), Training(MAKERS["gmp-compact"])
    stopped.train(0, 18)
    saved = stopped.state()
    resumed.optimizer.load_state_dict(saved["optimizer"])
    with pytest.raises(StateError, match="load the run first"):
        resumed.run.load_state_dict(saved["run"])
    assert resumed.run.step_count == 0
