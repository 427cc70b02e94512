"""The speed table measures what it says: both sides do the same work, in turn, and the verdict follows the bounds."""

from __future__ import annotations

import itertools
import math
import pickle
import statistics
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from gmp_kernels import ShapeError, Threshold
from gmp_kernels.tools import plots
from gmp_kernels.tools.bench import run as bench
from gmp_kernels.tools.bench.measurement import (
    Case,
    Pair,
    Result,
    Spread,
    Timed,
    measure,
    measure_all,
    time_once,
)
from gmp_kernels.tools.bench.optimizers import optimizer_cases
from gmp_kernels.tools.bench.patterns import pattern_cases, regrow_cases
from gmp_kernels.tools.bench.record import Machine
from gmp_kernels.tools.bench.small import small_cases
from gmp_kernels.tools.bench.training import training_cases
from gmp_kernels.tools.bench.weights import NUM_WEIGHTS

SHRINK = 4096
# bf16 rounds, and ten times the weights have another threshold: their two sides agree on nothing.
SELECTIONS = [
    c
    for c in bench.select_cases()
    if c.baseline in ("np.partition", "partition() in place", "torch.kthvalue", "torch.topk")
]

SAME_MASKS = [c for c in (*pattern_cases(), *regrow_cases()) if c.baseline.startswith(("topk", "matmul"))]


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


def test_a_threshold_from_the_last_one_is_that_of_the_weights_after_the_optimizer_step() -> None:
    first, later = (c for c in bench.select_cases() if c.baseline == "tensor.sum()" and "0.99" in c.name)
    before, after = ran(built(first)[0]), ran(built(later)[0])
    assert isinstance(before, Threshold) and isinstance(after, Threshold)
    assert before.num_pruned == after.num_pruned
    assert 0 < abs(after.value / before.value - 1) < 0.01


@pytest.mark.parametrize("case", [*bench.prune_cases(), *pattern_cases()], ids=named)
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


@pytest.mark.parametrize(
    "case",
    [c for c in (*pattern_cases(), *regrow_cases()) if "topk" in c.baseline or "matmul" in c.baseline],
    ids=named,
)
def test_the_other_ways_to_prune_in_patterns_keep_the_same_weights(case: Case) -> None:
    ours, baseline = built(case)
    for _ in range(2):  # each run starts from the same weights
        mask = ran(ours).masks[0]  # type: ignore[attr-defined]
        theirs = ran(baseline) != 0
        assert isinstance(theirs, torch.Tensor) and int(theirs.sum()) == mask.num_kept
        if "bf16" in case.name:  # which has many ties, and they keep any of tied weights
            assert torch.all(theirs.sum(1) == 2)
        else:
            assert torch.equal(theirs.view(mask.shape), mask.to_bool())


@pytest.mark.parametrize("case", regrow_cases(), ids=named)
def test_a_projection_begins_where_an_optimizer_step_has_left_the_weights(case: Case) -> None:
    ours, _ = built(case)
    results = [ran(ours), ran(ours)]
    assert results[0] == results[1]
    assert results[0].thresholds[0].num_pruned == round(0.95 * NUM_WEIGHTS / SHRINK)  # type: ignore[attr-defined]
    ours.prepare()
    weight = ours.prepare.func.__self__  # type: ignore[attr-defined]
    assert torch.all(weight != 0)


@pytest.mark.parametrize("case", bench.scheduler_cases(), ids=named)
def test_the_timed_scheduler_steps_are_no_updates(case: Case) -> None:
    ours, limit = case.build(SHRINK)
    assert isinstance(ours, Timed) and limit == 30e-6
    assert [ran(ours) for _ in range(3)] == [None] * 3


def tensors_of(step: Timed) -> list[torch.Tensor]:
    """Return what an optimizer's step reads and writes: parameters, gradients, dense state."""
    optimizer = step.run.__self__  # type: ignore[attr-defined]
    (group,) = optimizer.param_groups
    state = [optimizer.state[p][key] for p in group["params"] for key in ("exp_avg", "exp_avg_sq")]
    return [*group["params"], *(p.grad for p in group["params"]), *state]


@pytest.mark.parametrize("case", optimizer_cases()[:2], ids=named)
def test_dense_steps_walk_the_same_tensors_on_both_sides(case: Case) -> None:
    ours, baseline = built(case)
    for side in (ours, baseline, ours):
        ran(side)
    shared = [tensor.data_ptr() for tensor in tensors_of(ours)]
    assert shared == [tensor.data_ptr() for tensor in tensors_of(baseline)] and len(set(shared)) == 4


