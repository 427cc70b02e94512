"""Options of the command line: how help shows them, and what is said of values that do not fit."""

from __future__ import annotations

import re
from types import ModuleType
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from gmp_kernels.errors import OutputError

__all__ = ["Command", "Group", "UsageError", "drawing", "in_one_line"]

# What typer raises for a wrong command line; it has no name of its own for all of them.
UsageError: type[Exception] = typer.BadParameter.__base__  # type: ignore[assignment]


class _FlagsWithoutValue:
    """A command whose help shows no value behind flags, which take none."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the options, that for help among them."""
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
    """Say what typer found wrong as the library says it: option, what was expected, what came."""
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


def drawing() -> ModuleType:
    """Import what draws pictures, which takes longer than most commands take to run.

    Raises
    ------
    OutputError
        matplotlib is not installed.
    """
    try:
        from gmp_kernels.tools import plots
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        raise OutputError(
            f"pictures: expected {missing} to be installed, got none; run: pip install 'gmp-kernels[cli]'"
        ) from None
    return plots
