"""The command line, ``gmp-kernels``: one function per command. The computing happens elsewhere."""

from __future__ import annotations

import atexit
import gc
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch

from gmp_kernels import __version__, backends
from gmp_kernels.errors import GMPError

try:
    import typer

    from gmp_kernels.tools.cli import bench, checkpoints, plan
    from gmp_kernels.tools.cli.options import Command, Group, UsageError, in_one_line
    from gmp_kernels.tools.cli.terminal import Table, say, show
except ModuleNotFoundError as error:
    # The library works without these packages. A traceback would hide the fix.
    missing = str(error.name).partition(".")[0]
    raise SystemExit(f"gmp-kernels: the command line needs {missing}; run: pip install 'gmp-kernels[cli]'") from None

__all__ = ["app", "main"]

app = typer.Typer(cls=Group, help="Gradual magnitude pruning for PyTorch.", add_completion=False)
checkpoints.register(app)
plan.register(app)
bench.register(app)

FOR_TESTS = {"simt"}  # backends that `info` does not list


def main() -> None:
    """Run the command line (the console entry point). Errors are reported in one line."""
    atexit.register(_end_fast)
    arguments = sys.argv[1:] or ["--help"]
    try:
        sys.exit(app(arguments, standalone_mode=False))
    except GMPError as error:
        fail(in_flags(str(error), flags_of(arguments)))
    except UsageError as error:
        fail(in_one_line(error), code=2)
    except typer.Abort:
        fail("stopped", code=130)
    except BrokenPipeError:
        # The reader of the output has gone. Without this, Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        # The library turns errors in reading into its own, so this one comes from writing.
        fail(f"the output cannot be written: {error}; give another path, or make room")


def _end_fast() -> None:
    """Keep Python from looking for garbage in all that torch has made, which the end of the process frees anyway.

    It takes longer than most commands. Triton's bindings would report all that is left as leaks.
    """
    if "triton" not in sys.modules:
        gc.freeze()


def fail(message: str, *, code: int = 1) -> NoReturn:
    """Print an error and end the process with an exit code."""
    say(f"gmp-kernels: {message}", error=True)
    sys.exit(code)


def flags_of(arguments: Sequence[str]) -> dict[str, str]:
    """Return {name of an argument in Python: its flag} for the command in ``arguments``."""
    commands: dict[str, Any] = getattr(typer.main.get_command(app), "commands", {})
    command = next((commands[argument] for argument in arguments if argument in commands), None)
    options = [option for option in command.params if option.opts[0].startswith("--")] if command else []
    named = {option.name: option.opts[0] for option in options}
    return named | {flag.removeprefix("--").replace("-", "_"): flag for flag in named.values()}


def in_flags(message: str, flags: Mapping[str, str]) -> str:
    """Reword an error of the library for the command line, with flags instead of classes and arguments."""
    if not flags:
        return message
    names = "|".join(flags)
    message = re.sub(rf"^([\w.]+: )*({names}):", lambda match: f"{flags[match[2]]}:", message)
    message = re.sub(r"^[A-Z]\w*: ", "", message)
    # Advice at the end is there to be pasted: in the shell, a flag stands before each entry of a list.
    message = re.sub(rf": ({names})=\[(.+)\]$", lambda match: f": {_repeated(flags[match[1]], match[2])}", message)
    message = re.sub(rf"\b({names})=", lambda match: f"{flags[match[1]]} ", message)
    # Names without an underscore may be ordinary words in the message.
    parts = [name for name in flags if "_" in name]
    return re.sub(rf"\b({'|'.join(parts)})\b", lambda match: flags[match[1]], message) if parts else message


def _repeated(flag: str, entries: str) -> str:
    """Return a flag before each entry of a list of strings as Python writes it."""
    return " ".join(f"{flag} {shlex.quote(entry)}" for entry in re.findall(r"'([^']*)'", entries))


def _show_version(wanted: bool) -> None:
    if wanted:
        say(f"gmp-kernels {__version__}")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Take the options that do not belong to a command."""


class Optimizer(StrEnum):
    """Package whose SGD the demo trains with."""

    GMP = "gmp"
    TORCH = "torch"


@app.command(cls=Command)
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report, pictures, metrics and model.")] = Path("gmp_demo"),
    sparsity: Annotated[float, typer.Option(min=0.05, max=1, help="Final sparsity of every layer.")] = 0.97,
    seeds: Annotated[
        int, typer.Option(min=1, help="Number of repetitions. With more than one the report has mean and spread.")
    ] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the first repetition; the others count up from it.")] = 0,
    optimizer: Annotated[
        Optimizer, typer.Option(help="SGD with the mask inside the step (gmp), or torch's own (torch).")
    ] = Optimizer.GMP,
) -> None:
    """Train on real data, prune gradually, and compare with one-shot pruning."""
    try:
        from gmp_kernels.tools.demo import run
    except ModuleNotFoundError as error:
        sys.exit(f"gmp-kernels: {error}")
    run(out, sparsity=sparsity, seeds=seeds, seed=seed, optimizer=optimizer.value)


@app.command(cls=Command)
def info() -> None:
    """Show the versions, and for every backend whether it is usable or why not."""
    table = Table("backend", "priority", "on this machine")
    for backend in backends.available():
        if backend.name not in FOR_TESTS:
            table.add_row(backend.name, str(backend.priority), backend.probe() or "usable")
    say(f"gmp-kernels {__version__}, torch {torch.__version__}")
    show(table)
