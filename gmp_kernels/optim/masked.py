"""The base of SGD, Adam and AdamW: masks, compact state, torch's state_dict, and one kernel call per step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, count
from typing import Any, ClassVar, Self
from weakref import WeakValueDictionary

import torch
from torch.utils.hooks import RemovableHandle

from gmp_kernels import capture
from gmp_kernels.backends import UpdateTensor, choose
from gmp_kernels.errors import LayoutError, ShapeError, StateError, TargetError
from gmp_kernels.masks import BitMask
from gmp_kernels.ops import apply_masks_
from gmp_kernels.optim.batch import Batch
from gmp_kernels.optim.compact import Layouts
from gmp_kernels.optim.constants import constants_of, is_on_gpu
from gmp_kernels.optim.graphs import Graphs
from gmp_kernels.optim.ready import MASTER, Ready, check_state, checked_grad, is_per_weight, state_dtype
from gmp_kernels.sharding import is_sharded, local, local_grad

__all__ = ["MaskedOptimizer"]


class MaskedOptimizer(torch.optim.Optimizer):
    """Mixed into a ``torch.optim`` class, it replaces the step by one pass in which pruned weights cost nothing.

    Subclasses name their rule and the state it keeps, and turn a parameter group into the kernel's constants.
    """

    rule: ClassVar[str]
    # What a compiled graph knows an optimizer by: it can hold numbers and tensors, no objects.
    handle: int
    handles: ClassVar[Iterator[int]] = count()
    by_handle: ClassVar[WeakValueDictionary[int, MaskedOptimizer]] = WeakValueDictionary()
    # torch's GradScaler then hands over the scale and the overflow flag instead of unscaling in passes of its own.
    _step_supports_amp_scaling = True

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        # Here and not in __init__, so that copies and unpickled optimizers get handles of their own.
        self = super().__new__(cls)
        self.handle = next(cls.handles)
        cls.by_handle[self.handle] = self
        return self

    def _init_masking(self, *, compact_state: bool, master_weights: bool, backend: str | None) -> None:
        self._compact_state = compact_state
        self._master_weights = master_weights
        self._backend = backend
        self._masks: dict[torch.Tensor, BitMask] = {}
        self._layouts = Layouts(backend)  # of the parameters whose state is compact now
        self._ready: dict[int, Ready] = {}  # by the id of the parameter, which it holds
        self._batch: Batch | None = None  # of the latest step
        self._graphs = Graphs()
        self._watchers: OrderedDict[int, tuple[Callable[[], None], Callable[..., None]]] = OrderedDict()
        if any(group.get("differentiable") for group in self.param_groups):
            raise ValueError(f"{self._name}: differentiable=True is not supported; use torch.optim")

    def __getstate__(self) -> dict[str, Any]:
        # What copies and pickles carry: torch names three attributes and would drop these.
        ours = ("_compact_state", "_master_weights", "_backend", "_masks", "_layouts", "_graphs")
        anew: dict[str, Any] = {"_ready": {}, "_batch": None, "_watchers": OrderedDict()}
        return super().__getstate__() | {name: getattr(self, name) for name in ours} | anew

    @property
    def _name(self) -> str:
        return type(self).__name__

    # -- what a rule must say ----------------------------------------------------------------------------------------

    def _state_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Names, in torch's state, of the tensors this rule keeps per weight (at most three)."""
        raise AssertionError("a subclass says which")

    def _constants(self, group: dict[str, Any], step: Any) -> dict[str, Any]:
        """The kernel's constants for the ``step``-th update (1 is the first) of a parameter of this group.

        ``step`` may be a float64 tensor of several; then so is what depends on it.
        """
        raise AssertionError("a subclass says which")

    # Whether torch's state of this rule holds a step count; where not, only the first step is told from the others.
    counts_steps: ClassVar[bool] = True

    # -- masks -------------------------------------------------------------------------------------------------------

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
        CaptureError
            A CUDA graph holds a step of a parameter that had no mask then, or another one. Nothing has changed when one
            of these is raised.
        """
        self.check_masks(masks)
        self.share_masks({p: mask.clone() for p, mask in masks.items()} if self._compact_state else masks)

    @torch.no_grad()
    def share_masks(self, masks: Mapping[torch.Tensor, BitMask], *, ranked_is_pruned: bool = False) -> None:
        """``set_masks`` for an owner that gives a mask other bits, in another tensor, rather than write under a layout.

        Parameters
        ----------
        masks : mapping of parameter to BitMask
            As in ``set_masks``; compact state is laid out by their bits themselves.
        ranked_is_pruned : bool
            What decides about a weight, its master copy or else itself, is zero already where the masks say so.

        Raises
        ------
        StateError
            Bits by which state is laid out have been written; and as ``set_masks``.
        """
        self.check_masks(masks)
        tensors, bits = list[torch.Tensor](), list[BitMask]()
        for p, mask in masks.items():
            state = self.state.get(p, {})
            found = [p.detach(), *([state[MASTER]] if MASTER in state else [])]
            if ranked_is_pruned:
                found.pop()
            if not self._compact_state:  # where what is pruned goes when it is repacked
                found += [v for key, v in state.items() if is_per_weight(key, v) and key != MASTER]
            found = [local(tensor) for tensor in found if local(tensor).numel()]
            tensors += found
            bits += [mask] * len(found)
        apply_masks_(tensors, bits, backend=self._backend)
        for p, mask in masks.items():
            self._masks[p] = mask
            if self._compact_state:
                self._ready.pop(id(p), None)
                self._batch = None
            elif (ready := self._ready.get(id(p))) is not None and ready.bits is not mask.packed:
                del self._ready[id(p)]
                self._batch = None
            elif ready is not None:
                ready.mask = mask
        if self._compact_state:
            self._layouts.repack(self.state, masks)

    def watch_steps(self, before: Callable[[], None], after: Callable[..., None]) -> RemovableHandle:
        """Call these around every step that is taken, compiled or not; what the handle's ``remove`` ends.

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
        for p, mask in masks.items():
            if p not in owned:
                raise TargetError(
                    f"{self._name}.set_masks: expected masks of this optimizer's parameters, got one for a tensor of "
                    f"shape {tuple(p.shape)} that is not among them; add it with add_param_group"
                )
            if mask.shape != (held := local(p).shape):
                raise ShapeError(f"{self._name}.set_masks: expected shape {tuple(held)}, got {tuple(mask.shape)}")
            self._graphs.check_mask(self._name, p, mask)
            self._layouts.check(self._name, p)

    def master_weight(self, parameter: torch.Tensor) -> torch.Tensor | None:
        """Return the float32 copy that the arithmetic of ``parameter`` runs on; None if there is none (yet)."""
        master: torch.Tensor | None = self.state.get(parameter, {}).get(MASTER)
        return None if master is None else local(master)

    # -- the step ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one optimization step.

        Parameters
        ----------
        closure : callable, optional
            Reevaluates the model and returns the loss.

        Returns
        -------
        The closure's loss, or None.

        Raises
        ------
        RuntimeError
            Sparse gradients, as in torch.
        DTypeError, LayoutError, ShapeError, StateError
            A parameter or gradient the kernels do not take, or a parameter that was converted or reshaped since its
            mask or state was made.
        CaptureError
            A step that a CUDA graph cannot hold, while one is captured. Nothing has been updated when one is raised.

        Notes
        -----
        One pass: weights, gradients and state are read and written once; where all of a block is pruned it is not
        written, and mostly not read. Blocks are 64 bytes of weights on the CPU and eight weights on a GPU, which writes
        no pruned weight at all in compact state: what others write under a mask, ``set_masks`` zeroes.

        In a ``torch.compile``d region the step is one operation of the graph, which looks up masks, state and
        hyperparameters when it runs: pruning does not make torch compile again, learning rates that change do once.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            owned = [p for group in self.param_groups for p in group["params"]]
            positions = [i for i, p in enumerate(owned) if p.grad is not None]
            weights = [owned[i] for i in positions]
            if weights:
                torch.ops.gmp_kernels.optimizer_step_(self.handle, positions, weights, [p.grad for p in weights])
        else:
            self.update_()
        return loss

    def update_(self, given: Mapping[torch.Tensor, tuple[torch.Tensor, torch.Tensor]] | None = None) -> None:
        """Take a step: ``given`` has, by parameter, the tensor that holds its value, and its gradient.

        By default the parameter itself and its ``grad``.
        """
        found_inf: torch.Tensor | None = getattr(self, "found_inf", None)
        grad_scale: torch.Tensor | None = getattr(self, "grad_scale", None)
        groups = self.param_groups
        # What is on the GPU stays there: looking at it would make the step wait.
        waits = found_inf is not None and found_inf.device.type != "cpu"
        lazy = [waits or bool(group.get("capturable")) or is_on_gpu(group["lr"]) for group in groups]
        if found_inf is not None and not all(lazy) and found_inf.item():
            return
        watchers = list(self._watchers.values())
        for before, _ in watchers:
            before()
        skips = found_inf if any(lazy) else None
        self._take_step(given, lazy, grad_scale, skips)
        for _, after in watchers:
            after(skips, is_direct=given is None)

    def _take_step(
        self,
        given: Mapping[torch.Tensor, tuple[torch.Tensor, torch.Tensor]] | None,
        lazy: Sequence[bool],
        grad_scale: torch.Tensor | None,
        skips: torch.Tensor | None,
    ) -> None:
        groups = self.param_groups
        keys = [self._state_keys(group) for group in groups]
        batch, fresh = self._batch, None
        gradients = None if batch is None or given is not None else batch.gradients(groups, keys, self.state)
        if gradients is None:
            # What the brief look does not settle is looked at parameter by parameter.
            members, gradients, fresh = self._checked(given, keys, lazy)
            if not members:
                return
            if batch is None or not batch.consists_of(members):
                batch = Batch(groups, keys, members, self._graphs.memory, counts_steps=self.counts_steps)
            elif given is None:
                batch.remember(groups, keys)
            self._batch = batch
        assert batch is not None
        device = batch.ready[0].parameter.device
        capturing = capture.is_capturing(device)
        if capturing:
            self._check_capture(device, [lazy[part.index] for part in batch.parts])
            if batch.has_counts_elsewhere(device):
                self._graphs.refuse_first_step(self._name)
        numbers = batch.steps(groups, lazy, fresh)
        constants, rows = constants_of(self._constants, numbers, grad_scale, skips)
        present = batch.present(gradients)
        choose(self._backend, device).update(self.rule, batch.updates, present, rows, constants)
        torch.autograd.graph.increment_version(batch.written)
        batch.count(1 if skips is None else (skips == 0).to(torch.float32).reshape(()))
        if capturing:
            self._graphs.note(ready for ready in batch.ready if not ready.is_empty)

    def _checked(
        self,
        given: Mapping[torch.Tensor, tuple[torch.Tensor, torch.Tensor]] | None,
        keys: Sequence[tuple[str, ...]],
        lazy: Sequence[bool],
    ) -> tuple[list[tuple[int, Ready]], list[torch.Tensor], list[bool]]:
        """Check every parameter that has a gradient, and create the state that it lacks.

        Returns
        -------
        members : list of (int, Ready)
            With the indices of their groups.
        gradients : list of torch.Tensor
        fresh : list of bool
            Whether state was created, which is before the first step.
        """
        found: list[tuple[int, torch.Tensor, torch.Tensor, Ready | None]] = []
        gradients: list[torch.Tensor] = []
        for index, group in enumerate(self.param_groups):
            for p in group["params"]:
                if given is not None:
                    weight, grad = given.get(p, (p, None))
                elif is_sharded(p):
                    weight, grad = local(p), None if p.grad is None else local_grad(p)
                else:
                    weight, grad = p, p.grad
                if grad is None:
                    continue
                self._layouts.check(self._name, p)
                ready = self._ready.get(id(p))
                if ready is not None and not ready.holds(weight, self.state.get(p), keys[index]):
                    ready = None
                if ready is None or not ready.fits(grad):
                    grad = checked_grad(self._name, p, weight, grad, self._masks.get(p))
                found.append((index, p, weight, ready))
                gradients.append(grad)
        unready = [(index, p) for index, p, _, ready in found if ready is None]
        for index, p in unready:
            check_state(self._name, p, self.state.get(p, {}), keys[index], self._layouts.get(p))
        if unready:
            self._check_device([p for _, p, _, _ in found])
            if capture.is_capturing(found[0][1].device):
                self._check_capture(found[0][1].device, [lazy[index] for index, *_ in found])
                if any(self._lacks_state(p, keys[index]) for index, p in unready):
                    self._graphs.refuse_first_step(self._name)
        members: list[tuple[int, Ready]] = []
        fresh: list[bool] = []
        for index, p, weight, ready in found:
            fresh.append(ready is None and self._init_state(keys[index], p, weight))
            if ready is None:
                ready = self._ready[id(p)] = self._prepare(keys[index], p, weight)
            members.append((index, ready))
        return members, gradients, fresh

    def _check_capture(self, device: torch.device, lazy: Iterable[bool]) -> None:
        """Refuse steps that a CUDA graph would repeat wrongly."""
        if self._compact_state:
            self._graphs.refuse(
                self._name, "compact state, which every update lays out anew; build it with compact_state=False"
            )
        if not (implementation := choose(self._backend, device)).capturable:
            name = type(implementation).__name__.lower()
            self._graphs.refuse(self._name, f"the backend {name}; build it with backend='cuda'")
        if self.counts_steps and not all(lazy):
            self._graphs.refuse(
                self._name, "step counts on the host, which would stand still; build it with capturable=True"
            )

    def _check_device(self, parameters: Sequence[torch.Tensor]) -> None:
        """Refuse several devices; parameters that are ready are on the one of the latest step."""
        devices = {p.device for p in parameters}
        if len(devices) > 1:
            raise LayoutError(
                f"{self._name}: expected all parameters on one device, got {sorted(map(str, devices))}; use one "
                "optimizer per device"
            )
        self._ready = {key: ready for key, ready in self._ready.items() if ready.tensor.weight.device in devices}

    def _prepare(self, keys: tuple[str, ...], p: torch.Tensor, weight: torch.Tensor) -> Ready:
        mask, layout, state = self._masks.get(p), self._layouts.get(p), self.state[p]
        bits = None if mask is None else mask.packed
        tensor = UpdateTensor(
            weight=weight.detach(),
            master=self.master_weight(p),
            state=tuple(local(state[key]) for key in keys),
            mask=bits if layout is None else layout.mask,
            compaction=layout,
        )
        return Ready(p, weight, state, keys, tensor, mask, self._layouts.version(p))

    def _lacks_state(self, p: torch.Tensor, keys: tuple[str, ...]) -> bool:
        state = self.state.get(p, {})
        names = (*keys, *(["step"] if self.counts_steps else []), *([MASTER] if self._has_master(p) else []))
        return any(state.get(name) is None for name in names)

    def _has_master(self, p: torch.Tensor) -> bool:
        return self._master_weights and p.dtype in (torch.bfloat16, torch.float16)

    def _init_state(self, keys: tuple[str, ...], p: torch.Tensor, weight: torch.Tensor) -> bool:
        """Create what the state lacks; return whether this is the first step of the parameter."""
        state = self.state[p]
        if self.counts_steps and "step" not in state:
            # Neither where nor what torch's defaults are: a count in bfloat16 would end at 256.
            state["step"] = torch.tensor(0.0, dtype=torch.float32, device="cpu")
        if self._has_master(p) and MASTER not in state:
            value = p if is_sharded(p) else weight
            state[MASTER] = value.detach().to(torch.float32, memory_format=torch.preserve_format)
        missing = [name for name in keys if state.get(name) is None]
        layout = self._layouts.get(p)
        for name in missing:
            state[name] = (
                torch.zeros_like(p, dtype=state_dtype(p), memory_format=torch.preserve_format)
                if layout is None
                else torch.zeros(layout.num_kept, dtype=state_dtype(p), device=p.device)
            )
        for key, value in state.items():
            # The model went to another memory format: the state follows it.
            if is_per_weight(key, value) and value.shape == p.shape and value.stride() != p.stride():
                state[key] = torch.empty_like(p, dtype=value.dtype).copy_(value)
        return bool(missing)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return torch's own format, dense whatever the layout here: ``torch.optim`` can load it.

        Master weights are under ``master_weight``. Memory: compact state is expanded.
        """
        result = super().state_dict()
        for index, p in self._indexed().items():
            if index in result["state"]:
                # torch hands out the dictionaries it goes on with: one that is being loaded must not turn compact.
                result["state"][index] = self._layouts.dense(p, self.state[p])
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` of this class or of the ``torch.optim`` class returned.

        State of pruned weights is dropped; state of 16-bit parameters is kept in float32.

        Raises
        ------
        ValueError
            Other parameter groups, as in torch.
        StateError
            State of another shape. Nothing has changed when one is raised.
        """
        # The numbers in the state_dict are its own; parameters correspond by position, as in torch.
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        owner = dict(zip(saved, self._indexed().values(), strict=False))
        found = [
            (index, owner[index], key, value)
            for index, state in state_dict["state"].items()
            if index in owner
            for key, value in state.items()
            if is_per_weight(key, value)
        ]
        for index, p, key, value in found:
            if value.shape != p.shape or local(value).shape != local(p).shape:
                raise StateError(
                    f"{self._name}.load_state_dict: expected '{key}' of shape {tuple(p.shape)} for parameter "
                    f"{index}, got {tuple(value.shape)}; is it the state of another model?"
                )
        super().load_state_dict(state_dict)
        self._layouts.clear()
        self._ready.clear()
        self._batch = None
        # torch casts state to the parameter's dtype, which would round what is kept in float32 on purpose.
        for _, p, key, value in found:
            self.state[p][key] = torch.empty_like(p, dtype=state_dtype(p)).copy_(value)
        self.share_masks(self._masks)

    def _indexed(self) -> dict[int, torch.Tensor]:
        """Parameters by the number ``state_dict`` gives them."""
        return dict(enumerate(p for group in self.param_groups for p in group["params"]))
