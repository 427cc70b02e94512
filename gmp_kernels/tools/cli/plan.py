"""The dry run of a pruning run: ``gmp-kernels plan``."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from gmp_kernels import recipes, schedules
from gmp_kernels.checkpoints import DEFAULT_RULE, open_checkpoint
from gmp_kernels.checkpoints.files import TensorInfo
from gmp_kernels.checkpoints.targets import TensorIndex
from gmp_kernels.errors import OutputError, RecipeError
from gmp_kernels.model.coverage import shown_shape
from gmp_kernels.patterns import NM, Pattern
from gmp_kernels.tools.cli.checkpoints import WORDS, Scope, fraction
from gmp_kernels.tools.cli.options import PATTERN_WORDS, Command, drawing, pattern_of
from gmp_kernels.tools.cli.terminal import Table, say, show
from gmp_kernels.tools.plan import Course, Plan, Row
from gmp_kernels.tools.presets import PRESETS
from gmp_kernels.tools.recipes import course_of, is_recipe, layers_of, warnings_about

__all__ = ["register"]

DEFAULT = "blog"  # preset
RECIPE_STEPS = 100  # per epoch, unless given
MOST_DIGITS = 18  # bound on the digits of a size
KINDS = {
    "cubic": schedules.Cubic,
    "linear": schedules.Linear,
    "inverse-cubic": schedules.InverseCubic,
    "exponential": schedules.Exponential,
    "cosine": schedules.Cosine,
}


class Kind(StrEnum):
    """Curves of the sparsity."""

    _ignore_ = "kind"
    for kind in KINDS:
        vars()[kind.upper()] = kind


class Distribution(StrEnum):
    """Ways of sharing a sparsity among layers."""

    UNIFORM = "uniform"
    ERK = "erk"


class PruningLR(StrEnum):
    """Shapes of the learning rate in the pruning stage."""

    CONSTANT = "constant"
    COSINE = "cosine"
    CYCLIC = "cyclic"
    REWIND = "rewind"


class FinetuningLR(StrEnum):
    """Shapes of the learning rate in fine-tuning."""

    STEPS = "steps"
    LINEAR = "linear"
    COSINE = "cosine"


class PresetName(StrEnum):
    """Runs that come with the package."""

    _ignore_ = "name"
    for name in PRESETS:
        vars()[name.upper()] = name


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(cls=Command)(plan)


def _explain(wanted: bool) -> None:
    if wanted:
        for name, preset in PRESETS.items():
            say(f"{name}: {preset.about}")
            say(f"    {_words_of(preset.plan)}; {_lengths_of(preset.plan)}")
            say(f"    learning rate: {_lr_words_of(preset.plan)}")
            say(f"    source: {preset.source}")
        raise typer.Exit


def plan(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN",
            help=f"A preset: {', '.join(PRESETS)}. Or a .safetensors file, or a Hugging Face folder of them, whose "
            "layers are planned; only their shapes are read. Or a SparseML recipe, .yaml or .md. Default: blog.",
        ),
    ] = None,
    presets: Annotated[
        bool, typer.Option("--presets", callback=_explain, is_eager=True, help="Explain the presets and exit.")
    ] = False,
    preset: Annotated[
        PresetName | None, typer.Option(help="Run to plan for the layers of a checkpoint. Default: blog.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Checkpoint whose layers a recipe prunes. Only their shapes are read.")
    ] = None,
    initial_sparsity: Annotated[
        float | None, typer.Option(callback=fraction, help="Sparsity at the first update, in [0, 1].")
    ] = None,
    final_sparsity: Annotated[
        float | None,
        typer.Option(
            callback=fraction, help="Sparsity at the last update, in [0, 1]. Default with --pattern N:M: 1 - N/M."
        ),
    ] = None,
    kind: Annotated[Kind | None, typer.Option(help="Curve of the sparsity in the pruning stage.")] = None,
    frequency: Annotated[float | None, typer.Option(help="Epochs from one update to the next.")] = None,
    stabilization: Annotated[float | None, typer.Option(help="Epochs before the first update.")] = None,
    pruning: Annotated[float | None, typer.Option(help="Epochs from the first update to the last.")] = None,
    finetuning: Annotated[float | None, typer.Option(help="Epochs after the last update.")] = None,
    steps_per_epoch: Annotated[int | None, typer.Option(help="Optimizer steps per epoch.")] = None,
    lr: Annotated[
        PruningLR | None,
        typer.Option(help="Shape of the learning rate in the pruning stage. rewind: down, and back up at once."),
    ] = None,
    finetuning_lr: Annotated[
        FinetuningLR | None,
        typer.Option(help="Shape of the learning rate in fine-tuning: two steps down, or down to 0."),
    ] = None,
    scope: Annotated[
        Scope | None, typer.Option(help="Prune this fraction of each layer, or of all layers ranked together.")
    ] = None,
    distribution: Annotated[
        Distribution | None, typer.Option(help="Every layer alike, or small layers less (Erdos-Renyi-Kernel).")
    ] = None,
    pattern: Annotated[Pattern | None, typer.Option(metavar="N:M|RxC", parser=pattern_of, help=PATTERN_WORDS)] = None,
    targets: Annotated[list[str] | None, typer.Option(help=f"{WORDS} Default: {DEFAULT_RULE}.")] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Targets to leave out; the same kinds of entries.")] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(help="Shape of a pruned weight, e.g. 512x256x3x3, in place of the preset's; repeat for each."),
    ] = None,
    per_layer: Annotated[
        bool, typer.Option("--per-layer", help="Also show how many weights each layer loses.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Folder for sparsity.png and learning_rate.png.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="JSON file for all rows, layer by layer.")] = None,
) -> None:
    """Show sparsity, learning rate and weight decay of a run, epoch by epoch, without training.

    The other options change the run of the preset. Nothing is written but what --plot and --json name.
    """
    if plot is not None:
        drawing()  # a missing matplotlib is reported before anything is shown
    lengths = _given(
        stabilization=stabilization, pruning=pruning, finetuning=finetuning, steps_per_epoch=steps_per_epoch
    )
    changes = _given(
        initial_sparsity=initial_sparsity,
        final_sparsity=final_sparsity,
        kind=None if kind is None else KINDS[kind.value],
        frequency=frequency,
        pruning_lr=None if lr is None else lr.value,
        finetuning_lr=None if finetuning_lr is None else finetuning_lr.value,
        scope=None if scope is None else scope.value,
        distribution=None if distribution is None else distribution.value,
        pattern=pattern,
    )
    if isinstance(pattern, NM):
        changes.setdefault("final_sparsity", pattern.sparsity)
    if run is not None and is_recipe(run):
        steps = lengths.pop("steps_per_epoch", RECIPE_STEPS)
        said = lengths | changes | _given(preset=preset, layer=layer, targets=targets, ignore=ignore)
        if said:
            raise typer.BadParameter(
                "expected nothing that the recipe says itself", param_hint=f"--{next(iter(said)).replace('_', '-')}"
            )
        _plan_recipe(run, checkpoint, steps, per_layer=per_layer, plot=plot, json_file=json_file)
        return
    if checkpoint is not None:
        raise typer.BadParameter(
            "expected a recipe to plan for it; pass the checkpoint as RUN", param_hint="--checkpoint"
        )
    name, start = _start(run, preset, layer, targets, ignore)
    planned = replace(start, stages=replace(start.stages, **lengths), **changes)
    course = planned.course
    rows = course.rows()
    say(f"{name}: {_words_of(planned)}; {_lengths_of(planned)}")
    say(f"    learning rate: {_lr_words_of(planned)}")
    if name in PRESETS and planned == PRESETS[name].plan:
        say(f"    {PRESETS[name].about}; source: {PRESETS[name].source}")
    elif name not in PRESETS:
        base = preset.value if preset else DEFAULT
        say(f"    stages, steps and learning rates of the preset '{base}', unless options say otherwise")
    show(_epochs(rows))
    if per_layer:
        show(_layers(course, rows))
    if plot is not None:
        titles = (f"Planned sparsity, {name}: {_words_of(planned)}", f"Learning rate, {name}: {_lr_words_of(planned)}")
        _draw(course, plot, titles)
        say(f"wrote {plot / 'sparsity.png'} and {plot / 'learning_rate.png'}")
    if json_file is not None:
        document = {
            "stages": asdict(planned.stages),
            "schedule": planned.schedule().to_dict(),
            "scope": planned.scope,
            "distribution": planned.distribution,
            "pattern": None if planned.pattern is None else str(planned.pattern),
            "layers": planned.layers,
            "rows": [row._asdict() for row in rows],
        }
        json_file.write_text(json.dumps(document, indent=2) + "\n")
        say(f"wrote {json_file}")


def _plan_recipe(
    run: str,
    checkpoint: Path | None,
    steps_per_epoch: int,
    *,
    per_layer: bool,
    plot: Path | None,
    json_file: Path | None,
) -> None:
    """Show, draw and write what a recipe does."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            recipe = recipes.load(run)
        except ModuleNotFoundError as error:
            raise OutputError(str(error)) from None
        except OSError as error:
            raise RecipeError(f"{run}: expected a file to read, got {error.strerror!r}; check the path") from None
    layers = {} if checkpoint is None else layers_of(open_checkpoint(checkpoint).tensors)
    course = course_of(recipe, layers, steps_per_epoch)
    rows = course.rows()
    of = f"{len(course.layers)} layers of {checkpoint}" if layers else "the weights of each modifier as one layer"
    say(f"{run}: {recipe.epochs} epochs of {steps_per_epoch} steps, {of}")
    for word in [*map(str, (one.message for one in caught)), *warnings_about(recipe, layers, steps_per_epoch)]:
        say(f"note: {word}")
    show(_epochs(rows, counts=bool(layers)))
    if per_layer and layers:
        show(_layers(course, rows))
    if plot is not None:
        plots = drawing()
        plot.mkdir(parents=True, exist_ok=True)
        plots.plot_course(plot / "sparsity.png", course, f"Planned sparsity, {run}: {of}")
        say(f"wrote {plot / 'sparsity.png'}")
        if not any(map(math.isnan, course.learning_rate)):
            steps = range(course.total_steps + 1)
            path = plot / "learning_rate.png"
            plots.plot_learning_rate(path, steps, course.learning_rate, f"Learning rate, {run}", parts=course.stages)
            say(f"wrote {path}")
    if json_file is not None:
        document = {
            "recipe": run,
            "layers": layers,
            "rows": [{key: None if value != value else value for key, value in row._asdict().items()} for row in rows],
        }
        json_file.write_text(json.dumps(document, indent=2) + "\n")
        say(f"wrote {json_file}")


