"""The pruner's calls of ``prune_``, on whole layers or on shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch

from gmp_kernels.counts import Caps
from gmp_kernels.distributed.placement import local
from gmp_kernels.masks import BitMask
from gmp_kernels.ops import NonFinite, PruneResult, Scope, begin_prune, prune_
from gmp_kernels.pruner.enforcement import Enforcement
from gmp_kernels.pruner.scores import scores_of

__all__ = ["begin", "prune_nothing", "writable_mask"]


def begin(
    held: Enforcement, num_prune: Mapping[str, int], *, step: int, scope: Scope, nonfinite: NonFinite
) -> Callable[[], dict[str, int]]:
    """Do everything in an update that comes before its first write: one call of ``prune_`` per device.

    ``num_prune`` has one count per layer, of which global scope takes the sum. Ranks compare ``step``. The rest is as
    in ``prune_``.

    Returns
    -------
    callable
        Prunes the layers, stores their thresholds, and returns how many weights of each are pruned. May be called again
        if it is interrupted, unless there are other ranks. Masks are changed in place. With compact state, whose layout
        needs the old bits, their ``packed`` is replaced.
    """
    batches, shards = _by_device(held, num_prune, scope), held.shards
    if len(batches) > 1:
        # Each call must find its NaN before the first one writes.
        prune_nothing(held, num_prune, scope=scope, nonfinite=nonfinite)
    calls: list[tuple[list[str], Callable[[], PruneResult]]] = []
    for batch in batches:
        counts = [num_prune[name] for name in batch]
        given = _layers(held, batch) | {"scope": scope, "nonfinite": nonfinite, "caps": _caps(held, batch, scope)}
        given["num_prune"] = [sum(counts)] if scope == "global" else counts
        given["regrow"] = held.limits.regrow
        given["previous"] = [held.thresholds.get(name) for name in batch]
        scores = None if held.limits.scores is None else partial(scores_of, held, batch)
        if shards is None:
            own = None if scores is None else scores()
            calls.append((batch, begin_prune(**given, **_pattern(held, batch), scores=own, are_unbroken=True)))
        else:
            # Called there, so that no rank waits for one whose function fails.
            calls.append((batch, partial(shards.prune_, step=step, scores=scores, **given)))

    def write() -> dict[str, int]:
        num_pruned: dict[str, int] = {}
        for batch, prune in calls:
            result = prune()
            for name, mask in zip(batch, result.masks, strict=True):
                if held.masks[name] is not mask:
                    held.masks[name].become(mask)
            held.thresholds.update(zip(batch, result.thresholds, strict=True))
            num_pruned.update(zip(batch, result.num_pruned, strict=True))
        return num_pruned

    return write


def prune_nothing(held: Enforcement, names: Iterable[str], *, scope: Scope, nonfinite: NonFinite) -> None:
    """Raise what ``prune_`` would raise for these layers, and change nothing."""
    if held.limits.scores is not None:
        # NaN matters in what is ranked, and so does its dtype. Scores are not known yet.
        scope, nonfinite = "layer", "keep"
    for batch in _by_device(held, names, scope):
        pattern = _pattern(held, batch)
        if held.shards is not None:
            batch = [name for name in batch if held.masks[name].numel]
            # One rank must not fail while others go on. All look for NaN together, at the first update.
            nonfinite, pattern = "keep", {}
        prune_(num_prune=0, scope=scope, nonfinite=nonfinite, **_layers(held, batch), **pattern)


def _layers(held: Enforcement, names: list[str]) -> dict[str, Any]:
    """Return what ``prune_`` is given of these layers, for any count."""
    return {
        "weights": [_ranked(held, name) for name in names],
        "masks": [writable_mask(held, name) for name in names],
        "names": names,
        "backend": held.backend,
    }


def _pattern(held: Enforcement, names: list[str]) -> dict[str, Any]:
    """Return the patterns of these layers as ``prune_`` is given them."""
    patterns = held.limits.patterns
    return {"pattern": [patterns.get(name) for name in names]} if patterns else {}


def _caps(held: Enforcement, names: list[str], scope: Scope) -> Caps | None:
    """Return the caps of layers that are ranked together; others are in their counts."""
    if scope == "layer" or held.limits.max_sparsity is None:
        return None
    limits = held.limits.of_layers({name: held.parameters[name].shape for name in names})
    assert limits is not None
    num_pruned = [0 if held.limits.regrow else held.num_pruned[name] for name in names]
    return Caps([limit.most for limit in limits], num_pruned)


def _by_device(held: Enforcement, names: Iterable[str], scope: Scope) -> list[list[str]]:
    """Split ``names`` by device for layer scope; ``prune_`` itself refuses global scope over several."""
    batches: dict[torch.device | None, list[str]] = {}
    for name in names:
        device = held.parameters[name].device if scope == "layer" else None
        batches.setdefault(device, []).append(name)
    return list(batches.values())


def writable_mask(held: Enforcement, name: str) -> BitMask:
    """Return a mask whose bits may be written; a copy if compact state is laid out by the present bits."""
    mask, optimizer = held.masks[name], held.masked_optimizer
    return mask.clone() if optimizer is not None and optimizer.compact_state else mask


def _ranked(held: Enforcement, name: str) -> torch.Tensor:
    """Return the tensor that is ranked: the master copy if the optimizer keeps one, else the weight."""
    parameter, optimizer = held.parameters[name], held.masked_optimizer
    master = None if optimizer is None else optimizer.master_weight(parameter)
    return local(parameter) if master is None else master
