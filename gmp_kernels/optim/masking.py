"""An optimizer's masks, and what brings weights and state up to date with them.

The masks are the truth. What they say is recorded first, which needs no memory; weights and state follow, and whatever
an error or an interrupt has kept from following does so before the next step.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch.utils.hooks import RemovableHandle

from gmp_kernels.backends import StateMove, capture, choose
from gmp_kernels.backends.at_once import at_once
from gmp_kernels.distributed.placement import local
from gmp_kernels.errors import DTypeError, LayoutError, ShapeError, TargetError
from gmp_kernels.masks import BitMask
from gmp_kernels.ops import apply_masks_
from gmp_kernels.optim.batch import Batch
from gmp_kernels.optim.compact import CompactState, check_layout, layout_of, layouts_by
from gmp_kernels.optim.entries import MASTER, check_state, dense_state, per_weight
from gmp_kernels.optim.graphs import Graphs
from gmp_kernels.optim.ready import Ready

__all__ = ["Masking"]


class Settlement(NamedTuple):
    """Work left to do before weights and state are what the masks say.

    Attributes
    ----------
    states : dict of parameter to dict
        State laid out anew, to take the place of what is there.
    zeroed : list of (torch.Tensor, BitMask)
        What is zeroed where it is.
    filled : list of (torch.Tensor, torch.Tensor)
        The same of tensors that are not in the order of their mask, which is bool here, True = pruned.
    parameters : set of torch.Tensor
        All that this is about.
    """

    states: dict[torch.Tensor, dict[str, Any]]
    zeroed: list[tuple[torch.Tensor, BitMask]]
    filled: list[tuple[torch.Tensor, torch.Tensor]]
    parameters: set[torch.Tensor]


class Masking(torch.optim.Optimizer):
    """The half of ``MaskedOptimizer`` that knows masks."""

    # Entries of which torch's state of a parameter that has stepped has all.
    essential: ClassVar[Sequence[str]] = ()

    def _init_masking(self, *, compact_state: bool, master_weights: bool, backend: str | None) -> None:
        self._compact_state = compact_state
        self._master_weights = master_weights
        self._backend = backend
        self._masks: dict[torch.Tensor, BitMask] = {}
        # Whose mask was not applied yet, and whether that is needed of what decides about a weight, too.
        self._pending: dict[torch.Tensor, bool] = {}
        self._ready: dict[int, Ready] = {}  # by the id of the parameter, which it holds
        self._batch: Batch | None = None  # of the latest step
        self._graphs = Graphs()
        self._watchers: OrderedDict[int, tuple[Callable[[], None], Callable[..., None]]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        # What copies and pickles carry: torch names three attributes and would drop these.
        ours = ("_compact_state", "_master_weights", "_backend", "_masks", "_pending", "_graphs")
        anew: dict[str, Any] = {"_ready": {}, "_batch": None, "_watchers": OrderedDict()}
        return super().__getstate__() | {name: getattr(self, name) for name in ours} | anew

    @property
    def _name(self) -> str:
        return type(self).__name__

    @property
    def compact_state(self) -> bool:
        """Whether state is kept for the kept weights only."""
        return self._compact_state

    def set_masks(self, masks: Mapping[torch.Tensor, BitMask]) -> None:
        """Take over masks, zero what they prune in weights and state, and repack compact state.

        Every step reads the mask it was given: bits that ``prune_`` changes in place count from the next step on. State
        of what they prune is zeroed when the masks are set again. Compact state is laid out by the bits it was given,
        of which it keeps a copy: there, masks that change have to be set again. Parameters not named keep the mask they
        have. ``GMPScheduler`` hands over its masks by itself.

        Parameters
        ----------
        masks : mapping of parameter to BitMask
            Each of the parameter's shape (of a sharded one: of what this process holds of it), on its device.

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
        Memory: compact state is there twice, in its old and its new layout, until all of it has moved.
        """
        before = {"_masks": self._masks, "_pending": self._pending}
        try:
            self.share_masks({p: mask.clone() for p, mask in masks.items()} if self._compact_state else masks)
        except Exception:
            self.__dict__.update(before)
            raise

    @torch.no_grad()
    def share_masks(
        self, masks: Mapping[torch.Tensor, BitMask], *, ranked_is_pruned: bool = False, are_checked: bool = False
    ) -> None:
        """``set_masks`` for an owner that gives a mask other bits, in another tensor, rather than write under a layout.

        Masks that pass the checks are set, also where memory runs out or an interrupt comes: weights and state then
        follow before the next step.

        Parameters
        ----------
        masks : mapping of parameter to BitMask
            As in ``set_masks``; compact state is laid out by their bits themselves.
        ranked_is_pruned : bool
            What decides about a weight, its master copy or else itself, is zero already where the masks say so.
        are_checked : bool
            ``check_masks`` has found nothing wrong just now.

        Raises
        ------
        StateError
            Bits by which state is laid out have been written; and as ``set_masks``.
        """
        if not are_checked:
            self.check_masks(masks)
        others = [p for p in self._pending if p not in masks]
        pending = {p: self._pending.get(p, False) or not ranked_is_pruned for p in masks}
        self.__dict__.update(_masks={**self._masks, **masks}, _pending={**self._pending, **pending})
        self._settle(others)

    @torch.no_grad()
    def forget_masks(self, parameters: Iterable[torch.Tensor]) -> None:
        """Let the masks of these parameters go; their compact state becomes dense. Weights stay as they are.

        Raises
        ------
        CaptureError
            A CUDA graph reads one of them.
        StateError
            Bits by which state is laid out have been written. Nothing has changed when one is raised.
        """
        gone = set(parameters)
        for p in gone & self._masks.keys():
            self._graphs.check_no_mask(self._name, p)
        compact = [p for p in gone if layout_of(self.state.get(p)) is not None]
        for p in compact:
            check_layout(self._name, p, self.state[p])
        states = {p: dense_state(p, self.state[p], self._backend) for p in compact}
        masks = {p: mask for p, mask in self._masks.items() if p not in gone}
        pending = {p: decides for p, decides in self._pending.items() if p not in gone}
        self._ready = {key: ready for key, ready in self._ready.items() if ready.parameter not in gone}
        self._batch = None
        self._replace(states, masks, pending)

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

    def has_mask(self, parameter: torch.Tensor) -> bool:
        """Whether a mask was set for ``parameter``."""
        return parameter in self._masks

    def check_masks(self, masks: Mapping[torch.Tensor, BitMask]) -> None:
        """Raise what ``set_masks`` would, and StateError where bits by which state is laid out have been written."""
        owned = {p for group in self.param_groups for p in group["params"]}
        op = f"{self._name}.set_masks"
        for p, mask in masks.items():
            if p not in owned:
                raise TargetError(
                    f"{op}: expected masks of this optimizer's parameters, got one for a tensor of "
                    f"shape {tuple(p.shape)} that is not among them; add it with add_param_group"
                )
            if not isinstance(mask, BitMask):
                raise DTypeError(f"{op}: expected a BitMask, got {type(mask).__name__}; use BitMask.from_bool(...)")
            if mask.shape != (held := local(p).shape) or not mask.is_packed:
                raise ShapeError(f"{op}: expected shape {tuple(held)}, got {tuple(mask.shape)}; make a new BitMask")
            if mask.packed.device != p.device:
                raise LayoutError(f"{op}: expected a mask on {p.device}, got {mask.packed.device}; use mask.to(device)")
            self._graphs.check_mask(self._name, p, mask)
            self._check_state(p)

    def master_weight(self, parameter: torch.Tensor) -> torch.Tensor | None:
        """Return the float32 copy that the arithmetic of ``parameter`` runs on; None if there is none (yet)."""
        master: torch.Tensor | None = self.state.get(parameter, {}).get(MASTER)
        return None if master is None else local(master)

    @torch.no_grad()
    def follow_weights(self, parameters: Iterable[torch.Tensor]) -> None:
        """Give master weights the values of parameters that something else has written.

        A master that rounds to what its parameter holds stays: it knows the weight better. Temporary memory: about 12
        bytes per weight of the largest parameter.
        """
        for p in parameters:
            master = self.master_weight(p)
            if master is not None:
                weight = local(p).detach()
                master.copy_(torch.where(master.to(weight.dtype) == weight, master, weight))

    def _check_state(self, p: torch.Tensor) -> None:
        """Refuse state that does not belong to the parameter as it is now."""
        state, ready = self.state.get(p), self._ready.get(id(p))
        if state and ready is not None and layout_of(state) is None and ready.holds_state(local(p), state):
            return
        if state:
            check_layout(self._name, p, state)
            check_state(self._name, p, state, self.essential)

    # -- what follows the masks --------------------------------------------------------------------------------------

    def _settle(self, unchecked: Iterable[torch.Tensor] | None = None) -> None:
        """Bring weights and state up to date with the masks; when it raises nothing has changed.

        ``unchecked`` are the parameters whose state was not looked at just now; by default all.
        """
        stale = {p: self._masks[p] for p in self.state if self._is_stale(p)} if self._compact_state else {}
        if self._pending or stale:
            for p in {*self._pending, *stale} if unchecked is None else unchecked:
                self._check_state(p)
            self._commit(self._settlement(stale))

    def _settlement(self, stale: Mapping[torch.Tensor, BitMask]) -> Settlement:
        """Return what is left to do, all that needs memory done. Live weights and state stay as they are.

        ``stale`` are the masks of parameters whose state has to be laid out anew.
        """
        masks, pending = self._masks, self._pending
        parameters = {*pending, *stale}
        for p in parameters:
            if capture.is_capturing(p.device):
                self._graphs.refuse(self._name, "masks to be applied first; set masks before capturing")
        states: dict[torch.Tensor, dict[str, Any]] = {**self._repack(stale)}
        zeroed, filled = list[tuple[torch.Tensor, BitMask]](), list[tuple[torch.Tensor, torch.Tensor]]()
        for p in parameters:
            state: dict[str, Any] = states.get(p, self.state.get(p, {}))
            compact = state.names if isinstance(state, CompactState) else frozenset()
            names = [name for name in per_weight(p, state) if name not in compact]
            with_decisive = pending.get(p, True)
            found = [p.detach()] if with_decisive or MASTER in state else []
            found += [state[name] for name in names if with_decisive or name != MASTER]
            for tensor in map(local, found):
                if tensor.numel() and tensor.is_contiguous() and not tensor.is_neg():
                    zeroed.append((tensor, masks[p]))
                elif tensor.numel():
                    filled.append((tensor, ~masks[p].to_bool()))
        return Settlement(states, zeroed, filled, parameters)

    def _is_stale(self, p: torch.Tensor) -> bool:
        """Whether compact state is laid out by other bits than those of its mask, or not yet."""
        state, mask = self.state[p], self._masks.get(p)
        layout = layout_of(state)
        if mask is None or (layout is not None and layout.mask is mask.packed):
            return False
        return layout is not None or any(name != MASTER for name in per_weight(p, state))

    def _repack(self, masks: Mapping[torch.Tensor, BitMask]) -> dict[torch.Tensor, CompactState]:
        """Return the state of these parameters laid out for the weights that these masks keep; what is there stays."""
        layouts = layouts_by({p: mask.packed for p, mask in masks.items()}, self._backend)
        moves: dict[torch.device, list[StateMove]] = {}
        found = {}
        for p, layout in layouts.items():
            state, old = self.state[p], layout_of(self.state[p])
            compact = state.names if isinstance(state, CompactState) else frozenset()
            packed: dict[str, torch.Tensor] = {}
            for name in per_weight(p, state):
                if name == MASTER:
                    continue
                source = state[name] if name in compact else local(state[name]).contiguous()
                packed[name] = torch.empty(layout.num_kept, dtype=source.dtype, device=source.device)
                source_layout = old if name in compact else None
                move = StateMove(source, source_layout, packed[name], layout, local(p).numel())
                moves.setdefault(source.device, []).append(move)
            found[p] = CompactState({**state, **packed}, layout, packed, local(p).shape)
        for device, own in moves.items():
            choose(self._backend, device).move_state(own)
        return found

    def _commit(self, settlement: Settlement) -> None:
        """Do what is left to do; to do it twice is to do it once."""
        for p in settlement.parameters:
            # Have the next step look anew at what changes.
            ready, mask = self._ready.get(id(p)), self._masks[p]
            if ready is not None and (
                p in settlement.states or ready.mask is not mask or ready.bits is not mask.packed
            ):
                del self._ready[id(p)]
                self._batch = None
        devices: dict[torch.device, tuple[list[torch.Tensor], list[BitMask]]] = {}
        for tensor, mask in settlement.zeroed:
            tensors, bits = devices.setdefault(tensor.device, ([], []))
            tensors.append(tensor)
            bits.append(mask)
        for tensors, bits in devices.values():
            apply_masks_(tensors, bits, backend=self._backend)
        for tensor, pruned in settlement.filled:
            tensor.masked_fill_(pruned, 0.0)
        self._replace(settlement.states, self._masks, {})

    def _replace(
        self,
        states: dict[torch.Tensor, dict[str, Any]],
        masks: dict[torch.Tensor, BitMask],
        pending: dict[torch.Tensor, bool],
    ) -> None:
        """Have other state, masks and masks to apply from one moment to the next."""
        at_once(
            [
                partial(dict.update, self.state, states),
                partial(self.__dict__.update, _masks=masks, _pending=pending),
            ]
        )
