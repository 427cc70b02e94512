"""What is on the pictures that are written."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from gmp_kernels import plots as shared
from gmp_kernels.tools import plots


def keep_figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Return a list that holds each figure as soon as it is written."""
    figures: list[Figure] = []
    save = shared.save

    def keep(figure: Figure, path: Path) -> None:
        figures.append(figure)
        save(figure, path)

    for module in (shared, plots):
        monkeypatch.setattr(module, "save", keep)
    return figures


def labels_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def title_of(figure: Figure) -> str:
    """Return the title in one line."""
    return figure.axes[0].get_title(loc="left").replace("\n", " ")
