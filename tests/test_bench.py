"""The speed table measures what it says: both sides do the same work, in turn, and the verdict follows the bounds."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from typer.testing import CliRunner

from gmp_kernels import ShapeError, Threshold
from gmp_kernels.tools import plots
from gmp_kernels.tools.bench import run as bench
from gmp_kernels.tools.bench.measurement import (
    Case,
    Machine,
    Pair,
    Result,
    Spread,
    Timed,
    measure,
    measure_all,
    time_once,
)
from gmp_kernels.tools.cli import main as cli

SHRINK = 4096
# bf16 rounds, and ten times the weights have another threshold: their two sides agree on nothing.
SELECTIONS = [
    c
    for c in bench.select_cases()
    if c.baseline in ("np.partition", "partition() in place", "torch.kthvalue", "torch.topk")
]
RUNNER = CliRunner(env={"COLUMNS": "140"})


def built(case: Case) -> tuple[Timed, Timed]:
    ours, baseline = case.build(SHRINK)
    assert isinstance(ours, Timed) and isinstance(baseline, Timed)
    return ours, baseline


def ran(side: Timed) -> object:
    side.prepare()
    return side.run()


def named(case: Case) -> str:
    return f"{case.name} / {case.baseline}"


class Clock:
    """Stands still unless told otherwise."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize("case", SELECTIONS, ids=named)
def test_the_other_selections_find_the_same_threshold(case: Case) -> None:
    ours, baseline = built(case)
    threshold = ran(ours)
    assert isinstance(threshold, Threshold)
    # topk from above returns the kept weights and the threshold, which is the smallest of them.
    assert torch.as_tensor(ran(baseline)).min().item() == threshold.value
    # And again: nothing either side runs on was used up.
    assert ran(ours) == threshold
    assert torch.as_tensor(ran(baseline)).min().item() == threshold.value


def test_a_warm_threshold_is_that_of_the_weights_after_the_optimizer_step() -> None:
    cold, warm = (c for c in bench.select_cases() if c.baseline == "tensor.sum()" and "0.99" in c.name)
    before, after = ran(built(cold)[0]), ran(built(warm)[0])
    assert isinstance(before, Threshold) and isinstance(after, Threshold)
    assert before.num_pruned == after.num_pruned
    assert 0 < abs(after.value / before.value - 1) < 0.01


@pytest.mark.parametrize("case", bench.prune_cases(), ids=named)
def test_every_round_of_a_prune_step_starts_from_dense_weights(case: Case) -> None:
    ours, baseline = built(case)
    counts = []
    for _ in range(2):
        result = ran(ours)
        counts.append((sum(result.num_pruned), sum(result.num_newly_pruned)))  # type: ignore[attr-defined]
        ran(baseline)
    assert counts[0] == counts[1]
    assert counts[0][0] == counts[0][1] > 0


def test_l1_unstructured_prunes_as_many_weights_of_a_fresh_module_each_time() -> None:
    (case,) = (c for c in bench.prune_cases() if c.baseline == "l1_unstructured")
    ours, baseline = built(case)
    modules = [ran(baseline), ran(baseline)]
    assert modules[0] is not modules[1]
    for module in modules:
        assert int((module.weight == 0).sum()) == ran(ours).num_pruned[0]  # type: ignore[attr-defined]


def test_resnet50_layers_and_the_one_tensor_hold_the_same_weights() -> None:
    (case,) = (c for c in bench.prune_cases() if c.baseline == "the same in one tensor")
    layers, whole = (ran(side) for side in built(case))
    assert len(layers.masks) == 54  # type: ignore[attr-defined]
    assert sum(mask.numel for mask in layers.masks) == whole.masks[0].numel  # type: ignore[attr-defined]


def test_weights_in_channels_last_and_contiguous_ones_get_the_same_masks() -> None:
    (case,) = (c for c in bench.prune_cases() if c.baseline == "contiguous")
    ours, theirs = (ran(side) for side in built(case))
    assert {mask.memory_format for mask in ours.masks} == {torch.channels_last, torch.contiguous_format}  # type: ignore[attr-defined]
    assert ours.masks == theirs.masks and len(ours.masks) == 54  # type: ignore[attr-defined]


@pytest.mark.parametrize(("case", "num_calls"), zip(bench.scheduler_cases(), (1, 100), strict=True))
def test_the_timed_scheduler_steps_are_no_updates(case: Case, num_calls: int) -> None:
    ours, limit = case.build(SHRINK)
    assert isinstance(ours, Timed) and limit == pytest.approx(num_calls * 30e-6)
    assert [ran(ours) for _ in range(3)] == [[None] * num_calls] * 3


