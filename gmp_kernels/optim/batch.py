"""Parameters that have passed every check and step together, and the brief look that tells whether that still holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain, groupby
from operator import is_
from typing import Any

import torch

from gmp_kernels.backends import UpdateBatch
from gmp_kernels.distributed.placement import is_sharded
from gmp_kernels.optim.compact import version_of
from gmp_kernels.optim.constants import Group, Steps
from gmp_kernels.optim.counts import StepCounts
from gmp_kernels.optim.ready import Ready

__all__ = ["Batch"]


class _Part:
    """The parameters of one group in a batch."""

    def __init__(self, index: int, ready: Sequence[Ready], *, counts_steps: bool) -> None:
        self.index = index
        self.size = len(ready)
        self.members = [i for i, r in enumerate(ready) if not r.is_empty]
        self.counts = StepCounts([r.state for r in ready if r.state is not None]) if counts_steps else None


class Batch:
    """The checked parameters of a step.

    Attributes
    ----------
    ready : list of Ready
        In the order of the groups.
    updates : UpdateBatch
        Those that have something here.
    written : list of torch.Tensor
        All that a step changes of them.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        keys: Sequence[tuple[str, ...]],
        members: Sequence[tuple[int, Ready]],
        captured: list[torch.Tensor],
        *,
        counts_steps: bool,
    ) -> None:
        self.ready = [ready for _, ready in members]
        present = [ready for ready in self.ready if not ready.is_empty]
        self.updates = UpdateBatch([ready.tensor for ready in present], captured)
        self.written = list(chain.from_iterable(ready.written for ready in present))
        self.parts = [
            _Part(index, [ready for _, ready in found], counts_steps=counts_steps)
            for index, found in groupby(members, lambda member: member[0])
        ]
        self._groups = [index for index, _ in members]
        self.remember(groups, keys)

    def consists_of(self, members: Sequence[tuple[int, Ready]]) -> bool:
        """Whether it was made of these, which are in these groups, and their step counts are those of then."""
        return (
            len(members) == len(self.ready)
            and all(map(is_, (ready for _, ready in members), self.ready))
            and [index for index, _ in members] == self._groups
            and all(map(is_, (ready.count for ready in self.ready), self._counts))
        )

    def remember(self, groups: Sequence[Group], keys: Sequence[tuple[str, ...]]) -> None:
        """Note what ``gradients`` is going to compare."""
        ready = self.ready
        self._owned = [p for group in groups for p in group["params"]]
        self._sizes, self._keys = [len(group["params"]) for group in groups], list(keys)
        self._parameters = [r.parameter for r in ready]
        self._is_plain = not any(map(is_sharded, self._parameters))
        self._pointers = [r.pointer for r in ready]
        self._shapes, self._strides = [r.shape for r in ready], [r.stride for r in ready]
        self._dtypes, self._devices = [r.dtype for r in ready], [r.device for r in ready]
        self._states = [r.state for r in ready]
        self._remember_entries()
        self._masks = [(r.mask, r.bits) for r in ready if r.mask is not None]
        self._frozen = [(r.bits, r.version) for r in ready if r.bits is not None and r.version is not None]

    def _remember_entries(self) -> None:
        self._entries = [state for state in self._states if state is not None]
        self._counts = [r.count for r in self.ready]
        self._values = list(chain.from_iterable(map(dict.values, self._entries)))

    def gradients(
        self, groups: Sequence[Group], keys: Sequence[tuple[str, ...]], state: Mapping[torch.Tensor, dict[str, Any]]
    ) -> list[torch.Tensor] | None:
        """Return the gradients, if everything is as it was and they fit; None where each has to be looked at.

        List by list and not parameter by parameter: this is most of what a step of many small tensors costs.
        """
        if not self._is_plain or keys != self._keys or [len(group["params"]) for group in groups] != self._sizes:
            return None
        if not all(map(is_, chain.from_iterable(group["params"] for group in groups), self._owned)):
            return None
        grads = [grad for p in self._owned if (grad := p.grad) is not None]
        parameters, states = self._parameters, self._entries
        if len(grads) != len(parameters) or any(grad.layout is not torch.strided for grad in grads):
            return None
        if len(parameters) != len(self._owned) and any(p.grad is None for p in parameters):
            return None
        holds = (
            [p.data_ptr() for p in parameters] == self._pointers
            and [p.shape for p in parameters] == self._shapes
            and [p.stride() for p in parameters] == self._strides
            and [grad.shape for grad in grads] == self._shapes
            and [grad.stride() for grad in grads] == self._strides
            and [grad.dtype for grad in grads] == self._dtypes
            and [grad.get_device() for grad in grads] == self._devices
            and all(map(is_, map(state.get, parameters), self._states))
            and sum(map(len, states)) == len(self._values)
            and all(map(is_, chain.from_iterable(map(dict.values, states)), self._values))
            and all(mask.packed is bits for mask, bits in self._masks)
            and all(version_of(bits) == version for bits, version in self._frozen)
            and not any(map(torch.Tensor.is_neg, grads))
        )
        return grads if holds else None

    def present(self, gradients: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Return the gradients of those parameters that have something here."""
        if len(self.updates.tensors) == len(self.ready):
            return gradients
        return [gradient for gradient, ready in zip(gradients, self.ready, strict=True) if not ready.is_empty]

    def steps(self, groups: Sequence[Group], lazy: Sequence[bool], fresh: Sequence[bool] | None) -> list[Steps]:
        """Return, by group, the numbers of the steps about to be taken.

        Parameters
        ----------
        groups : sequence of dict
        lazy : sequence of bool
            By group: whether its counts go to the parameters' device and are not looked at.
        fresh : sequence of bool, optional
            By parameter, where steps are not counted: whether this one is the first.
        """
        result, start, moved = [], 0, False
        for part in self.parts:
            numbers: list[int] | torch.Tensor
            if part.counts is None:
                is_first = [False] * part.size if fresh is None else fresh[start : start + part.size]
                numbers = [1 if first else 2 for first in is_first]
            else:
                if lazy[part.index]:
                    moved |= part.counts.move_to(self.ready[start].parameter.device)
                if lazy[part.index] or part.counts.device.type != "cpu":
                    numbers = part.counts.tensor().double() + 1
                else:
                    numbers = [count + 1 for count in part.counts.tolist()]
            start += part.size
            result.append(Steps(groups[part.index], numbers, part.members))
        if moved:
            self._remember_entries()
        return result

    def has_counts_elsewhere(self, device: torch.device) -> bool:
        """Whether step counts would have to be moved to ``device``."""
        return any(part.counts is not None and part.counts.device != device for part in self.parts)

    def counting(self, amount: int | torch.Tensor) -> list[Callable[[], object]]:
        """Return C functions that raise the step counts."""
        return [part.counts.adding(amount) for part in self.parts if part.counts is not None]
