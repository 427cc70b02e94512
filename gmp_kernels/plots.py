"""The picture of sparsity against optimizer steps, and what all pictures have in common.

Figures are built without pyplot, each on its own Agg canvas. So drawing needs no display and does not change the
matplotlib state of the program. Importing this module imports matplotlib.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

from gmp_kernels.errors import OutputError, ShapeError, printable

try:
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter
except ModuleNotFoundError as error:
    missing = str(error.name).partition(".")[0]
    raise ModuleNotFoundError(
        f"pictures: expected {missing} to be installed, got none; run: pip install 'gmp-kernels[cli]'", name=error.name
    ) from None

__all__ = [
    "COLORS",
    "FEW",
    "INK",
    "NO_PARTS",
    "STEPS",
    "Curves",
    "Parts",
    "check_lengths",
    "check_picture",
    "figure_of",
    "fit",
    "literal",
    "plot_sparsity",
    "put_title",
    "save",
    "shade",
    "style",
]

DPI = 130
INK = "#444444"
COLORS = ("#0b6fb8", "#e0701b", "#8a5aa8", "#2c8a4b", "#b23a48")
FORMATS = (".png", ".svg")
# More curves than this differ by shade instead of color.
FEW = 4
# Of more curves than this, the legend names half as many of the sparsest, and as many of the densest.
MOST_LISTED = 16
# Curves closer than this everywhere are one line to the eye: 0.5% of sparsity is less than a line's width.
COINCIDENT = 0.005
STEPS = "{x:,.10g}"  # numbers on an axis of optimizer steps; a run of few steps has marks between them
LEGEND_LINE = 0.2  # height of a line of the legend in inches
TITLE_WIDTH = 96  # characters per line of a title in a picture of 8 inches


Parts: TypeAlias = Mapping[str, tuple[float, float]]  # name, begin and end on the x axis
NO_PARTS: Parts = {}


class Curves(NamedTuple):
    """Sparsity against optimizer steps.

    Attributes
    ----------
    steps : sequence of int
        Optimizer steps done, ascending.
    total : sequence of float
        Sparsity of all layers together, a fraction, one value per step; NaN where it is not known.
    layers : mapping of str to sequence of float
        The same of each layer; empty if only the total is known.
    """

    steps: Sequence[int]
    total: Sequence[float]
    layers: Mapping[str, Sequence[float]]


def plot_sparsity(
    path: str | PathLike[str],
    curves: Curves,
    title: str,
    *,
    target: Curves | None = None,
    updates: Sequence[int] = (),
    now: int | None = None,
    parts: Parts = NO_PARTS,
) -> None:
    """Draw sparsity against optimizer steps, as staircases, into a PNG or SVG file.

    One line shows all layers together. Layers that differ from it get lines of their own. Those that coincide are drawn
    once, and the legend gives their number.

    Parameters
    ----------
    path : path
        File to write; its suffix gives the format.
    curves : Curves
        A value holds from its step to the next one.
    title : str
    target : Curves, optional
        What the schedules ask for, drawn as thin lines, for the same layers or none.
    updates : sequence of int
        Steps to mark.
    now : int, optional
        Step that a vertical line marks as the present.
    parts : mapping of str to (int, int)
        {name: (first step, last step)} of the parts of the run, to write above; the second is shaded.

    Raises
    ------
    OutputError
        The suffix is neither .png nor .svg. No file is written.
    ShapeError
        A curve does not have one value per step. No file is written.
    """
    check_picture(path)
    for one in (curves, target or curves):
        check_lengths("plot_sparsity", "step", one.steps, [("total", one.total), *one.layers.items()])
    like_total, *groups = _alike(curves, target)
    figure, axes = figure_of(title, num_listed=min(len(groups), MOST_LISTED))
    label = _label_of_total(like_total, is_alone=not groups)
    axes.step(curves.steps, curves.total, where="post", color=INK, linewidth=2.2, label=label, zorder=3)
    if target is not None:
        axes.plot(target.steps, target.total, color=INK, linewidth=0.8, label="target of the schedule")
    for i, names in enumerate(groups):
        color = COLORS[i] if len(groups) <= FEW else colormaps["viridis"](i / len(groups))
        label = literal(names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more")
        if MOST_LISTED // 2 <= i < len(groups) - MOST_LISTED // 2:
            label = f"{len(groups) - MOST_LISTED} more curves between" if i == MOST_LISTED // 2 else "_"
        axes.step(curves.steps, curves.layers[names[0]], where="post", color=color, linewidth=1.3, label=label)
        if target is not None and target.layers:
            axes.plot(target.steps, target.layers[names[0]], color=color, linewidth=0.7)
    if updates:
        axes.plot(updates, [0.012] * len(updates), "|", color=INK, alpha=0.7, markersize=7, label="updates")
    if now is not None:
        axes.axvline(now, color=INK, linewidth=0.8, linestyle=":", label=f"now, step {now}")
    axes.set(xlabel="optimizer steps", ylabel="sparsity: share of weights pruned", ylim=(-0.01, 1.03))
    axes.xaxis.set_major_formatter(STEPS)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    if groups:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize="small")
    else:
        # Above the marks of the updates.
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 0.05), frameon=False, fontsize="small")
    fit(axes, sorted([*curves.steps, *(target.steps if target else ())]))
    shade(axes, parts)
    save(figure, path)


def check_picture(path: str | PathLike[str]) -> str:
    """Return the format that the suffix of a picture's path names, "png" or "svg"; else raise OutputError."""
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise OutputError(
            f"{path}: expected the name of a picture that ends in .png or .svg, got {suffix or 'no suffix'}"
        )
    return suffix.removeprefix(".")


