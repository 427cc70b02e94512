"""Options of the command line: their display in the help, and the errors for wrong values."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from gmp_kernels.errors import OutputError

__all__ = ["Command", "Group", "UsageError", "drawing", "in_one_line"]

# The base class of all that typer raises for a wrong command line. typer exports no name for it.
UsageError: type[Exception] = typer.BadParameter.__base__  # type: ignore[assignment]


class _FlagsWithoutValue:
    """Mixin for commands: the help shows no placeholder for a value after flags, which take none."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters, including the help option."""
        parameters: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for parameter in parameters:
            if getattr(parameter, "is_flag", False):
                parameter.metavar = ""
        return parameters


class Command(_FlagsWithoutValue, TyperCommand):
    """A command with options."""


class Group(_FlagsWithoutValue, TyperGroup):
    """A command with commands below it."""


def in_one_line(error: Exception) -> str:
    """Return typer's error in the form of the library's errors: option, expected value, given value."""
    message: str = error.format_message()  # type: ignore[attr-defined]
    found = re.fullmatch(
        r"Invalid value for '?(?P<option>[^:']+)'?: (Value error, )?(?P<reason>.*)", message, re.DOTALL
    )
    if found is None:
        return message
    reason = found["reason"]
    if choice := re.fullmatch(r"(?P<value>.*) is not one of (?P<names>'.*')\.?", reason, re.DOTALL):
        *names, last = choice["names"].split(", ")
        reason = f"expected {', '.join(names)} or {last}, got {choice['value']}"
    elif limit := re.match(r"Input should be (?P<limit>[^,]*)", reason):
        value = error.__cause__.errors()[0]["input"]  # type: ignore[union-attr]
        what = limit["limit"] if limit["limit"].startswith("a") else f"a number {limit['limit']}"
        reason = f"expected {what}, got {value!r}"
    return f"{found['option']}: {reason}"


def drawing(path: Path | None = None) -> ModuleType:
    """Import and return ``plots``. The import takes longer than most commands, so only those that draw do it.

    Raises
    ------
    OutputError
        matplotlib is not installed, or ``path`` is not the name of a picture.
    """
    try:
        from gmp_kernels.plots import check_picture
        from gmp_kernels.tools import plots
    except ModuleNotFoundError as error:
        raise OutputError(str(error)) from None
    if path is not None:
        check_picture(path)
    return plots
