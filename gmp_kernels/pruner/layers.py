"""The pruner's calls of ``prune_``, on whole layers or on shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

from gmp_kernels.distributed import Shards
from gmp_kernels.distributed.placement import local
from gmp_kernels.masks import BitMask
from gmp_kernels.ops import NonFinite, PruneResult, Scope, Threshold, begin_prune, prune_
from gmp_kernels.optim.masked import MaskedOptimizer
from gmp_kernels.pruner.groups import Groups
from gmp_kernels.pruner.progress import Progress
from gmp_kernels.reports import LayerReport

__all__ = ["Agreement", "LayerPruner", "report_layers", "write_despite_interrupts"]

_T = TypeVar("_T")


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


class Agreement:
    """Agreement of all ranks on the run that they are in, made once and anew after a state was loaded.

    Parameters
    ----------
    shards : Shards, optional
        None: there is nobody to agree with.
    groups : Groups
    progress : Progress
    pruner : LayerPruner
    """

    def __init__(self, shards: Shards | None, groups: Groups, progress: Progress, pruner: LayerPruner) -> None:
        self._shards = shards
        self._groups = groups
        self._progress = progress
        self._pruner = pruner
        self._is_made = False

    def make(self) -> None:
        """Wait for the ranks, unless they have agreed already.

        Raises
        ------
        StateError
            They differ, on every rank.
        DistributedError
            A rank does not answer.
        """
        if self._shards is None or self._is_made:
            return
        thresholds = {f"threshold of '{name}'": value for name, value in self._pruner.thresholds.items()}
        self._shards.agree({**self._groups.settings(), "step": self._progress.step_count, **thresholds})
        self._is_made = True

    def renew(self) -> None:
        """Have it made again: another state was loaded."""
        self._is_made = False


def report_layers(
    names: Sequence[str], result: PruneResult, before: Mapping[str, int], shapes: Mapping[str, torch.Size]
) -> dict[str, LayerReport]:
    """Return what was done to each layer, of which so many weights were pruned before."""
    return {
        name: LayerReport(name, cut.value, shapes[name].numel(), n, n - before[name], cut.num_ties)
        for name, cut, n in zip(names, result.thresholds, result.num_pruned, strict=True)
    }


class LayerPruner:
    """Prunes parameters by name, in place, and keeps their masks.

    Parameters
    ----------
    parameters : mapping of str to Parameter
    masks : mapping of str to BitMask
        Changed in place; under compact state, whose layout needs the old bits, their ``packed`` is replaced.
    shards : Shards, optional
        Where parameters are shards or copies of those of other ranks.
    scope, nonfinite, backend
        As in ``prune_``.

    Attributes
    ----------
    thresholds : dict of str to Threshold
        Of the latest update of each layer.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        masks: Mapping[str, BitMask],
        shards: Shards | None,
        *,
        scope: Scope,
        nonfinite: NonFinite,
        backend: str | None,
    ) -> None:
        self._parameters = parameters
        self._masks = masks
        self._shards = shards
        self._scope: Scope = scope
        self._nonfinite: NonFinite = nonfinite
        self._backend = backend
        self.thresholds: dict[str, Threshold] = {}

    def batches(self, names: Iterable[str]) -> list[list[str]]:
        """Split ``names`` by device for layer scope; ``prune_`` itself refuses global scope over several."""
        batches: dict[torch.device | None, list[str]] = {}
        for name in names:
            device = self._parameters[name].device if self._scope == "layer" else None
            batches.setdefault(device, []).append(name)
        return list(batches.values())

    def begin(
        self, names: Sequence[str], num_prune: list[int], optimizer: MaskedOptimizer | None, *, step: int
    ) -> Callable[[], PruneResult]:
        """Do what comes before the first write to one batch.

        Parameters
        ----------
        names : sequence of str
        num_prune : list of int
            One per name, or a single one in global scope.
        optimizer : MaskedOptimizer, optional
            Its master weights are ranked, where it keeps some.
        step : int
            What ranks compare.

        Returns
        -------
        callable
            Prunes the batch. May be called again if it is interrupted, unless there are other ranks.
        """
        request: dict[str, Any] = {
            "names": names,
            "scope": self._scope,
            "nonfinite": self._nonfinite,
            "previous": [self.thresholds.get(name) for name in names],
            "backend": self._backend,
        }
        weights = [self._ranked(name, optimizer) for name in names]
        masks = [self.writable_mask(name, optimizer) for name in names]
        if self._shards is not None:
            prune: Callable[[], PruneResult] = partial(
                self._shards.prune_, weights, masks, num_prune, step=step, **request
            )
        else:
            prune = begin_prune(weights, num_prune=num_prune, masks=masks, **request)

        def write() -> PruneResult:
            result = prune()
            for name, mask in zip(names, masks, strict=True):
                self._masks[name].packed = mask.packed
            self.thresholds.update(zip(names, result.thresholds, strict=True))
            return result

        return write

    def prune_nothing(self, names: Sequence[str], optimizer: MaskedOptimizer | None) -> None:
        """Raise what ``prune_`` would raise for these layers, and change nothing."""
        names = [name for name in names if self._masks[name].numel or self._shards is None]
        prune_(
            [self._ranked(name, optimizer) for name in names],
            num_prune=0,
            masks=[self.writable_mask(name, optimizer) for name in names],
            scope=self._scope,
            # One rank must not fail where the others go on: together they look at the first update.
            nonfinite=self._nonfinite if self._shards is None else "keep",
            names=names,
            backend=self._backend,
        )

    def writable_mask(self, name: str, optimizer: MaskedOptimizer | None) -> BitMask:
        """Return a mask whose bits may be written; a copy where compact state is laid out by the bits there are."""
        mask = self._masks[name]
        return mask.clone() if optimizer is not None and optimizer.compact_state else mask

    def _ranked(self, name: str, optimizer: MaskedOptimizer | None) -> torch.Tensor:
        """Return the tensor whose magnitudes decide: the master copy where the optimizer keeps one."""
        parameter = self._parameters[name]
        master = None if optimizer is None else optimizer.master_weight(parameter)
        return local(parameter) if master is None else master
