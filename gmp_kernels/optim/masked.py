"""The base of SGD, Adam and AdamW: one kernel call per step, in which pruned weights cost nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any, ClassVar, Self, TypeAlias
from weakref import WeakValueDictionary

import torch

from gmp_kernels.backends import capture, choose
from gmp_kernels.distributed.placement import is_sharded, local, local_grad
from gmp_kernels.errors import DTypeError, LayoutError, ShapeError, TargetError
from gmp_kernels.library import define
from gmp_kernels.optim.batch import Batch
from gmp_kernels.optim.checked import CheckedParameter, checked_gradient
from gmp_kernels.optim.compact import (
    MASTER,
    STEP,
    CompactState,
    as_count,
    compact_names,
    compacted,
    follow,
    layout_of,
    per_weight,
    state_dtype,
)
from gmp_kernels.optim.constants import constants_of, is_on_gpu
from gmp_kernels.optim.graphs import refuse, refuse_first_step
from gmp_kernels.optim.masking import Masking

__all__ = ["MaskedOptimizer"]

# By parameter, the tensor that holds its value, and its gradient.
Given: TypeAlias = Mapping[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]


class MaskedOptimizer(Masking):
    """Mixed into a ``torch.optim`` class, it replaces the step by one pass in which pruned weights cost nothing.

    Subclasses name their rule and the state it keeps, and turn a parameter group into the kernel's constants.
    """

    rule: ClassVar[str]
    # torch's GradScaler then hands over the scale and the overflow flag instead of unscaling in passes of its own.
    _step_supports_amp_scaling = True
    # A compiled graph knows the optimizer by this number: it can hold numbers and tensors, no objects.
    handle: int

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        # Here and not in __init__, so that copies and unpickled optimizers get handles of their own.
        self = super().__new__(cls)
        self.handle = next(_handles)
        _optimizers[self.handle] = self
        return self

    # -- what a rule must say ----------------------------------------------------------------------------------------

    def _state_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Return those of ``state_names`` that this group uses (at most three)."""
        raise AssertionError("a subclass says which")

    def _constants(self, group: dict[str, Any], step: Any) -> dict[str, Any]:
        """Return the kernel's constants for the ``step``-th update (1 is the first) of a parameter of this group.

        ``step`` may be a float64 tensor of several; then so is what depends on it. Where ``essential`` names no step
        count, it is 1 or 2: only the first step is told from the others.
        """
        raise AssertionError("a subclass says which")

    def _densified(self, gradient: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """Return a sparse gradient as a dense one, where torch's optimizer takes it."""
        raise RuntimeError(f"{self._name} does not support sparse gradients, please consider SparseAdam instead")

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
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._refuse_differentiable(group)
            for p in group["params"]:
                if p.is_complex():
                    raise DTypeError(
                        f"{self._name}: expected real parameters, got {p.dtype} of shape {tuple(p.shape)}; give "
                        "torch.view_as_real of them, or use torch.optim"
                    )
        except (DTypeError, ValueError):
            self.param_groups.pop()
            raise

    def _refuse_differentiable(self, group: Mapping[str, Any]) -> None:
        if group.get("differentiable"):
            raise ValueError(f"{self._name}: differentiable=True is not supported; use torch.optim")

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

    def update_(self, given: Given | None = None) -> None:
        """Take a step with these values and gradients; by default with the parameters themselves and their ``grad``."""
        found_inf: torch.Tensor | None = getattr(self, "found_inf", None)
        grad_scale: torch.Tensor | None = getattr(self, "grad_scale", None)
        groups = self.param_groups
        for group in groups:
            self._refuse_differentiable(group)
        # Values on a GPU stay there: to read them would make the step wait.
        waits = is_on_gpu(found_inf)
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
        self, given: Given | None, lazy: Sequence[bool], grad_scale: torch.Tensor | None, skips: torch.Tensor | None
    ) -> None:
        groups, batch = self.param_groups, self._batch
        keys = [self._state_keys(group) for group in groups]
        is_captured = self._is_captured(given, lazy)
        gradients, is_first = None, None
        writes: list[Callable[[], object]] = []
        if batch is not None and given is None and not self._pending:
            gradients = batch.gradients(groups, keys, self.state)
        if batch is None or gradients is None:
            # Something has changed, or may have: every parameter is checked.
            self._settle()
            members, gradients, is_first, writes = self._check_each(given, keys, is_captured=is_captured)
            if not members:
                return
            if batch is None or not batch.consists_of(members):
                batch = Batch(members, self._graph_memory, counts_steps=STEP in self.essential)
            batch.remember(groups, keys)
            self._batch = batch
        device = batch.members[0].parameter.device
        if is_captured and batch.has_counts_elsewhere(device):
            refuse_first_step(self._name)
        constants, rows = constants_of(self._constants, batch.steps(groups, lazy, is_first), grad_scale, skips)
        # New state and counts belong to what the kernel writes: all of it is there, or nothing.
        writes += batch.counting(1 if skips is None else (skips == 0).to(torch.float32).reshape(()))
        # Before the kernel: a version that no write follows makes no gradient wrong.
        torch.autograd.graph.increment_version(batch.written)
        choose(self._backend, device).update(
            self.rule, batch.updates, batch.present(gradients), batch.present(rows), constants, after=writes
        )
        if is_captured:
            # A graph finds the masks there when it is replayed.
            present = batch.present(batch.members)
            self._graph_masks.update((c.parameter, 0 if c.bits is None else c.bits.data_ptr()) for c in present)

    def _is_captured(self, given: Given | None, lazy: Sequence[bool]) -> bool:
        """Return whether a CUDA graph records this step; raise CaptureError if it would repeat the step wrongly."""
        if not any(capture.is_capturing(p.device) for group in self.param_groups for p in group["params"][:1]):
            return False
        stepping = [
            (index, p)
            for index, group in enumerate(self.param_groups)
            for p in group["params"]
            if (p.grad if given is None else given.get(p)) is not None
        ]
        if not stepping:
            return False
        if self._compact_state:
            refuse(self._name, "compact state, which every update lays out anew; build it with compact_state=False")
        backend = choose(self._backend, stepping[0][1].device)
        if not backend.capturable:
            refuse(self._name, f"the backend {type(backend).__name__.lower()}; build it with backend='cuda'")
        if STEP in self.essential and not all(lazy[index] for index, _ in stepping):
            refuse(self._name, "step counts on the host, which would stand still; build it with capturable=True")
        return True

    def _check_each(
        self, given: Given | None, keys: Sequence[tuple[str, ...]], *, is_captured: bool
    ) -> tuple[list[tuple[int, CheckedParameter]], list[torch.Tensor], list[bool], list[Callable[[], object]]]:
        """Check every parameter that has a gradient.

        Returns
        -------
        members : list of (int, CheckedParameter)
            With the indices of their groups.
        gradients : list of torch.Tensor
        is_first : list of bool
            Whether the state lacks an entry per weight, which it does before the first step.
        writes : list of callable
            To be called once the step is taken: new state becomes the parameters', and what was stepped in the place of
            a parameter is copied to it.
        """
        members: list[tuple[int, CheckedParameter]] = []
        gradients: list[torch.Tensor] = []
        is_first: list[bool] = []
        created: dict[torch.Tensor, dict[str, Any]] = {}
        devices: set[torch.device] = set()  # of those that were not checked
        writes: list[Callable[[], object]] = [partial(dict.update, self.state, created)]
        for index, group in enumerate(self.param_groups):
            for p in group["params"]:
                weight, gradient = _value_and_gradient(p, given)
                if gradient is None:
                    continue
                if weight.is_neg():
                    # A view that negates what is in memory, which is what kernels see.
                    view, weight = weight.detach(), weight.detach().resolve_neg()
                    writes.append(partial(view.copy_, weight))
                state, mask, checked = self.state.get(p), self._masks.get(p), self._checked.get(id(p))
                if checked is not None and not checked.holds(weight, state, keys[index]):
                    checked = None
                if checked is None:
                    self._check_state(p)
                if checked is None or not checked.fits(gradient):
                    if gradient.layout is not torch.strided:
                        gradient = self._densified(gradient, group)
                    is_compact = self._compact_state and mask is not None
                    gradient = checked_gradient(self._name, p, weight, gradient, mask, is_compact=is_compact)
                is_first.append(checked is None and any(state is None or state.get(n) is None for n in keys[index]))
                if checked is None:
                    completed = self._completed(p, weight, keys[index])
                    checked = self._checked[id(p)] = CheckedParameter(p, weight, completed, keys[index], mask)
                    devices.add(p.device)
                if checked.state is not None and checked.state is not state:
                    created[p] = checked.state
                members.append((index, checked))
                gradients.append(gradient)
        if len({id(checked.parameter) for _, checked in members}) < len(members):
            # Its two steps would be taken at once, in one piece of memory.
            raise LayoutError(f"{self._name}: expected each parameter once, got one twice; remove it from its group")
        if devices:
            devices.update(checked.parameter.device for _, checked in members)
        if len(devices) > 1:
            raise LayoutError(
                f"{self._name}: expected all parameters on one device, got {sorted(map(str, devices))}; use one "
                "optimizer per device"
            )
        if is_captured and created:
            refuse_first_step(self._name)
        return members, gradients, is_first, writes

    def _completed(self, p: torch.Tensor, weight: torch.Tensor, keys: tuple[str, ...]) -> dict[str, Any] | None:
        """Return a copy of the state with what it lacks, all in the form it is kept in; itself if it is so already."""
        old, mask = self.state.get(p), self._masks.get(p)
        state: dict[str, Any] = {} if old is None else old
        missing = [name for name in keys if state.get(name) is None]
        if missing and self._compact_state and mask is not None and layout_of(state) is None:
            state = compacted({p: state}, {p: mask}, self._backend)[p]
        layout, compact = layout_of(state), compact_names(state)
        values: dict[str, Any] = {}
        if STEP in self.essential:
            number = state.get(STEP)
            # Whatever torch's default device and dtype are.
            device = number.device if isinstance(number, torch.Tensor) else torch.device("cpu")
            values[STEP] = as_count(0.0 if number is None else number, device)
        if self._master_weights and p.dtype in (torch.bfloat16, torch.float16) and state.get(MASTER) is None:
            value = p if is_sharded(p) else weight
            values[MASTER] = value.detach().to(torch.float32, memory_format=torch.preserve_format)
        for name in missing:
            values[name] = (
                torch.zeros_like(p, dtype=state_dtype(p), memory_format=torch.preserve_format)
                if layout is None
                else torch.zeros(layout.num_kept, dtype=state_dtype(p), device=p.device)
            )
        # The model went to another memory format: the state follows it.
        values.update((name, follow(p, state[name])) for name in per_weight(p, state) if name not in compact)
        if all(state.get(name) is value for name, value in values.items()):
            return old
        merged = {**state, **values}
        return merged if layout is None else CompactState(merged, layout, {*compact, *missing}, weight.shape)


def _value_and_gradient(p: torch.Tensor, given: Given | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return what holds the value of a parameter in this process, and its gradient."""
    if given is not None:
        return given.get(p, (p, None))
    if is_sharded(p):
        return local(p), None if p.grad is None else local_grad(p)
    return p, p.grad


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
