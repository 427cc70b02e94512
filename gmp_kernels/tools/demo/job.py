"""One run of the demo, from the options to the files."""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gmp_kernels.errors import ScheduleError, printable
from gmp_kernels.plots import Curves, plot_sparsity
from gmp_kernels.schedules import Ramp
from gmp_kernels.stages import Stages
from gmp_kernels.tools.demo import checkpoint, data, metrics, report
from gmp_kernels.tools.demo.trial import METHODS, OPTIMIZERS, SWEPT, Trial, compare, num_epochs, stages_of, sweep_of
from gmp_kernels.tools.plan import parts_of
from gmp_kernels.tools.plots import plot_accuracy, plot_learning_rate, plot_sweep

__all__ = ["run"]


def run(
    out_dir: Path,
    *,
    sparsity: float = 0.97,
    epochs: int = 60,
    seeds: int = 3,
    seed: int = 0,
    optimizer: str = "gmp",
    threads: int = 1,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train a small network on scikit-learn's digits, prune it in three ways, and write the results.

    The three ways are gradual pruning (stabilization, pruning and fine-tuning in the proportion 1 : 34 : 25, 5% at the
    first update, an update per epoch), one-shot pruning, and one-shot pruning with as much training as the gradual run.
    The two that train are compared at further sparsities, from 80% to 98%.

    ``out_dir`` gets ``sweep.png``, ``sparsity.png``, ``learning_rate.png``, ``accuracy.png``, ``report.md``,
    ``metrics.json`` and the gradually pruned network with its masks in ``model.safetensors``. Files of these names are
    replaced.

    Parameters
    ----------
    out_dir : Path
        Output folder, created if it is missing.
    sparsity : float
        Final sparsity of every prunable layer, a fraction in [0.05, 1].
    epochs : int
        Length of each run that trains and prunes. The dense network is trained for half as many epochs.
    seeds : int
        Number of repetitions. Each has the next seed, and so another split, initial weights and order of images.
    seed : int
        Seed of the first repetition, whose network is saved.
    optimizer : {"gmp", "torch"}
        ``gmp_kernels.optim.SGD`` with compact state, or ``torch.optim.SGD``.
    threads : int
        Number of torch's threads while the job runs, >= 1. With batches this small, a second thread gains next to
        nothing, and costs much if other work competes for the cores. The number of threads changes the order of sums,
        so it changes the networks.
    console : rich.console.Console, optional
        Receives the progress and the closing table; default: standard output.

    Returns
    -------
    dict
        The content of ``metrics.json``.

    Raises
    ------
    SparsityError, ScheduleError
        ``sparsity``, ``epochs`` or ``seeds`` describes no run. Nothing has been written.
    """
    if seeds < 1:
        raise ScheduleError(f"demo: expected at least 1 seed, got {seeds}; each one is a comparison")
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"demo: expected optimizer to be one of {tuple(OPTIMIZERS)}, got {optimizer!r}")
    stages = stages_of(epochs, data.steps_per_epoch(data.load(seed)))
    schedule = stages.schedule(final_sparsity=sparsity)
    console = console or Console()

    with _torch_threads(threads):
        out_dir.mkdir(parents=True, exist_ok=True)
        trials = _compare(stages, schedule, range(seed, seed + seeds), optimizer, console)
        numbers = metrics.collect(trials, stages, sparsity, optimizer)
    options = {"--out": out_dir, "--sparsity": sparsity, "--seeds": seeds, "--seed": seed, "--optimizer": optimizer}
    command = shlex.join(["gmp-kernels", "demo", *(str(part) for option in options.items() for part in option)])

    _draw(out_dir, trials, stages, sparsity)
    checkpoint.save(out_dir / "model.safetensors", trials[0].model, trials[0].masks)
    (out_dir / "metrics.json").write_text(json.dumps(numbers, indent=2) + "\n")
    (out_dir / "report.md").write_text(report.markdown(numbers, command))
    console.print(report.table(numbers))
    wrote = f"wrote {out_dir / 'report.md'} with its pictures, metrics.json and model.safetensors"
    console.print(printable(wrote), markup=False, soft_wrap=True)
    return numbers


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _compare(stages: Stages, schedule: Ramp, seeds: Sequence[int], optimizer: str, console: Console) -> list[Trial]:
    sweep = sweep_of(schedule.final_sparsity)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("", total=len(seeds) * num_epochs(stages, sweep))

        def after_epoch(seed: int, method: str) -> None:
            progress.update(task, advance=1, description=f"seed {seed}: {METHODS[method]}")

        return [compare(stages, schedule, sweep, seed, optimizer, partial(after_epoch, seed)) for seed in seeds]


def _draw(out_dir: Path, trials: Sequence[Trial], stages: Stages, sparsity: float) -> None:
    first = trials[0]
    plot_sweep(
        out_dir / "sweep.png",
        list(first.sweep["gmp"]),
        {METHODS[method]: [list(trial.sweep[method].values()) for trial in trials] for method in SWEPT},
        "Test accuracy at the end" + _of_seeds(trials),
        baselines={METHODS["dense"]: statistics.fmean(trial.results["dense"].accuracy for trial in trials)},
    )
    ends = [*(update.step for update in first.history), stages.total_steps]
    staircases = {name: [0.0] for name in first.masks}
    for update in first.history:
        for layer in update.layers:
            staircases[layer.name].append(layer.sparsity)
    total = [0.0, *(update.sparsity for update in first.history)]
    plot_sparsity(
        out_dir / "sparsity.png",
        Curves([0, *ends], [*total, total[-1]], {name: [*values, values[-1]] for name, values in staircases.items()}),
        "Sparsity of the gradually pruned network",
        parts=parts_of(stages),
    )
    plot_learning_rate(
        out_dir / "learning_rate.png",
        range(stages.total_steps),
        first.learning_rates,
        "Learning rate of every run that prunes and trains",
        parts=parts_of(stages),
    )
    epochs = range(len(first.results["gmp"].curve))
    plot_accuracy(
        out_dir / "accuracy.png",
        epochs,
        {
            # One-shot pruning without retraining has a single value. It is drawn as a line.
            METHODS[method]: [
                curve if len(curve) > 1 else curve * len(epochs)
                for curve in (trial.results[method].curve for trial in trials)
            ]
            for method in ("gmp", "oneshot_retrained", "oneshot")
        },
        f"Test accuracy at {100 * sparsity:g}% sparsity" + _of_seeds(trials),
        baselines={METHODS["dense"]: statistics.fmean(trial.results["dense"].accuracy for trial in trials)},
        parts=parts_of(stages, stages.steps_per_epoch),
    )


def _of_seeds(trials: Sequence[Trial]) -> str:
    return f", mean and range of {len(trials)} seeds" if len(trials) > 1 else ""