def _start(
    run: str | None,
    preset: PresetName | None,
    layer: list[str] | None,
    targets: list[str] | None,
    ignore: list[str] | None,
) -> tuple[str, Plan]:
    """Return the name of what is planned, and the plan that the other options change."""
    if run in PRESETS and preset is not None:
        raise typer.BadParameter(
            f"expected none beside the preset '{run}', got '{preset.value}'", param_hint="--preset"
        )
    name = run if run in PRESETS else DEFAULT if preset is None else preset.value
    start = PRESETS[name or DEFAULT].plan
    if run is not None and run not in PRESETS:
        if layer:
            raise typer.BadParameter(f"expected none beside a checkpoint, got {layer[0]!r}", param_hint="--layer")
        if not Path(run).exists():
            raise typer.BadParameter(
                f"expected a preset ({', '.join(PRESETS)}) or the path of a checkpoint, got {run!r}", param_hint="RUN"
            )
        return run, replace(start, layers=_targets(open_checkpoint(Path(run)).tensors, targets, ignore))
    if layer:
        start = replace(start, layers={f"layer{i}": _shape(text) for i, text in enumerate(layer)})
    if targets or ignore:
        tensors = [TensorInfo(Path(), name, "F32", shape, 0, 0) for name, shape in start.layers.items()]
        start = replace(start, layers=_targets(tensors, targets, ignore))
    return name or DEFAULT, start


