"""Pictures of runs, of the weights of a checkpoint, and of measured ratios, as PNG or SVG files by their suffix."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from gmp_kernels.errors import ShapeError
from gmp_kernels.plots import (
    COLORS,
    FEW,
    INK,
    NO_PARTS,
    STEPS,
    Curves,
    Parts,
    check_lengths,
    figure_of,
    fit,
    literal,
    plot_sparsity,
    put_title,
    save,
    shade,
    style,
)
from gmp_kernels.tools.plan import TOGETHER, Course

__all__ = ["Bar", "plot_accuracy", "plot_course", "plot_histogram", "plot_learning_rate", "plot_ratios", "plot_sweep"]

# Up to this many learning rates, the axis shows the rates themselves.
FEW_RATES = 8
# A range of rates that is wider than this is drawn on a linear axis: they fall to 0, which no logarithm reaches.
WIDEST_RANGE = 1e4
# Staircases of more steps than this look the same as those of fewer.
MOST_UPDATES = 400
# Height of the enlarged part of the accuracy picture, below the best baseline.
ENLARGED = 0.2


def plot_course(path: Path, course: Course, title: str) -> None:
    """Draw the sparsity of a planned run against optimizer steps: the total, and the layers that differ from it."""
    steps = sorted({step for updates in course.updates for step in updates})
    steps = [0, *steps[:: max(1, len(steps) // MOST_UPDATES)], *steps[-1:], course.total_steps]
    counts = [course.num_prune(step) for step in steps]
    total = [sum(at.values()) / course.num_weights for at in counts]
    # Of layers ranked together, the weights decide which are pruned.
    known = {} if TOGETHER in counts[0] else course.layers
    layers = {name: [at[name] / math.prod(shape) for at in counts] for name, shape in known.items()}
    plot_sparsity(path, Curves(steps, total, layers), title, parts=course.stages)


def plot_learning_rate(
    path: Path, steps: Sequence[int], values: Sequence[float], title: str, *, parts: Parts = NO_PARTS
) -> None:
    """Draw the learning rate against optimizer steps.

    The axis is logarithmic, unless the rate falls to 0 or nearly so.

    Parameters
    ----------
    path : Path
        File to write.
    steps : sequence of int
        Optimizer steps done, ascending; a value holds from its step to the next one.
    values : sequence of float
        Learning rate, one per step.
    title : str
    parts : mapping of str to (float, float)
        {name: (begin, end)} of the stages, on the x axis.

    Raises
    ------
    ShapeError
        There is not one value per step. No file is written.
    """
    check_lengths("plot_learning_rate", "step", steps, [("learning rate", values)])
    figure, axes = figure_of(title)
    axes.step(steps, values, where="post", color=COLORS[0], linewidth=1.8)
    lowest, highest, scale = min(values), max(values), ""
    if 0 < highest <= WIDEST_RANGE * lowest:
        axes.set_yscale("log")
        scale = " (log scale)"
        axes.set_ylim(lowest / 2, highest * 2)
    else:
        axes.set_ylim(0, 1.05 * highest or 1)
        axes.yaxis.set_major_formatter("{x:g}")
    if len(set(values)) <= FEW_RATES:
        axes.set_yticks(sorted(set(values)), [f"{value:g}" for value in sorted(set(values))])
        axes.minorticks_off()
    axes.set(xlabel="optimizer steps", ylabel=f"learning rate{scale}")
    axes.xaxis.set_major_formatter(STEPS)
    fit(axes, steps)
    shade(axes, parts)
    save(figure, path)


def plot_accuracy(
    path: Path,
    epochs: Sequence[float],
    series: Mapping[str, Sequence[Sequence[float]]],
    title: str,
    *,
    baselines: Mapping[str, float],
    parts: Parts = NO_PARTS,
) -> None:
    """Draw test accuracy against epochs: the whole range, and below it the range near the baselines.

    Parameters
    ----------
    path : Path
        File to write.
    epochs : sequence of float
        Epochs done, ascending.
    series : mapping of str to sequence of sequence of float
        {method: one curve per repetition}, accuracy as a fraction, one value per epoch. The line is the mean of the
        repetitions; the band around it runs from the lowest to the highest.
    title : str
    baselines : mapping of str to float
        {name: accuracy}, at least one, drawn as dashed horizontal lines.
    parts : mapping of str to (float, float)
        {name: (begin, end)} of the stages, on the x axis.

    Raises
    ------
    ShapeError
        A curve does not have one value per epoch. No file is written.
    """
    check_lengths("plot_accuracy", "epoch", epochs, ((name, run) for name, runs in series.items() for run in runs))
    figure = Figure(figsize=(8.0, 6.4), layout="constrained")
    whole, enlarged = figure.subplots(2, sharex=True, height_ratios=(2, 3))
    for axes, label in ((whole, "test accuracy"), (enlarged, "test accuracy, enlarged")):
        _draw_runs(axes, epochs, series, baselines)
        axes.set_ylabel(label)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        style(axes)
    put_title(whole, title)
    whole.set_ylim(0, 1.03)
    best = max(baselines.values())
    enlarged.set_ylim(best - ENLARGED, min(1.0, best + ENLARGED / 4))
    enlarged.set_xlabel("epochs")
    fit(enlarged, epochs)
    for axes in (whole, enlarged):
        shade(axes, parts)
    figure.legend(*whole.get_legend_handles_labels(), loc="outside lower center", ncols=FEW, frameon=False)
    save(figure, path)


def plot_sweep(
    path: Path,
    sparsities: Sequence[float],
    series: Mapping[str, Sequence[Sequence[float]]],
    title: str,
    *,
    baselines: Mapping[str, float],
) -> None:
    """Draw final test accuracy against final sparsity into a PNG file, one place on the axis for each sparsity.

    Parameters
    ----------
    path : Path
        File to write.
    sparsities : sequence of float
        Fractions, ascending.
    series : mapping of str to sequence of sequence of float
        {method: one curve per repetition}, accuracy as a fraction, one value per sparsity. Drawn as by
        ``plot_accuracy``.
    title : str
    baselines : mapping of str to float
        {name: accuracy}, drawn as dashed horizontal lines.

    Raises
    ------
    ShapeError
        A curve does not have one value per sparsity. No file is written.
    """
    check_lengths("plot_sweep", "sparsity", sparsities, ((name, run) for name, runs in series.items() for run in runs))
    figure, axes = figure_of(title)
    # Equal distances, because the sparsities that matter lie close together near 1.
    positions = range(len(sparsities))
    _draw_runs(axes, positions, series, baselines, marker="o")
    axes.set_xticks(positions, [f"{100 * sparsity:g}%" for sparsity in sparsities])
    axes.set(xlabel="sparsity (not to scale)", ylabel="test accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(loc="lower left", frameon=False)
    save(figure, path)


def plot_histogram(
    path: Path, series: Mapping[str, Mapping[int, int]], title: str, *, bins_per_octave: int = 1
) -> None:
    """Draw a histogram of magnitudes, on a logarithmic axis.

    Parameters
    ----------
    path : Path
        File to write.
    series : mapping of str to mapping of int to int
        {tensor: {b: number of magnitudes in [2^(b/bins_per_octave), 2^((b+1)/bins_per_octave))}}. A count is drawn as
        its share of the magnitudes of its tensor. One more line shows all tensors together.
    title : str
    bins_per_octave : int

    Raises
    ------
    ShapeError
        There are no magnitudes. No file is written.
    """
    drawn = {name: counts for name, counts in series.items() if counts}
    if not drawn:
        raise ShapeError("plot_histogram: expected at least one magnitude, got none; there is nothing to draw")
    total: Counter[int] = Counter()
    for counts in drawn.values():
        total.update(counts)
    many = len(drawn) > FEW
    figure, axes = figure_of(title)
    low, high = min(total), max(total)
    # The axis shows exponents, because twice the largest magnitude of float64 is not a finite number.
    edges = [b / bins_per_octave for b in range(low, high + 2)]

    def shares(counts: Mapping[int, int]) -> list[float]:
        num = sum(counts.values())
        return [counts.get(b, 0) / num for b in range(low, high + 1)]

    for i, (name, counts) in enumerate(drawn.items()):
        color = colormaps["viridis"](i / len(drawn)) if many else COLORS[i]
        label = None if many else literal(name)
        axes.stairs(shares(counts), edges, color=color, linewidth=0.8 if many else 1.6, label=label)
    if len(drawn) > 1:
        axes.stairs(shares(total), edges, color=INK, linewidth=2.0, label=f"all {len(drawn)} tensors")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(lambda x, _: f"$2^{{{x:g}}}$")
    # The peak of a tensor whose weights are all alike, such as a norm, may be cut off. Otherwise it would flatten the
    # other curves.
    top = min(max(max(shares(counts)) for counts in drawn.values()), 2 * max(shares(total)))
    axes.set(xlabel="magnitude", ylabel="share of the weights that are not zero", ylim=(0, 1.05 * top))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(loc="upper left", frameon=False, fontsize="small")
    save(figure, path)


class Bar(NamedTuple):
    """One row of the speed table.

    Attributes
    ----------
    ratios : sequence of float
        Ours / baseline in each process that measured the row, positive; lower is better.
    text : str
        The number, or numbers, to write beside it.
    must, aim : float or None
        The bounds it is held to.
    is_missed : bool
    """

    ratios: Sequence[float]
    text: str
    must: float | None = None
    aim: float | None = None
    is_missed: bool = False


def plot_ratios(path: Path, rows: Mapping[str, Bar], title: str) -> None:
    """Draw measured ratios as horizontal bars on a logarithmic axis, with the bounds they are held to.

    A bar ends at the median of the processes. A dot shows each process.

    Parameters
    ----------
    path : Path
        File to write.
    rows : mapping of str to Bar
        From top to bottom. Bars that miss their bound are red.
    title : str

    Raises
    ------
    ShapeError
        There are no rows. No file is written.
    """
    if not rows:
        raise ShapeError("plot_ratios: expected at least one row, got none; there is nothing to draw")
    figure = Figure(figsize=(10.0, 1.8 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    bars = list(rows.values())
    positions = range(len(bars))
    colors = [COLORS[4] if bar.is_missed else COLORS[0] for bar in bars]
    # Bars start at 1, the baseline.
    axes.barh(positions, [statistics.median(bar.ratios) - 1 for bar in bars], left=1, height=0.45, color=colors)
    for position, bar, color in zip(positions, bars, colors, strict=True):
        axes.plot([min(bar.ratios), max(bar.ratios)], [position] * 2, color=color, linewidth=1)
        axes.scatter(bar.ratios, [position] * len(bar.ratios), s=22, color=color, edgecolors="white", zorder=3)
        axes.text(1.01, position, bar.text, transform=axes.get_yaxis_transform(), va="center", color=INK)
    for bounds, color, label in (
        ([bar.must for bar in bars], INK, "must: the bound; red if missed"),
        ([bar.aim for bar in bars], COLORS[1], "aim"),
    ):
        marks = [math.nan if bound is None else bound for bound in bounds]
        if any(bound is not None for bound in bounds):
            axes.plot(marks, positions, "|", color=color, markersize=14, markeredgewidth=2.5, label=label, zorder=4)
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}" if x >= 1 else f"1/{1 / x:g}")
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_yticks(positions, [literal(name) for name in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("ours / baseline; a dot per process, a bar to their median; lower is better")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.suptitle(literal(title), color=INK)
    if axes.get_legend_handles_labels()[1]:
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
    save(figure, path)


def _draw_runs(
    axes: Axes,
    positions: Sequence[float],
    series: Mapping[str, Sequence[Sequence[float]]],
    baselines: Mapping[str, float],
    marker: str | None = None,
) -> None:
    """Draw baselines, and for each method the mean of its repetitions in a band from the lowest to the highest."""
    for name, value in baselines.items():
        axes.axhline(value, color=INK, linewidth=1.2, linestyle="--", label=literal(name))
    for color, (name, runs) in zip(itertools.cycle(COLORS), series.items(), strict=False):
        per_position = list(zip(*runs, strict=True))
        mean = [sum(values) / len(values) for values in per_position]
        axes.plot(positions, mean, color=color, linewidth=1.8, marker=marker, label=literal(name))
        lowest, highest = [min(values) for values in per_position], [max(values) for values in per_position]
        axes.fill_between(positions, lowest, highest, color=color, alpha=0.15, linewidth=0)
