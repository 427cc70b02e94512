"""Look of every table of the command line."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

__all__ = ["new_table", "print_whole"]

WIDEST = 1 << 16


def new_table(*columns: str, right: Iterable[int] = ()) -> Table:
    """Return an empty table; the columns at the positions ``right`` are flush right, and never cut short."""
    made = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for position in right:
        made.columns[position].justify = "right"
        made.columns[position].no_wrap = True
    return made


def print_whole(console: Console, table: Table) -> None:
    """Print a table as wide as it is, on a console of any width: pieces of names can be neither read nor found."""
    narrow = console.width
    console.width = max(narrow, Measurement.get(console, console.options.update(max_width=WIDEST), table).maximum)
    console.print(table)
    console.width = narrow
