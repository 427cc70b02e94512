"""Pictures of pruning runs, of the weights of a checkpoint, and of measured ratios, as PNG files.

Figures are built without pyplot, each on its own Agg canvas. So drawing needs no display and does not change the
matplotlib state of the program.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from gmp_kernels.errors import ShapeError, printable
from gmp_kernels.stages import Stages

__all__ = ["plot_accuracy", "plot_histogram", "plot_learning_rate", "plot_ratios", "plot_sparsity", "plot_sweep"]

DPI = 130
INK = "#444444"
COLORS = ("#0b6fb8", "#e0701b", "#8a5aa8", "#2c8a4b", "#b23a48")
# More curves than this differ by shade instead of color, and their legend is beside the picture instead of on it.
FEW = 4
# Curves closer than this everywhere are one line to the eye: 0.5% of sparsity is less than a line's width.
COINCIDENT = 0.005
# Height of a line of the legend in inches.
LEGEND_LINE = 0.2
# Up to this many learning rates, the axis shows the rates themselves instead of powers of ten.
FEW_RATES = 8
# Height of the enlarged part of the accuracy picture, below the best baseline.
ENLARGED = 0.2


def plot_sparsity(
    path: Path,
    steps: Sequence[int],
    series: Mapping[str, Sequence[float]],
    title: str,
    *,
    stages: Stages | None = None,
) -> None:
    """Draw sparsity against optimizer steps, a staircase per layer, into a PNG file.

    Parameters
    ----------
    path : Path
        File to write.
    steps : sequence of int
        Optimizer steps done, ascending; a value holds from its step to the next one.
    series : mapping of str to sequence of float
        {layer: sparsity as a fraction}, one value per step. Curves that coincide, as they do if all layers have the
        same sparsity, are drawn once, and the legend gives their number.
    title : str
    stages : Stages, optional
        Stages to shade in the background.

    Raises
    ------
    ShapeError
        A series does not have one value per step. No file is written.
    """
    _check_lengths("plot_sparsity", "step", steps, series.items())
    curves: list[tuple[Sequence[float], list[str]]] = []
    for name, values in series.items():
        for drawn, names in curves:
            if all(abs(a - b) <= COINCIDENT for a, b in zip(drawn, values, strict=True)):
                names.append(name)
                break
        else:
            curves.append((values, [name]))

    many = len(curves) > FEW
    figure, axes = _figure(title, num_listed=len(curves) if many else 0)
    for i, (values, names) in enumerate(curves):
        label = _literal(names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more")
        if len(names) == len(series) > 1:
            label = f"all {len(series)} layers"
        color = colormaps["viridis"](i / len(curves)) if many else COLORS[i]
        axes.step(steps, values, where="post", color=color, linewidth=1.6, label=label)
    axes.set(xlabel="optimizer steps", ylabel="sparsity", ylim=(0, 1.03))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if many:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize="small")
    else:
        axes.legend(loc="lower right", frameon=False)
    _fit(axes, steps)
    _shade(axes, stages)
    _save(figure, path)


def plot_learning_rate(
    path: Path, steps: Sequence[int], values: Sequence[float], title: str, *, stages: Stages | None = None
) -> None:
    """Draw the learning rate against optimizer steps, on a logarithmic axis, into a PNG file.

    Parameters
    ----------
    path : Path
        File to write.
    steps : sequence of int
        Optimizer steps done, ascending; a value holds from its step to the next one.
    values : sequence of float
        Learning rate, one per step. Zeros are left out, because the axis is logarithmic.
    title : str
    stages : Stages, optional
        Stages to shade in the background.

    Raises
    ------
    ShapeError
        There is not one value per step. No file is written.
    """
    _check_lengths("plot_learning_rate", "step", steps, [("learning rate", values)])
    figure, axes = _figure(title)
    axes.step(steps, values, where="post", color=COLORS[0], linewidth=1.8)
    positive = [value for value in values if value > 0]
    if positive:
        axes.set_yscale("log", nonpositive="mask")
        axes.set_ylim(min(positive) / 2, max(positive) * 2)
        if len(set(positive)) <= FEW_RATES:
            axes.set_yticks(sorted(set(positive)), [f"{value:g}" for value in sorted(set(positive))])
            axes.minorticks_off()
    axes.set(xlabel="optimizer steps", ylabel="learning rate")
    _fit(axes, steps)
    _shade(axes, stages)
    _save(figure, path)


def plot_accuracy(
    path: Path,
    epochs: Sequence[float],
    series: Mapping[str, Sequence[Sequence[float]]],
    title: str,
    *,
    baselines: Mapping[str, float],
    stages: Stages | None = None,
) -> None:
    """Draw test accuracy against epochs into a PNG file: the whole range, and below it the range near the baselines.

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
    stages : Stages, optional
        Stages to shade in the background.

    Raises
    ------
    ShapeError
        A curve does not have one value per epoch. No file is written.
    """
    _check_lengths("plot_accuracy", "epoch", epochs, ((name, run) for name, runs in series.items() for run in runs))
    figure = Figure(figsize=(8.0, 6.4), layout="constrained")
    whole, enlarged = figure.subplots(2, sharex=True, height_ratios=(2, 3))
    for axes in (whole, enlarged):
        _draw_runs(axes, epochs, series, baselines)
        axes.set_ylabel("test accuracy")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        _style(axes)
    _title(whole, title)
    whole.set_ylim(0, 1.03)
    best = max(baselines.values())
    enlarged.set_ylim(best - ENLARGED, min(1.0, best + ENLARGED / 4))
    enlarged.set_xlabel("epochs")
    _fit(enlarged, epochs)
    for axes in (whole, enlarged):
        _shade(axes, stages, 1 if stages is None else stages.steps_per_epoch)
    figure.legend(*whole.get_legend_handles_labels(), loc="outside lower center", ncols=FEW, frameon=False)
    _save(figure, path)


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
    _check_lengths("plot_sweep", "sparsity", sparsities, ((name, run) for name, runs in series.items() for run in runs))
    figure, axes = _figure(title)
    # Equal distances, because the sparsities that matter lie close together near 1.
    positions = range(len(sparsities))
    _draw_runs(axes, positions, series, baselines, marker="o")
    axes.set_xticks(positions, [f"{100 * sparsity:g}%" for sparsity in sparsities])
    axes.set(xlabel="sparsity", ylabel="test accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.legend(loc="lower left", frameon=False)
    _save(figure, path)


def plot_histogram(
    path: Path, series: Mapping[str, Mapping[int, int]], title: str, *, bins_per_octave: int = 1
) -> None:
    """Draw a histogram of magnitudes, on a logarithmic axis, into a PNG file.

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
    figure, axes = _figure(title)
    low, high = min(total), max(total)
    # The axis shows exponents, because twice the largest magnitude of float64 is not a finite number.
    edges = [b / bins_per_octave for b in range(low, high + 2)]

    def shares(counts: Mapping[int, int]) -> list[float]:
        num = sum(counts.values())
        return [counts.get(b, 0) / num for b in range(low, high + 1)]

    for i, (name, counts) in enumerate(drawn.items()):
        color = colormaps["viridis"](i / len(drawn)) if many else COLORS[i]
        label = None if many else _literal(name)
        axes.stairs(shares(counts), edges, color=color, linewidth=0.8 if many else 1.6, label=label)
    if len(drawn) > 1:
        axes.stairs(shares(total), edges, color=INK, linewidth=2.0, label=f"all {len(drawn)} tensors")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(lambda x, _: f"$2^{{{x:g}}}$")
    # The peak of a tensor whose weights are all alike, such as a norm, may be cut off. Otherwise it would flatten the
    # other curves.
    top = min(max(max(shares(counts)) for counts in drawn.values()), 2 * max(shares(total)))
    axes.set(xlabel="magnitude", ylabel="share of the weights that are not zero", ylim=(0, 1.05 * top))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.legend(loc="upper left", frameon=False, fontsize="small")
    _save(figure, path)