@pytest.mark.thorough
def test_the_training_is_timed_from_the_backward_pass_on() -> None:
    (case,) = bench.training_cases()
    ours, baseline = case.build(SHRINK)
    assert 0 < ours < 60 and 0 < baseline < 60


def test_every_row_is_there_once() -> None:
    cases = bench.all_cases()
    assert len({named(case) for case in cases}) == len(cases)
    assert all(case.aim is None or case.aim < case.must for case in cases)


def test_a_step_that_takes_too_much_memory_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    case = bench.memory_cases()[0]
    monkeypatch.setenv("GMP_KERNELS_BACKEND", "reference")  # 40 bytes per weight
    result = measure(case, shrink=16)
    num_weights = bench.NUM_WEIGHTS // 16
    assert result.ours.median > 10 * num_weights
    assert result.baseline.median == pytest.approx(0.05 * 4 * num_weights + 4e6)
    assert case.verdict(result.ratio) == "missed"


def test_sides_take_turns_after_one_warm_up_until_the_time_is_over() -> None:
    clock, order = Clock(), []

    def side(name: str, seconds: float) -> Timed:
        return Timed(lambda: (order.append(name), clock.advance(seconds)), lambda: clock.advance(100))

    case = Case("a", "b", 1.0, None, lambda _: Pair(side("ours", 1), side("baseline", 4)))
    result = measure(case, seconds=7 * 205, clock=clock)
    assert order == ["ours", "baseline"] * 8
    assert result.ours == Spread(1, 1, 1, 7)
    assert result.baseline == Spread(4, 4, 4, 7)
    assert result.ratio == 0.25


def test_a_slow_case_still_gets_five_rounds() -> None:
    clock = Clock()
    case = Case("a", "b", 1.0, None, lambda _: Pair(Timed(lambda: clock.advance(60)), 30.0))
    result = measure(case, seconds=1, clock=clock)
    assert result.ours == Spread(60, 60, 60, 5)
    assert result.baseline == Spread(30, 30, 30, 0)
    assert (result.ratio, result.verdict) == (2.0, "missed")


def test_spread_is_the_median_and_the_outer_deciles() -> None:
    clock, seconds = Clock(), itertools.chain([99], range(11))
    case = Case("a", "b", 1.0, None, lambda _: Pair(Timed(lambda: clock.advance(next(seconds))), 1.0))
    assert measure(case, seconds=55, clock=clock).ours == Spread(5, 1, 9, 11)


def test_preparation_is_not_timed() -> None:
    clock = Clock()
    assert time_once(Timed(lambda: clock.advance(2), lambda: clock.advance(50)), clock) == 2


@given(
    ratio=st.floats(1e-4, 1e4),
    must=st.floats(1e-3, 1e3),
    aim=st.none() | st.floats(0.01, 1),
)
def test_verdict_is_the_strictest_bound_met(ratio: float, must: float, aim: float | None) -> None:
    aim = None if aim is None else aim * must
    verdict = Case("a", "b", must, aim, lambda _: Pair(1.0, 1.0)).verdict(ratio)
    assert (verdict == "missed") == (ratio > must)
    assert (verdict == "aim") == (aim is not None and ratio <= aim)


def test_machine_is_told_by_a_file_name() -> None:
    machine = Machine.here()
    assert machine.threads == torch.get_num_threads()
    assert machine.to_dict()["torch"] == torch.__version__
    assert Machine("Some CPU (R) @ 2.0GHz", 8, 4, 0.0, "", "", "", "").slug == "some-cpu-r-2-0ghz-8-cores"


def test_command_prints_the_table_and_writes_numbers_and_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [
        Case("halved", "whole", 0.5, 0.4, lambda _: Pair(2.0, 4.0)),
        Case("small", "large", 1 / 8, 1 / 15, lambda _: Pair(1.5e6, 3e7), "B"),
        Case("slow", "quick", 1.3, None, lambda _: Pair(8e-6, 5e-6)),
    ]
    monkeypatch.setattr(cli, "all_cases", lambda: cases)
    result = RUNNER.invoke(cli.app, ["bench", "--output", str(tmp_path / "new")])
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.output.splitlines()]
    assert ["halved", "2000.00", "ms", "whole", "4000.00", "ms", "0.50", "0.50", "0.40", "must"] in rows
    assert ["small", "1.50", "MB", "large", "30.00", "MB", "1/20", "1/8", "1/15", "aim"] in rows
    assert ["slow", "8.00", "us", "quick", "5.00", "us", "1.60", "1.30", "missed"] in rows

    machine = Machine.here()
    document = json.loads((tmp_path / "new" / f"{machine.slug}.json").read_text())
    assert document["machine"].keys() == machine.to_dict().keys()
    assert document["shrink"] == 1
    assert document["cases"] == [
        Result(case, *(Spread(side, side, side, 0) for side in case.build(1))).to_dict() for case in cases
    ]
    assert (tmp_path / "new" / f"{machine.slug}.png").read_bytes().startswith(b"\x89PNG")


