"""Checked parameters that step together, their step counts, and a fast test for changes since the latest step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, groupby, islice
from operator import itemgetter
from typing import Any, TypeVar

import torch

from gmp_kernels.backends.types import UpdateBatch
from gmp_kernels.optim.checked import CheckedParameter, Snapshot, is_unchanged, plain_layouts, snapshot
from gmp_kernels.optim.compact import STEP

__all__ = ["Batch"]

T = TypeVar("T")


class Batch:
    """The checked parameters of a step.

    The step counts of a group on the host become views of one tensor, so that one addition counts a step for all. On a
    device they stay where they are, because a CUDA graph may hold them.

    Parameters
    ----------
    members : list of CheckedParameter
        In the order of the groups.
    groups : sequence of int
        Index of each member's group.
    keys : sequence of tuple of str
        Per group, the state entries that the rule reads and writes.
    counts_steps : bool
        Whether the states of the members have step counts.

    Attributes
    ----------
    members : list of CheckedParameter
    updates : UpdateBatch
        The members that are not empty.
    written : list of torch.Tensor
        All tensors of these that a step changes.
    """

    def __init__(
        self,
        members: list[CheckedParameter],
        groups: Sequence[int],
        keys: Sequence[tuple[str, ...]],
        *,
        counts_steps: bool,
    ) -> None:
        self.members, self._groups, self._keys = members, groups, keys
        self._is_present = [checked.tensor.weight.numel() > 0 for checked in members]
        self._are_all_present = all(self._is_present)
        present = self.present(members)
        self.updates = UpdateBatch([checked.tensor for checked in present])
        self.written = [tensor for checked in present for tensor in checked.written]
        self._masks = [checked.mask for checked in members if checked.mask is not None]
        self._frozen = [bits for checked in members for bits in checked.frozen]
        # By group index: its members, and the tensors that together hold their step counts, in the same order.
        self._parts = {
            index: [checked for _, checked in part]
            for index, part in groupby(zip(groups, members, strict=True), key=itemgetter(0))
        }
        self._counts: dict[int, list[torch.Tensor]] = {}
        if counts_steps:
            for index in self._parts:
                self._counts[index] = [state[STEP] for state in self._states_of(index)]
                devices = [count.device for count in self._counts[index]]
                elsewhere = [device for device in devices if device.type != "cpu"]
                if len(elsewhere) < len(devices):
                    self._join_counts(index, elsewhere[0] if elsewhere else torch.device("cpu"))
        self._record()

    def _states_of(self, index: int) -> list[dict[str, Any]]:
        return [checked.state for checked in self._parts[index] if checked.state is not None]

    def _join_counts(self, index: int, device: torch.device) -> None:
        """Make the step counts of a group views of one tensor on this device."""
        whole = torch.stack([state[STEP].to(device) for state in self._states_of(index)])
        for i, state in enumerate(self._states_of(index)):
            state[STEP] = whole[i]
        self._counts[index] = [whole]

    # -- changes -----------------------------------------------------------------------------------------------------

    def _record(self) -> None:
        weights = [checked.tensor.weight for checked in self.members]
        parameters = [checked.parameter for checked in self.members]
        states = [checked.state for checked in self.members]
        self._checked = self._snapshot(self._groups, parameters, weights, states, self._keys)
        self._layouts = plain_layouts(weights, False)

    def holds(self, *columns: Any) -> bool:
        """Whether nothing but the gradients has changed, given the arguments of ``_snapshot`` as they are now."""
        return is_unchanged(self._snapshot(*columns), self._checked)

    def _snapshot(
        self,
        groups: Sequence[int],
        parameters: Sequence[torch.Tensor],
        weights: list[torch.Tensor],
        states: Sequence[dict[str, Any] | None],
        keys: Sequence[tuple[str, ...]],
    ) -> Snapshot:
        values = chain.from_iterable(map(dict.values, filter(None, states)))
        objects = [*parameters, *states, *values, *(mask.packed for mask in self._masks)]
        return snapshot(weights, objects, self._frozen, groups, keys)

    def fits(self, gradients: list[torch.Tensor]) -> bool:
        """Whether a kernel can walk these gradients beside the weights as they are.

        All are compared at once, because this is most of the cost of a step of many small tensors.
        """
        layouts = plain_layouts(gradients, False)
        return layouts is not None and layouts == self._layouts

    # -- the step ----------------------------------------------------------------------------------------------------

    def present(self, column: Sequence[T]) -> Sequence[T]:
        """Return the entries of ``column``, which has one per member, for the members that are not empty."""
        if self._are_all_present:
            return column
        return [entry for entry, is_present in zip(column, self._is_present, strict=True) if is_present]

    def steps(
        self, groups: Sequence[dict[str, Any]], lazy: Sequence[bool], is_first: Sequence[bool] | None
    ) -> list[tuple[dict[str, Any], list[int] | torch.Tensor]]:
        """Return, per group, the numbers of the steps that its members are about to take.

        Parameters
        ----------
        groups : sequence of dict
        lazy : sequence of bool
            Per group, whether the host must not read its step counts. They then go to the parameters' device.
        is_first : sequence of bool, optional
            For rules without step counts: per member, whether this step is its first. By default none is.
        """
        result: list[tuple[dict[str, Any], list[int] | torch.Tensor]] = []
        firsts = iter(is_first or [False] * len(self.members))
        for index, part in self._parts.items():
            if index not in self._counts:
                result.append((groups[index], [1 if first else 2 for first in islice(firsts, len(part))]))
                continue
            device = part[0].parameter.device
            if lazy[index] and self._counts[index][0].device != device:
                self._join_counts(index, device)
                self._record()
            counts = torch.stack(self._counts[index]).reshape(-1)
            is_lazy = lazy[index] or counts.device.type != "cpu"
            result.append((groups[index], counts.double() + 1 if is_lazy else [int(n) + 1 for n in counts.tolist()]))
        return result

    def has_counts_elsewhere(self, device: torch.device) -> bool:
        """Whether step counts would have to be moved to ``device``."""
        return any(counts[0].device != device for counts in self._counts.values())

    def counting(self, amount: int | torch.Tensor) -> list[Callable[[], object]]:
        """Return C functions that raise the step counts."""
        return [partial(torch._foreach_add_, counts, amount) for counts in self._counts.values()]
