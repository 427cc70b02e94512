"""The pruner's calls of ``prune_``, on whole layers or on shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

from gmp_kernels.distributed import Shards
from gmp_kernels.distributed.placement import local
from gmp_kernels.masks import BitMask
from gmp_kernels.ops import PruneResult, begin_prune, prune_
from gmp_kernels.pruner.enforcement import Enforcement
from gmp_kernels.reports import LayerReport

__all__ = ["begin", "prune_nothing", "report_layers", "writable_mask", "write_despite_interrupts"]

_T = TypeVar("_T")


def begin(
    held: Enforcement, names: Sequence[str], num_prune: list[int], *, step: int, **options: Any
) -> Callable[[], PruneResult]:
    """Do what comes before the first write of an update to layers of one device.

    Parameters
    ----------
    held : Enforcement
    names : sequence of str
    num_prune : list of int
        One per name, or a single one in global scope.
    step : int
        What ranks compare.
    **options
        ``scope`` and ``nonfinite``, as in ``prune_``.

    Returns
    -------
    callable
        Prunes the layers. May be called again if it is interrupted, unless there are other ranks. Masks are changed in
        place; under compact state, whose layout needs the old bits, their ``packed`` is replaced.
    """
    weights = [_ranked(held, name) for name in names]
    masks = [writable_mask(held, name) for name in names]
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
        masks=[writable_mask(held, name) for name in names],
        names=names,
        backend=held.backend,
        **options,
    )


def writable_mask(held: Enforcement, name: str) -> BitMask:
    """Return a mask whose bits may be written; a copy where compact state is laid out by the bits there are."""
    mask, optimizer = held.masks[name], held.masked_optimizer
    return mask.clone() if optimizer is not None and optimizer.compact_state else mask


def _ranked(held: Enforcement, name: str) -> torch.Tensor:
    """Return the tensor whose magnitudes decide: the master copy where the optimizer keeps one."""
    parameter, optimizer = held.parameters[name], held.masked_optimizer
    master = None if optimizer is None else optimizer.master_weight(parameter)
    return local(parameter) if master is None else master


def write_despite_interrupts(write: Callable[[], _T], shards: Shards | None) -> _T:
    """Call what writes; an interrupt in between is raised once it was called again, which changes nothing twice."""
    try:
        return write()
    except Exception:
        raise
    except BaseException:
        # Other ranks would not take part.
        if shards is None:
            write()
        raise


def report_layers(
    names: Sequence[str], result: PruneResult, before: Mapping[str, int], sizes: Mapping[str, int]
) -> dict[str, LayerReport]:
    """Return what was done to each layer, of which so many weights were pruned before."""
    return {
        name: LayerReport(name, cut.value, sizes[name], n, n - before[name], cut.num_ties)
        for name, cut, n in zip(names, result.thresholds, result.num_pruned, strict=True)
    }
