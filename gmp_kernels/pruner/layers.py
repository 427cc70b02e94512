"""The pruner's calls of ``prune_``, on whole layers or on shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from gmp_kernels.distributed.placement import local
from gmp_kernels.masks import BitMask
from gmp_kernels.ops import NonFinite, PruneResult, Scope, Threshold, begin_prune, prune_
from gmp_kernels.pruner.enforcement import Enforcement

__all__ = ["begin", "overwrite_masks", "prune_nothing"]


def begin(
    held: Enforcement, names: Sequence[str], num_prune: Sequence[int], *, step: int, scope: Scope, nonfinite: NonFinite
) -> Callable[[], dict[str, tuple[Threshold, int]]]:
    """Do everything in an update that comes before its first write: one call of ``prune_`` per device.

    ``num_prune`` has one count per name, or a single one in global scope. Ranks compare ``step``. The rest is as in
    ``prune_``.

    Returns
    -------
    callable
        Prunes the layers and returns their thresholds, and how many weights of each are pruned. May be called again if
        it is interrupted, unless there are other ranks. Masks are changed in place. With compact state, whose layout
        needs the old bits, their ``packed`` is replaced.
    """
    batches = _by_device(held, names, scope)
    if len(batches) > 1:
        # Each call must find its NaN before the first one writes.
        prune_nothing(held, names, scope=scope, nonfinite=nonfinite)
    counts = dict(zip(names, num_prune, strict=scope == "layer"))
    calls = []
    for batch in batches:
        weights, masks = [_ranked(held, name) for name in batch], [_writable_mask(held, name) for name in batch]
        own = num_prune if scope == "global" else [counts[name] for name in batch]
        options: dict[str, Any] = {"scope": scope, "nonfinite": nonfinite, "names": batch, "backend": held.backend}
        options["previous"] = [held.thresholds.get(name) for name in batch]
        if held.shards is not None:
            prune: Callable[[], PruneResult] = partial(held.shards.prune_, weights, masks, own, step=step, **options)
        else:
            prune = begin_prune(weights, num_prune=own, masks=masks, **options)
        calls.append((batch, masks, prune))
    found: dict[str, tuple[Threshold, int]] = {}

    def write() -> dict[str, tuple[Threshold, int]]:
        for batch, masks, prune in calls:
            if batch[0] not in found:
                result = prune()
                for name, mask in zip(batch, masks, strict=True):
                    held.masks[name].packed = mask.packed
                held.thresholds.update(zip(batch, result.thresholds, strict=True))
                found.update(zip(batch, zip(result.thresholds, result.num_pruned, strict=True), strict=True))
        return found

    return write


def prune_nothing(held: Enforcement, names: Iterable[str], *, scope: Scope, nonfinite: NonFinite) -> None:
    """Raise what ``prune_`` would raise for these layers, and change nothing."""
    for batch in _by_device(held, names, scope):
        if held.shards is not None:
            batch = [name for name in batch if held.masks[name].numel]
            # One rank must not fail while others go on. All look for NaN together, at the first update.
            nonfinite = "keep"
        prune_(
            [_ranked(held, name) for name in batch],
            num_prune=0,
            masks=[_writable_mask(held, name) for name in batch],
            names=batch,
            scope=scope,
            nonfinite=nonfinite,
            backend=held.backend,
        )


def _by_device(held: Enforcement, names: Iterable[str], scope: Scope) -> list[list[str]]:
    """Split ``names`` by device for layer scope; ``prune_`` itself refuses global scope over several."""
    batches: dict[torch.device | None, list[str]] = {}
    for name in names:
        device = held.parameters[name].device if scope == "layer" else None
        batches.setdefault(device, []).append(name)
    return list(batches.values())


def overwrite_masks(held: Enforcement, masks: Mapping[str, BitMask]) -> None:
    """Replace the bits of the masks."""
    # Memory can run out only here, before anything is written.
    written = {name: _writable_mask(held, name) for name in masks}
    for name, mask in masks.items():
        written[name].packed.copy_(mask.packed)
        held.masks[name].packed = written[name].packed


def _writable_mask(held: Enforcement, name: str) -> BitMask:
    """Return a mask whose bits may be written; a copy if compact state is laid out by the present bits."""
    mask, optimizer = held.masks[name], held.masked_optimizer
    return mask.clone() if optimizer is not None and optimizer.compact_state else mask


def _ranked(held: Enforcement, name: str) -> torch.Tensor:
    """Return the tensor that is ranked: the master copy if the optimizer keeps one, else the weight."""
    parameter, optimizer = held.parameters[name], held.masked_optimizer
    master = None if optimizer is None else optimizer.master_weight(parameter)
    return local(parameter) if master is None else master
