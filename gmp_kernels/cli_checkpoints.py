"""The commands on checkpoints, ``gmp-kernels prune`` and ``gmp-kernels inspect``."""

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
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from gmp_kernels.checkpoints import (
    BINS_PER_OCTAVE,
    DEFAULT_MEMORY,
    DEFAULT_RULE,
    PruneJob,
    PruneReport,
    TensorStatistics,
    cover_tensors,
    inspect_checkpoint,
)
from gmp_kernels.coverage import Coverage, shown_names
from gmp_kernels.distributions import emptied_layers
from gmp_kernels.errors import GMPError, OutputError
from gmp_kernels.tables import new_table, print_whole

__all__ = ["register"]

MB = 1 << 20
BLOCKS = " ▁▂▃▄▅▆▇█"
WORDS = "Names of tensors or modules, globs, or re: and a regular expression; once per entry."


class Scope(StrEnum):
    """Sets of weights that are ranked together."""

    LAYER = "layer"
    GLOBAL = "global"


class DType(StrEnum):
    """Of floating-point tensors in the output."""

    FLOAT64 = "float64"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(prune)
    app.command()(inspect)


def prune(
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="A .safetensors file, or a Hugging Face folder of them.")
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="A file or folder, as IN is, that is not there yet.")],
    sparsity: Annotated[float, typer.Option(help="Fraction of the weights to prune, in [0, 1].")],
    scope: Annotated[
        Scope, typer.Option(help="Prune so much of each tensor, or of all together: the smallest of all.")
    ] = Scope.LAYER,
    targets: Annotated[list[str] | None, typer.Option(help=f"{WORDS} Default: {DEFAULT_RULE}.")] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Of the targets, leave out these; in the same words.")
    ] = None,
    dtype: Annotated[
        DType | None,
        typer.Option(
            help="Convert floating-point tensors of the output, after pruning; configs stay as they are. "
            "Default: every tensor keeps its dtype."
        ),
    ] = None,
    masks: Annotated[
        bool, typer.Option("--masks", help="Also write the packed masks: OUT.masks.safetensors, or OUT/masks/.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace OUT if it is there, once the new one is whole.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on after the last shard that an interrupted run has finished.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, show the targets, write nothing.")
    ] = False,
    max_memory: Annotated[
        int,
        typer.Option(
            min=8,
            help="MB for weights at a time, beside what Python and torch take themselves. In layer scope a tensor of "
            "up to half of it is read once, a larger one twice.",
        ),
    ] = DEFAULT_MEMORY // MB,
) -> None:
    """Prune a safetensors checkpoint of any size, exactly, on its way from disk to disk.

    OUT appears when it is whole, and not before. Under torchrun the shards are divided among the processes.
    """
    job = PruneJob(
        source,
        target,
        sparsity=sparsity,
        scope=scope.value,
        targets=targets,
        ignore=ignore,
        dtype=None if dtype is None else getattr(torch, dtype.value),
        masks=masks,
        force=force,
    )
    console = Console()
    coverage = cover_tensors(job.checkpoint.tensors, targets, ignore)
    if dry_run:
        _show_targets(console, job, coverage)
        return
    try:
        with _progress(console, "pruning") as advance:
            report = job.run(resume=resume, max_memory=max_memory * MB, progress=advance)
    except (GMPError, KeyboardInterrupt):
        if job.is_begun():
            Console(stderr=True).print("What is finished of it is kept: --resume goes on from there.")
        raise
    if os.environ.get("RANK", "0") == "0":
        _show_coverage(console, coverage, [layer.num_pruned for layer in report.layers])
        console.print(_summary(job, report, target), soft_wrap=True, highlight=False)


def inspect(
    path: Annotated[Path, typer.Argument(help="A .safetensors file, or a Hugging Face folder of them.")],
    only: Annotated[list[str] | None, typer.Option("--filter", help=f"Look at these alone. {WORDS}")] = None,
    histogram: Annotated[bool, typer.Option("--histogram", help="Draw how the magnitudes are distributed.")] = False,
    plot: Annotated[Path | None, typer.Option(help="PNG file for the same as a picture.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for all numbers.")] = None,
) -> None:
    """Show sparsity, ranges, NaN and Inf of a safetensors checkpoint, tensor by tensor."""
    for output in (plot, json_file):
        # Before hours of reading, not after.
        if output is not None and not output.parent.is_dir():
            raise OutputError(f"{output}: expected its folder to be there, got none; create {output.parent}")
    console = Console()
    with _progress(console, "reading") as advance:
        found = inspect_checkpoint(path, only=only, histogram=histogram or plot is not None, progress=advance)
    print_whole(console, _statistics(found, with_histogram=histogram))
    if histogram:
        console.print(_bars(_all_magnitudes(found)))
    if plot is not None:
        # matplotlib takes longer to import than most checkpoints to read.
        from gmp_kernels.plots import plot_histogram

        plot_histogram(plot, {t.name: t.histogram for t in found}, path.name, bins_per_octave=BINS_PER_OCTAVE)
        console.print(f"wrote {plot}", soft_wrap=True)
    if json_file is not None:
        document = {"path": str(path), "total": _total(found).to_dict(), "tensors": [t.to_dict() for t in found]}
        json_file.write_text(json.dumps(document, indent=2) + "\n")
        console.print(f"wrote {json_file}", soft_wrap=True)


