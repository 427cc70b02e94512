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
from gmp_kernels.optim.compact import CompactState, check_layout, compact_names, layout_of
from gmp_kernels.optim.constants import constants_of, is_on_gpu
from gmp_kernels.optim.entries import MASTER, STEP, as_count, follow, per_weight, state_dtype
from gmp_kernels.optim.graphs import refuse, refuse_first_step
from gmp_kernels.optim.masking import Masking
from gmp_kernels.optim.moves import compacted

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
    # What a compiled graph knows an optimizer by: it can hold numbers and tensors, no objects.
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
        if isinstance(param_group, dict) and not isinstance(params := param_group["params"], set):
            if not isinstance(params, torch.Tensor):
                # What can be walked once only is walked twice.
                param_group["params"] = params = list(params)
            self._refuse_differentiable({**self.defaults, **param_group})
            for entry in [params] if isinstance(params, torch.Tensor) else params:
                p = entry[1] if isinstance(entry, tuple) and len(entry) > 1 else entry
                if isinstance(p, torch.Tensor) and p.is_complex():
                    raise DTypeError(
                        f"{self._name}: expected real parameters, got {p.dtype} of shape {tuple(p.shape)}; give "
                        "torch.view_as_real of them, or use torch.optim"
                    )
        super().add_param_group(param_group)

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
        # What is on the GPU stays there: looking at it would make the step wait.
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
            # What the brief look does not settle is looked at parameter by parameter.
            self._settle()
            found, gradients, writes = self._with_gradients(given, keys)
            if not found:
                return
            members, is_first, created = self._checked_members(found, keys)
            if is_captured and created:
                refuse_first_step(self._name)
            writes.append(partial(dict.update, self.state, created))
            batch = self._batch
            if batch is None or not batch.consists_of(members):
                batch = Batch(members, self._graphs.memory, counts_steps=STEP in self.essential)
            batch.remember(groups, keys)
            self._batch = batch
        device = batch.members[0].parameter.device
        if is_captured and batch.has_counts_elsewhere(device):
            refuse_first_step(self._name)
        constants, rows = constants_of(self._constants, batch.steps(groups, lazy, is_first), grad_scale, skips)
        # New state and counts belong to what the kernel writes: all of it is there, or nothing.
        writes += batch.counting(1 if skips is None else (skips == 0).to(torch.float32).reshape(()))
        # Before the kernel: of versions that no write follows nobody computes anything wrong.
        torch.autograd.graph.increment_version(batch.written)
        choose(self._backend, device).update(
            self.rule, batch.updates, batch.present(gradients), batch.present(rows), constants, after=writes
        )
        if is_captured:
            self._graphs.note(batch.present(batch.members))

    def _is_captured(self, given: Given | None, lazy: Sequence[bool]) -> bool:
        """Return whether a CUDA graph records this step.

        Raises
        ------
        CaptureError
            It would repeat the step wrongly.
        """
        if not any(capture.is_capturing(group["params"][0].device) for group in self.param_groups if group["params"]):
            return False
        stepping = {
            index: p
            for index, group in enumerate(self.param_groups)
            for p in group["params"]
            if (p.grad if given is None else given.get(p)) is not None
        }
        if not stepping:
            return False
        if self._compact_state:
            refuse(self._name, "compact state, which every update lays out anew; build it with compact_state=False")
        backend = choose(self._backend, next(iter(stepping.values())).device)
        if not backend.capturable:
            refuse(self._name, f"the backend {type(backend).__name__.lower()}; build it with backend='cuda'")
        if STEP in self.essential and not all(lazy[index] for index in stepping):
            refuse(self._name, "step counts on the host, which would stand still; build it with capturable=True")
        return True

    def _with_gradients(
        self, given: Given | None, keys: Sequence[tuple[str, ...]]
    ) -> tuple[
        list[tuple[int, torch.Tensor, torch.Tensor, CheckedParameter | None]],
        list[torch.Tensor],
        list[Callable[[], object]],
    ]:
        """Check the gradients of every parameter that has one.

        Returns
        -------
        found : list of (int, torch.Tensor, torch.Tensor, CheckedParameter or None)
            Index of the group, the parameter, what holds its value, and the checked parameter that still holds.
        gradients : list of torch.Tensor
        writes : list of callable
            Copy to parameters what was stepped in their place.
        """
        found: list[tuple[int, torch.Tensor, torch.Tensor, CheckedParameter | None]] = []
        gradients: list[torch.Tensor] = []
        writes: list[Callable[[], object]] = []
        for index, group in enumerate(self.param_groups):
            for p in group["params"]:
                weight, gradient = _value_and_gradient(p, given)
                if gradient is None:
                    continue
                if weight.is_neg():
                    # A view that negates what is in memory, which is what kernels see.
                    view, weight = weight.detach(), weight.detach().resolve_neg()
                    writes.append(partial(view.copy_, weight))
                state = self.state.get(p)
                check_layout(self._name, p, state)
                checked = self._checked.get(id(p))
                if checked is not None and not checked.holds(weight, state, keys[index]):
                    checked = None
                if checked is None or not checked.fits(gradient):
                    if gradient.layout is not torch.strided:
                        gradient = self._densified(gradient, group)
                    mask = self._masks.get(p)
                    is_compact = self._compact_state and mask is not None
                    gradient = checked_gradient(self._name, p, weight, gradient, mask, is_compact=is_compact)
                found.append((index, p, weight, checked))
                gradients.append(gradient)
        if len({id(p) for _, p, _, _ in found}) < len(found):
            # Its two steps would be taken at once, in one piece of memory.
            raise LayoutError(f"{self._name}: expected each parameter once, got one twice; remove it from its group")
        return found, gradients, writes

    def _checked_members(
        self,
        found: Sequence[tuple[int, torch.Tensor, torch.Tensor, CheckedParameter | None]],
        keys: Sequence[tuple[str, ...]],
    ) -> tuple[list[tuple[int, CheckedParameter]], list[bool], dict[torch.Tensor, dict[str, Any]]]:
        """Check the state of those that are not checked, and make what it lacks.

        Returns
        -------
        members : list of (int, CheckedParameter)
            With the indices of their groups.
        is_first : list of bool
            Whether state per weight was made, which is before the first step.
        created : dict of parameter to dict
            State that is not the parameter's yet.
        """
        unchecked = [(index, p) for index, p, _, checked in found if checked is None]
        if unchecked and len(devices := {p.device for _, p, _, _ in found}) > 1:
            raise LayoutError(
                f"{self._name}: expected all parameters on one device, got {sorted(map(str, devices))}; use one "
                "optimizer per device"
            )
        for _, p in unchecked:
            self._check_state(p)
        bare: dict[torch.Tensor, dict[str, Any]] = {
            p: self.state.get(p, {})
            for index, p in unchecked
            if self._compact_state and p in self._masks and keys[index] and layout_of(self.state.get(p)) is None
        }
        laid_out = compacted(bare, self._masks, self._backend)
        members: list[tuple[int, CheckedParameter]] = []
        is_first: list[bool] = []
        created: dict[torch.Tensor, dict[str, Any]] = {}
        for index, p, weight, checked in found:
            state = self.state.get(p)
            is_first.append(any(state is None or state.get(name) is None for name in keys[index]))
            if checked is None:
                completed = self._completed(keys[index], p, weight, laid_out.get(p, state))
                if completed is not None:
                    created[p] = state = completed
                checked = CheckedParameter(p, weight, state, keys[index], self._masks.get(p))
                self._checked[id(p)] = checked
            members.append((index, checked))
        return members, is_first, created

    def _completed(
        self, keys: tuple[str, ...], p: torch.Tensor, weight: torch.Tensor, state: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        """Return a copy of the state with what it lacks, all in the form it is kept in; None if it is so already."""
        state = {} if state is None else state
        values: dict[str, Any] = {}
        if STEP in self.essential:
            number = state.get(STEP)
            # Neither where nor what torch's defaults are.
            device = number.device if isinstance(number, torch.Tensor) else torch.device("cpu")
            values[STEP] = as_count(0.0 if number is None else number, device)
        if self._master_weights and p.dtype in (torch.bfloat16, torch.float16) and state.get(MASTER) is None:
            value = p if is_sharded(p) else weight
            values[MASTER] = value.detach().to(torch.float32, memory_format=torch.preserve_format)
        layout, compact = layout_of(state), compact_names(state)
        missing = [name for name in keys if state.get(name) is None]
        for name in missing:
            values[name] = (
                torch.zeros_like(p, dtype=state_dtype(p), memory_format=torch.preserve_format)
                if layout is None
                else torch.zeros(layout.num_kept, dtype=state_dtype(p), device=p.device)
            )
        # The model went to another memory format: the state follows it.
        values.update((name, follow(p, state[name])) for name in per_weight(p, state) if name not in compact)
        if all(state.get(name) is value for name, value in values.items()):
            return None
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
