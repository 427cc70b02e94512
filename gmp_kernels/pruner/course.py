"""The picture of a run: the sparsities its reports tell of, and those its schedules ask for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from os import PathLike

from torch import distributed

from gmp_kernels.plots import Curves, check_picture, plot_sparsity
from gmp_kernels.pruner.distributions import together
from gmp_kernels.pruner.groups import Group
from gmp_kernels.reports import StepReport

__all__ = ["asked_for", "draw", "so_far"]

NUM_POINTS = 200  # of a schedule's curve


def draw(
    path: str | PathLike[str],
    history: Sequence[StepReport],
    groups: Sequence[Group],
    num_pruned: Mapping[str, int],
    now: int,
) -> None:
    """Draw the run up to step ``now`` and what its schedules ask for. Of several ranks, only the first writes."""
    check_picture(path)
    if distributed.is_available() and distributed.is_initialized() and distributed.get_rank() > 0:
        return
    known = so_far(history, groups, num_pruned, now)
    end = max(group.schedule.end_step for group in groups)
    rest = "all updates are made" if now > end else f"the last update is due at step {end}"
    layers = "1 layer" if len(num_pruned) == 1 else f"{len(num_pruned)} layers"
    plot_sparsity(
        path,
        known,
        f"Sparsity of {layers}: {known.total[-1]:.1%} at step {now}; {rest}",
        target=asked_for(groups, max(end, now)),
        updates=[report.step for report in history],
        now=now,
    )


def so_far(history: Sequence[StepReport], groups: Sequence[Group], num_pruned: Mapping[str, int], now: int) -> Curves:
    """Return the sparsities after each update and at step ``now``; NaN where no report tells.

    Reports of a resumed run may lack their layers, and the earliest may be gone. A report also tells how sparse its
    layers were before, back to the update before it.
    """
    layers = {}
    for group in groups:
        for name, shape in group.shapes.items():
            counts = _counts_of(name, group, history, num_pruned[name])
            layers[name] = [count / math.prod(shape) for count in counts]
    sizes = {name: math.prod(shape) for group in groups for name, shape in group.shapes.items()}
    weights = [sizes[name] / sum(sizes.values()) for name in layers]
    total = [sum(w * s for w, s in zip(weights, at, strict=True)) for at in zip(*layers.values(), strict=True)]
    for i, report in enumerate(history, start=1):
        # A report counts all layers that were due, also where it does not list them.
        if math.isnan(total[i]) and all(group.schedule.is_update_step(report.step) for group in groups):
            total[i] = report.sparsity
    steps = [0, *(report.step for report in history), now]
    # What was before the first report that is left is known only if no update came before.
    is_whole = not history or history[0].step <= min(group.schedule.begin_step for group in groups)
    first = 0 if is_whole else 1
    return Curves(steps[first:], total[first:], {name: values[first:] for name, values in layers.items()})


def asked_for(groups: Sequence[Group], end: int) -> Curves:
    """Return what the schedules ask for from step 0 to ``end``; of layers ranked together, the total alone."""
    evenly = {round(end * i / NUM_POINTS) for i in range(NUM_POINTS + 1)}
    bends = {step for group in groups for begin in [group.schedule.begin_step] for step in (begin - 1, begin)}
    bends |= {group.schedule.end_step for group in groups}
    steps = sorted(step for step in evenly | bends if 0 <= step <= end)
    counts = [[group.num_prune(group.schedule.sparsity_at(step)) for group in groups] for step in steps]
    sizes = {name: math.prod(shape) for group in groups for name, shape in group.shapes.items()}
    total = [sum(sum(group.values()) for group in at) / sum(sizes.values()) for at in counts]
    if any(group.distribute is together for group in groups):
        return Curves(steps, total, {})
    by_layer = [{name: count for group in at for name, count in group.items()} for at in counts]
    return Curves(steps, total, {name: [at[name] / n for at in by_layer] for name, n in sizes.items()})


def _counts_of(name: str, group: Group, history: Sequence[StepReport], current: int) -> list[float]:
    """Return the number of pruned weights of a layer before the first report, after each of them, and now."""
    counts = [math.nan] * (len(history) + 1)
    told = {}
    for i, report in enumerate(history, start=1):
        told[i] = next((layer for layer in report.layers if layer.name == name), None)
        if (layer := told[i]) is not None:
            counts[i] = layer.num_pruned
        elif not group.schedule.is_update_step(report.step):
            counts[i] = counts[i - 1]
    # Backwards from the first report that lists the layer, to the update before it.
    first = next((i for i, layer in told.items() if layer is not None), len(counts))
    layer = told.get(first)
    before = current if layer is None else layer.num_pruned - layer.num_newly_pruned
    for i in range(first - 1, -1, -1):
        counts[i] = before
        if i and group.schedule.is_update_step(history[i - 1].step):
            break
    return [*counts, current]
