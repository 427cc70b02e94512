"""Parameters that have passed every check, their step counts, and a fast test for changes since the latest step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain, compress, groupby, repeat
from operator import is_, itemgetter
from typing import Any, TypeVar

import torch

from gmp_kernels.backends.layouts import layouts_of
from gmp_kernels.backends.types import Constants, Implementation, UpdateBatch, UpdateTensor
from gmp_kernels.checks import PLAIN
from gmp_kernels.distributed.placement import local
from gmp_kernels.masks import BitMask
from gmp_kernels.optim.checks import bits_beside
from gmp_kernels.optim.compact import MASTER, STEP, layout_of, version_of
from gmp_kernels.optim.constants import Settings, constants_of

__all__ = ["Batch"]

T = TypeVar("T")


class Batch:
    """Checked parameters, which are valid as long as nothing about them changes. A step may leave some of them out.

    The step counts of a group on the host become views of one tensor, so that one addition counts a step for all. On a
    device they stay where they are, because a CUDA graph may hold them.

    Parameters
    ----------
    groups : sequence of int
        Index of each parameter's group. The parameters are in the order of the groups.
    parameters, weights : sequences of torch.Tensor
        The parameters, and the tensors that hold their values here.
    state : mapping
        The optimizer's state, in which their entries are complete and in the form the optimizer keeps them in.
    keys : sequence of tuple of str
        Per group, the state entries that the rule reads and writes.
    masks : sequence of BitMask or None
    implementation : Implementation
        The backend that takes their steps.
    counts_steps : bool
        Whether the states have step counts.

    Attributes
    ----------
    groups, parameters, weights, keys, implementation, counts_steps
        As given.
    known : frozenset of torch.Tensor
        The parameters.
    bits : list of torch.Tensor or None
        The packed bits that the masks had.
    updates : UpdateBatch
        The parameters that are not empty.
    has_empty : bool
        Whether there are others.
    all_written : list of torch.Tensor
        What a step of all parameters changes.
    expected : tuple or None
        What ``gradients_if_unchanged`` compares with; None if only ``holds`` can look at these parameters.
    """

    def __init__(
        self,
        groups: Sequence[int],
        parameters: Sequence[torch.Tensor],
        weights: list[torch.Tensor],
        state: Mapping[Any, Any],
        keys: Sequence[tuple[str, ...]],
        masks: Sequence[BitMask | None],
        implementation: Implementation,
        *,
        counts_steps: bool,
    ) -> None:
        self.groups, self.parameters, self.weights, self._state, self.keys = groups, parameters, weights, state, keys
        self.known = frozenset(parameters)
        self._own_masks, self.implementation = masks, implementation
        self._tensors = list(map(self._tensor_of, range(len(parameters))))
        self._collect()
        # By group index: its parameters, and the tensors that together hold their step counts, in the same order.
        parts = groupby(zip(groups, parameters, strict=True), key=itemgetter(0))
        self._parts = {group: [p for _, p in part] for group, part in parts}
        self._counts: dict[int, list[torch.Tensor]] = {}
        self.counts_steps = counts_steps
        if counts_steps:
            for group in self._parts:
                self._counts[group] = self._counts_of(self._parts[group])
                devices = [count.device for count in self._counts[group]]
                elsewhere = [device for device in devices if device.type != "cpu"]
                if len(elsewhere) < len(devices):
                    self._join_counts(group, elsewhere[0] if elsewhere else torch.device("cpu"))
        # Settings, learning rates, and what ``constants_of`` has returned for them.
        self._usual: tuple[Settings, list[float], tuple[Constants, list[int]]] | None = None
        self._record()

    def _tensor_of(self, i: int) -> UpdateTensor:
        """Return parameter ``i`` in the form that backends take."""
        weight, mask, entries = self.weights[i], self._own_masks[i], self._state.get(self.parameters[i], {})
        master = entries.get(MASTER)
        return UpdateTensor(
            weight=weight.detach(),
            master=None if master is None else local(master),
            state=tuple(local(entries[key]) for key in self.keys[self.groups[i]]),
            mask=None if mask is None else bits_beside(weight, mask),
            compaction=layout_of(entries),
        )

    def _collect(self) -> None:
        """Gather what the parameters have in common from their tensors and masks."""
        self._masks = [mask for mask in self._own_masks if mask is not None]
        self.bits = [None if mask is None else mask.packed for mask in self._own_masks]
        self._frozen: list[torch.Tensor] = []  # bits that must not be written
        self._written: list[list[torch.Tensor]] = []  # by a step
        for p, weight, bits, t in zip(self.parameters, self.weights, self.bits, self._tensors, strict=True):
            if bits is not None and (t.compaction is not None or t.mask is not bits):
                # Compact state is laid out by them, or the step reads a reordered copy of them.
                self._frozen.append(bits)
            # A plain parameter and a tensor detached from it share their version counter.
            own = [p] if weight is p else [p, t.weight]
            self._written.append([*own, *t.state] if t.master is None else [*own, t.master, *t.state])
        self.all_written = list(chain.from_iterable(self._written))
        self._is_present = [weight.numel() > 0 for weight in self.weights]
        self.has_empty = not all(self._is_present)
        self.updates = UpdateBatch(self.present(self._tensors))

    def with_states(self, state: Mapping[Any, Any], states: Mapping[torch.Tensor, Mapping[str, Any]]) -> Batch | None:
        """Return the batch once some entries of ``state`` are replaced by ``states``, made for their masks' new bits.

        It shares what stays with this one. None if something else has changed since the parameters were checked.
        """
        columns = self.groups, self.parameters, list(map(local, self.parameters)), state, self.keys
        replaced = list(map(states.__contains__, self.parameters))
        of_masks = zip(replaced, self._own_masks, self.bits, strict=True)
        are_bits_known = all(new or mask is None or mask.packed is bits for new, mask, bits in of_masks)
        if not (are_bits_known and states.keys() <= self.known and self.holds(*columns, with_bits=False)):
            return None
        batch = object.__new__(Batch)
        batch.__dict__.update(self.__dict__)
        batch._state = {**state, **states}
        batch._tensors = [batch._tensor_of(i) if new else self._tensors[i] for i, new in enumerate(replaced)]
        batch._collect()
        batch._record()
        return batch

    def _counts_of(self, parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        return [self._state[p][STEP] for p in parameters]

    def _join_counts(self, group: int, device: torch.device) -> None:
        """Make the step counts of a group views of one tensor on this device."""
        whole = torch.stack([count.to(device) for count in self._counts_of(self._parts[group])])
        for i, p in enumerate(self._parts[group]):
            self._state[p][STEP] = whole[i]
        self._counts[group] = [whole]

    # -- changes -----------------------------------------------------------------------------------------------------

    def _record(self) -> None:
        objects, facts = self._snapshot(self.groups, self.parameters, self.weights, self._state, self.keys)
        self._checked = objects, facts
        self._layouts = layouts_of(self.weights, False)
        self.expected: tuple[Any, ...] | None = None
        types = list(map(type, self.parameters))
        if PLAIN.issuperset(types) and self._layouts is not None and all(map(is_, self.weights, self.parameters)):
            parameters, end = list(self.parameters), len(objects) - len(self._masks)
            of_state = objects[len(parameters) : end]
            bits = self._masks, objects[end:], self._frozen, facts[1]
            self.expected = parameters, types, list(self.groups), of_state, *bits, self._layouts, facts[0]

    def holds(self, *columns: Any, with_bits: bool = True) -> bool:
        """Whether nothing but the gradients has changed, given the arguments of ``_snapshot`` as they are now.

        Without ``with_bits`` masks may have other bits.
        """
        (objects, facts), (before, expected) = self._snapshot(*columns), self._checked
        if not with_bits and self._masks:
            objects, before = objects[: -len(self._masks)], before[: -len(self._masks)]
        is_known = facts[0] is not None and facts == expected
        return is_known and len(objects) == len(before) and all(map(is_, objects, before))

    def is_current(self, state: Mapping[Any, Any]) -> bool:
        """Whether parameters, masks and the optimizer's ``state`` are those that were checked."""
        return self.holds(self.groups, self.parameters, list(map(local, self.parameters)), state, self.keys)

    def _snapshot(
        self,
        groups: Sequence[int],
        parameters: Sequence[torch.Tensor],
        weights: list[torch.Tensor],
        state: Mapping[Any, Any],
        keys: Sequence[tuple[str, ...]],
    ) -> tuple[list[object], list[object]]:
        """Return all that the outcome of the checks depends on: objects that have to stay, and facts.

        The record keeps the objects alive, so that no other object can take the place of one. The whole state is
        compared, because to look up the entries of parameters takes longer.
        """
        entries = [entry for entry in state.values() if isinstance(entry, dict)]
        values = chain.from_iterable(map(dict.values, entries))
        objects = [*parameters, *state, *state.values(), *values, *(mask.packed for mask in self._masks)]
        return objects, [layouts_of(weights, True), list(map(version_of, self._frozen)), groups, keys]

    def fits(self, gradients: list[torch.Tensor]) -> bool:
        """Whether a kernel can walk these gradients beside the weights as they are.

        All are compared at once, because this is most of the cost of a step of many small tensors.
        """
        layouts = layouts_of(gradients, False)
        return layouts is not None and layouts == self._layouts

    # -- the step ----------------------------------------------------------------------------------------------------

    def present(self, column: Sequence[T]) -> list[T]:
        """Return the entries of ``column``, which has one per parameter, for the parameters that are not empty."""
        return list(compress(column, self._is_present))

    def written(self, takes_step: Sequence[bool]) -> Iterable[torch.Tensor]:
        """Return all tensors that a step of these parameters changes."""
        return chain.from_iterable(compress(self._written, takes_step))

    def constants(
        self,
        rule: Callable[[dict[str, Any], Any], dict[str, Any]],
        groups: Sequence[dict[str, Any]],
        settings: Settings,
        first: Collection[torch.Tensor],
        grad_scale: torch.Tensor | None,
        found_inf: torch.Tensor | None,
        takes_step: Sequence[bool] | None,
    ) -> tuple[Constants, list[int]]:
        """Return the constants of a step and the row of each parameter. Other arguments are as for ``constants_of``.

        Where no steps are counted, those of the latest step serve again until a setting changes.
        """
        is_usual = not (self.counts_steps or first or takes_step) and grad_scale is found_inf is None
        rates = [group["lr"] for group in groups] if is_usual and settings.values is not None else None
        if rates and self._usual is not None and self._usual[0] is settings and self._usual[1] == rates:
            return self._usual[2]
        found = constants_of(rule, self._steps(groups, settings.lazy, first), grad_scale, found_inf, takes_step)
        if rates:
            self._usual = settings, rates, found
        return found

    def _steps(
        self, groups: Sequence[dict[str, Any]], lazy: Sequence[bool], first: Collection[torch.Tensor]
    ) -> list[tuple[dict[str, Any], list[int] | torch.Tensor]]:
        """Return, per group, itself and the numbers of the steps that its parameters would take now.

        Parameters
        ----------
        groups : sequence of dict
        lazy : sequence of bool
            Per group, whether the host must not read its step counts. They then go to the parameters' device.
        first : collection of torch.Tensor
            For rules without step counts: the parameters whose first step it is.
        """
        device = self.parameters[0].device
        steps: list[tuple[dict[str, Any], list[int] | torch.Tensor]] = []
        for index, own in self._parts.items():
            if index not in self._counts:
                steps.append((groups[index], [1 if p in first else 2 for p in own] if first else [2] * len(own)))
                continue
            if lazy[index] and self._counts[index][0].device != device:
                self._join_counts(index, device)
                self._record()
            counts = self._counts[index][0]
            if not counts.ndim:  # they are not views of one tensor
                counts = torch.stack(self._counts[index])
            is_lazy = lazy[index] or counts.device.type != "cpu"
            steps.append((groups[index], counts.double() + 1 if is_lazy else [int(n) + 1 for n in counts.tolist()]))
        return steps

    def has_counts_elsewhere(self, device: torch.device, takes_step: Sequence[bool] | None) -> bool:
        """Whether step counts of parameters that take a step would have to be moved to ``device``."""
        counts = self._counts_of(compress(self.parameters, takes_step or repeat(True))) if self._counts else []
        return any(count.device != device for count in counts)

    def counting(self, amount: int | torch.Tensor, takes_step: Sequence[bool] | None) -> list[Callable[[], object]]:
        """Return C functions that raise the step counts of these parameters, by default of all."""
        counts: Iterable[list[torch.Tensor]] = self._counts.values()
        if takes_step is not None:
            counts = [self._counts_of(compress(self.parameters, takes_step))]
        return [partial(torch._foreach_add_, own, amount) for own in counts]
