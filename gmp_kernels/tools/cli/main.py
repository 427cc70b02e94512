"""The command line, ``gmp-kernels``: one function per command. The computing happens elsewhere."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch

from gmp_kernels import __version__, backends
from gmp_kernels.errors import GMPError
from gmp_kernels.tools.bench.gpu import gpu_cases
from gmp_kernels.tools.bench.measurement import HEADINGS, Failure, Machine, Result, measure_all, write_results
from gmp_kernels.tools.bench.run import all_cases
from gmp_kernels.tools.plan import PRESETS, Plan, Preset, Row, plan_rows

try:
    import typer
    from rich.console import Console
    from rich.progress import track

    from gmp_kernels.tools.cli.checkpoints import fraction, register
    from gmp_kernels.tools.cli.options import Command, Group, UsageError, drawing, in_one_line
    from gmp_kernels.tools.cli.terminal import Table, say, show
except ModuleNotFoundError as error:
    # The library works without these packages. A traceback would hide the fix.
    missing = str(error.name).partition(".")[0]
    raise SystemExit(f"gmp-kernels: the command line needs {missing}; run: pip install 'gmp-kernels[cli]'") from None

__all__ = ["app", "main"]

app = typer.Typer(cls=Group, help="Gradual magnitude pruning for PyTorch.", add_completion=False)
register(app)


FOR_TESTS = {"simt"}  # backends that `info` does not list
MOST_DIGITS = 18  # bound on the digits of a size


def main() -> None:
    """Run the command line (the console entry point). Errors are reported in one line."""
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
    message = re.sub(rf"^(\w+: )*({names}):", lambda match: f"{flags[match[2]]}:", message)
    message = re.sub(r"^[A-Z]\w*: ", "", message)
    message = re.sub(rf"\b({names})=", lambda match: f"{flags[match[1]]} ", message)
    # Names without an underscore may be ordinary words in the message.
    parts = [name for name in flags if "_" in name]
    return re.sub(rf"\b({'|'.join(parts)})\b", lambda match: flags[match[1]], message) if parts else message


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


@app.command(cls=Command)
def plan(
    preset: Annotated[Preset, typer.Option(help="Run to start from; the other options change it.")] = Preset.BLOG,
    initial_sparsity: Annotated[
        float | None, typer.Option(callback=fraction, help="Sparsity at the first update, in [0, 1].")
    ] = None,
    final_sparsity: Annotated[
        float | None, typer.Option(callback=fraction, help="Sparsity at the last update, in [0, 1].")
    ] = None,
    stabilization: Annotated[float | None, typer.Option(help="Epochs before the first update.")] = None,
    pruning: Annotated[float | None, typer.Option(help="Epochs from the first update to the last.")] = None,
    finetuning: Annotated[float | None, typer.Option(help="Epochs after the last update.")] = None,
    steps_per_epoch: Annotated[int | None, typer.Option(help="Optimizer steps per epoch.")] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(help="Shape of a pruned weight, e.g. 512x256x3x3; repeat the option for each layer."),
    ] = None,
    per_layer: Annotated[
        bool, typer.Option("--per-layer", help="Also show how many weights each layer loses.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Folder for sparsity.png and learning_rate.png.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="JSON file for all rows, layer by layer.")] = None,
) -> None:
    """Show sparsity, learning rate and weight decay of a run, epoch by epoch, without training."""
    if plot is not None:
        drawing()  # a missing matplotlib is reported before anything is shown
    chosen = PRESETS[preset]
    lengths = _given(
        stabilization=stabilization, pruning=pruning, finetuning=finetuning, steps_per_epoch=steps_per_epoch
    )
    sparsities = _given(initial_sparsity=initial_sparsity, final_sparsity=final_sparsity)
    layers = {f"layer{i}": _shape(text) for i, text in enumerate(layer)} if layer else chosen.layers
    chosen = replace(chosen, stages=replace(chosen.stages, **lengths), layers=layers, **sparsities)
    rows = plan_rows(chosen)

    show(_epochs(rows))
    if per_layer:
        show(_layers(chosen, rows))
    if plot is not None:
        _draw(chosen, plot)
        say(f"wrote {plot / 'sparsity.png'} and {plot / 'learning_rate.png'}")
    if json_file is not None:
        document = {
            "stages": asdict(chosen.stages),
            "schedule": chosen.schedule().to_dict(),
            "layers": chosen.layers,
            "rows": [row._asdict() for row in rows],
        }
        json_file.write_text(json.dumps(document, indent=2) + "\n")
        say(f"wrote {json_file}")


class Device(StrEnum):
    """Devices that the benchmarks run on."""

    CPU = "cpu"
    CUDA = "cuda"


@app.command(cls=Command)
def bench(
    device: Annotated[Device, typer.Option(help="The CPU, or the GPU that torch uses.")] = Device.CPU,
    quick: Annotated[
        bool, typer.Option("--quick", help="Use a sixteenth of the weights and a tenth of the time, as a trial.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Number of threads for both sides of a row; default: torch's.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the JSON file and the plot, which are named after the device.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="JSON file for all numbers.")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG file for the ratios.")] = None,
) -> None:
    """Measure every operation on this machine beside its usual alternative."""
    if plot is not None or output is not None:
        drawing()  # a missing matplotlib is reported before minutes of measuring
    if threads is not None:
        torch.set_num_threads(threads)
    torch_device = torch.device(device)
    machine = Machine.here(torch_device)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        json_file, plot = output / f"{machine.slug}.json", output / f"{machine.slug}.png"
    setting = f"{machine.device}, {machine.cores} cores, {machine.threads} threads, torch {machine.torch}"
    if machine.gpu is not None:
        setting = f"{machine.gpu}, {setting}"
    say(f"{setting}, numpy {machine.numpy}, load {machine.load:.2f}")
    cases, seconds = (all_cases(), 3.0) if device is Device.CPU else (gpu_cases(torch_device), 1.5)
    shrink, seconds = (16, seconds / 10) if quick else (1, seconds)
    outcomes: list[Result | Failure] = []
    measured = measure_all(cases, shrink=shrink, seconds=seconds, device=torch_device)
    for outcome in track(measured, "measuring", total=len(cases), console=Console(), transient=True):
        outcomes.append(outcome)
        if json_file is not None:
            # Written after every row, so that a crash in a later one loses nothing.
            write_results(json_file, machine, shrink, outcomes)
    show(_ratios(outcomes))
    failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
    for failure in failures:
        say(f"{failure.case.name}: {failure.error}")
    if quick:
        say("So few weights fit into the cache: the verdicts hold for the full table only.")
    if json_file is not None:
        say(f"wrote {json_file}")
    results = [outcome for outcome in outcomes if isinstance(outcome, Result)]
    if plot is not None and results:
        rows = {
            f"{result.case.name} / {result.case.baseline}": (result.ratio, result.case.must, result.case.aim)
            for result in results
        }
        drawing().plot_ratios(plot, rows, setting)
        say(f"wrote {plot}")
    if failures:
        raise typer.Exit(1)


def _given(**options: float | None) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.split("x")
    if not all(size.isdecimal() and len(size) < MOST_DIGITS and int(size) > 0 for size in sizes):
        raise typer.BadParameter(f"expected sizes joined by x, such as 512x256, got {text!r}", param_hint="--layer")
    return tuple(int(size) for size in sizes)


def _epochs(rows: list[Row]) -> Table:
    table = Table("epoch", "step", "stage", "sparsity", "num_prune", "LR", "weight decay")
    for row in rows:
        table.add_row(
            f"{row.epoch:g}",
            str(row.step),
            row.stage,
            f"{row.sparsity:.4f}",
            str(row.total_num_prune),
            f"{row.learning_rate:g}",
            f"{row.weight_decay:g}",
        )
    return table


def _layers(plan: Plan, rows: list[Row]) -> Table:
    pruning = [row for row in rows if row.step >= plan.stages.pruning_begin_step]
    first, last = pruning[0], pruning[-1]
    table = Table("layer", "shape", f"num_prune at epoch {first.epoch:g}", f"at epoch {last.epoch:g}")
    for name, shape in plan.layers.items():
        table.add_row(name, "x".join(map(str, shape)), str(first.num_prune[name]), str(last.num_prune[name]))
    return table


def _draw(plan: Plan, folder: Path) -> None:
    plots = drawing()
    folder.mkdir(parents=True, exist_ok=True)
    steps = list(range(len(plan.trace.sparsity)))
    plots.plot_sparsity(
        folder / "sparsity.png", steps, {"every layer": plan.trace.sparsity}, "Sparsity", stages=plan.stages
    )
    plots.plot_learning_rate(
        folder / "learning_rate.png", steps, plan.trace.learning_rate, "Learning rate", stages=plan.stages
    )


def _ratios(outcomes: list[Result | Failure]) -> Table:
    rows = [outcome.cells() for outcome in outcomes]
    *columns, rate = HEADINGS
    with_rates = any(row[-1] for row in rows)
    table = Table(*columns, *[rate] * with_rates, right=(1, 3, 4, 5, 6, *[8] * with_rates))
    for *cells, rate in rows:
        table.add_row(*cells, *[rate] * with_rates)
    return table
