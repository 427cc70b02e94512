"""Text output of the commands, and their tables. All output goes through here, and none is taken for markup."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence

from rich.cells import cell_len

from gmp_kernels.errors import printable

__all__ = ["Table", "say", "show"]

GAP = "   "
MOST_RULE = 40


class Table:
    """Rows of text under headings. Columns are as wide as their cells, so that no name is cut and all can be searched.

    Parameters
    ----------
    *columns : str
        Headings.
    right : iterable of int
        Positions of the columns that are flush right.
    """

    def __init__(self, *columns: str, right: Iterable[int] = ()) -> None:
        self._rows: list[list[str]] = [list(columns)]
        self._right = set(right)

    def add_row(self, *cells: str) -> None:
        """Add a row with one cell per column."""
        self._rows.append([printable(cell) for cell in cells])

    def lines(self) -> Iterator[str]:
        """Yield the headings, a rule, and the rows, in time linear in their number."""
        widths = self._widths()
        yield from self._heading(widths)
        for row in self._rows[1:]:
            yield self._line(row, widths)

    def streamed(self, rows: Iterable[Sequence[str]]) -> Iterator[str]:
        """Yield the headings, a rule, and then ``rows`` one by one. Columns are as wide as the rows added before."""
        widths = self._widths()
        yield from self._heading(widths)
        for row in rows:
            yield self._line([printable(cell) for cell in row], widths)

    def _widths(self) -> list[int]:
        return [max(map(cell_len, column)) for column in zip(*self._rows, strict=True)]

    def _heading(self, widths: Sequence[int]) -> Iterator[str]:
        yield self._line(self._rows[0], widths)
        # The last column may have long sentences. A rule of that width would wrap.
        yield GAP.join("─" * width for width in [*widths[:-1], min(widths[-1], MOST_RULE)]).replace(" ", "─")

    def _line(self, row: Sequence[str], widths: Sequence[int]) -> str:
        cells = []
        for position, (cell, width) in enumerate(zip(row, widths, strict=True)):
            padding = " " * (width - cell_len(cell))
            cells.append(padding + cell if position in self._right else cell + padding)
        return GAP.join(cells).rstrip()


def say(text: str, *, error: bool = False, flush: bool = False) -> None:
    """Print one line to standard output, or with ``error`` to standard error; escape unprintable characters.

    With ``flush`` the line can be read at once, even in a file or a pipe.
    """
    stream = sys.stderr if error else sys.stdout
    encoding = stream.encoding or "utf-8"
    # Characters outside the encoding of the stream are escaped too.
    stream.write(printable(text).encode(encoding, "backslashreplace").decode(encoding) + "\n")
    if flush:
        stream.flush()


def show(table: Table) -> None:
    """Print a table between two empty lines."""
    for line in ("", *table.lines(), ""):
        say(line)