def test_a_row_that_fails_is_recorded_and_the_next_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    json_file, seen = tmp_path / "a.json", []

    def fail(_: int) -> Pair:
        raise RuntimeError("no [memory] left")

    def last(_: int) -> Pair:
        seen.extend(json.loads(json_file.read_text())["cases"])  # what a kill would leave
        return Pair(1.0, 2.0)

    cases = [
        Case("first", "b", 1.0, None, lambda _: Pair(1.0, 1.0)),
        Case("second", "b", 1.5, 1.1, fail),
        Case("third", "b", 1.0, None, last),
    ]
    monkeypatch.setattr(cli, "all_cases", lambda: cases)
    result = RUNNER.invoke(cli.app, ["bench", "--json", str(json_file)])
    assert result.exit_code == 1
    rows = [line.split() for line in result.output.splitlines()]
    assert ["second", "b", "1.50", "1.10", "failed"] in rows
    assert ["third", "1000.00", "ms", "b", "2000.00", "ms", "0.50", "1.00", "must"] in rows
    assert "second: RuntimeError: no [memory] left" in result.output
    document = json.loads(json_file.read_text())
    assert [row["name"] for row in document["cases"]] == ["first", "second", "third"]
    assert document["cases"][1]["error"] == "RuntimeError: no [memory] left"
    assert seen == document["cases"][:2]
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_an_interrupt_ends_the_measurement() -> None:
    def interrupted(_: int) -> Pair:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(measure_all([Case("a", "b", 1.0, None, interrupted)]))


def test_command_takes_file_names_and_the_number_of_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    case = Case("a", "b", 1.0, None, lambda shrink: seen.append((shrink, torch.get_num_threads())) or Pair(1.0, 1.0))
    monkeypatch.setattr(cli, "all_cases", lambda: [case])
    json_file, plot = tmp_path / "a.json", tmp_path / "a.png"
    drawn, draw = [], plots.plot_ratios
    monkeypatch.setattr(plots, "plot_ratios", lambda path, rows, title: (drawn.append(rows), draw(path, rows, title)))
    before = torch.get_num_threads()
    try:
        args = ["bench", "--quick", "--threads", "1", "--json", str(json_file), "--plot", str(plot)]
        result = RUNNER.invoke(cli.app, args)
    finally:
        torch.set_num_threads(before)
    assert result.exit_code == 0, result.output
    assert seen == [(16, 1)]
    assert "the ratios are not held to their bounds" in result.output
    row = next(line.split() for line in result.output.splitlines() if line.startswith("a "))
    assert row == ["a", "1000.00", "ms", "b", "1000.00", "ms", "1.00"]
    heading = next(line.split() for line in result.output.splitlines() if line.startswith("ours "))
    assert heading == ["ours", "median", "baseline", "median", "ratio"]
    assert json.loads(json_file.read_text())["cases"][0]["verdict"] is None
    (bar,) = drawn
    assert bar == {"a / b": (1.0, None, None)}
    assert json.loads(json_file.read_text())["machine"]["threads"] == 1
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "a.png"}


def test_plot_shows_every_ratio_with_its_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    plots.plot_ratios(tmp_path / "a.png", {"met": (0.5, 1.5, 1.1), "missed": (2.0, 1.0, None)}, "title")
    axes = figures[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["met", "missed"]
    assert axes.get_xscale() == "log"
    assert [text.get_text() for text in axes.texts] == ["0.5", "2"]
    met, missed = axes.patches
    assert (met.get_x() + met.get_width(), missed.get_x() + missed.get_width()) == (0.5, 2.0)
    assert met.get_facecolor() != missed.get_facecolor()
    must, aim = (list(line.get_xdata()) for line in axes.lines[:2])
    assert must == [1.5, 1.0]
    assert aim[0] == 1.1 and math.isnan(aim[1])


def test_plot_of_a_trial_shows_no_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    plots.plot_ratios(tmp_path / "a.png", {"fast": (0.5, None, None), "slow": (2.0, None, None)}, "title")
    fast, slow = figures[0].axes[0].patches
    assert fast.get_facecolor() == slow.get_facecolor()
    assert figures[0].legends == [] and len(figures[0].axes[0].lines) == 1  # the line at 1


def test_plot_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match="expected at least one row, got none"):
        plots.plot_ratios(tmp_path / "a.png", {}, "title")
    assert list(tmp_path.iterdir()) == []
