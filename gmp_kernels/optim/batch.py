"""Checked parameters that step together, their step counts, and a brief look for changes since the latest step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain, groupby
from operator import is_
from typing import Any, TypeVar

import torch

from gmp_kernels.backends import UpdateBatch
from gmp_kernels.distributed.placement import is_sharded
from gmp_kernels.optim.checked import CheckedParameter
from gmp_kernels.optim.compact import STEP, version_of

__all__ = ["Batch"]

T = TypeVar("T")


class Batch:
    """The checked parameters of a step.

    Parameters
    ----------
    members : sequence of (int, CheckedParameter)
        In the order of the groups, with the index of each one's group.
    captured : list of torch.Tensor
        Receives what CUDA graphs of a step read at every replay.
    counts_steps : bool
        Whether their states have step counts.

    Attributes
    ----------
    members : list of CheckedParameter
    updates : UpdateBatch
        Those of them that are not empty.
    written : list of torch.Tensor
        All that a step changes of these.
    """

    def __init__(
        self, members: Sequence[tuple[int, CheckedParameter]], captured: list[torch.Tensor], *, counts_steps: bool
    ) -> None:
        self._groups = [index for index, _ in members]
        self.members = [checked for _, checked in members]
        self._is_present = [checked.tensor.weight.numel() > 0 for checked in self.members]
        self._are_all_present = all(self._is_present)
        present = self.present(self.members)
        self.updates = UpdateBatch([checked.tensor for checked in present], captured)
        self.written = [tensor for checked in present for tensor in checked.written]
        # By group: its index, the number of its members, and their step counts.
        self._parts: list[tuple[int, int, StepCounts | None]] = []
        for index, part in groupby(members, lambda member: member[0]):
            states = [checked.state for _, checked in part]
            counts = StepCounts([state for state in states if state is not None]) if counts_steps else None
            self._parts.append((index, len(states), counts))

    def consists_of(self, members: Sequence[tuple[int, CheckedParameter]]) -> bool:
        """Whether these are its members, in the same groups and with the same step counts."""
        return (
            [index for index, _ in members] == self._groups
            and all(map(is_, (checked for _, checked in members), self.members))
            and all(map(is_, (checked.count for checked in self.members), self._counts))
        )

    def remember(self, groups: Sequence[dict[str, Any]], keys: Sequence[tuple[str, ...]]) -> None:
        """Note what ``gradients`` compares at the next step."""
        members = self.members
        self._owned = [p for group in groups for p in group["params"]]
        self._sizes, self._keys = [len(group["params"]) for group in groups], list(keys)
        self._parameters = [checked.parameter for checked in members]
        self._is_plain = not any(map(is_sharded, self._parameters))
        self._pointers = [checked.pointer for checked in members]
        forms = [checked.form for checked in members]
        self._shapes, self._strides, self._dtypes, self._devices = map(list, zip(*forms, strict=True))
        self._states = [checked.state for checked in members]
        self._masks = [(checked.mask, checked.bits) for checked in members if checked.mask is not None]
        self._frozen = [(c.bits, c.version) for c in members if c.bits is not None and c.version is not None]
        self._remember_entries()

    def _remember_entries(self) -> None:
        self._entries = [state for state in self._states if state is not None]
        self._values = list(chain.from_iterable(map(dict.values, self._entries)))
        self._counts = [checked.count for checked in self.members]

    def gradients(
        self,
        groups: Sequence[dict[str, Any]],
        keys: Sequence[tuple[str, ...]],
        state: Mapping[torch.Tensor, dict[str, Any]],
    ) -> list[torch.Tensor] | None:
        """Return the gradients if they fit and nothing else has changed; None: every parameter has to be checked.

        Lists are compared, not parameters: this is most of what a step of many small tensors costs.
        """
        if not self._is_plain or keys != self._keys or [len(group["params"]) for group in groups] != self._sizes:
            return None
        if not all(map(is_, chain.from_iterable(group["params"] for group in groups), self._owned)):
            return None
        grads = [grad for p in self._owned if (grad := p.grad) is not None]
        parameters, entries = self._parameters, self._entries
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
            and sum(map(len, entries)) == len(self._values)
            and all(map(is_, chain.from_iterable(map(dict.values, entries)), self._values))
            and all(mask.packed is bits for mask, bits in self._masks)
            and all(version_of(bits) == version for bits, version in self._frozen)
            and not any(map(torch.Tensor.is_neg, grads))
        )
        return grads if holds else None

    def present(self, column: Sequence[T]) -> Sequence[T]:
        """Return the entries of those members that are not empty, of a column that has one for each."""
        if self._are_all_present:
            return column
        return [entry for entry, is_present in zip(column, self._is_present, strict=True) if is_present]

    def steps(
        self, groups: Sequence[dict[str, Any]], lazy: Sequence[bool], is_first: Sequence[bool] | None
    ) -> list[tuple[dict[str, Any], list[int] | torch.Tensor]]:
        """Return, by group, the numbers of the steps that its members are about to take.

        Parameters
        ----------
        groups : sequence of dict
        lazy : sequence of bool
            By group: whether the host must not look at its counts. They then go to the parameters' device.
        is_first : sequence of bool, optional
            By member, where steps are not counted: whether this one is the first; by default none is.
        """
        result: list[tuple[dict[str, Any], list[int] | torch.Tensor]] = []
        start = 0
        for index, size, counts in self._parts:
            if counts is None:
                firsts = [False] * size if is_first is None else is_first[start : start + size]
                result.append((groups[index], [1 if first else 2 for first in firsts]))
            else:
                device = self.members[start].parameter.device
                if lazy[index] and counts.device != device:
                    counts.join_on(device)
                    self._remember_entries()
                result.append((groups[index], counts.numbers(is_lazy=lazy[index])))
            start += size
        return result

    def has_counts_elsewhere(self, device: torch.device) -> bool:
        """Whether step counts would have to be moved to ``device``."""
        return any(counts is not None and counts.device != device for _, _, counts in self._parts)

    def counting(self, amount: int | torch.Tensor) -> list[Callable[[], object]]:
        """Return C functions that raise the step counts."""
        return [counts.adding(amount) for _, _, counts in self._parts if counts is not None]


class StepCounts:
    """The step counts in some parameters' states.

    On the host they are made views of one tensor, so that a step is one addition, whatever their number. On a device
    they stay where they are, because a CUDA graph may hold them.

    Parameters
    ----------
    states : sequence of dict
        Not empty, each with a count. The counts are replaced where they have to be joined or moved.
    """

    def __init__(self, states: Sequence[dict[str, Any]]) -> None:
        self._states = states
        self._whole: torch.Tensor | None = None
        cpu = torch.device("cpu")
        others = {count.device for count in self._each()} - {cpu}
        if not others:
            self.join_on(cpu)
        elif any(count.device == cpu for count in self._each()):
            self.join_on(others.pop())

    @property
    def device(self) -> torch.device:
        """The device that holds all of them."""
        return self._each()[0].device

    def join_on(self, device: torch.device) -> None:
        """Make them views of one tensor there."""
        self._whole = torch.stack([count.to(device) for count in self._each()])
        for i, state in enumerate(self._states):
            state[STEP] = self._whole[i]

    def numbers(self, *, is_lazy: bool) -> list[int] | torch.Tensor:
        """Return the numbers of the steps about to be taken: a float64 tensor where the host does not look at them."""
        counts = torch.stack(self._each()) if self._whole is None else self._whole
        return counts.double() + 1 if is_lazy or counts.device.type != "cpu" else [int(n) + 1 for n in counts.tolist()]

    def adding(self, amount: int | torch.Tensor) -> Callable[[], object]:
        """Return a C function that raises all of them."""
        if self._whole is None:
            return partial(torch._foreach_add_, self._each(), amount)
        return partial(self._whole.add_, amount)

    def _each(self) -> list[torch.Tensor]:
        return [state[STEP] for state in self._states]
