"""The pictures are PNG files of the right content, and drawing them leaves matplotlib as it was."""

import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from gmp_kernels import ShapeError, Stages
from gmp_kernels.tools import plots

STEPS = list(range(0, 61, 5))
STAGES = Stages(1, 3, 2, steps_per_epoch=10)


def assert_is_png(path: Path) -> None:
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert path.stat().st_size > 5000


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are written, to look at what is on them."""
    figures: list[Figure] = []
    save = plots._save

    def keep(figure: Figure, path: Path) -> None:
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(plots, "_save", keep)
    return figures


def staircase(final: float) -> list[float]:
    return [final * step / 60 for step in STEPS]


def test_sparsity_is_a_staircase_that_holds_until_the_next_step(tmp_path: Path, saved: list[Figure]) -> None:
    path = tmp_path / "sparsity.png"
    plots.plot_sparsity(path, STEPS, {"a": staircase(0.9), "b": staircase(0.5)}, "title", stages=STAGES)
    assert_is_png(path)
    axes = saved[0].axes[0]
    assert [line.get_drawstyle() for line in axes.lines] == ["steps-post"] * 2
    assert [list(line.get_ydata()) for line in axes.lines] == [staircase(0.9), staircase(0.5)]
    assert axes.get_xlabel() == "optimizer steps"
    assert axes.get_title(loc="left") == "title"
    assert {text.get_text() for text in axes.texts} == {"stabilization", "pruning", "fine-tuning"}


def test_layers_that_coincide_are_one_line_and_counted(tmp_path: Path, saved: list[Figure]) -> None:
    alike = {name: staircase(0.9) for name in "abc"}
    plots.plot_sparsity(tmp_path / "a.png", STEPS, alike, "")
    plots.plot_sparsity(tmp_path / "b.png", STEPS, alike | {"d": staircase(0.5)}, "")
    plots.plot_sparsity(tmp_path / "c.png", STEPS, {"every layer": staircase(0.5)}, "")
    labels = [[text.get_text() for text in figure.axes[0].get_legend().get_texts()] for figure in saved]
    assert labels == [["all 3 layers"], ["a and 2 more", "d"], ["every layer"]]


def test_many_layers_are_listed_beside_the_picture(tmp_path: Path, saved: list[Figure]) -> None:
    plots.plot_sparsity(tmp_path / "a.png", STEPS, {f"layer{i}": staircase(i / 40) for i in range(40)}, "")
    figure = saved[0]
    legend = figure.axes[0].get_legend()
    assert len(legend.get_texts()) == 40
    box = legend.get_window_extent()
    assert box.x0 >= figure.axes[0].get_window_extent().x1
    assert box.y0 >= 0 and box.y1 <= figure.bbox.y1 and box.x1 <= figure.bbox.x1


def test_learning_rate_axis_shows_the_rates_themselves(tmp_path: Path, saved: list[Figure]) -> None:
    path = tmp_path / "learning_rate.png"
    plots.plot_learning_rate(path, [0, 1, 2, 3], [0.1, 0.1, 0.01, 0.001], "title", stages=STAGES)
    assert_is_png(path)
    axes = saved[0].axes[0]
    assert axes.get_yscale() == "log"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0.001", "0.01", "0.1"]


@pytest.mark.parametrize("values", [[0.1, 0.05, 0.0], [0.0, 0.0, 0.0]])
def test_a_learning_rate_of_zero_is_left_out(tmp_path: Path, values: list[float]) -> None:
    path = tmp_path / "learning_rate.png"
    plots.plot_learning_rate(path, [0, 1, 2], values, "")
    assert_is_png(path)


def test_accuracy_draws_the_mean_and_the_range(tmp_path: Path, saved: list[Figure]) -> None:
    path = tmp_path / "accuracy.png"
    series = {"a": [[0.9, 0.8], [0.7, 0.9]], "b": [[0.1, 0.95], [0.3, 0.95]]}
    plots.plot_accuracy(path, [0, 1], series, "title", baselines={"dense": 0.97}, stages=STAGES)
    assert_is_png(path)
    whole, enlarged = saved[0].axes
    for axes in (whole, enlarged):
        dense, a, b = axes.lines
        assert list(dense.get_ydata()) == [0.97, 0.97]
        assert list(a.get_ydata()) == pytest.approx([0.8, 0.85])
        assert list(b.get_ydata()) == pytest.approx([0.2, 0.95])
        band = axes.collections[0].get_paths()[0].vertices
        assert (band[:, 1].min(), band[:, 1].max()) == (0.7, 0.9)
    assert whole.get_ylim()[0] == 0.0
    assert enlarged.get_ylim() == pytest.approx((0.77, 1.0))
    assert [text.get_text() for text in saved[0].legends[0].get_texts()] == ["dense", "a", "b"]


def test_a_sweep_has_a_place_for_each_sparsity(tmp_path: Path, saved: list[Figure]) -> None:
    path = tmp_path / "sweep.png"
    plots.plot_sweep(path, [0.9, 0.975], {"a": [[0.9, 0.8], [0.7, 0.9]]}, "title", baselines={"dense": 0.97})
    assert_is_png(path)
    (axes,) = saved[0].axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["90%", "97.5%"]
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
        plots.plot_sparsity(path, [0, 1, 2], {"a": [0.1, 0.2]}, "")
    with pytest.raises(ShapeError, match="plot_learning_rate: expected one value per step"):
        plots.plot_learning_rate(path, [0, 1], [0.1], "")
    with pytest.raises(ShapeError, match="plot_accuracy: expected one value per epoch"):
        plots.plot_accuracy(path, [0, 1], {"a": [[0.1, 0.2], [0.1]]}, "", baselines={"dense": 1.0})
    with pytest.raises(ShapeError, match="plot_sweep: expected one value per sparsity"):
        plots.plot_sweep(path, [0.8, 0.9], {"a": [[0.1, 0.2], [0.1]]}, "", baselines={})
    with pytest.raises(ShapeError, match="at least one step"):
        plots.plot_sparsity(path, [], {}, "")
    assert not path.exists()


def test_drawing_neither_imports_pyplot_nor_chooses_a_backend(tmp_path: Path) -> None:
    program = f"""
import sys, matplotlib
before = dict.__getitem__(matplotlib.rcParams, "backend")
from pathlib import Path
from gmp_kernels.tools.plots import plot_sparsity
plot_sparsity(Path({str(tmp_path / "a.png")!r}), [0, 1], {{"a": [0.0, 0.5]}}, "")
assert "matplotlib.pyplot" not in sys.modules
assert dict.__getitem__(matplotlib.rcParams, "backend") is before
"""
    subprocess.run([sys.executable, "-c", program], check=True)
