"""The dry run: both presets give the numbers they are known by."""

from __future__ import annotations

import pytest

from gmp_kernels.errors import ScheduleError
from gmp_kernels.stages import Stages
from gmp_kernels.tools.plan import PRESETS, Plan, Preset, Row, plan_rows, resnet50_layers


@pytest.fixture(scope="module")
def blog() -> list[Row]:
    return plan_rows(PRESETS[Preset.BLOG])


@pytest.fixture(scope="module")
def resnet50() -> list[Row]:
    return plan_rows(PRESETS[Preset.RESNET50])


def test_blog_sparsity(blog: list[Row]) -> None:
    assert [row.epoch for row in blog] == list(range(61))
    assert [blog[epoch].sparsity for epoch in (0, 1, 35, 60)] == [0.0, 0.05, 0.9, 0.9]
    for epoch in range(1, 36):
        assert blog[epoch].sparsity == pytest.approx(0.9 - 0.85 * ((35 - epoch) / 34) ** 3, abs=1e-15)
    assert {row.sparsity for row in blog[35:]} == {0.9}


def test_blog_stages(blog: list[Row]) -> None:
    assert [row.stage for row in blog] == ["stabilization"] + ["pruning"] * 34 + ["fine-tuning"] * 26
    assert [row.weight_decay for row in blog] == [1e-4] * 35 + [0.0] * 26
    assert [row.step for row in blog] == [5005 * epoch for epoch in range(61)]


def test_blog_learning_rate_falls_in_fine_tuning_only(blog: list[Row]) -> None:
    # 30% and 65% of epochs 35 to 60 are 42.5 and 51.25.
    assert [row.learning_rate for row in blog] == pytest.approx([0.01] * 43 + [0.001] * 9 + [0.0001] * 9)


def test_resnet50_sparsity(resnet50: list[Row]) -> None:
    assert [resnet50[epoch].sparsity for epoch in (0, 1, 2, 37, 57)] == [0.0, 0.0, 0.05, 0.85, 0.85]
    for epoch in range(2, 38):
        assert resnet50[epoch].sparsity == pytest.approx(0.85 - 0.8 * ((37 - epoch) / 35) ** 3, abs=1e-15)
    assert resnet50[-1].epoch == 57


def test_resnet50_learning_rate(resnet50: list[Row]) -> None:
    assert [resnet50[epoch].learning_rate for epoch in (0, 42, 43, 49, 50, 57)] == pytest.approx(
        [0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001]
    )


def test_resnet50_learning_rate_falls_at_the_first_step_of_the_epoch() -> None:
    rates = PRESETS[Preset.RESNET50].trace.learning_rate
    assert rates[43 * 5005 - 1 : 43 * 5005 + 1] == pytest.approx([0.01, 0.001])
    assert rates[50 * 5005 - 1 : 50 * 5005 + 1] == pytest.approx([0.001, 0.0001])


def test_num_prune_is_rounded_layer_by_layer(resnet50: list[Row]) -> None:
    row = resnet50[37]
    assert row.num_prune["conv1.weight"] == round(0.85 * 9408)
    assert row.num_prune["fc.weight"] == 1740800
    assert row.total_num_prune == sum(row.num_prune.values())
    assert abs(row.total_num_prune - 0.85 * 25_502_912) <= 54 / 2


def test_resnet50_layers_are_those_of_torchvision() -> None:
    layers = resnet50_layers()
    assert len(layers) == 54
    assert layers["layer1.0.downsample.0.weight"] == (256, 64, 1, 1)
    assert layers["layer3.5.conv2.weight"] == (256, 256, 3, 3)
    assert layers["layer4.0.conv1.weight"] == (512, 1024, 1, 1)
    # The whole model has 25 557 032 parameters, of which 53 120 belong to norms and 1000 are the classifier's bias.
    assert Plan(Stages(0, 0, 1, steps_per_epoch=1), 1.0, 1.0).trace.sparsity == [1.0, 1.0]
    rows = plan_rows(Plan(Stages(0, 0, 1, steps_per_epoch=1), 1.0, 1.0))
    assert rows[0].total_num_prune == 25_557_032 - 53_120 - 1000


def test_a_run_that_ends_within_an_epoch_has_a_last_row() -> None:
    rows = plan_rows(Plan(Stages(0.5, 1, 1.1, steps_per_epoch=10), layers={"fc": (10, 10)}))
    assert [(row.epoch, row.step) for row in rows] == [(0, 0), (1, 10), (2, 20), (2.6, 26)]
    assert [row.num_prune for row in rows] == [{"fc": 0}, {"fc": 5}, {"fc": 90}, {"fc": 90}]


def test_a_plan_of_no_run_is_refused_when_made() -> None:
    with pytest.raises(ScheduleError, match="initial_sparsity <= final_sparsity"):
        Plan(Stages(steps_per_epoch=2), initial_sparsity=0.95)
