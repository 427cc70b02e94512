"""An optimizer's masks and state: how weights and state follow the masks, and how they are saved and loaded.

The masks decide. A new mask is recorded first, which needs no memory; then weights and state follow it. If an error or
an interrupt prevents that, they follow before the next step.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, ClassVar, NoReturn

import torch
from torch.utils.hooks import RemovableHandle

from gmp_kernels.backends import devices
from gmp_kernels.backends.at_once import at_once
from gmp_kernels.checks import check_mask
from gmp_kernels.distributed.placement import local, sharded_like
from gmp_kernels.errors import CaptureError, DTypeError, TargetError
from gmp_kernels.formats import format_of
from gmp_kernels.masks import BitMask
from gmp_kernels.ops import apply_masks_
from gmp_kernels.optim.batch import Batch
from gmp_kernels.optim.checks import check_state, loaded_state
from gmp_kernels.optim.compact import (
    MASTER,
    STEP,
    check_layout,
    compact_names,
    compacted,
    expanded,
    layout_of,
    per_weight,
)
from gmp_kernels.optim.constants import Settings

__all__ = ["Masking"]


class Masking(torch.optim.Optimizer):
    """The half of ``MaskedOptimizer`` that holds masks and state between steps."""

    # Entries with a value per weight that torch's state of this rule may have.
    state_names: ClassVar[tuple[str, ...]] = ()
    # Entries that torch's state always has once a parameter has stepped.
    essential: ClassVar[Sequence[str]] = ()
    _state_dtype = torch.float32  # older pickles do not tell
    _settings: Settings | None = None  # of the groups at the latest step

    def __init__(
        self,
        *args: Any,
        compact_state: bool = False,
        state_dtype: torch.dtype | None = None,
        master_weights: bool = False,
        backend: str | None = None,
        **kwargs: Any,
    ) -> None:
        if state_dtype not in (None, torch.float32, torch.bfloat16):
            raise DTypeError(
                f"{self._name}: expected torch.float32 or torch.bfloat16 as state_dtype, got {state_dtype}; leave it "
                "out for float32"
            )
        super().__init__(*args, **kwargs)
        self._compact_state = compact_state
        self._state_dtype = state_dtype or torch.float32
        self._master_weights = master_weights
        self._backend = backend
        self._masks: dict[torch.Tensor, BitMask] = {}
        # Parameters whose mask was not applied yet. True means the weight, or its master copy, has to be zeroed too.
        self._pending: dict[torch.Tensor, bool] = {}
        self._batch: Batch | None = None  # the parameters that were checked for the latest step
        # Addresses of the packed bits that captured graphs read, 0 for no mask. Kept for good, because a graph does not
        # tell when it is deleted.
        self._graph_masks: dict[torch.Tensor, int] = {}
        self._watchers: OrderedDict[int, tuple[Callable[[], None], Callable[..., None]]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        # torch's own would drop all but three attributes from copies and pickles.
        ours = ("_compact_state", "_state_dtype", "_master_weights", "_backend", "_masks", "_pending")
        # A copy is in no graph and has no watchers.
        anew: dict[str, Any] = {"_batch": None, "_settings": None, "_graph_masks": {}}
        kept = {name: getattr(self, name) for name in ours}
        return super().__getstate__() | kept | anew | {"_watchers": OrderedDict()}

    @property
    def _name(self) -> str:
        return type(self).__name__

    @property
    def compact_state(self) -> bool:
        """Whether state is kept for the kept weights only."""
        return self._compact_state

    @property
    def _counts_steps(self) -> bool:
        """Whether each state has a step count: the rule needs it, or the random numbers of rounding do."""
        return STEP in self.essential or self._state_dtype == torch.bfloat16

    # -- masks -------------------------------------------------------------------------------------------------------

    def set_masks(self, masks: Mapping[torch.Tensor, BitMask]) -> None:
        """Take over masks, zero what they prune in weights and state, and lay out compact state by them.

        Every step reads the masks given here, so bits that ``prune_`` changes in place count from the next step on. The
        state of weights pruned that way is zeroed when the masks are set again. Compact state is laid out by a copy of
        the bits: with it, masks that change have to be set again. Parameters not named keep the mask they have.
        ``GMPScheduler`` hands over its masks by itself.

        Parameters
        ----------
        masks : mapping of parameter to BitMask
            Each of the parameter's shape and on its device; for a sharded parameter, of the local shard's shape.

        Raises
        ------
        TargetError
            A parameter this optimizer does not have.
        ShapeError, LayoutError, DTypeError
            A mask that does not fit.
        StateError
            State that does not belong to the parameter as it is now.
        CaptureError
            A CUDA graph holds a step of a parameter that had no mask then, or another one. Nothing has changed when one
            of these is raised, or when memory runs out. An interrupt leaves the masks as they were, or has them applied
            before the next step.

        Notes
        -----
        Memory: compact state exists twice, in its old and its new layout, until all of it has moved.
        """
        before = {"_masks": self._masks, "_pending": self._pending}
        try:
            self.share_masks({p: mask.clone() for p, mask in masks.items()} if self._compact_state else masks)
        except Exception:
            self.__dict__.update(before)
            raise

    def share_masks(
        self, masks: Mapping[torch.Tensor, BitMask], *, ranked_is_pruned: bool = False, are_checked: bool = False
    ) -> None:
        """Set masks for an owner that replaces the bits of a mask by another tensor where compact state uses them.

        Masks that pass the checks are set even if memory runs out or an interrupt comes; weights and state then follow
        before the next step.

        Parameters
        ----------
        masks : mapping of parameter to BitMask
            As in ``set_masks``, except that compact state is laid out by these bits, not by a copy.
        ranked_is_pruned : bool
            The tensor that is ranked (the master copy if there is one, else the weight) is zero already where pruned.
        are_checked : bool
            ``check_masks`` has just accepted these masks.

        Raises
        ------
        StateError
            Bits by which state is laid out have been written; and as ``set_masks``.
        """
        if not are_checked:
            self.check_masks(masks)
        pending = {p: self._pending.get(p, False) or not ranked_is_pruned for p in masks}
        batch = self._batch if all(self._masks.get(p) is mask for p, mask in masks.items()) else None
        self.__dict__.update(_masks={**self._masks, **masks}, _pending={**self._pending, **pending}, _batch=batch)
        self._settle(checked=masks)

    @torch.no_grad()
    def forget_masks(self, parameters: Iterable[torch.Tensor]) -> None:
        """Drop the masks of these parameters; their compact state becomes dense. Weights stay as they are.

        Raises
        ------
        CaptureError
            A CUDA graph reads one of them.
        StateError
            Bits by which state is laid out have been written. Nothing has changed when one is raised.
        """
        gone = set(parameters)
        for p in gone & self._masks.keys():
            if self._graph_masks.get(p):
                raise CaptureError(
                    f"{self._name}.forget_masks: expected a parameter whose mask no CUDA graph reads, got one of shape "
                    f"{tuple(p.shape)} whose step was captured under it; fill the mask with ones, or build a new "
                    "optimizer and capture again"
                )
        states = {
            p: expanded(self._name, p, self.state[p], self._backend)
            for p in gone
            if layout_of(self.state.get(p)) is not None
        }
        masks = {p: mask for p, mask in self._masks.items() if p not in gone}
        pending = {p: decides for p, decides in self._pending.items() if p not in gone}
        self._replace(states, masks, pending)

    def check_masks(self, masks: Mapping[torch.Tensor, BitMask]) -> None:
        """Raise what ``set_masks`` would, and StateError if bits by which state is laid out have been written."""
        if self._has_checked(masks):
            return
        owned = {p for group in self.param_groups for p in group["params"]}
        op = f"{self._name}.set_masks"
        for p, mask in masks.items():
            if p not in owned:
                raise TargetError(
                    f"{op}: expected masks of this optimizer's parameters, got one for a tensor of "
                    f"shape {tuple(p.shape)} that is not among them; add it with add_param_group"
                )
            check_mask(op, mask, local(p), f"a parameter of shape {tuple(p.shape)}")
            read = self._graph_masks.get(p)
            if read is not None and read != mask.packed.data_ptr():
                raise CaptureError(
                    f"{op}: expected the mask that a parameter of shape {tuple(p.shape)} had when a CUDA graph "
                    f"captured its step, got {'another one' if read else 'one where it had none'}; set masks, or build "
                    "the GMPScheduler, before capturing, and change their bits in place"
                )
        self._check_states(masks)

    def _has_checked(self, masks: Mapping[torch.Tensor, BitMask]) -> bool:
        """Whether these are the masks of the latest step, and nothing has changed since then."""
        batch = self._batch
        return (
            batch is not None
            and not self._graph_masks
            and batch.known.issuperset(masks)
            and all(self._masks.get(p) is mask for p, mask in masks.items())
            and batch.is_current(self.state)
        )

    def _check_states(self, parameters: Collection[torch.Tensor]) -> None:
        """Refuse state that does not belong to its parameter as it is now."""
        batch = self._batch
        known = batch.known if parameters and batch is not None and batch.is_current(self.state) else ()
        for p in parameters:
            state = self.state.get(p)
            if state and p not in known:
                check_layout(self._name, p, state)
                check_state(self._name, p, state, self._state_dtype, self.state_names, self.essential)

    def _refuse_capture(self, got: str) -> NoReturn:
        """Raise CaptureError for a step that a graph would repeat wrongly; ``got`` ends with what to build instead."""
        raise CaptureError(
            f"{self._name}: expected a step that a CUDA graph can hold, got {got}, or take the step outside of the "
            "graph"
        )

    @torch.no_grad()
    def _settle(self, checked: Collection[torch.Tensor] = ()) -> None:
        """Bring weights and state up to date with the masks.

        An error leaves both as they were, and the next call does the rest; repeating the work changes nothing.
        ``checked`` are the parameters whose state was checked just now.
        """
        stale = {p: self.state[p] for p in self._masks if self._is_stale(p)} if self._compact_state else {}
        behind = {*self._pending, *stale}
        if not behind:
            return
        self._check_states([p for p in behind if p not in checked])
        if any(devices.is_capturing(p.device) for p in behind):
            self._refuse_capture("masks to be applied first; set masks before capturing")
        # All memory is allocated before the first write.
        masks = {p: self._aligned(p) for p in behind}
        states = compacted(stale, masks, self._backend)
        # A batch of the old state would keep its memory.
        batch = self._batch.with_states(self.state, states) if self._batch is not None and states else self._batch
        zeroed: dict[torch.device, tuple[list[torch.Tensor], list[BitMask]]] = {}
        filled: list[Callable[[], object]] = []
        for p, mask in masks.items():
            for tensor in self._behind(p, states.get(p, self.state.get(p, {}))):
                if format_of(tensor) is mask.memory_format and not tensor.is_neg():
                    tensors, bits = zeroed.setdefault(tensor.device, ([], []))
                    tensors.append(tensor)
                    bits.append(mask)
                else:
                    filled.append(partial(tensor.masked_fill_, ~mask.to_bool(), 0.0))
        for tensors, bits in zeroed.values():
            apply_masks_(tensors, bits, backend=self._backend)
        for fill in filled:
            fill()
        self._replace(states, self._masks, {}, batch)

    def _behind(self, p: torch.Tensor, state: Mapping[str, Any]) -> list[torch.Tensor]:
        """Return the dense, non-empty tensors of a parameter to which its mask was not applied yet."""
        with_decisive = self._pending.get(p, True)
        compact = compact_names(state)
        names = [name for name in per_weight(p, state) if name not in compact]
        found = [p.detach()] if with_decisive or MASTER in state else []
        found += [state[name] for name in names if with_decisive or name != MASTER]
        return [tensor for tensor in map(local, found) if tensor.numel()]

    def _is_stale(self, p: torch.Tensor) -> bool:
        """Whether compact state is not laid out by the bits of its mask, or is not laid out yet."""
        state, mask = self.state.get(p), self._masks[p]
        layout = layout_of(state)
        if layout is None:
            return state is not None and any(name != MASTER for name in per_weight(p, state))
        return layout.mask is not mask.packed or format_of(local(p)) not in (mask.memory_format, None)

    def _aligned(self, p: torch.Tensor) -> BitMask:
        """Return the mask of a parameter, in whose memory format it is from now on, so that kernels can apply it."""
        mask = self._masks[p]
        mask.follow(local(p))
        return mask

    def _replace(
        self,
        states: Mapping[torch.Tensor, dict[str, Any]],
        masks: dict[torch.Tensor, BitMask],
        pending: dict[torch.Tensor, bool],
        batch: Batch | None = None,
    ) -> None:
        """Replace state, masks, pending masks and the batch in one step that no interrupt can divide."""
        at_once(
            [
                partial(dict.update, self.state, states),
                partial(self.__dict__.update, _masks=masks, _pending=pending, _batch=batch),
            ]
        )

    # -- for the owner of the masks ----------------------------------------------------------------------------------

    def watch_steps(self, before: Callable[[], None], after: Callable[..., None]) -> RemovableHandle:
        """Call these around every step that is taken, compiled or not, until the handle's ``remove`` is called.

        Parameters
        ----------
        before : callable
            Without arguments.
        after : callable
            Its argument is the flag by which a GPU decides whether the step is skipped, or None. ``is_direct`` says
            whether the parameters themselves were written, or tensors that are copied to them later.
        """
        handle = RemovableHandle(self._watchers)
        self._watchers[handle.id] = before, after
        return handle

    def master_weight(self, parameter: torch.Tensor) -> torch.Tensor | None:
        """Return the float32 copy that the arithmetic of ``parameter`` runs on; None if there is none (yet)."""
        master: torch.Tensor | None = self.state.get(parameter, {}).get(MASTER)
        return None if master is None else local(master)

    @torch.no_grad()
    def follow_weights(self, parameters: Iterable[torch.Tensor]) -> None:
        """Give master weights the values of parameters that something else has written.

        A master that rounds to the value of its parameter stays, because it is more precise. Temporary memory: about 12
        bytes per weight of the largest parameter.
        """
        for p in parameters:
            master = self.master_weight(p)
            if master is not None:
                weight = local(p).detach()
                master.copy_(torch.where(master.to(weight.dtype) == weight, master, weight))

    # -- checkpoints -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Return the state in torch's own format, always dense, which ``torch.optim`` can load.

        State of pruned weights is zero in it, even if masks have not been applied yet. Master weights are under
        ``master_weight``. Memory: compact state is expanded.

        Raises
        ------
        StateError
            Bits by which state is laid out have been written.
        """
        # It runs before the hooks of others, which then see the dense form, as with torch.
        expand = self.register_state_dict_post_hook(lambda _, saved: self._expand(saved["state"]), prepend=True)
        try:
            return super().state_dict()
        finally:
            expand.remove()

    def _expand(self, saved: dict[Any, Any]) -> None:
        """Replace the state that torch has collected by its dense form."""
        for index, p in enumerate(p for group in self.param_groups for p in group["params"]):
            if index in saved:
                # torch returns its live dictionaries. A new one cannot turn compact while somebody loads it.
                saved[index] = self.dense_state(p)

    def dense_state(self, p: torch.Tensor) -> dict[str, Any]:
        """Return the state of a parameter as ``state_dict`` has it, {} if there is none. Compact state is expanded."""
        state, mask = self.state.get(p, {}), self._masks.get(p)
        dense = expanded(self._name, p, state, self._backend)
        layout = layout_of(state)
        if mask is not None and (p in self._pending or (layout is not None and layout.mask is not mask.packed)):
            pruned = ~mask.to_bool()
            for name in per_weight(p, dense):
                dense[name] = sharded_like(local(dense[name]).masked_fill(pruned, 0.0), p)
        return dense

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` of this class or of the ``torch.optim`` class returned.

        State is kept in ``state_dtype``, also that of 16-bit parameters, and step counts in float32. Everything loaded
        is copied. State of pruned weights is dropped at the next step, or when masks are set, by the masks of that
        time.

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
        op = f"{self._name}.load_state_dict"
        for index, values in state_dict["state"].items():
            if index not in owners:
                # Kept as it is, as in torch.
                state[index] = copy.deepcopy(values)
            elif values:
                p, group = owners[index]
                given = p, values, self._state_dtype, self.essential
                state[p] = loaded_state(op, index, *given, is_capturable=bool(group.get("capturable")))
        pending = dict.fromkeys(self._masks, True)
        self.__dict__.update(state=state, param_groups=groups, _pending=pending, _batch=None)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _loaded_groups(self, state_dict: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the parameter groups as torch would load them."""
        # torch loads them into a throwaway optimizer, for its checks and defaults of groups without its writes.
        scratch = object.__new__(type(self))
        scratch.__dict__.update(self.__dict__)
        for kind in ("pre", "post"):
            scratch.__dict__[f"_optimizer_load_state_dict_{kind}_hooks"] = OrderedDict()
        super(Masking, scratch).load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        return scratch.param_groups
