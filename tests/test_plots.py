"""The pictures are PNG or SVG files of the right content, and drawing them leaves matplotlib as it was."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from picture_cases import labels_of, title_of

from gmp_kernels import ShapeError, Stages
from gmp_kernels.errors import OutputError
from gmp_kernels.plots import Curves, plot_sparsity
from gmp_kernels.tools import plots
from gmp_kernels.tools.plan import Plan

STEPS = list(range(0, 61, 5))
PARTS = {"stabilization": (0, 10), "pruning": (10, 40), "fine-tuning": (40, 60)}


def assert_is_png(path: Path) -> None:
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert path.stat().st_size > 5000


def staircase(final: float) -> list[float]:
    return [final * step / 60 for step in STEPS]


def curves(**finals: float) -> Curves:
    """A total that ends at 0.5, and layers that end at these sparsities."""
    return Curves(STEPS, staircase(0.5), {name: staircase(final) for name, final in finals.items()})


def test_sparsity_is_a_staircase_that_holds_until_the_next_step(tmp_path: Path, saved: list[Figure]) -> None:
    path = tmp_path / "sparsity.png"
    plot_sparsity(path, curves(a=0.2, b=0.9), "title", parts=PARTS)
    assert_is_png(path)
    axes = saved[0].axes[0]
    assert [line.get_drawstyle() for line in axes.lines] == ["steps-post"] * 3
    # The total, then the layers, the sparsest first.
    assert [list(line.get_ydata()) for line in axes.lines] == [staircase(0.5), staircase(0.9), staircase(0.2)]
    assert labels_of(saved[0]) == ["total", "b", "a"]
    assert axes.get_xlabel() == "optimizer steps"
    assert title_of(saved[0]) == "title"
    assert {text.get_text() for text in axes.texts} == {"stabilization", "pruning", "fine-tuning"}


def test_layers_that_coincide_are_one_line_and_counted(tmp_path: Path, saved: list[Figure]) -> None:
    # 0.504 ends less than a line's width above the total, 0.9 and 0.903 as close to each other.
    for layers in (
        {},
        {"a": 0.5},
        {"a": 0.5, "b": 0.504},
        {"a": 0.5, "b": 0.9, "c": 0.903},
        {"a": 0.5, "b": 0.504, "c": 0},
    ):
        plot_sparsity(tmp_path / "a.png", curves(**layers), "")
    assert [labels_of(figure) for figure in saved] == [
        ["total"],
        ["a"],
        ["all 2 layers"],
        ["total, and a", "b and 1 more"],
        ["total, and 2 layers alike", "c"],
    ]
    # What is drawn for layers alike is the total, not one of them.
    assert list(saved[2].axes[0].lines[0].get_ydata()) == staircase(0.5)


def test_targets_are_thin_lines_and_separate_curves_that_coincide_so_far(tmp_path: Path, saved: list[Figure]) -> None:
    so_far = Curves([0, 10], [0.0, 0.1], {"a": [0.0, 0.1], "b": [0.0, 0.1]})
    target = Curves([0, 10, 60], [0.0, 0.1, 0.6], {"a": [0.0, 0.1, 0.4], "b": [0.0, 0.1, 0.6]})
    plot_sparsity(tmp_path / "a.png", so_far, "", target=target, updates=[10], now=10)
    axes = saved[0].axes[0]
    total, asked, a, asked_of_a, marks, now = axes.lines
    assert labels_of(saved[0]) == [
        "total, and b",
        "target of the schedule",
        "a",
        "updates",
        "now, step 10",
    ]
    assert total.get_linewidth() > 2 * asked.get_linewidth()
    assert (list(asked.get_ydata()), list(asked_of_a.get_ydata())) == (target.total, target.layers["a"])
    assert a.get_color() == asked_of_a.get_color()
    assert list(marks.get_xdata()) == [10] and list(now.get_xdata()) == [10, 10]
    assert axes.get_xlim() == (0, 60)


def test_what_is_not_known_is_left_blank(tmp_path: Path, saved: list[Figure]) -> None:
    unknown = [math.nan, math.nan, 0.5]
    plot_sparsity(tmp_path / "a.png", Curves([0, 1, 2], unknown, {"a": unknown, "b": [math.nan, 0.2, 0.5]}), "")
    assert labels_of(saved[0]) == ["total, and a", "b"]
    assert [math.isnan(y) for y in saved[0].axes[0].lines[0].get_ydata()] == [True, True, False]
    # Of layers that are like the total as far as they are known, the total is drawn.
    plot_sparsity(tmp_path / "a.png", Curves([0, 1, 2], [0.0, 0.2, 0.5], {"a": unknown, "b": unknown}), "")
    assert labels_of(saved[1]) == ["all 2 layers"]


@pytest.mark.parametrize(("number", "listed"), [(16, 17), (40, 18)])
def test_many_layers_are_listed_beside_the_picture(
    number: int, listed: int, tmp_path: Path, saved: list[Figure]
) -> None:
    finals = {f"layer{i}": 0.51 + i / 90 for i in range(number)}
    plot_sparsity(tmp_path / "a.png", curves(**finals), "")
    figure = saved[0]
    assert len(figure.axes[0].lines) == number + 1
    labels = labels_of(figure)
    assert len(labels) == listed
    assert labels[1:9] == [f"layer{i}" for i in range(number - 1, number - 9, -1)]
    assert labels[-8:] == [f"layer{i}" for i in range(7, -1, -1)]
    assert labels[9] == ("layer7" if number == 16 else "24 more curves between")
    box = figure.axes[0].get_legend().get_window_extent()
    assert box.x0 >= figure.axes[0].get_window_extent().x1
    assert box.y0 >= 0 and box.y1 <= figure.bbox.y1 and box.x1 <= figure.bbox.x1


def test_a_long_title_stays_in_the_picture(tmp_path: Path, saved: list[Figure]) -> None:
    plot_sparsity(tmp_path / "a.png", curves(), "from $5$ " + "to here and there " * 9, parts=PARTS)
    (figure,) = saved
    title = next(
        child for child in figure.axes[0].get_children() if getattr(child, "get_text", str)().startswith("from")
    )
    box = title.get_window_extent()
    assert "\n" in title.get_text() and r"\$5\$" in title.get_text()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1


def test_the_suffix_is_the_format(tmp_path: Path) -> None:
    plot_sparsity(tmp_path / "a.SVG", curves(), "")
    assert b"<svg" in (tmp_path / "a.SVG").read_bytes()
    for name in ("a", "a.jpg", ".png"):
        with pytest.raises(OutputError, match=r"expected the name of a picture that ends in .png or .svg, got"):
            plot_sparsity(tmp_path / name, curves(), "")
        assert not (tmp_path / name).exists()


def test_learning_rate_axis_shows_the_rates_themselves(tmp_path: Path, saved: list[Figure]) -> None:
    path = tmp_path / "learning_rate.png"
    plots.plot_learning_rate(path, [0, 1, 2, 3], [0.1, 0.1, 0.01, 0.001], "title", parts=PARTS)
    assert_is_png(path)
    axes = saved[0].axes[0]
    assert (axes.get_yscale(), axes.get_ylabel()) == ("log", "learning rate (log scale)")
    assert [axes.xaxis.get_major_formatter()(tick) for tick in (0.5, 300_000)] == ["0.5", "300,000"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0.001", "0.01", "0.1"]


@pytest.mark.parametrize("values", [[0.1, 0.05, 0.0], [0.1, 0.05, 1e-9], [0.0, 0.0, 0.0]])
def test_a_learning_rate_that_falls_to_zero_is_drawn_from_zero(
    tmp_path: Path, saved: list[Figure], values: list[float]
) -> None:
    path = tmp_path / "learning_rate.png"
    plots.plot_learning_rate(path, [0, 1, 2], values, "")
    assert_is_png(path)
    axes = saved[0].axes[0]
    assert (axes.get_yscale(), axes.get_ylabel(), axes.get_ylim()[0]) == ("linear", "learning rate", 0.0)
    assert list(axes.lines[0].get_ydata()) == values


@pytest.mark.parametrize("distribution", ["uniform", "erk"])
def test_a_course_of_many_updates_is_drawn_by_some_of_them(
    tmp_path: Path, saved: list[Figure], distribution: str
) -> None:
    stages = Stages(100, 2000, 300, steps_per_epoch=1)
    course = Plan(stages, {"a": (30, 40), "b": (8, 100)}, frequency=1, distribution=distribution).course
    plots.plot_course(tmp_path / "a.png", course, "")
    lines = saved[0].axes[0].lines
    assert len(lines) == (1 if distribution == "uniform" else 3)
    steps = list(lines[0].get_xdata())
    assert (steps[:2], steps[-2:], len(steps) < 500) == ([0, 100], [2100, 2400], True)
    for step, sparsity in zip(steps, lines[0].get_ydata(), strict=True):
        assert sparsity == sum(course.num_prune(step).values()) / 2000


def test_of_layers_ranked_together_only_the_total_is_planned(tmp_path: Path, saved: list[Figure]) -> None:
    course = Plan(Stages(1, 3, 2, steps_per_epoch=10), {"a": (30, 40), "b": (8, 10)}, scope="global").course
    plots.plot_course(tmp_path / "a.png", course, "")
    assert labels_of(saved[0]) == ["total"]
    assert saved[0].axes[0].lines[0].get_ydata()[-1] == 0.9


def test_accuracy_draws_the_mean_and_the_range(tmp_path: Path, saved: list[Figure]) -> None:
    path = tmp_path / "accuracy.png"
    series = {"a": [[0.9, 0.8], [0.7, 0.9]], "b": [[0.1, 0.95], [0.3, 0.95]]}
    plots.plot_accuracy(path, [0, 1], series, "title", baselines={"dense": 0.97}, parts=PARTS)
    assert_is_png(path)
    whole, enlarged = saved[0].axes
    for axes in (whole, enlarged):
        dense, a, b = axes.lines
        assert list(dense.get_ydata()) == [0.97, 0.97]
        assert list(a.get_ydata()) == pytest.approx([0.8, 0.85])
        assert list(b.get_ydata()) == pytest.approx([0.2, 0.95])
        band = axes.collections[0].get_paths()[0].vertices
        assert (band[:, 1].min(), band[:, 1].max()) == (0.7, 0.9)
    assert (whole.get_ylabel(), enlarged.get_ylabel()) == ("test accuracy", "test accuracy, enlarged")
    assert whole.get_ylim()[0] == 0.0
    assert enlarged.get_ylim() == pytest.approx((0.77, 1.0))
    assert [enlarged.yaxis.get_major_formatter()(tick) for tick in (0.975, 1.0)] == ["97.5%", "100.0%"]
    assert [text.get_text() for text in saved[0].legends[0].get_texts()] == ["dense", "a", "b"]


def test_a_sweep_has_a_place_for_each_sparsity(tmp_path: Path, saved: list[Figure]) -> None:
    path = tmp_path / "sweep.png"
    plots.plot_sweep(path, [0.9, 0.975], {"a": [[0.9, 0.8], [0.7, 0.9]]}, "title", baselines={"dense": 0.97})
    assert_is_png(path)
    (axes,) = saved[0].axes
    assert axes.get_xlabel() == "sparsity (not to scale)"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["90%", "97.5%"]
    assert axes.yaxis.get_major_formatter()(0.825) == "82.5%"
    dense, a = axes.lines
    assert list(dense.get_ydata()) == [0.97, 0.97]
    assert (list(a.get_xdata()), list(a.get_ydata())) == ([0, 1], pytest.approx([0.8, 0.85]))
    band = axes.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (0.7, 0.9)


def test_a_tensor_of_equal_weights_does_not_flatten_the_others(tmp_path: Path, saved: list[Figure]) -> None:
    spread = dict.fromkeys(range(-20, -10), 1000)
    plots.plot_histogram(tmp_path / "h.png", {"norm": {0: 10}, "weight": spread}, "magnitudes")
    assert saved[0].axes[0].get_ylim()[1] < 0.25


def test_series_of_another_length_is_refused_and_nothing_written(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    with pytest.raises(ShapeError, match=r"plot_sparsity: expected one value per step \(3\) for 'a', got 2"):
        plot_sparsity(path, Curves([0, 1, 2], [0.1, 0.2, 0.3], {"a": [0.1, 0.2]}), "")
    with pytest.raises(ShapeError, match="plot_learning_rate: expected one value per step"):
        plots.plot_learning_rate(path, [0, 1], [0.1], "")
    with pytest.raises(ShapeError, match="plot_accuracy: expected one value per epoch"):
        plots.plot_accuracy(path, [0, 1], {"a": [[0.1, 0.2], [0.1]]}, "", baselines={"dense": 1.0})
    with pytest.raises(ShapeError, match="plot_sweep: expected one value per sparsity"):
        plots.plot_sweep(path, [0.8, 0.9], {"a": [[0.1, 0.2], [0.1]]}, "", baselines={})
    with pytest.raises(ShapeError, match="at least one step"):
        plot_sparsity(path, Curves([], [], {}), "")
    assert not path.exists()


def test_drawing_neither_imports_pyplot_nor_chooses_a_backend(tmp_path: Path) -> None:
    program = f"""
import sys, matplotlib
before = dict.__getitem__(matplotlib.rcParams, "backend")
from pathlib import Path
from gmp_kernels.plots import Curves, plot_sparsity
plot_sparsity(Path({str(tmp_path / "a.png")!r}), Curves([0, 1], [0.0, 0.5], {{}}), "")
assert "matplotlib.pyplot" not in sys.modules
assert dict.__getitem__(matplotlib.rcParams, "backend") is before
"""
    subprocess.run([sys.executable, "-c", program], check=True)
