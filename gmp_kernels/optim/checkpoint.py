"""torch's state_dict of an optimizer with masks: dense when it leaves, and whole or not at all when it comes back."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch

from gmp_kernels.distributed.placement import local, sharded_like
from gmp_kernels.errors import StateError
from gmp_kernels.optim.compact import check_layout, layout_of
from gmp_kernels.optim.entries import STEP, as_count, check_complete, check_loaded, dense_state, per_weight, state_dtype
from gmp_kernels.optim.masking import Masking

__all__ = ["Checkpointed"]


class Checkpointed(Masking):
    """The half of ``MaskedOptimizer`` that knows checkpoints."""

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Return torch's own format, dense whatever the layout here: ``torch.optim`` can load it.

        State of pruned weights is zero in it, also where masks have not been applied yet. Master weights are under
        ``master_weight``. Memory: compact state is expanded.

        Raises
        ------
        StateError
            Bits by which state is laid out have been written.
        """
        # Before the hooks of others, which then see what torch would show them.
        expand = self.register_state_dict_post_hook(lambda _, saved: self._expand(saved), prepend=True)
        try:
            return super().state_dict()
        finally:
            expand.remove()

    def _expand(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        for index, p in self._indexed().items():
            if index in state_dict["state"]:
                # torch hands out the dictionaries it goes on with: one that is being loaded must not turn compact.
                state_dict["state"][index] = self._saved_state(p)
        return state_dict

    def _saved_state(self, p: torch.Tensor) -> dict[str, Any]:
        state, mask = self.state[p], self._masks.get(p)
        check_layout(self._name, p, state)
        dense = dense_state(p, state, self._backend)
        layout = layout_of(state)
        if mask is not None and (p in self._pending or (layout is not None and layout.mask is not mask.packed)):
            pruned = ~mask.to_bool()
            for name in per_weight(p, dense):
                dense[name] = sharded_like(local(dense[name]).masked_fill(pruned, 0.0), p)
        return dense

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` of this class or of the ``torch.optim`` class returned.

        State of 16-bit parameters is kept in float32, and so are all step counts. What is loaded is a copy. State of
        pruned weights is dropped at the next step, or when masks are set, by the masks there are then.

        Raises
        ------
        ValueError
            Other parameter groups, as in torch.
        StateError
            State of another shape or type, or incomplete. Nothing has changed when one is raised.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        groups = self._loaded_groups(state_dict)
        # The numbers in the state_dict are its own; parameters correspond by position, as in torch.
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        owned = [(p, group) for group in groups for p in group["params"]]
        owners = dict(zip(saved, owned, strict=True))
        state: defaultdict[Any, Any] = defaultdict(dict)
        for index, values in state_dict["state"].items():
            if index not in owners:
                # Kept as it is, as in torch.
                state[index] = copy.deepcopy(values)
            elif values:
                p, group = owners[index]
                state[p] = self._loaded_state(index, p, group, values)
        pending = dict.fromkeys(self._masks, True)
        self.__dict__.update(state=state, param_groups=groups, _pending=pending, _ready={}, _batch=None)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _loaded_groups(self, state_dict: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the parameter groups as torch would load them."""
        # torch does it on an optimizer that is thrown away: its checks and defaults of groups, without its writes.
        scratch = object.__new__(type(self))
        scratch.__dict__.update(self.__dict__)
        for kind in ("pre", "post"):
            scratch.__dict__[f"_optimizer_load_state_dict_{kind}_hooks"] = OrderedDict()
        super(Checkpointed, scratch).load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        return scratch.param_groups

    def _loaded_state(
        self, index: object, p: torch.Tensor, group: Mapping[str, Any], values: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return a copy of a parameter's state, in the types it is kept in."""
        if not isinstance(values, Mapping):
            raise StateError(
                f"{self._name}.load_state_dict: expected a dictionary as the state of parameter {index}, got a "
                f"{type(values).__name__}; is it a state_dict?"
            )
        check_complete(f"{self._name}.load_state_dict", p, values, self.essential)
        state = {}
        for name, value in values.items():
            if name == STEP and value is not None:
                is_beside = isinstance(value, torch.Tensor) and value.device == p.device
                device = p.device if group.get("capturable") or is_beside else torch.device("cpu")
                state[name] = as_count(value, device).clone()
            elif isinstance(value, torch.Tensor):
                check_loaded(self._name, p, index, name, value)
                # torch casts state to the parameter's dtype, which would round what is kept in float32 on purpose.
                state[name] = torch.empty_like(p, dtype=state_dtype(p)).copy_(value)
            else:
                state[name] = copy.deepcopy(value)
        return state

    def _indexed(self) -> dict[int, torch.Tensor]:
        """Parameters by the number ``state_dict`` gives them."""
        return dict(enumerate(p for group in self.param_groups for p in group["params"]))
