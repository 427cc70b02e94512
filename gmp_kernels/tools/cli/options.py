"""Options of the command line: their display in the help, and the errors for wrong values."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from gmp_kernels.errors import OutputError
from gmp_kernels.patterns import NM, Block, Pattern

__all__ = ["PATTERN_WORDS", "Command", "Group", "UsageError", "drawing", "in_one_line", "pattern_of"]

PATTERN_WORDS = (
    "2:4 keeps 2 or more of each 4 weights along the inputs, dimension 1; 2:4@0 those along dimension 0, for weights "
    "that are stored transposed; 4x4 prunes whole blocks."
)

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


def pattern_of(text: str) -> Pattern:
    """Return the pattern that a word such as 2:4, 2:4@0 or 4x4 stands for."""
    groups, blocks = re.fullmatch(r"(\d+):(\d+)(?:@(\d+))?", text), re.fullmatch(r"(\d+)x(\d+)", text)
    try:
        if groups is not None:
            return NM(int(groups[1]), int(groups[2]), int(groups[3] or 1))
        if blocks is not None:
            return Block(int(blocks[1]), int(blocks[2]))
    except ValueError as error:
        reason, _, _ = str(error).partition(": ")[2].partition(";")  # the advice is for Python
        raise typer.BadParameter(reason) from None
    raise typer.BadParameter(f"expected N:M such as 2:4, or blocks such as 4x4, got {text!r}")


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
