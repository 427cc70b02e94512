"""The base of SGD, Adam and AdamW: one kernel call per step, in which pruned weights cost nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any, ClassVar, NamedTuple, Self
from weakref import WeakValueDictionary

import torch

from gmp_kernels.backends import Compaction, UpdateTensor, capture, choose
from gmp_kernels.distributed.placement import is_sharded, local, local_grad
from gmp_kernels.errors import DTypeError, LayoutError, ShapeError, TargetError
from gmp_kernels.library import define
from gmp_kernels.optim.batch import Batch
from gmp_kernels.optim.checkpoint import Checkpointed
from gmp_kernels.optim.compact import CompactState, check_layout, layout_of, layouts_by
from gmp_kernels.optim.constants import constants_of, is_on_gpu
from gmp_kernels.optim.entries import MASTER, STEP, as_count, follow, per_weight, state_dtype
from gmp_kernels.optim.ready import Ready, bits_beside, checked_grad

__all__ = ["MaskedOptimizer"]


class _Found(NamedTuple):
    """A parameter to step: its group's index, what holds its value, and what an earlier step knows of it."""

    group: int
    parameter: torch.Tensor
    weight: torch.Tensor
    gradient: torch.Tensor
    ready: Ready | None


class MaskedOptimizer(Checkpointed):
    """Mixed into a ``torch.optim`` class, it replaces the step by one pass in which pruned weights cost nothing.

    Subclasses name their rule and the state it keeps, and turn a parameter group into the kernel's constants.
    """

    rule: ClassVar[str]
    # What a compiled graph knows an optimizer by: it can hold numbers and tensors, no objects.
    handle: int
    # torch's GradScaler then hands over the scale and the overflow flag instead of unscaling in passes of its own.
    _step_supports_amp_scaling = True

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

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        # Here and not in __init__, so that copies and unpickled optimizers get handles of their own.
        self = super().__new__(cls)
        self.handle = next(_handles)
        _optimizers[self.handle] = self
        return self

    # -- parameter groups --------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with hyperparameters of their own, as in torch.

        Raises
        ------
        DTypeError
            Complex parameters.
        ValueError, TypeError
            ``differentiable``; and as in torch. Nothing has been added when one is raised.
        """
        if isinstance(param_group, dict) and not isinstance(params := param_group["params"], (torch.Tensor, set)):
            # What can be walked once only is walked twice.
            param_group["params"] = params = list(params)
            entries = [entry[1] if isinstance(entry, tuple) and len(entry) > 1 else entry for entry in params]
            self._check_group({**self.defaults, **param_group}, entries)
        elif isinstance(param_group, dict) and isinstance(params, torch.Tensor):
            self._check_group({**self.defaults, **param_group}, [params])
        super().add_param_group(param_group)

    def _check_group(self, group: Mapping[str, Any], params: Iterable[object]) -> None:
        if group.get("differentiable"):
            raise ValueError(f"{self._name}: differentiable=True is not supported; use torch.optim")
        for p in params:
            if isinstance(p, torch.Tensor) and p.is_complex():
                raise DTypeError(
                    f"{self._name}: expected real parameters, got {p.dtype} of shape {tuple(p.shape)}; give "
                    "torch.view_as_real of them, or use torch.optim"
                )

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
            Sparse gradients, where torch refuses them; SGD makes them dense.
        ValueError
            ``differentiable`` in a group.
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
        for group in groups:
            if group.get("differentiable"):
                self._check_group(group, ())
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
        created: dict[torch.Tensor, dict[str, Any]] = {}
        resolved: list[tuple[torch.Tensor, torch.Tensor]] = []
        known = batch is not None and given is None and not self._pending
        gradients = batch.gradients(groups, keys, self.state) if known and batch is not None else None
        if gradients is None:
            # What the brief look does not settle is looked at parameter by parameter.
            self._settle()
            batch = self._batch
            found, resolved = self._with_gradients(given, keys)
            if not found:
                return
            members, fresh, created = self._made_ready(found, keys, lazy)
            gradients = [one.gradient for one in found]
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
        amount = 1 if skips is None else (skips == 0).to(torch.float32).reshape(())
        # New state and counts belong to what the kernel writes: all of it is there, or nothing.
        after: list[Callable[[], object]] = [partial(dict.update, self.state, created), *batch.counting(amount)]
        after += [partial(weight.copy_, value) for weight, value in resolved]
        # Before the kernel: of versions that no write follows nobody computes anything wrong.
        torch.autograd.graph.increment_version(batch.written)
        choose(self._backend, device).update(self.rule, batch.updates, present, rows, constants, after=after)
        if capturing:
            self._graphs.note(ready for ready in batch.ready if not ready.is_empty)

    def _with_gradients(
        self,
        given: Mapping[torch.Tensor, tuple[torch.Tensor, torch.Tensor]] | None,
        keys: Sequence[tuple[str, ...]],
    ) -> tuple[list[_Found], list[tuple[torch.Tensor, torch.Tensor]]]:
        """Return every parameter that has a gradient, checked against it.

        Beside them, weights that are views which negate what is in memory, each with what is stepped in its place.
        """
        found: list[_Found] = []
        resolved: list[tuple[torch.Tensor, torch.Tensor]] = []
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
                if weight.is_neg():
                    resolved.append((weight.detach(), weight.detach().resolve_neg()))
                    weight = resolved[-1][1]
                state = self.state.get(p)
                check_layout(self._name, p, state)
                ready = self._ready.get(id(p))
                if ready is not None and not ready.holds(weight, state, keys[index]):
                    ready = None
                if ready is None or not ready.fits(grad):
                    dense = grad if grad.layout is torch.strided else self._densified(grad, group)
                    mask = self._masks.get(p)
                    is_compact = self._compact_state and mask is not None
                    grad = checked_grad(self._name, p, weight, dense, mask, is_compact=is_compact)
                found.append(_Found(index, p, weight, grad, ready))
        if len({id(one.parameter) for one in found}) < len(found):
            # Its two steps would be taken at once, in one piece of memory.
            raise LayoutError(f"{self._name}: expected each parameter once, got one twice; remove it from its group")
        return found, resolved

    def _made_ready(
        self, found: Sequence[_Found], keys: Sequence[tuple[str, ...]], lazy: Sequence[bool]
    ) -> tuple[list[tuple[int, Ready]], list[bool], dict[torch.Tensor, dict[str, Any]]]:
        """Check the state of those that are not ready, and make what it lacks.

        Returns
        -------
        members : list of (int, Ready)
            With the indices of their groups.
        fresh : list of bool
            Whether state was made, which is before the first step.
        created : dict of parameter to dict
            State that is not the parameter's yet.
        """
        unready = [(one.group, one.parameter) for one in found if one.ready is None]
        for _, p in unready:
            self._check_state(p)
        layouts: dict[torch.Tensor, Compaction] = {}
        if unready:
            self._check_device([one.parameter for one in found])
            device = found[0].parameter.device
            lacking = [p for index, p in unready if self._lacks_state(p, keys[index])]
            if capture.is_capturing(device):
                self._check_capture(device, [lazy[one.group] for one in found])
                if lacking:
                    self._graphs.refuse_first_step(self._name)
            layouts = self._layouts_of(lacking)
        members: list[tuple[int, Ready]] = []
        fresh: list[bool] = []
        created: dict[torch.Tensor, dict[str, Any]] = {}
        for index, p, weight, _, ready in found:
            is_first = False
            if ready is None:
                state = self.state.get(p)
                is_first = any(state is None or state.get(name) is None for name in keys[index])
                if (completed := self._completed(keys[index], p, weight, layouts.get(p))) is not None:
                    state = created[p] = completed
                ready = self._ready[id(p)] = self._prepare(keys[index], p, weight, state)
            fresh.append(is_first)
            members.append((index, ready))
        return members, fresh, created

    def _densified(self, grad: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """Return a sparse gradient as a dense one, where torch's optimizer takes it."""
        raise RuntimeError(f"{self._name} does not support sparse gradients, please consider SparseAdam instead")

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

    def _prepare(
        self, keys: tuple[str, ...], p: torch.Tensor, weight: torch.Tensor, state: dict[str, Any] | None
    ) -> Ready:
        mask, layout, entries = self._masks.get(p), layout_of(state), state or {}
        master = entries.get(MASTER)
        bits = None if mask is None else bits_beside(weight, mask)
        tensor = UpdateTensor(
            weight=weight.detach(),
            master=None if master is None else local(master),
            state=tuple(local(entries[key]) for key in keys),
            mask=bits,
            compaction=layout,
        )
        return Ready(p, weight, state, keys, tensor, mask)

    def _lacks_state(self, p: torch.Tensor, keys: tuple[str, ...]) -> bool:
        state = self.state.get(p, {})
        names = (*keys, *([STEP] if self.counts_steps else []), *([MASTER] if self._has_master(p) else []))
        return any(state.get(name) is None for name in names)

    def _has_master(self, p: torch.Tensor) -> bool:
        return self._master_weights and p.dtype in (torch.bfloat16, torch.float16)

    def _layouts_of(self, parameters: Iterable[torch.Tensor]) -> dict[torch.Tensor, Compaction]:
        """Return the layouts of state that these parameters are about to get."""
        if not self._compact_state:
            return {}
        masks = self._masks
        return layouts_by({p: masks[p].packed for p in parameters if p in masks}, self._backend)

    def _completed(
        self, keys: tuple[str, ...], p: torch.Tensor, weight: torch.Tensor, new_layout: Compaction | None
    ) -> dict[str, Any] | None:
        """Return a copy of the state with what it lacks, all in the form it is kept in; None if it is so already."""
        state = self.state.get(p, {})
        values: dict[str, Any] = {}
        if self.counts_steps:
            count = state.get(STEP)
            # Neither where nor what torch's defaults are.
            device = count.device if isinstance(count, torch.Tensor) else torch.device("cpu")
            values[STEP] = as_count(0.0 if count is None else count, device)
        if self._has_master(p) and state.get(MASTER) is None:
            value = p if is_sharded(p) else weight
            values[MASTER] = value.detach().to(torch.float32, memory_format=torch.preserve_format)
        layout = layout_of(state) or new_layout
        missing = [name for name in keys if state.get(name) is None]
        for name in missing:
            values[name] = (
                torch.zeros_like(p, dtype=state_dtype(p), memory_format=torch.preserve_format)
                if layout is None
                else torch.zeros(layout.num_kept, dtype=state_dtype(p), device=p.device)
            )
        compact = state.names if isinstance(state, CompactState) else frozenset()
        # The model went to another memory format: the state follows it.
        values.update((name, follow(p, state[name])) for name in per_weight(p, state) if name not in compact)
        if all(state.get(name) is value for name, value in values.items()):
            return None
        merged = {**state, **values}
        if layout is None or not (compact or missing):
            return merged
        return CompactState(merged, layout, {*compact, *missing}, weight.shape)