def check_lengths(
    op: str, unit: str, positions: Sequence[float], series: Iterable[tuple[str, Sequence[float]]]
) -> None:
    """Raise ShapeError if there are no positions, or a series does not have one value for each."""
    if not positions:
        raise ShapeError(f"{op}: expected at least one {unit}, got none; there is nothing to draw")
    for name, values in series:
        if len(values) != len(positions):
            raise ShapeError(
                f"{op}: expected one value per {unit} ({len(positions)}) for '{name}', got {len(values)}; "
                f"pass the {unit}s they belong to"
            )


def figure_of(title: str, num_listed: int = 0) -> tuple[Figure, Axes]:
    """Return a figure with one plot, large enough for a legend of ``num_listed`` lines beside it."""
    size = (11.0, max(4.2, LEGEND_LINE * (num_listed + 4))) if num_listed else (8.0, 4.2)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    axes: Axes = figure.subplots()
    put_title(axes, title)
    style(axes)
    return figure, axes


def literal(text: str) -> str:
    """Return a name so that matplotlib draws it literally: no formula between two dollars, and no control characters.

    A name that begins with an underscore gets a space in front, because the legend would leave it out.
    """
    shown = printable(text).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def style(axes: Axes) -> None:
    """Draw two spines and horizontal lines only."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def fit(axes: Axes, positions: Sequence[float]) -> None:
    """Let the x axis run from the first position to the last."""
    # A run of one step has equal ends, which matplotlib does not take as a range.
    axes.set_xlim(positions[0], max(positions[-1], positions[0] + 1))


def put_title(axes: Axes, title: str) -> None:
    """Write a title, in several lines if it is long."""
    lines = textwrap.wrap(printable(title), TITLE_WIDTH, break_on_hyphens=False)
    # The padding leaves room for the names of the stages between title and axes.
    axes.set_title("\n".join(map(literal, lines)), loc="left", color=INK, pad=18, fontsize="medium")


def shade(axes: Axes, parts: Parts) -> None:
    """Write the names of the parts of a run above the axes, and shade every other part."""
    left, right = axes.get_xlim()
    for i, (part, (begin, end)) in enumerate(parts.items()):
        if i % 2:
            axes.axvspan(begin, end, color="#f1f1f1", zorder=0, linewidth=0)
        # A part that is too short for its name can be recognized by the shade beside it.
        if end - begin > 0.12 * (right - left):
            name = axes.annotate(
                part,
                ((begin + end) / 2, 1.0),
                xycoords=axes.get_xaxis_transform(),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize="small",
                color="#777777",
            )
            # The name stands in the padding of the title. Without this, a part beyond the last step drawn would push
            # the axes aside.
            name.set_in_layout(False)


def save(figure: Figure, path: str | PathLike[str]) -> None:
    """Write a figure in the format that the path's suffix names. If drawing fails, no file is written."""
    FigureCanvasAgg(figure)
    picture = io.BytesIO()
    figure.savefig(picture, format=check_picture(path), dpi=DPI)
    Path(path).write_bytes(picture.getvalue())


def _alike(curves: Curves, target: Curves | None) -> list[list[str]]:
    """Return the layers like the total, then groups of layers that coincide, the sparsest first."""

    def values_of(one: str | None) -> np.ndarray:
        parts = [curves, target] if target is not None and target.layers else [curves]
        return np.concatenate([part.total if one is None else part.layers[one] for part in parts])

    total = values_of(None)
    groups: list[tuple[np.ndarray, list[str]]] = [(total, [])]
    for name in curves.layers:
        # Of a layer less may be known than of the total.
        values = np.where(np.isnan(values_of(name)), total, values_of(name))
        for drawn, names in groups:
            if np.allclose(drawn, values, rtol=0, atol=COINCIDENT, equal_nan=True):
                names.append(name)
                break
        else:
            groups.append((values, [name]))
    like_total, *others = groups
    others.sort(key=lambda group: np.nan_to_num(group[0])[::-1].tolist(), reverse=True)
    return [names for _, names in [like_total, *others]]


def _label_of_total(like_total: Sequence[str], *, is_alone: bool) -> str:
    if not like_total:
        return "total"
    name = literal(like_total[0]) if len(like_total) == 1 else f"{len(like_total)} layers alike"
    if is_alone:
        return name if len(like_total) == 1 else f"all {len(like_total)} layers"
    return f"total, and {name}"