@pytest.mark.parametrize("case", small_cases()[:3], ids=named)
def test_small_tensors_are_dense_again_before_they_are_pruned(case: Case) -> None:
    ours, baseline = built(case)
    results = [ran(side) for side in (ours, baseline, ours)]
    if case.name.startswith("prune_"):
        assert [result.num_newly_pruned for result in results[::2]] == [[230], [230]]  # type: ignore[attr-defined]


@pytest.mark.thorough
@pytest.mark.parametrize("case", training_cases(), ids=named)
def test_the_training_is_timed_from_the_backward_pass_on(case: Case) -> None:
    ours, baseline = case.build(SHRINK)
    assert 0 < ours < 60 and 0 < baseline < 60


def test_every_row_is_there_once_and_can_be_sent_to_a_process(tmp_path: Path) -> None:
    cases = bench.all_cases(tmp_path)
    assert len({named(case) for case in cases}) == len(cases)
    assert all(case.aim is None or case.aim < case.must for case in cases)
    assert pickle.loads(pickle.dumps(cases))[0].name == cases[0].name


def test_a_step_that_takes_too_much_memory_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    case = bench.memory_cases()[0]
    monkeypatch.setenv("GMP_KERNELS_BACKEND", "reference")  # 40 bytes per weight
    result = measure(case, shrink=16)
    num_weights = NUM_WEIGHTS // 16
    assert result.ours.median > 10 * num_weights
    assert result.baseline.median == pytest.approx(0.05 * 4 * num_weights + 4e6)
    assert case.verdict(result.ratios) == "missed"


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


def test_a_slow_case_still_gets_three_rounds() -> None:
    clock = Clock()
    case = Case("a", "b", 1.0, None, lambda _: Pair(Timed(lambda: clock.advance(60)), 30.0))
    result = measure(case, seconds=1, clock=clock)
    assert result.ours == Spread(60, 60, 60, 3)
    assert result.baseline == Spread(30, 30, 30, 0)
    assert (result.ratio, result.verdict) == (2.0, "missed")


def test_a_side_that_takes_long_runs_once_if_the_case_says_so() -> None:
    clock, order = Clock(), []

    def side(name: str, seconds: float) -> Timed:
        return Timed(lambda: (order.append(name), clock.advance(seconds)))

    case = Case("a", "b", 1.0, None, lambda _: Pair(side("quick", 0.01), side("slow", 60)), once=True)
    result = measure(case, seconds=1000, clock=clock)
    assert sorted(order) == ["quick"] * 4 + ["slow"]
    assert (result.ours.rounds, result.baseline) == (3, Spread(60, 60, 60, 1))


def test_warm_caches_hold_what_the_same_side_has_just_used() -> None:
    clock, order = Clock(), []

    def side(name: str) -> Timed:
        return Timed(lambda: (order.append(name), clock.advance(1)), lambda: order.append(f"prepare {name}"))

    case = Case("a", "b", 1.0, None, lambda _: Pair(side("ours"), side("baseline")), warm=True)
    assert measure(case, seconds=0, clock=clock).ours == Spread(1, 1, 1, 3)
    turn = [[f"prepare {name}", name] * 2 for name in ("ours", "baseline")]
    assert order == (turn[0] + turn[1]) * 4


def test_spread_is_the_median_and_the_outer_deciles() -> None:
    clock, seconds = Clock(), itertools.chain([99], range(11))
    case = Case("a", "b", 1.0, None, lambda _: Pair(Timed(lambda: clock.advance(next(seconds))), 1.0))
    assert measure(case, seconds=55, clock=clock).ours == Spread(5, 1, 9, 11)


def measured(*ratios: float, **bounds: float) -> Result:
    """Return the result of processes in which ours takes so many times the 2 seconds of the baseline."""
    case = Case("a", "b", bounds.pop("must", 1.0), None, lambda _: Pair(1.0, 1.0), **bounds)
    processes = [(Spread(2 * ratio, ratio, 3 * ratio, 10), Spread(2, 1, 3, 10)) for ratio in ratios]
    return Result(case, tuple(processes))


def test_a_row_is_the_median_of_its_processes_and_shows_their_range() -> None:
    result = measured(0.9, 1.0, 0.8, 0.85, 0.95)
    assert (result.ratio, result.modes) == (0.9, [(5, 0.9)])
    assert result.ours == Spread(1.8, 0.8, 3.0, 50)
    assert result.cells()[4] == "0.90 (0.80-1.00)"
    assert measured(0.8, 0.8).cells()[4] == "0.80"


