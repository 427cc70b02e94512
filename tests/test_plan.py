"""The dry run: presets give the numbers they are known by, and a course says what a run with a model does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gmp_kernels import Stages, schedules
from gmp_kernels.errors import ScheduleError, ShapeError, SparsityError, TargetError
from gmp_kernels.patterns import NM, Block
from gmp_kernels.pruner.distributions import uniform
from gmp_kernels.pruner.groups import Group
from gmp_kernels.tools.plan import TOGETHER, Course, Plan, Row
from gmp_kernels.tools.presets import PRESETS, bert_base_layers, llama_1b_layers, resnet50_layers

LAYERS = {"fc": (10, 10)}


@pytest.fixture(scope="module")
def blog() -> list[Row]:
    return PRESETS["blog"].plan.course.rows()


@pytest.fixture(scope="module")
def resnet50() -> list[Row]:
    return PRESETS["resnet50"].plan.course.rows()


def cubic(initial: float, final: float, left: float) -> object:
    """The schedule of Zhu and Gupta with this part of it to go, up to the rounding of each of 54 counts."""
    return pytest.approx(final + (initial - final) * left**3, abs=54 / 2 / 25_502_912)


def test_blog_sparsity(blog: list[Row]) -> None:
    assert [row.epoch for row in blog] == list(range(61))
    assert [round(blog[epoch].sparsity, 5) for epoch in (0, 1, 35, 60)] == [0.0, 0.05, 0.9, 0.9]
    for epoch in range(1, 36):
        assert blog[epoch].sparsity == cubic(0.05, 0.9, (35 - epoch) / 34)
    assert len({row.sparsity for row in blog[35:]}) == 1


def test_blog_stages(blog: list[Row]) -> None:
    assert [row.stage for row in blog] == ["stabilization"] + ["pruning"] * 34 + ["fine-tuning"] * 26
    assert [row.weight_decay for row in blog] == [1e-4] * 35 + [0.0] * 26
    assert [row.step for row in blog] == [5005 * epoch for epoch in range(61)]


def test_blog_learning_rate_falls_in_fine_tuning_only(blog: list[Row]) -> None:
    # 30% and 65% of epochs 35 to 60 are 42.5 and 51.25.
    assert [row.learning_rate for row in blog] == pytest.approx([0.01] * 43 + [0.001] * 9 + [0.0001] * 9)


def test_resnet50_sparsity(resnet50: list[Row]) -> None:
    assert [round(resnet50[epoch].sparsity, 5) for epoch in (0, 1, 2, 37, 57)] == [0.0, 0.0, 0.05, 0.85, 0.85]
    for epoch in range(2, 38):
        assert resnet50[epoch].sparsity == cubic(0.05, 0.85, (37 - epoch) / 35)
    assert resnet50[-1].epoch == 57


def test_resnet50_learning_rate(resnet50: list[Row]) -> None:
    assert [resnet50[epoch].learning_rate for epoch in (0, 42, 43, 49, 50, 57)] == pytest.approx(
        [0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001]
    )


def test_resnet50_learning_rate_falls_at_the_first_step_of_the_epoch() -> None:
    rates = PRESETS["resnet50"].plan.course.learning_rate
    assert rates[43 * 5005 - 1 : 43 * 5005 + 1] == pytest.approx([0.01, 0.001])
    assert rates[50 * 5005 - 1 : 50 * 5005 + 1] == pytest.approx([0.001, 0.0001])


def test_bert_is_pruned_a_hundred_times_per_epoch_from_epoch_2_to_20() -> None:
    course = PRESETS["bert"].plan.course
    (updates,) = course.updates
    assert (updates[0], updates[-1]) == (2 * 5475, 20 * 5475)
    # A hundredth of 5475 steps is 55, which fits into 18 epochs 1791 times; the last update comes at their end.
    assert updates == [*range(10_950, 109_500, 55), 109_500]
    assert len(updates) == 1793
    rows = {row.epoch: row.sparsity for row in course.rows()}
    # At epoch 11, step 60225, the latest update is that of step 10950 + 895 * 55 = 60175. 72 counts are rounded.
    expected = 0.9 * (1 - ((109_500 - 60_175) / 98_550) ** 3)
    assert rows[11] == pytest.approx(expected, abs=72 / 2 / 84_934_656)
    assert [rows[epoch] for epoch in (2, 20, 30)] == pytest.approx([0.0, 0.9, 0.9], abs=72 / 2 / 84_934_656)


def test_gmp_star_begins_with_70_percent_and_sets_the_learning_rate_back_at_every_update() -> None:
    course = PRESETS["gmp-star"].plan.course
    (updates,) = course.updates
    assert updates == [5475 * epoch for epoch in range(2, 27, 4)]
    rows = {row.epoch: row for row in course.rows()}
    assert [round(rows[epoch].sparsity, 6) for epoch in (1, 2, 26)] == [0.0, 0.7, 0.9]
    for step in updates:
        assert course.learning_rate[step] == pytest.approx(8e-5)
    for step in updates[1:]:
        # One of 21900 steps is left on the way from 8e-5 to a tenth of it.
        assert course.learning_rate[step - 1] == pytest.approx(8e-6 + 7.2e-5 / 21_900, rel=1e-9)


def test_llm_pretraining_is_pruned_from_a_quarter_to_three_quarters() -> None:
    course = PRESETS["llm-pretraining"].plan.course
    (updates,) = course.updates
    assert (updates[0] / course.total_steps, updates[-1] / course.total_steps) == (0.25, 0.75)


def test_num_prune_is_rounded_layer_by_layer(resnet50: list[Row]) -> None:
    row = resnet50[37]
    assert row.num_prune["conv1.weight"] == round(0.85 * 9408)
    assert row.num_prune["fc.weight"] == 1740800
    assert row.total_num_prune == sum(row.num_prune.values())
    assert abs(row.total_num_prune - 0.85 * 25_502_912) <= 54 / 2


def test_layers_of_the_presets_add_up_to_their_models() -> None:
    sizes = {name: PRESETS[name].plan.course.num_weights for name in ("blog", "bert", "llm-pretraining")}
    # ResNet-50 has 25 557 032 parameters, of which 53 120 belong to norms and 1000 are the classifier's bias.
    assert sizes["blog"] == 25_557_032 - 53_120 - 1000
    # A layer of BERT-base has 7 087 872 parameters: 6912 in biases, 3072 in norms.
    assert sizes["bert"] == 12 * (7_087_872 - 6912 - 3072)
    # Llama 3.2 1B has 1 235 814 400 parameters: embeddings of 128 256 x 2048, and 33 norms of 2048.
    assert sizes["llm-pretraining"] == 1_235_814_400 - 128_256 * 2048 - 33 * 2048
    assert (len(resnet50_layers()), len(bert_base_layers()), len(llama_1b_layers())) == (54, 72, 112)
    assert resnet50_layers()["layer1.0.downsample.0.weight"] == (256, 64, 1, 1)
    assert resnet50_layers()["layer4.0.conv1.weight"] == (512, 1024, 1, 1)


def test_a_run_that_ends_within_an_epoch_has_a_last_row() -> None:
    rows = Plan(Stages(0.5, 1, 1.1, steps_per_epoch=10), LAYERS).course.rows()
    assert [(row.epoch, row.step) for row in rows] == [(0, 0), (1, 10), (2, 20), (2.6, 26)]
    assert [row.num_prune for row in rows] == [{"fc": 0}, {"fc": 5}, {"fc": 90}, {"fc": 90}]


def test_a_run_of_one_step() -> None:
    (row, last) = Plan(Stages(0, 0, 1, steps_per_epoch=1), LAYERS, 1.0, 1.0).course.rows()
    assert (row.num_prune, last.num_prune) == ({"fc": 100}, {"fc": 100})


def test_a_plan_of_no_run_is_refused_when_made() -> None:
    stages = Stages(steps_per_epoch=2)
    with pytest.raises(ScheduleError, match="initial_sparsity <= final_sparsity"):
        Plan(stages, LAYERS, initial_sparsity=0.95)
    with pytest.raises(TargetError, match="expected distribution='uniform' with scope='global'"):
        Plan(stages, LAYERS, scope="global", distribution="erk")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"distribution": "erk"},
        {"scope": "global"},
        {"kind": schedules.Linear},
        {"pattern": NM(1, 2), "final_sparsity": 0.5},
        {"pattern": NM(1, 2), "final_sparsity": 0.5, "scope": "global"},
        {"pattern": NM(1, 2), "final_sparsity": 0.45, "distribution": "erk"},
        {"pattern": Block(5, 2)},
        {"pattern": Block(5, 2), "scope": "global"},
    ],
    ids=str,
)
@pytest.mark.parametrize("frequency", [None, 0.5, 3])
def test_a_plan_is_what_the_run_does(options: dict[str, object], frequency: float | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.Linear(20, 30), nn.Linear(30, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=1e-4)
    stages = Stages(1, 5, 3, steps_per_epoch=4)
    layers = {name: tuple(p.shape) for name, p in model.named_parameters() if p.ndim == 2}
    plan = Plan(stages, layers, frequency=frequency, pruning_lr="rewind", finetuning_lr="linear", **options)  # type: ignore[arg-type]
    rates = stages.lr_scheduler(optimizer, "linear", pruning="rewind")
    arguments = {key: value for key, value in options.items() if key not in ("kind", "final_sparsity")}
    run = stages.attach(model, optimizer, plan.schedule(), lr_scheduler=rates, **arguments)
    for step in range(stages.total_steps):
        group = optimizer.param_groups[0]
        assert (group["lr"], group["weight_decay"]) == (plan.course.learning_rate[step], plan.course.weight_decay[step])
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        run.step()
        num_pruned = {name: mask.numel - mask.num_kept for name, mask in run.pruner.masks.items()}
        planned = plan.course.num_prune(step)
        if "scope" in options:
            num_pruned = {TOGETHER: sum(num_pruned.values())}
        assert planned == num_pruned


def test_groups_with_schedules_of_their_own_are_added_up() -> None:
    a = Group(schedules.Constant(0.5, 2), {"a": torch.Size((4, 5))}, uniform)
    b = Group(schedules.MultiStep({0: 0.2, 3: 0.4}), {"b": torch.Size((10, 8))}, uniform)
    course = Course([a, b], [0.1] * 5, [0.0] * 5, 1)
    assert [(row.num_prune, row.sparsity, row.stage) for row in course.rows()] == [
        ({"a": 0, "b": 16}, 0.16, ""),
        ({"a": 0, "b": 16}, 0.16, ""),
        ({"a": 10, "b": 16}, 0.26, ""),
        ({"a": 10, "b": 32}, 0.42, ""),
        ({"a": 10, "b": 32}, 0.42, ""),
    ]


def test_patterns_that_cannot_be_planned() -> None:
    stages = Stages(stabilization=1, pruning=3, finetuning=1, steps_per_epoch=2)
    layers = {"a": (8, 8), "b": (8, 6), "c": (8, 7)}
    with pytest.raises(ShapeError, match=r"'b' cannot be 2:4: .*'c' cannot be 2:4: .*ignore=\['b', 'c'\]"):
        Plan(stages, layers, final_sparsity=0.5, pattern=NM(2, 4))
    for scope in ("layer", "global"):
        with pytest.raises(SparsityError, match=r"at most 0.5 for 'a'.* as pattern=2:4 allows, got 0.6; end lower$"):
            Plan(stages, {"a": (8, 8)}, final_sparsity=0.6, pattern=NM(2, 4), scope=scope)