def plot_ratios(path: Path, rows: Mapping[str, tuple[float, float, float | None]], title: str) -> None:
    """Draw measured ratios as horizontal bars on a logarithmic axis, with the bounds they are held to, into a PNG file.

    Parameters
    ----------
    path : Path
        File to write.
    rows : mapping of str to (float, float, float or None)
        {name: (ratio, must, aim)}, from top to bottom. Ratios are positive, and lower is better. Bars above must are
        red.
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
    positions = range(len(rows))
    ratios, musts, aims = zip(*rows.values(), strict=True)
    colors = [COLORS[0] if ratio <= must else COLORS[4] for ratio, must in zip(ratios, musts, strict=True)]
    # Bars start at 1, the baseline. A dot marks the end of each, because some are too short to see.
    axes.barh(positions, [ratio - 1 for ratio in ratios], left=1, height=0.45, color=colors)
    axes.scatter(ratios, positions, s=35, color=colors, zorder=3)
    for bounds, color, label in ((musts, INK, "must"), (aims, COLORS[1], "aim")):
        marks = [math.nan if bound is None else bound for bound in bounds]
        axes.plot(marks, positions, "|", color=color, markersize=14, markeredgewidth=2.5, label=label, zorder=4)
    for position, ratio in enumerate(ratios):
        axes.text(1.01, position, f"{ratio:.3g}", transform=axes.get_yaxis_transform(), va="center", color=INK)
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}" if x >= 1 else f"1/{1 / x:g}")
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_yticks(positions, [_literal(name) for name in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("ours / baseline, medians; lower is better")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.suptitle(_literal(title), color=INK)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    _save(figure, path)


def _check_lengths(
    op: str, unit: str, positions: Sequence[float], series: Iterable[tuple[str, Sequence[float]]]
) -> None:
    if not positions:
        raise ShapeError(f"{op}: expected at least one {unit}, got none; there is nothing to draw")
    for name, values in series:
        if len(values) != len(positions):
            raise ShapeError(
                f"{op}: expected one value per {unit} ({len(positions)}) for '{name}', got {len(values)}; "
                f"pass the {unit}s they belong to"
            )


def _figure(title: str, num_listed: int = 0) -> tuple[Figure, Axes]:
    """Return a figure with one plot, high enough for a legend of ``num_listed`` lines beside it."""
    figure = Figure(figsize=(8.0, max(4.2, LEGEND_LINE * num_listed)), layout="constrained")
    axes: Axes = figure.subplots()
    _title(axes, title)
    _style(axes)
    return figure, axes


def _draw_runs(
    axes: Axes,
    positions: Sequence[float],
    series: Mapping[str, Sequence[Sequence[float]]],
    baselines: Mapping[str, float],
    marker: str | None = None,
) -> None:
    """Draw baselines, and for each method the mean of its repetitions in a band from the lowest to the highest."""
    for name, value in baselines.items():
        axes.axhline(value, color=INK, linewidth=1.2, linestyle="--", label=_literal(name))
    for color, (name, runs) in zip(itertools.cycle(COLORS), series.items(), strict=False):
        per_position = list(zip(*runs, strict=True))
        mean = [sum(values) / len(values) for values in per_position]
        axes.plot(positions, mean, color=color, linewidth=1.8, marker=marker, label=_literal(name))
        lowest, highest = [min(values) for values in per_position], [max(values) for values in per_position]
        axes.fill_between(positions, lowest, highest, color=color, alpha=0.15, linewidth=0)


def _literal(text: str) -> str:
    """Return a name so that matplotlib draws it literally: no formula between two dollars, and no control characters.

    A name that begins with an underscore gets a space in front, because the legend would leave it out.
    """
    shown = printable(text).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _fit(axes: Axes, positions: Sequence[float]) -> None:
    # A run of one step has equal ends, which matplotlib does not take as a range.
    axes.set_xlim(positions[0], max(positions[-1], positions[0] + 1))


def _title(axes: Axes, title: str) -> None:
    # The padding leaves room for the names of the stages between title and axes.
    axes.set_title(_literal(title), loc="left", color=INK, pad=18)


def _shade(axes: Axes, stages: Stages | None, unit: float = 1) -> None:
    """Shade the pruning stage and write the names of the stages above; ``unit`` is the number of steps per x unit."""
    if stages is None:
        return
    ends = [0, stages.pruning_begin_step, stages.pruning_end_step, stages.total_steps]
    axes.axvspan(ends[1] / unit, ends[2] / unit, color="#f1f1f1", zorder=0, linewidth=0)
    for begin, end in itertools.pairwise(ends):
        # A stage that is too short for its name can be recognized by the shade beside it.
        if end - begin > 0.12 * stages.total_steps:
            name = axes.annotate(
                stages.stage_at(begin),
                ((begin + end) / 2 / unit, 1.0),
                xycoords=axes.get_xaxis_transform(),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize="small",
                color="#777777",
            )
            # The name stands in the padding of the title. Without this, a stage beyond the last step drawn would push
            # the axes aside.
            name.set_in_layout(False)


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", dpi=DPI)