@contextlib.contextmanager
def _progress(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar, the speed and the time left, if there is a terminal to show them on."""
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


def _show_targets(console: Console, job: PruneJob, coverage: Coverage) -> None:
    by_layer = len(counts := job.num_prune()) == len(job.tensors)
    table = new_table(
        "tensor", "dtype", "shape", "weights", *(["num_prune"] if by_layer else []), right=(3, 4)[: 1 + by_layer]
    )
    for i, tensor in enumerate(job.tensors):
        count = [str(counts[i])] if by_layer else []
        table.add_row(escape(tensor.name), tensor.dtype, _shape(tensor.shape), str(tensor.numel), *count)
    print_whole(console, table)
    # Only ranking all of them would tell who loses what in global scope.
    _show_coverage(console, coverage, counts if by_layer else [0] * len(job.tensors))
    weights = sum(tensor.numel for tensor in job.tensors)
    others = len(job.checkpoint.tensors) - len(job.tensors)
    console.print(
        f"would prune {sum(counts)} of {weights} weights in {len(job.tensors)} tensors and copy {others} as they are",
        soft_wrap=True,
        highlight=False,
    )


def _show_coverage(console: Console, coverage: Coverage, num_pruned: Sequence[int]) -> None:
    """Print the coverage, and what is left without a weight; ``num_pruned`` is by target, in their order."""
    names, sizes = [tensor.name for tensor in coverage.targets], [tensor.num_weights for tensor in coverage.targets]
    lines = [str(coverage)]
    if emptied := emptied_layers(names, sizes, num_pruned):
        lines.append(f"no weight is left in {shown_names(emptied)}")
    console.print("\n".join(lines), soft_wrap=True, highlight=False, markup=False)


def _summary(job: PruneJob, report: PruneReport, target: Path) -> str:
    others = len(job.checkpoint.tensors) - len(job.tensors)
    return (
        f"pruned {len(report.layers)} tensors to a sparsity of {report.sparsity:.4f}, copied {others} others: "
        f"{decimal(report.num_bytes)} in {report.seconds:.1f} s, "
        f"{decimal(round(report.num_bytes / report.seconds))}/s; wrote {target}"
    )


def _total(found: Sequence[TensorStatistics]) -> TensorStatistics:
    """Return the statistics of all tensors whose zeros are counted, as of a single one."""
    counted = [t for t in found if t.num_zeros is not None]
    magnitudes = [m for t in counted for m in (t.smallest, t.largest) if m is not None]
    numel = sum(t.numel for t in counted)
    return TensorStatistics(
        name="total",
        dtype="",
        shape=(numel,),
        numel=numel,
        num_zeros=sum(t.num_zeros or 0 for t in counted),
        num_nan=sum(t.num_nan or 0 for t in counted),
        num_inf=sum(t.num_inf or 0 for t in counted),
        largest=max(magnitudes, default=None),
        smallest=min(magnitudes, default=None),
        histogram=_all_magnitudes(found),
    )


def _all_magnitudes(found: Sequence[TensorStatistics]) -> Counter[int]:
    total: Counter[int] = Counter()
    for tensor in found:
        total.update(tensor.histogram)
    return total


def _statistics(found: Sequence[TensorStatistics], *, with_histogram: bool) -> Table:
    columns = ["tensor", "dtype", "shape", "sparsity", "zeros", "NaN", "Inf", "smallest", "largest"]
    octaves = _octaves(_all_magnitudes(found))
    if with_histogram and octaves:
        columns.append(f"2^{min(octaves)} .. 2^{max(octaves) + 1}")
    table = new_table(*columns, right=range(3, 9))
    for tensor in [*found, _total(found)]:
        numbers = (tensor.num_zeros, tensor.num_nan, tensor.num_inf)
        row = [
            escape(tensor.name),
            tensor.dtype,
            _shape(tensor.shape),
            "-" if tensor.sparsity is None else f"{tensor.sparsity:.4f}",
            *("-" if number is None else str(number) for number in numbers),
            *("-" if magnitude is None else f"{magnitude:.4g}" for magnitude in (tensor.smallest, tensor.largest)),
        ]
        if with_histogram and octaves:
            row.append(_line(_octaves(tensor.histogram), range(min(octaves), max(octaves) + 1)))
        table.add_row(*row)
    return table


def _octaves(histogram: Counter[int]) -> Counter[int]:
    octaves: Counter[int] = Counter()
    for b, count in histogram.items():
        octaves[b // BINS_PER_OCTAVE] += count
    return octaves


def _line(counts: Counter[int], positions: range) -> str:
    """Draw a histogram as one line of blocks; what is there at all is seen."""
    highest = max(counts.values(), default=1)
    return "".join(BLOCKS[-(-counts[b] * (len(BLOCKS) - 1) // highest)] for b in positions)


def _bars(histogram: Counter[int]) -> Table:
    octaves = _octaves(histogram)
    highest, total = max(octaves.values(), default=1), sum(octaves.values())
    table = new_table("magnitude from", "weights", "share", "", right=(0, 1, 2))
    for b in range(max(octaves, default=-1), min(octaves, default=0) - 1, -1):
        share = octaves[b] / total
        table.add_row(f"2^{b}", str(octaves[b]), f"{share:.2%}", "█" * round(40 * octaves[b] / highest))
    return table


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"
