"""The pruner's calls of ``prune_``, on whole layers or on shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from gmp_kernels.distributed.placement import local
from gmp_kernels.masks import BitMask
from gmp_kernels.ops import PruneResult, Scope, begin_prune, prune_
from gmp_kernels.pruner.enforcement import Enforcement

__all__ = ["begin", "by_device", "overwrite_masks", "prune_nothing"]


def by_device(held: Enforcement, names: Iterable[str], scope: Scope) -> list[list[str]]:
    """Split ``names`` by device for layer scope; ``prune_`` itself refuses global scope over several."""
    batches: dict[torch.device | None, list[str]] = {}
    for name in names:
        device = held.parameters[name].device if scope == "layer" else None
        batches.setdefault(device, []).append(name)
    return list(batches.values())


def begin(
    held: Enforcement, names: Sequence[str], num_prune: list[int], *, step: int, **options: Any
) -> Callable[[], PruneResult]:
    """Do what comes before the first write of an update to layers of one device.

    ``num_prune`` has one count per name, or a single one in global scope; ``step`` is what ranks compare, and
    ``options`` are ``scope`` and ``nonfinite`` as in ``prune_``.

    Returns
    -------
    callable
        Prunes the layers. May be called again if it is interrupted, unless there are other ranks. Masks are changed in
        place; under compact state, whose layout needs the old bits, their ``packed`` is replaced.
    """
    weights = [_ranked(held, name) for name in names]
    masks = [_writable_mask(held, name) for name in names]
    options |= {"names": names, "previous": [held.thresholds.get(name) for name in names], "backend": held.backend}
    if held.shards is not None:
        prune: Callable[[], PruneResult] = partial(held.shards.prune_, weights, masks, num_prune, step=step, **options)
    else:
        prune = begin_prune(weights, num_prune=num_prune, masks=masks, **options)

    def write() -> PruneResult:
        result = prune()
        for name, mask in zip(names, masks, strict=True):
            held.masks[name].packed = mask.packed
        held.thresholds.update(zip(names, result.thresholds, strict=True))
        return result

    return write


def prune_nothing(held: Enforcement, names: Sequence[str], **options: Any) -> None:
    """Raise what ``prune_`` would raise for layers of one device, and change nothing."""
    if held.shards is not None:
        names = [name for name in names if held.masks[name].numel]
        # One rank must not fail where the others go on: together they look at the first update.
        options["nonfinite"] = "keep"
    prune_(
        [_ranked(held, name) for name in names],
        num_prune=0,
        masks=[_writable_mask(held, name) for name in names],
        names=names,
        backend=held.backend,
        **options,
    )


def overwrite_masks(held: Enforcement, masks: Mapping[str, BitMask]) -> None:
    """Give the masks other bits."""
    # Memory can run out here alone, where nothing is written yet.
    written = {name: _writable_mask(held, name) for name in masks}
    for name, mask in masks.items():
        written[name].packed.copy_(mask.packed)
        held.masks[name].packed = written[name].packed


def _writable_mask(held: Enforcement, name: str) -> BitMask:
    """Return a mask whose bits may be written; a copy where compact state is laid out by the bits there are."""
    mask, optimizer = held.masks[name], held.masked_optimizer
    return mask.clone() if optimizer is not None and optimizer.compact_state else mask


def _ranked(held: Enforcement, name: str) -> torch.Tensor:
    """Return the tensor whose magnitudes decide: the master copy where the optimizer keeps one."""
    parameter, optimizer = held.parameters[name], held.masked_optimizer
    master = None if optimizer is None else optimizer.master_weight(parameter)
    return local(parameter) if master is None else master