@given(
    low=st.lists(st.floats(1.0, 1.1), min_size=1, max_size=4),
    high=st.lists(st.floats(1.4, 1.5), min_size=1, max_size=4),
)
def test_a_row_of_two_modes_shows_both(low: list[float], high: list[float]) -> None:
    result = measured(*high, *low)
    assert [count for count, _ in result.modes] == [len(low), len(high)]
    assert [ratio for _, ratio in result.modes] == pytest.approx([statistics.median(low), statistics.median(high)])
    assert f" in {len(low)}, " in result.cells()[4]


def test_modes_begin_where_the_highest_is_a_quarter_above_the_lowest() -> None:
    assert len(measured(1.0, 1.25).modes) == 1 and len(measured(1.0, 1.26).modes) == 2


def test_a_single_process_may_miss_the_bound_of_all() -> None:
    assert measured(0.8, 0.9, 1.0, 1.05, 1.1, highest=1.1).verdict == "must"
    assert measured(0.8, 0.9, 1.0, 1.05, 1.11, highest=1.1).verdict == "missed"
    assert measured(0.8, 0.9, 1.0, 1.05, 1.11).verdict == "must"
    assert measured(1.0, must=1.0, highest=1.1).cells()[5] == "1.00, all 1.10"


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
    verdict = Case("a", "b", must, aim, lambda _: Pair(1.0, 1.0)).verdict([ratio])
    assert (verdict == "missed") == (ratio > must)
    assert (verdict == "aim") == (aim is not None and ratio <= aim)


def test_machine_is_told_by_a_file_name() -> None:
    machine = Machine.here()
    assert machine.threads == torch.get_num_threads()
    assert machine.to_dict()["torch"] == torch.__version__
    assert Machine("Some CPU (R) @ 2.0GHz", 8, 4, 0.0, "", "", "", "").slug == "some-cpu-r-2-0ghz-8-cores"
    for is_chosen, slug in ((False, "cpu-8-cores"), (True, "cpu-8-cores-avx2")):
        assert Machine("CPU", 8, 4, 0.0, "", "", "", "", isa="avx2", is_isa_chosen=is_chosen).slug == slug


def test_an_interrupt_ends_the_measurement() -> None:
    def interrupted(_: int) -> Pair:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(measure_all([Case("a", "b", 1.0, None, interrupted)]))


def drawn(monkeypatch: pytest.MonkeyPatch, path: Path, rows: dict[str, plots.Bar]) -> Figure:
    figures: list[Figure] = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    plots.plot_ratios(path, rows, "title")
    return figures[0]


def test_plot_shows_every_ratio_with_its_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {
        "met": plots.Bar([0.7, 0.5, 0.4], "0.5", 1.5, 1.1),
        "missed": plots.Bar([2.0], "2", 1.0, None, is_missed=True),
    }
    axes = drawn(monkeypatch, tmp_path / "a.png", rows).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["met", "missed"]
    assert axes.get_xscale() == "log"
    assert [text.get_text() for text in axes.texts] == ["0.5", "2"]
    met, missed = axes.patches
    assert (met.get_x() + met.get_width(), missed.get_x() + missed.get_width()) == (0.5, 2.0)
    assert met.get_facecolor() != missed.get_facecolor()
    dots, (dot,) = (points.get_offsets()[:, 0].tolist() for points in axes.collections)
    assert dots == [0.7, 0.5, 0.4] and dot == 2.0
    must, aim = (list(line.get_xdata()) for line in axes.lines if line.get_marker() == "|")
    assert must == [1.5, 1.0]
    assert aim[0] == 1.1 and math.isnan(aim[1])


def test_plot_of_a_trial_shows_no_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"fast": plots.Bar([0.5], "0.5"), "slow": plots.Bar([2.0], "2")}
    figure = drawn(monkeypatch, tmp_path / "a.png", rows)
    fast, slow = figure.axes[0].patches
    assert fast.get_facecolor() == slow.get_facecolor()
    assert figure.legends == [] and not [line for line in figure.axes[0].lines if line.get_marker() == "|"]


def test_plot_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match="expected at least one row, got none"):
        plots.plot_ratios(tmp_path / "a.png", {}, "title")
    assert list(tmp_path.iterdir()) == []