def _targets(
    tensors: Sequence[TensorInfo], targets: list[str] | None, ignore: list[str] | None
) -> dict[str, tuple[int, ...]]:
    """Return {name: shape} of what ``gmp-kernels prune`` would prune."""
    chosen = set(TensorIndex(tensors).choose(targets, ignore)[0])
    return {tensor.name: tensor.shape for tensor in tensors if tensor.name in chosen}


def _words_of(planned: Plan) -> str:
    """Return the sparsities of a plan in one line."""
    schedule = planned.schedule()
    sharing = {"uniform": "all alike", "erk": "the small ones less (ERK)"}[planned.distribution]
    sharing = "ranked together" if planned.scope == "global" else sharing
    sharing += "" if planned.pattern is None else f", {planned.pattern}"
    kind = next(name for name, kind in KINDS.items() if kind is type(schedule))
    epochs = schedule.frequency / planned.stages.steps_per_epoch
    updates = f"{1 / epochs:.3g} updates per epoch" if epochs < 1 else f"an update every {epochs:.3g} epochs"
    return (
        f"{100 * schedule.initial_sparsity:.3g}% to {100 * schedule.final_sparsity:.3g}% ({kind}), "
        f"{'an update every epoch' if epochs == 1 else updates}, {_counted(len(planned.layers), 'layer')}, {sharing}"
    )


