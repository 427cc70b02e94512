"""What every table of the command line looks like."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.table import Table

__all__ = ["new_table"]


def new_table(*columns: str, right: Iterable[int] = ()) -> Table:
    """Return an empty table; the columns at the positions ``right`` are flush right, and never cut short."""
    made = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for position in right:
        made.columns[position].justify = "right"
        made.columns[position].no_wrap = True
    return made