_handles = count()
_optimizers: WeakValueDictionary[int, MaskedOptimizer] = WeakValueDictionary()


@torch.no_grad()
def _optimizer_step(
    handle: int, positions: Sequence[int], weights: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]
) -> None:
    """Take the step of a compiled graph; ``positions`` says which of the optimizer's parameters the weights are.

    They need not be the parameters themselves: a graph may hold the value of one in a buffer and write it back later.
    """
    optimizer = _optimizers.get(handle)
    if optimizer is None:
        raise TargetError(
            f"optimizer_step_: expected the handle of a living optimizer, got {handle}; call optimizer.step(), or "
            "compile again what was compiled with an optimizer that is gone"
        )
    owned = [p for group in optimizer.param_groups for p in group["params"]]
    given = dict(zip([owned[i] for i in positions], zip(weights, gradients, strict=True), strict=True))
    for i, (p, (weight, gradient)) in zip(positions, given.items(), strict=True):
        expected, found = ((t.shape, t.stride(), t.dtype, t.device, g.shape) for t, g in ((p, p), (weight, gradient)))
        if expected != found:
            raise ShapeError(
                f"optimizer_step_: expected shape, strides, dtype, device and gradient's shape of parameter {i}, "
                f"{expected}, got {found}; compile again after converting a model"
            )
    optimizer.update_(given)


define(
    "optimizer_step_(int handle, int[] positions, Tensor(a!)[] weights, Tensor[] gradients) -> ()",
    _optimizer_step,
)