def _lr_words_of(planned: Plan) -> str:
    """Return the learning rates of a plan in one line."""
    finetuning = "two steps down" if planned.finetuning_lr == "steps" else f"{planned.finetuning_lr} to 0"
    return f"{planned.pruning_lr} in the pruning stage, {finetuning} in fine-tuning"


def _lengths_of(planned: Plan) -> str:
    """Return the lengths of a plan's stages in one line."""
    stages = planned.stages
    lengths = f"{stages.stabilization:g} + {stages.pruning:g} + {stages.finetuning:g}"
    return f"stages of {lengths} epochs, {stages.steps_per_epoch} steps per epoch"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.split("x")
    if not all(size.isdecimal() and len(size) < MOST_DIGITS and int(size) > 0 for size in sizes):
        raise typer.BadParameter(f"expected sizes joined by x, such as 512x256, got {text!r}", param_hint="--layer")
    return tuple(int(size) for size in sizes)


def _epochs(rows: Sequence[Row], *, counts: bool = True) -> Table:
    table = Table("epoch", "step", "stage", "sparsity", *(["num_prune"] if counts else []), "LR", "weight decay")
    for row in rows:
        table.add_row(
            f"{row.epoch:g}",
            str(row.step),
            row.stage,
            f"{row.sparsity:.4f}",
            *([str(row.total_num_prune)] if counts else []),
            # A recipe may leave them to the optimizer.
            *("-" if math.isnan(value) else f"{value:.4g}" for value in (row.learning_rate, row.weight_decay)),
        )
    return table


def _layers(course: Course, rows: Sequence[Row]) -> Table:
    begin = min((updates[0] for updates in course.updates if updates), default=0)
    first, last = next(row for row in rows if row.step >= begin), rows[-1]
    table = Table("layer", "shape", f"num_prune at epoch {first.epoch:g}", f"at epoch {last.epoch:g}", "sparsity")
    for name, count in last.num_prune.items():
        shape = course.layers.get(name, ())
        # Layers ranked together have one row, without a shape.
        sparsity = count / (math.prod(shape) if shape else course.num_weights)
        shown = shown_shape(shape) if shape else "-"
        table.add_row(name, shown, str(first.num_prune[name]), str(count), f"{sparsity:.4f}")
    return table


def _draw(course: Course, folder: Path, titles: tuple[str, str]) -> None:
    plots = drawing()
    folder.mkdir(parents=True, exist_ok=True)
    plots.plot_course(folder / "sparsity.png", course, titles[0])
    steps = range(course.total_steps + 1)
    plots.plot_learning_rate(folder / "learning_rate.png", steps, course.learning_rate, titles[1], parts=course.stages)
