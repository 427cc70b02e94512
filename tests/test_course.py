"""The picture of a run shows what the masks were, wherever its reports still tell, and nothing else."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from picture_cases import labels_of, title_of
from scheduler_cases import RAMP, make, train_step

from gmp_kernels import GMPScheduler, schedules
from gmp_kernels.errors import OutputError
from gmp_kernels.pruner.course import asked_for, so_far
from gmp_kernels.pruner.state import MOST_REPORTS
from gmp_kernels.recipes.timing import Hold

STEPS = 14
EVERY_STEP = schedules.Linear(0.1, 0.9, 0, 100, frequency=1)
CASES = {
    "plain": {},
    "erk": {"distribution": "erk"},
    "global": {"scope": "global"},
    "zeros": {"start": "zeros"},
    "overrides": {"overrides": {"0": 0.5, "3": schedules.MultiStep({4: 0.3, 5: 0.4, 12: 0.8})}},
    "from step 0": {"schedule": schedules.Cubic(0.3, 0.8, 0, 9, frequency=2)},
    "one shot": {"schedule": schedules.OneShot(0.7, 3), "overrides": {"4": 0.0}},
    "nothing more": {"schedule": schedules.Constant(None), "start": "zeros"},
}


def sparsities(pruner: GMPScheduler) -> dict[str, float]:
    """Of the total and the layers, counted from the masks."""
    sizes = {name: mask.numel for name, mask in pruner.masks.items()}
    pruned = {name: mask.numel - mask.num_kept for name, mask in pruner.masks.items()}
    by_layer = {name: pruned[name] / n for name, n in sizes.items()}
    return {"total": sum(pruned.values()) / sum(sizes.values())} | by_layer


def course_of(pruner: GMPScheduler):
    return so_far(pruner.history, pruner._groups, pruner._held.num_pruned, pruner.step_count)


def assert_true(pruner: GMPScheduler, truth: list[dict[str, float]]) -> int:
    """Compare the curves with the sparsity after each step; return after how many steps the total is known."""
    curves = course_of(pruner)
    assert list(curves.steps) == sorted(curves.steps) and curves.steps[-1] == pruner.step_count
    num_known = 0
    for name in truth[0]:
        values = curves.total if name == "total" else curves.layers[name]
        at = dict(zip(curves.steps, values, strict=True))  # of points at one step, the last holds
        known = math.nan
        for step in range(len(truth)):
            known = at.get(step, known)
            if not math.isnan(known):
                assert known == pytest.approx(truth[step][name], abs=1e-12), (name, step)
                num_known += name == "total"
    return num_known


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_shows_what_the_masks_were(case: str, tmp_path: Path) -> None:
    model, optimizer, pruner = make(**CASES[case]) if case != "zeros" else make_with_zeros(**CASES[case])
    truth: list[dict[str, float]] = []
    assert course_of(pruner).total[-1] == sparsities(pruner)["total"]
    for step in range(STEPS):
        train_step(model, optimizer, step)
        pruner.step()
        truth.append(sparsities(pruner))
        assert assert_true(pruner, truth) == step + 1
        if step == 6:
            pruner.plot(tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_bytes().startswith(b"<?xml")


def make_with_zeros(**options):
    model, optimizer, _ = make()
    with torch.no_grad():
        model[3].weight[:4] = 0
    return model, optimizer, GMPScheduler(model, optimizer, RAMP, **options)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_resumed_run_shows_what_is_still_known(case: str) -> None:
    model, optimizer, pruner = make(**CASES[case])
    truth: list[dict[str, float]] = []
    for step in range(STEPS):
        train_step(model, optimizer, step)
        pruner.step()
        truth.append(sparsities(pruner))
        if step < 7:
            continue
        resumed_model, resumed_optimizer, resumed = make(**CASES[case])
        resumed_model.load_state_dict(model.state_dict())
        resumed_optimizer.load_state_dict(optimizer.state_dict())
        resumed.load_state_dict(pruner.state_dict())
        known = assert_true(resumed, truth)
        # A report without layers tells the total after it, if all were due, and nothing before it.
        num_open = {
            "plain": 2,
            "erk": 2,
            "global": 2,
            "zeros": 2,
            "overrides": 5 if step < 10 else 6 if step < 12 else 10,
        }
        assert known == len(truth) - num_open.get(case, 0), step


def test_of_a_long_run_that_is_resumed_only_the_latest_reports_are_left() -> None:
    model, optimizer, pruner = make(EVERY_STEP, distribution="erk")
    truth = []
    for step in range(90):
        train_step(model, optimizer, step)
        pruner.step()
        truth.append(sparsities(pruner))
    _, _, resumed = make(EVERY_STEP, distribution="erk")
    resumed.load_state_dict(pruner.state_dict())
    curves = course_of(resumed)
    # The total after each of these updates, and of the layers what the last report tells: before it, after it, and now.
    assert len(curves.steps) == MOST_REPORTS + 1
    assert not any(map(math.isnan, curves.total))
    assert all(
        [math.isnan(value) for value in values] == [True] * 62 + [False] * 3 for values in curves.layers.values()
    )
    assert assert_true(resumed, truth) == MOST_REPORTS


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_the_schedules_ask_for_is_what_the_masks_become(case: str) -> None:
    model, optimizer, pruner = make(**CASES[case])
    asked = asked_for(pruner._groups, STEPS)
    assert list(asked.steps) == list(range(STEPS + 1))
    for step in range(STEPS):
        train_step(model, optimizer, step)
        pruner.step()
        layers = {name: values[step] for name, values in asked.layers.items()}
        found = sparsities(pruner)
        due = [group for group in pruner._groups if group.schedule.is_update_step(step)]
        for name in (name for group in due for name in group.shapes if layers):
            assert found[name] == layers[name]
        if len(due) == len(pruner._groups):
            assert found["total"] == pytest.approx(asked.total[step], abs=1e-12)
    assert (asked.layers == {}) == (case == "global")


def test_the_picture_says_where_the_run_stands(tmp_path: Path, saved: list[Figure]) -> None:
    model, optimizer, pruner = make(distribution="erk")
    for step in range(STEPS):
        if step in (0, 7):
            pruner.plot(tmp_path / "a.png")
        train_step(model, optimizer, step)
        pruner.step()
    pruner.plot(str(tmp_path / "a.png"))
    assert [title_of(figure) for figure in saved] == [
        "Sparsity of 3 layers: 0.0% at step 0; the last update is due at step 10",
        "Sparsity of 3 layers: 79.3% at step 7; the last update is due at step 10",
        "Sparsity of 3 layers: 90.0% at step 14; all updates are made",
    ]
    assert labels_of(saved[1])[:3] == ["total", "target of the schedule", "3.weight"]
    assert [list(line.get_xdata()) for line in saved[1].axes[0].lines if line.get_marker() == "|"] == [[2, 6]]
    assert [figure.axes[0].get_xlim() for figure in saved] == [(0, 10), (0, 10), (0, 14)]


def test_a_run_past_its_end_says_so_without_reports(tmp_path: Path, saved: list[Figure]) -> None:
    model, optimizer, pruner = make(schedule=Hold(1))
    for step in range(3):
        train_step(model, optimizer, step)
        pruner.step()
    pruner.plot(tmp_path / "a.png")
    assert pruner.history == []
    assert title_of(saved[0]) == "Sparsity of 3 layers: 0.0% at step 3; all updates are made"


def test_a_path_that_names_no_picture_is_refused(tmp_path: Path) -> None:
    *_, pruner = make()
    with pytest.raises(OutputError, match=r"ends in .png or .svg, got .pdf"):
        pruner.plot(tmp_path / "a.pdf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("rank", "written"), [(0, ["a.png"]), (1, [])])
def test_of_several_processes_the_first_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, written: list[str]
) -> None:
    *_, pruner = make()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    pruner.plot(tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == written


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    *_, pruner = make()
    for name in ("gmp_kernels.plots", "gmp_kernels.pruner.course"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"expected matplotlib .* run: pip install 'gmp-kernels\[cli\]'"):
        pruner.plot(tmp_path / "a.png")
