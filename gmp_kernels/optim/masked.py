"""The base of SGD, Adam and AdamW: one kernel call per step, in which pruned weights cost nothing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from inspect import signature
from itertools import compress, count, repeat
from types import MappingProxyType, MethodType
from typing import Any, ClassVar, NamedTuple, NoReturn, Self, TypeAlias
from weakref import WeakValueDictionary

import torch

from gmp_kernels.backends import choose, devices
from gmp_kernels.backends.addresses import address
from gmp_kernels.backends.layouts import gradients_if_unchanged
from gmp_kernels.checks import PLAIN
from gmp_kernels.distributed.placement import is_sharded, local, local_grad
from gmp_kernels.errors import CaptureError, DTypeError, LayoutError, ShapeError, TargetError
from gmp_kernels.library import define
from gmp_kernels.optim.batch import Batch
from gmp_kernels.optim.checks import check_memory, check_weight, gradient_beside
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
    state_dtype_of,
)
from gmp_kernels.optim.constants import Settings, is_on_gpu
from gmp_kernels.optim.hooks import hooked_where_observed
from gmp_kernels.optim.masking import Masking

__all__ = ["MaskedOptimizer"]

# For each parameter, the tensor that holds its value, and its gradient.
Given: TypeAlias = Mapping[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]
# Group indices, parameters, tensors that hold their values, gradients, and whether there is one. If not, the value
# stands in for it, which no kernel reads.
Columns: TypeAlias = tuple[list[int], list[torch.Tensor], list[torch.Tensor], list[torch.Tensor], list[bool]]


class Step(NamedTuple):
    """Everything that a step takes, found before its first write.

    Attributes
    ----------
    batch : Batch
    gradients : list of torch.Tensor
        One per parameter of the batch, laid out as it is.
    device : torch.device
    is_captured : bool
        Whether a CUDA graph is being captured.
    takes_step : list of bool or None
        Which parameters take the step; None if all do.
    created : dict
        State that parameters get with this step.
    first : set of torch.Tensor
        Parameters whose first step it is.
    writes : list of callable
        C functions to call once the kernel has written.
    """

    batch: Batch
    gradients: list[torch.Tensor]
    device: torch.device
    is_captured: bool
    takes_step: list[bool] | None = None
    created: Mapping[torch.Tensor, dict[str, Any]] = MappingProxyType({})
    first: Collection[torch.Tensor] = ()
    writes: Sequence[Callable[[], object]] = ()


class MaskedOptimizer(Masking):
    """Mixin for a ``torch.optim`` class that replaces its step by one pass in which pruned weights cost nothing.

    Subclasses name their rule and the state it keeps, and turn a parameter group into the kernel's constants.
    """

    rule: ClassVar[str]
    # torch's GradScaler then hands over the scale and the overflow flag instead of unscaling in passes of its own.
    _step_supports_amp_scaling = True
    # A compiled graph knows the optimizer by this number, because it can hold numbers and tensors but no objects.
    handle: int
    # torch wraps the step of a class by this.
    profile_hook_step = staticmethod(hooked_where_observed)  # type: ignore[assignment]  # the same for any arguments
    # Shown by help(), which would else take the arguments from __new__.
    __signature__ = signature(MethodType(Masking.__init__, Masking))

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        # Here and not in __init__, so that copies and unpickled optimizers get handles of their own.
        self = super().__new__(cls)
        self.handle = next(_handles)
        _optimizers[self.handle] = self
        return self

    # -- to be defined by each rule ----------------------------------------------------------------------------------

    def _state_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Return those of ``state_names`` that this group uses (at most three)."""
        raise AssertionError("a subclass says which")

    def _constants(self, group: dict[str, Any], step: Any) -> dict[str, Any]:
        """Return the kernel's constants for the ``step``-th update (1 is the first) of a parameter of this group.

        ``step`` may be a float64 tensor of several numbers; constants that depend on it then are tensors too. If
        steps are not counted, ``step`` is 1 for a first step and 2 for any other.
        """
        raise AssertionError("a subclass says which")

    def _densified(self, gradient: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """Return a sparse gradient as a dense one, if torch's optimizer takes sparse gradients."""
        raise RuntimeError(f"{self._name} does not support sparse gradients, please consider SparseAdam instead")

    # -- parameter groups --------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with hyperparameters of their own, as in torch.

        Raises
        ------
        DTypeError
            Complex parameters.
        ValueError, TypeError
            ``differentiable`` is set; and as in torch. Nothing has been added when one is raised.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            if group.get("differentiable"):
                self._refuse_differentiable()
            for p in group["params"]:
                if p.is_complex():
                    raise DTypeError(
                        f"{self._name}: expected real parameters, got {p.dtype} of shape {tuple(p.shape)}; give "
                        "torch.view_as_real of them, or use torch.optim"
                    )
        except (DTypeError, ValueError):
            self.param_groups.pop()
            raise

    def _refuse_differentiable(self) -> NoReturn:
        raise ValueError(f"{self._name}: differentiable=True is not supported; use torch.optim")

    # -- the step ----------------------------------------------------------------------------------------------------

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
            Sparse gradients, if torch refuses them; SGD makes them dense.
        ValueError
            ``differentiable`` is set in a group.
        DTypeError, LayoutError, ShapeError, StateError
            A parameter or gradient the kernels do not take, or a parameter that was converted or reshaped since its
            mask or state was made.
        CaptureError
            A CUDA graph is being captured and cannot hold this step. Nothing has been updated when one is raised.

        Notes
        -----
        One pass: weights, gradients and state are read and written once. Where most blocks have no weight left, these
        are neither read nor written. Blocks are 64 bytes of weights on the CPU and eight weights on a GPU. With compact
        state, values that other code writes to pruned weights may stay until ``set_masks``: a GPU writes no pruned
        weight at all, and a CPU none where few weights are kept.

        In a ``torch.compile``d region the step is one operation of the graph, which looks up masks, state and
        hyperparameters when it runs. Pruning does not make torch compile again; a changing learning rate does, once.
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
                with torch.no_grad():
                    gradients = [p.grad for p in weights]
                    torch.ops.gmp_kernels.optimizer_step_(self.handle, positions, weights, gradients)
            return loss
        self.update_()
        return loss

    def update_(self, given: Given | None = None) -> None:
        """Take a step with these values and gradients; by default with the parameters themselves and their ``grad``."""
        found_inf: torch.Tensor | None = getattr(self, "found_inf", None)
        grad_scale: torch.Tensor | None = getattr(self, "grad_scale", None)
        groups, settings = self.param_groups, self._settings
        if settings is None or not settings.hold(groups):
            if any(group.get("differentiable") for group in groups):
                self._refuse_differentiable()
            settings = self._settings = Settings.of(groups, self._state_keys)
        if found_inf is not None and is_on_gpu(found_inf):
            # Values on a GPU stay there, because reading them would make the step wait.
            settings = settings._replace(lazy=[True] * len(groups))
        if found_inf is not None and not all(settings.lazy) and found_inf.item():
            return
        watchers = list(self._watchers.values())
        for before, _ in watchers:
            before()
        skips = found_inf if any(settings.lazy) else None
        self._take_step(given, settings, grad_scale, skips)
        for _, after in watchers:
            after(skips, is_direct=given is None)

    def _take_step(
        self, given: Given | None, settings: Settings, grad_scale: torch.Tensor | None, skips: torch.Tensor | None
    ) -> None:
        step = self._look(given, settings)
        if step is None:
            self._settle()
            return
        batch, gradients, device, is_captured, takes_step, created, first, writes = step
        self._batch = batch
        if is_captured and (created or batch.has_counts_elsewhere(device, takes_step)):
            raise CaptureError(
                f"{self._name}: expected state that is on the device before a CUDA graph captures a step, got a "
                "parameter without; take a step outside of the graph first"
            )
        of_step = first, grad_scale, skips, takes_step
        constants, rows = batch.constants(self._constants, self.param_groups, settings, *of_step)
        if batch.has_empty:
            gradients, rows = batch.present(gradients), batch.present(rows)
        # New state and counts take effect together with the writes of the kernel: all of them, or none.
        amount = 1 if skips is None else (skips == 0).to(torch.float32).reshape(())
        writes = [*writes, *batch.counting(amount, takes_step)] if batch.counts_steps else writes
        # Versions are raised before the kernel runs: one that no write follows makes no gradient wrong.
        torch.autograd.graph.increment_version(batch.written(takes_step) if takes_step else batch.all_written)
        batch.implementation.update(self.rule, batch.updates, gradients, rows, constants, after=writes)
        if is_captured:
            # Replays of the graph read the masks at these addresses.
            read = zip(batch.parameters, map(address, batch.bits), strict=True)
            self._graph_masks.update(compress(read, takes_step or repeat(True)))

    def _look(self, given: Given | None, settings: Settings) -> Step | None:
        """Return all that a step takes, checked; None if no parameter has a gradient."""
        batch, lazy = self._batch, settings.lazy
        is_settled = given is None and not self._pending
        if is_settled and batch is not None and batch.expected is not None and batch.keys == settings.keys:
            gradients = gradients_if_unchanged(batch.expected, self.param_groups, self.state)
            if gradients is not None:
                device = batch.parameters[0].device
                is_captured = devices.is_capturing(device) and self._can_be_captured(device, batch.groups, lazy)
                return Step(batch, gradients, device, is_captured)
        return self._look_closer(given, lazy, settings.keys)

    @torch.no_grad()  # not a block, at whose end an interrupt would leave gradients switched off
    def _look_closer(self, given: Given | None, lazy: Sequence[bool], keys: Sequence[tuple[str, ...]]) -> Step | None:
        """Do so parameter by parameter."""
        groups, batch = self.param_groups, self._batch
        columns = _columns(groups, given, frozenset() if batch is None else batch.known)
        indices, parameters, weights, gradients, takes_step = columns
        if not any(takes_step):
            return None
        device = next(compress(parameters, takes_step)).device
        stepping = compress(indices, takes_step)
        is_captured = devices.is_capturing(device) and self._can_be_captured(device, stepping, lazy)
        created: dict[torch.Tensor, dict[str, Any]] = {}
        first: set[torch.Tensor] = set()
        writes: list[Callable[[], object]] = []
        if batch is None or self._pending or not batch.holds(indices, parameters, weights, self.state, keys):
            # Something has changed, or may have, so every parameter is checked.
            self._settle()
            batch, gradients, takes_step, created, writes = self._checked(columns, keys, device)
            old = {p: self.state.get(p, {}) for p in created}
            first = {p for p in created if any(k in created[p] and old[p].get(k) is None for k in self.state_names)}
            writes.append(partial(dict.update, self.state, created))
        if not batch.fits(gradients):
            beside = zip(batch.weights, gradients, batch.groups, strict=True)
            gradients = [self._beside(weight, gradient, groups[index]) for weight, gradient, index in beside]
        some = None if all(takes_step) else takes_step
        return Step(batch, gradients, device, is_captured, some, created, first, writes)

    def _can_be_captured(self, device: torch.device, groups: Iterable[int], lazy: Sequence[bool]) -> bool:
        """Return True; raise CaptureError if a CUDA graph would repeat these groups' step wrongly."""
        if self._compact_state:
            self._refuse_capture("compact state, which every update lays out anew; build it with compact_state=False")
        backend = choose(self._backend, device)
        if not backend.capturable:
            self._refuse_capture(f"the backend {type(backend).__name__.lower()}; build it with backend='cuda'")
        if self._counts_steps and not all(lazy[index] for index in groups):
            option = "capturable=True" if "capturable" in self.defaults else "a tensor on the GPU as lr"
            self._refuse_capture(f"step counts on the host, which would stand still; build it with {option}")
        return True

    def _checked(
        self, columns: Columns, keys: Sequence[tuple[str, ...]], device: torch.device
    ) -> tuple[Batch, list[torch.Tensor], list[bool], dict[torch.Tensor, dict[str, Any]], list[Callable[[], object]]]:
        """Check all parameters. Return them, their columns, and the state and the writes that are due with the step.

        Those that take no step are left out, unless they are as they were when they were checked.
        """
        batch = self._batch
        is_current = batch is not None and batch.keys == keys and batch.is_current(self.state)
        kept = [row for row in zip(*columns, strict=True) if row[4] or (is_current and row[1].device == device)]
        indices, parameters, weights, gradients, takes_step = map(list, zip(*kept, strict=True))
        _check_together(self._name, parameters)
        writes: list[Callable[[], object]] = []
        for i, weight in enumerate(weights):
            if weight.is_neg():
                # The view negates its memory, but kernels read the memory itself. torch reads it without a look.
                check_memory(self._name, weight)
                weights[i] = weight.detach().resolve_neg()
                writes.append(partial(weight.detach().copy_, weights[i]))
        masks = list(map(self._masks.get, parameters))
        self._check_states(parameters)
        for weight, gradient, mask in zip(weights, gradients, masks, strict=True):
            check_weight(self._name, weight, mask, is_compact=self._compact_state and mask is not None)
            check_memory(self._name, gradient)
        states = {p: self._completed(p, w, keys[i]) for i, p, w in zip(indices, parameters, weights, strict=True)}
        created = {p: state for p, state in states.items() if state is not None and state is not self.state.get(p)}
        state, counts_steps = {**self.state, **created}, self._counts_steps
        implementation = choose(self._backend, device)
        batch = Batch(indices, parameters, weights, state, keys, masks, implementation, counts_steps=counts_steps)
        return batch, gradients, takes_step, created, writes

    def _beside(self, weight: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """Return a gradient in the layout of its weight."""
        dense = gradient if gradient.layout is torch.strided else self._densified(gradient, group)
        return gradient_beside(self._name, weight, dense)

    def _completed(self, p: torch.Tensor, weight: torch.Tensor, keys: tuple[str, ...]) -> dict[str, Any] | None:
        """Return a copy of the state, complete and in the form it is kept in; the state itself if it is so already."""
        old, mask = self.state.get(p), self._masks.get(p)
        state: dict[str, Any] = {} if old is None else old
        missing = [name for name in keys if state.get(name) is None]
        if missing and self._compact_state and mask is not None and layout_of(state) is None:
            state = compacted({p: state}, {p: self._aligned(p)}, self._backend)[p]
        layout, compact = layout_of(state), compact_names(state)
        values: dict[str, Any] = {}
        if self._counts_steps:
            number = state.get(STEP)
            if STEP not in self.essential and (missing or number is None):
                # torch's state has no count here. All that matters is which step is the first of a buffer.
                number = 0.0 if missing else 1.0
            # Explicit, because torch's default device may be another.
            device = number.device if isinstance(number, torch.Tensor) else torch.device("cpu")
            values[STEP] = as_count(0.0 if number is None else number, device)
        if self._master_weights and p.dtype in (torch.bfloat16, torch.float16) and state.get(MASTER) is None:
            value = p if is_sharded(p) else weight
            values[MASTER] = value.detach().to(torch.float32, memory_format=torch.preserve_format)
        dtype = state_dtype_of(p, self._state_dtype)
        for name in missing:
            values[name] = (
                torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
                if layout is None
                else torch.zeros(layout.num_kept, dtype=dtype, device=p.device)
            )
        # The state follows a model that was converted to another memory format.
        values.update((name, follow(p, state[name])) for name in per_weight(p, state) if name not in compact)
        if all(state.get(name) is value for name, value in values.items()):
            return old
        merged = {**state, **values}
        if layout is None:
            return merged
        assert mask is not None
        return CompactState(merged, layout, {*compact, *missing}, mask)


def _check_together(optimizer: str, parameters: Sequence[torch.Tensor]) -> None:
    """Raise LayoutError for parameters that cannot take a step together."""
    if len(set(map(id, parameters))) < len(parameters):
        # Its two steps would run at the same time on the same memory.
        raise LayoutError(f"{optimizer}: expected each parameter once, got one twice; remove it from its group")
    devices = {p.device for p in parameters}
    if len(devices) > 1:
        raise LayoutError(
            f"{optimizer}: expected all parameters on one device, got {sorted(map(str, devices))}; use one "
            "optimizer per device"
        )


def _columns(groups: Sequence[dict[str, Any]], given: Given | None, known: Collection[torch.Tensor]) -> Columns:
    """Return the columns of the parameters that have a gradient or are ``known``, in the order of the groups."""
    if given is not None:
        owned = [(i, p) for i, group in enumerate(groups) for p in group["params"] if p in given or p in known]
        pairs = [given.get(p) or (local(p), local(p)) for _, p in owned]
        values, gradients = [value for value, _ in pairs], [gradient for _, gradient in pairs]
        return [i for i, _ in owned], [p for _, p in owned], values, gradients, [p in given for _, p in owned]
    found = [
        (index, p, gradient)
        for index, group in enumerate(groups)
        for p in group["params"]
        if (gradient := p.grad) is not None or p in known
    ]
    indices, parameters = [index for index, _, _ in found], [p for _, p, _ in found]
    gradients = [p if gradient is None else gradient for _, p, gradient in found]
    takes_step = [gradient is not None for _, _, gradient in found]
    if PLAIN.issuperset(map(type, parameters)):
        return indices, parameters, parameters, gradients, takes_step
    weights = list(map(local, parameters))
    gradients = [local_grad(p) if takes else w for p, w, takes in zip(parameters, weights, takes_step, strict=True)]
    return indices, parameters, weights, gradients, takes_step


_handles = count()
_optimizers: WeakValueDictionary[int, MaskedOptimizer] = WeakValueDictionary()


@torch.no_grad()
def _optimizer_step(
    handle: int, positions: Sequence[int], weights: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]
) -> None:
    """Take the step of a compiled graph; ``positions`` are those of the weights among the optimizer's parameters.

    Weights need not be the parameters themselves: a graph may hold a value in a buffer and write it back later.
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
