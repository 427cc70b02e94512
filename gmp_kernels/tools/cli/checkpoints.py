"""Commands on checkpoints: ``gmp-kernels prune`` and ``gmp-kernels inspect``."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from gmp_kernels.backends.dtypes import NAMES
from gmp_kernels.checkpoints import (
    BINS_PER_OCTAVE,
    DEFAULT_MEMORY,
    DEFAULT_RULE,
    Checkpoint,
    PruneJob,
    PruneReport,
    TensorStatistics,
    inspect_checkpoint,
    open_checkpoint,
    total_of,
)
from gmp_kernels.errors import GMPError, OutputError
from gmp_kernels.model.coverage import Coverage, shown_names, shown_shape
from gmp_kernels.patterns import NM, Pattern
from gmp_kernels.pruner.distributions import emptied_layers
from gmp_kernels.tools.cli.options import PATTERN_WORDS, Command, drawing, pattern_of
from gmp_kernels.tools.cli.terminal import Table, say, show

__all__ = ["fraction", "register"]

MB = 1 << 20
BLOCKS = " ▁▂▃▄▅▆▇█"
CUT = "⋮"  # stands for a range of empty octaves that is not drawn
WIDEST_GAP = 2  # empty octaves in a row that are still drawn
MOST_NAMES = 8
WORDS = "Names of tensors or modules, globs, or re: and a regular expression; repeat the option for each entry."


class Scope(StrEnum):
    """Sets of weights that are ranked together."""

    LAYER = "layer"
    GLOBAL = "global"


class DType(StrEnum):
    """Dtypes that the output can be converted to."""

    _ignore_ = "dtype"
    for dtype in NAMES.values():
        vars()[dtype.upper()] = dtype


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(cls=Command)(prune)
    app.command(cls=Command)(inspect)


def fraction(value: float | None) -> float | None:
    """Return a number as it is; refuse one that is not a fraction."""
    if value is not None and not 0 <= value <= 1:
        raise typer.BadParameter(f"expected a fraction in [0, 1], not a percentage, got {value:g}")
    return value


def _path(text: str) -> Path:
    """Return a path; refuse an empty one, which means the current folder but often comes from an unset variable."""
    if not text:
        raise typer.BadParameter("expected a path, got an empty one; write . for the current folder")
    return Path(text)


def prune(
    source: Annotated[
        Path, typer.Argument(metavar="IN", parser=_path, help="A .safetensors file, or a Hugging Face folder of them.")
    ],
    target: Annotated[
        Path, typer.Argument(metavar="OUT", parser=_path, help="Name of the output, a new file or folder like IN.")
    ],
    sparsity: Annotated[
        float | None,
        typer.Option(
            callback=fraction,
            help="Fraction of the weights to prune, in [0, 1]. Default with --pattern N:M: 1 - N/M.",
        ),
    ] = None,
    pattern: Annotated[Pattern | None, typer.Option(metavar="N:M|RxC", parser=pattern_of, help=PATTERN_WORDS)] = None,
    scope: Annotated[
        Scope, typer.Option(help="Prune this fraction of each tensor, or of all tensors ranked together.")
    ] = Scope.LAYER,
    targets: Annotated[list[str] | None, typer.Option(help=f"{WORDS} Default: {DEFAULT_RULE}.")] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Targets to leave out; the same kinds of entries.")] = None,
    dtype: Annotated[
        DType | None,
        typer.Option(
            help="Convert floating-point tensors of the output, after pruning; configs stay as they are. "
            "Default: every tensor keeps its dtype.",
        ),
    ] = None,
    masks: Annotated[
        bool, typer.Option("--masks", help="Also write the packed masks: OUT.masks.safetensors, or OUT/masks/.")
    ] = False,
    copy_others: Annotated[
        bool,
        typer.Option(
            "--copy-others",
            help="Also copy files of IN that do not belong to the model, such as weights in other formats, adapters "
            "and optimizer states. Default: they are left out.",
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an existing OUT and its masks once the new one is complete.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run after the last shard that it has finished.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, show the targets, and write nothing.")
    ] = False,
    max_memory: Annotated[
        int,
        typer.Option(
            min=8,
            help="MB of memory for weights, in addition to the memory of Python and torch. In layer scope a tensor of "
            "up to nearly half of it is read once, a larger one twice.",
        ),
    ] = DEFAULT_MEMORY // MB,
) -> None:
    """Prune a safetensors checkpoint of any size to an exact sparsity.

    OUT appears only once it is complete. Under torchrun the shards are divided among the processes.
    """
    if sparsity is None:
        if not isinstance(pattern, NM):
            raise typer.BadParameter("expected a fraction to prune, got none", param_hint="--sparsity")
        sparsity = pattern.sparsity
    job = PruneJob(
        source,
        target,
        sparsity=sparsity,
        scope=scope.value,
        pattern=pattern,
        targets=targets,
        ignore=ignore,
        dtype=None if dtype is None else getattr(torch, dtype.value),
        masks=masks,
        force=force,
        copy_others=copy_others,
    )
    if dry_run:
        _show_targets(job)
        _show_left_out(job.checkpoint)
        return
    try:
        with _progress(Console(), "pruning") as advance:
            report = job.run(resume=resume, max_memory=max_memory * MB, progress=advance)
    except (GMPError, KeyboardInterrupt):
        if job.is_begun():
            say("Finished shards are kept: --resume goes on from there.", error=True)
        raise
    if os.environ.get("RANK", "0") == "0":
        _show_coverage(job.coverage, [layer.num_pruned for layer in report.layers])
        _show_left_out(job.checkpoint)
        if (beside := job.kept_beside()) is not None:
            say(f"kept {beside}, which holds no masks of the new output")
        say(_summary(job, report, target))


def inspect(
    path: Annotated[
        Path,
        typer.Argument(metavar="PATH", parser=_path, help="A .safetensors file, or a Hugging Face folder of them."),
    ],
    only: Annotated[list[str] | None, typer.Option("--filter", help=f"Show only these tensors. {WORDS}")] = None,
    histogram: Annotated[bool, typer.Option("--histogram", help="Draw a histogram of the magnitudes.")] = False,
    plot: Annotated[Path | None, typer.Option(help="PNG or SVG file for the histogram as a picture.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="JSON file for all numbers.")] = None,
) -> None:
    """Show sparsity, patterns, ranges, NaN and Inf of a safetensors checkpoint, tensor by tensor."""
    for output in (plot, json_file):
        # Refused here, before hours of reading.
        if output is not None and not output.parent.is_dir():
            raise OutputError(f"{output}: expected its folder to be there, got none; create {output.parent}")
        if output is not None and output.is_dir():
            raise OutputError(f"{output}: expected the name of a file, got a folder; add a name")
    if plot is not None:
        drawing(plot)
    checkpoint = open_checkpoint(path)
    with _progress(Console(), "reading") as advance:
        found = inspect_checkpoint(checkpoint, only=only, histogram=histogram or plot is not None, progress=advance)
    total = total_of(found)
    show(_statistics(found, total, with_histogram=histogram))
    if histogram:
        show(_bars(total.histogram))
    _show_left_out(checkpoint)
    if plot is not None:
        weights = {t.name: t.histogram for t in found if t.kind == "weight"}
        drawing().plot_histogram(plot, weights, path.name, bins_per_octave=BINS_PER_OCTAVE)
        say(f"wrote {plot}")
    if json_file is not None:
        document = {"path": str(path), "total": total.to_dict(), "tensors": [t.to_dict() for t in found]}
        json_file.write_text(json.dumps(document, indent=2) + "\n")
        say(f"wrote {json_file}")


@contextlib.contextmanager
def _progress(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar, the speed and the time left if the output is a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _show_targets(job: PruneJob) -> None:
    counts = job.num_prune()
    by_layer = len(counts) == len(job.tensors)
    table = Table("tensor", "dtype", "shape", "weights", *(["num_prune"] if by_layer else []), right=(3, 4))
    for i, tensor in enumerate(job.tensors):
        count = [str(counts[i])] if by_layer else []
        table.add_row(tensor.name, tensor.dtype, shown_shape(tensor.shape), str(tensor.numel), *count)
    show(table)
    # In global scope the counts per tensor are known only after all weights are ranked.
    _show_coverage(job.coverage, counts if by_layer else [0] * len(job.tensors))
    weights = sum(tensor.numel for tensor in job.tensors)
    others = len(job.checkpoint.tensors) - len(job.tensors)
    say(f"would prune {sum(counts)} of {weights} weights in {len(job.tensors)} tensors and copy {others} as they are")


def _show_left_out(checkpoint: Checkpoint) -> None:
    """Print the files of a folder that do not belong to its model, and the tensors that only its index has."""
    by_kind: dict[str, list[str]] = {}
    for name, kind in checkpoint.left_out.items():
        by_kind.setdefault(kind, []).append(name)
    for kind, names in by_kind.items():
        more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
        say(f"left out, {kind}: {', '.join(names[:MOST_NAMES])}{more}")
    if by_kind:
        say("These do not belong to the model; prune --copy-others copies them as they are.")
    if checkpoint.tied:
        say(f"in the index only, tied to another tensor: {', '.join(checkpoint.tied)}")


def _show_coverage(coverage: Coverage, num_pruned: Sequence[int]) -> None:
    """Print the coverage and the targets that keep no weight; ``num_pruned`` has one count per target."""
    names, sizes = [tensor.name for tensor in coverage.targets], [tensor.num_weights for tensor in coverage.targets]
    lines = [str(coverage)]
    if emptied := emptied_layers(names, sizes, num_pruned):
        lines.append(f"no weight is left in {shown_names(emptied)}")
    for line in "\n".join(lines).splitlines():
        say(line)


def _summary(job: PruneJob, report: PruneReport, target: Path) -> str:
    others = len(job.checkpoint.tensors) - len(job.tensors)
    return (
        f"pruned {len(report.layers)} tensors to a sparsity of {report.sparsity:.4f}, copied {others} others: "
        f"{decimal(report.num_bytes)} in {report.seconds:.1f} s, "
        f"{decimal(round(report.num_bytes / report.seconds))}/s; wrote {target}"
    )


def _statistics(found: Sequence[TensorStatistics], total: TensorStatistics, *, with_histogram: bool) -> Table:
    columns = ["tensor", "dtype", "shape", "sparsity", "zeros", "NaN", "Inf", "smallest", "largest"]
    with_patterns = any(tensor.patterns for tensor in found)
    if with_patterns:
        columns.append("zeros keep to")
    positions = _positions(_octaves(total.histogram)) if with_histogram else []
    if positions:
        columns.append(f"2^{positions[0]} .. 2^{positions[-1]}")
    table = Table(*columns, right=range(3, 9))
    for tensor in [*found, total]:
        numbers = (tensor.num_zeros, tensor.num_nan, tensor.num_inf)
        row = [
            tensor.name,
            f"{tensor.dtype} mask" if tensor.kind == "mask" else tensor.dtype,
            shown_shape(tensor.shape),
            "-" if tensor.sparsity is None else f"{tensor.sparsity:.4f}",
            *("-" if number is None else str(number) for number in numbers),
            *("-" if magnitude is None else f"{magnitude:.4g}" for magnitude in (tensor.smallest, tensor.largest)),
        ]
        if with_patterns:
            row.append(", ".join(tensor.patterns))
        if positions:
            row.append(_line(_octaves(tensor.histogram), positions) if tensor.kind == "weight" else "")
        table.add_row(*row)
    return table


def _octaves(histogram: Counter[int]) -> Counter[int]:
    octaves: Counter[int] = Counter()
    for b, count in histogram.items():
        octaves[b // BINS_PER_OCTAVE] += count
    return octaves


def _positions(octaves: Counter[int]) -> list[int | None]:
    """Return the octaves to draw, ascending; one None stands for a range of empty ones."""
    positions: list[int | None] = []
    for b in sorted(octaves):
        if positions:
            last = positions[-1]
            assert last is not None
            positions += range(last + 1, b) if b - last <= WIDEST_GAP + 1 else [None]
        positions.append(b)
    return positions


def _line(counts: Counter[int], positions: Sequence[int | None]) -> str:
    """Draw a histogram as one line of blocks; a count above zero always gives a visible block."""
    highest = max(counts.values(), default=1)
    return "".join(CUT if b is None else BLOCKS[-(-counts[b] * (len(BLOCKS) - 1) // highest)] for b in positions)


def _bars(histogram: Counter[int]) -> Table:
    octaves = _octaves(histogram)
    highest, total = max(octaves.values(), default=1), sum(octaves.values())
    table = Table("magnitude from", "weights", "share", "", right=(0, 1, 2))
    for b in reversed(_positions(octaves)):
        if b is None:
            table.add_row(CUT, "0", "", "")
        else:
            share = octaves[b] / total
            table.add_row(f"2^{b}", str(octaves[b]), f"{share:.2%}", "█" * round(40 * octaves[b] / highest))
    return table
