"""One update of a pruner: all layers that are due, or nothing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from gmp_kernels.model.coverage import shown_names
from gmp_kernels.pruner.enforcement import Enforcement
from gmp_kernels.pruner.groups import Group
from gmp_kernels.pruner.interrupts import write_despite_interrupts
from gmp_kernels.pruner.layers import begin
from gmp_kernels.pruner.progress import Position
from gmp_kernels.reports import LayerReport, StepReport
from gmp_kernels.schedules import Schedule

__all__ = ["say_emptied", "update"]

MOST_ANEW = 1024  # reports that are kept where each update ranks all weights anew


def update(
    held: Enforcement,
    history: list[StepReport],
    schedule: Schedule,
    groups: Sequence[Group],
    due: Sequence[int | None],
    position: Position,
    options: dict[str, Any],
) -> StepReport:
    """Make the updates of these steps, one per group, or change nothing.

    Parameters
    ----------
    held : Enforcement
    history : list of StepReport
        Receives the report.
    schedule : Schedule
        Of the pruner itself, overrides aside.
    groups, due : sequences
    position : Position
        Of the run once the updates are made.
    options : dict
        ``scope`` and ``nonfinite`` of ``prune_``.
    """
    start = time.perf_counter()
    held.watch.check_shapes()
    updates = [(group, step) for group, step in zip(groups, due, strict=True) if step is not None]
    step = max(step for _, step in updates)
    counts: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for group, at in updates:
        counts |= group.num_prune(group.schedule.sparsity_at(at))
        sizes |= {name: shape.numel() for name, shape in group.shapes.items()}
    held.check_masks(names := [name for name in held.masks if name in counts])
    prune = begin(held, {name: counts[name] for name in names}, step=step, **options)
    before, num_reports = held.num_pruned, len(history)
    num_pruned: dict[str, int] = {}

    def write() -> StepReport:
        if not num_pruned:  # a second call must not write bits by which state is laid out by now
            num_pruned.update(prune())
        found = [(name, held.thresholds[name], num_pruned[name]) for name in names]
        layers = tuple(
            LayerReport(name, threshold.value, sizes[name], n, n - before[name], threshold.num_ties)
            for name, threshold, n in found
        )
        held.masks_changed(before | num_pruned)
        try:
            # If this fails, only optimizer state is left to zero, and the code that zeroes it tries again later.
            held.apply(names, ranked_is_pruned=True, are_checked=True)
        finally:
            report = StepReport(
                step=step,
                num_calls=position.num_calls,
                target_sparsity=schedule.sparsity_at(step),
                sparsity=sum(num_pruned.values()) / sum(layer.num_weights for layer in layers),
                seconds=time.perf_counter() - start,
                layers=layers,
            )
            history[num_reports:] = [report]
            if held.limits.regrow:
                del history[:-MOST_ANEW]  # updates that never end must not fill the memory
            held.progress.position = position
        return report

    return write_despite_interrupts(write, held.shards)


def say_emptied(held: Enforcement, report: StepReport) -> None:
    """Warn of layers that ranking all together has left without a weight."""
    emptied = [layer.name for layer in report.layers if layer.sparsity == 1.0]
    if emptied:
        held.say(
            "emptied",
            f"ranking all layers together has left {shown_names(emptied)} without a weight; prune less, give a "
            "max_sparsity=, use scope='layer', or add them to ignore=",
        )
