"""What SGD, Adam and AdamW share: masks, compact state, torch's state_dict, and one kernel call per step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, count
from typing import Any, ClassVar, Self
from weakref import WeakValueDictionary

import torch

from gmp_kernels.backends import Compaction, Gradient, StateMove, UpdateTensor, choose
from gmp_kernels.errors import LayoutError, ShapeError, StateError, TargetError
from gmp_kernels.masks import BitMask
from gmp_kernels.ops import apply_masks_
from gmp_kernels.optim.constants import Group, constants_of, is_on_gpu
from gmp_kernels.optim.ready import MASTER, Ready, check_state, checked_grad, is_per_weight, state_dtype
from gmp_kernels.sharding import is_sharded, local, local_grad, sharded_like

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
        self._compactions: dict[torch.Tensor, Compaction] = {}  # of the parameters whose state is compact now
        self._ready: dict[int, Ready] = {}  # by the id of the parameter, which it holds
        if any(group.get("differentiable") for group in self.param_groups):
            raise ValueError(f"{self._name}: differentiable=True is not supported; use torch.optim")

    def __getstate__(self) -> dict[str, Any]:
        # What copies and pickles carry: torch names three attributes and would drop these.
        ours = ("_compact_state", "_master_weights", "_backend", "_masks", "_compactions")
        return super().__getstate__() | {name: getattr(self, name) for name in ours} | {"_ready": {}}

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

    @torch.no_grad()
    def set_masks(self, masks: Mapping[torch.Tensor, BitMask]) -> None:
        """Take over masks, zero what they prune in weights and state, and repack compact state.

        ``GMPScheduler`` calls this after every update. The bits are copied: masks that change later have to be set
        again. Parameters not named keep the mask they have.

        Parameters
        ----------
        masks : mapping of parameter to BitMask
            Each of the parameter's shape (of a sharded one: of what this process holds of it), on its device.

        Raises
        ------
        TargetError
            A parameter this optimizer does not have.
        ShapeError, LayoutError, DTypeError
            A mask that does not fit. Nothing has changed when one is raised.
        """
        owned = {p for group in self.param_groups for p in group["params"]}
        for p, mask in masks.items():
            if p not in owned:
                raise TargetError(
                    f"{self._name}.set_masks: expected masks of this optimizer's parameters, got one for a tensor of "
                    f"shape {tuple(p.shape)} that is not among them; add it with add_param_group"
                )
            if mask.shape != (held := local(p).shape):
                raise ShapeError(f"{self._name}.set_masks: expected shape {tuple(held)}, got {tuple(mask.shape)}")
        tensors: list[torch.Tensor] = []
        bits: list[BitMask] = []
        for p, mask in masks.items():
            # Compact state has another shape: what is pruned in it goes when it is repacked.
            state = self.state.get(p, {})
            found = [p.detach(), *(v for key, v in state.items() if is_per_weight(key, v) and v.shape == p.shape)]
            found = [local(tensor) for tensor in found if local(tensor).numel()]
            tensors += found
            bits += [mask] * len(found)
        apply_masks_(tensors, bits, backend=self._backend)
        for p, mask in masks.items():
            self._masks[p] = mask.clone()
            self._ready.pop(id(p), None)
        if self._compact_state:
            self._repack(masks)

    def master_weight(self, parameter: torch.Tensor) -> torch.Tensor | None:
        """Return the float32 copy that the arithmetic of ``parameter`` runs on; None if there is none (yet)."""
        master: torch.Tensor | None = self.state.get(parameter, {}).get(MASTER)
        return None if master is None else local(master)

    def _repack(self, parameters: Iterable[torch.Tensor]) -> None:
        """Store the state of these parameters for the weights their masks keep, whatever its layout was."""
        parameters = list(parameters)
        if not parameters:
            return
        implementation = choose(self._backend, parameters[0].device)
        masks = [(self._masks[p].packed, local(p).numel()) for p in parameters]
        layouts = dict(zip(parameters, implementation.compactions(masks), strict=True))
        moves: list[StateMove] = []
        for p, (_, numel) in zip(parameters, masks, strict=True):
            for key, value in self.state.get(p, {}).items():
                if key == MASTER or not is_per_weight(key, value):
                    continue
                packed = torch.empty(layouts[p].num_kept, dtype=value.dtype, device=value.device)
                moves.append(StateMove(local(value), self._compactions.get(p), packed, layouts[p], numel))
                self.state[p][key] = packed
        if moves:
            implementation.move_state(moves)
        self._compactions.update(layouts)

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
            mask or state was made. Nothing has been updated when one is raised.

        Notes
        -----
        One pass: weights, gradients and state are read and written once; blocks of 64 bytes of weights that are all
        pruned are not written, and where more than a third of the blocks are, not read.

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
        # What is on the GPU stays there: looking at it would make the step wait.
        waits = found_inf is not None and found_inf.device.type != "cpu"
        on_device = [waits or bool(group.get("capturable")) or is_on_gpu(group["lr"]) for group in self.param_groups]
        if found_inf is not None and not all(on_device) and found_inf.item():
            return

        # A small step is mostly this loop: what was found good the last time is looked at and no more.
        found: list[tuple[Group, bool, torch.Tensor, torch.Tensor, torch.Tensor, Ready | None]] = []
        unready: list[tuple[Group, torch.Tensor]] = []
        for group, stays in zip(self.param_groups, on_device, strict=True):
            keys = self._state_keys(group)
            for p in group["params"]:
                if given is not None:
                    weight, grad = given.get(p, (p, None))
                elif is_sharded(p):
                    weight, grad = local(p), None if p.grad is None else local_grad(p)
                else:
                    weight, grad = p, p.grad
                if grad is None:
                    continue
                ready = self._ready.get(id(p))
                if ready is None or not ready.holds(weight, grad, self.state.get(p), keys):
                    ready, grad = None, checked_grad(self._name, p, weight, grad, self._masks.get(p))
                    unready.append((group, p))
                found.append((group, stays, p, weight, grad, ready))
        if not found:
            return
        if unready:
            for group, p in unready:
                check_state(self._name, p, self.state.get(p, {}), self._state_keys(group), self._compactions.get(p))
            self._check_device([p for _, _, p, _, _, _ in found])
        implementation = choose(self._backend, found[0][2].device)
        rows: list[Ready] = []
        gradients: list[Gradient] = []
        ages: list[tuple[Group, int | torch.Tensor]] = []
        position: dict[tuple[int, int], int] = {}  # in ages
        steps: list[torch.Tensor] = []
        for group, stays, p, weight, grad, ready in found:
            step: int | torch.Tensor = 2  # where steps are not counted: not the first
            if ready is None:
                step = 1 if self._init_state(group, p, weight) else step
                ready = self._ready[id(p)] = self._prepare(group, p, weight)
            if self.counts_steps:
                counted = self._step_count(p, ready.state, stays)
                steps.append(counted)
                step = counted if stays or counted.device.type != "cpu" else int(counted.item()) + 1
            if ready.is_empty:
                continue
            index = len(ages) if isinstance(step, torch.Tensor) else position.setdefault((id(group), step), len(ages))
            if index == len(ages):
                ages.append((group, step))
            rows.append(ready)
            gradients.append(Gradient(grad, index))
        constants = constants_of(self._constants, ages, grad_scale, found_inf if any(on_device) else None)
        implementation.update(self.rule, [ready.tensor for ready in rows], gradients, constants)
        torch.autograd.graph.increment_version(list(chain.from_iterable(ready.written for ready in rows)))
        if steps and found_inf is not None and any(on_device):
            torch._foreach_add_(steps, (found_inf == 0).to(steps[0]).reshape(()))
        elif steps:
            torch._foreach_add_(steps, 1)

    def _step_count(self, p: torch.Tensor, state: dict[str, Any], stays: bool) -> torch.Tensor:
        """Return the count of the steps before this one, on the parameter's device if it is to stay there."""
        count: torch.Tensor = state["step"]
        if stays and count.device != p.device:
            count = state["step"] = count.to(p.device)
        return count

    def _check_device(self, parameters: Sequence[torch.Tensor]) -> None:
        """Refuse several devices; parameters that are ready are on the one of the latest step."""
        devices = {p.device for p in parameters}
        if len(devices) > 1:
            raise LayoutError(
                f"{self._name}: expected all parameters on one device, got {sorted(map(str, devices))}; use one "
                "optimizer per device"
            )
        self._ready = {key: ready for key, ready in self._ready.items() if ready.tensor.weight.device in devices}

    def _prepare(self, group: dict[str, Any], p: torch.Tensor, weight: torch.Tensor) -> Ready:
        mask, keys, state = self._masks.get(p), self._state_keys(group), self.state[p]
        tensor = UpdateTensor(
            weight=weight.detach(),
            master=self.master_weight(p),
            state=tuple(local(state[key]) for key in keys),
            mask=None if mask is None else mask.packed,
            compaction=self._compactions.get(p),
        )
        return Ready(p, weight, state, keys, tensor)

    def _init_state(self, group: dict[str, Any], p: torch.Tensor, weight: torch.Tensor) -> bool:
        """Create what the state lacks; return whether this is the first step of the parameter."""
        state = self.state[p]
        if self.counts_steps and "step" not in state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32, device="cpu")
        if self._master_weights and p.dtype in (torch.bfloat16, torch.float16) and MASTER not in state:
            value = p if is_sharded(p) else weight
            state[MASTER] = value.detach().to(torch.float32, memory_format=torch.preserve_format)
        missing = [name for name in self._state_keys(group) if state.get(name) is None]
        layout = self._compactions.get(p)
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
                result["state"][index] = self._dense_state(p) if p in self._compactions else dict(self.state[p])
        return result

    def _dense_state(self, p: torch.Tensor) -> dict[str, Any]:
        layout = self._compactions[p]
        dense = dict(self.state[p])
        moves = []
        for key, value in self.state[p].items():
            if key == MASTER or not is_per_weight(key, value):
                continue
            values = torch.empty(local(p).shape, dtype=value.dtype, device=value.device)
            moves.append(StateMove(value, layout, values, None, values.numel()))
            dense[key] = sharded_like(values, p)
        choose(self._backend, p.device).move_state(moves)
        return dense

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
        self._compactions.clear()
        self._ready.clear()
        # torch casts state to the parameter's dtype, which would round what is kept in float32 on purpose.
        for _, p, key, value in found:
            self.state[p][key] = torch.empty_like(p, dtype=state_dtype(p)).copy_(value)
        self.set_masks(self._masks)

    def _indexed(self) -> dict[int, torch.Tensor]:
        """Parameters by the number ``state_dict`` gives them."""
        return dict(enumerate(p for group in self.param_groups for p in group["params"]))
