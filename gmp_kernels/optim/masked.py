"""What SGD, Adam and AdamW share: masks, compact state, torch's state_dict, and one kernel call per step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch

from gmp_kernels.backends import Compaction, StateMove, UpdateTensor, choose
from gmp_kernels.errors import DTypeError, LayoutError, ShapeError, StateError, TargetError
from gmp_kernels.masks import BitMask
from gmp_kernels.ops import DTYPES, apply_masks_

__all__ = ["MaskedOptimizer"]

MASTER = "master_weight"


class MaskedOptimizer(torch.optim.Optimizer):
    """Mixed into a ``torch.optim`` class, it replaces the step by one pass in which pruned weights cost nothing.

    Subclasses name their rule and the state it keeps, and turn a parameter group into the kernel's constants.
    """

    rule: ClassVar[str]
    # torch's GradScaler then hands over the scale and the overflow flag instead of unscaling in passes of its own.
    _step_supports_amp_scaling = True

    def _init_masking(self, *, compact_state: bool, master_weights: bool, backend: str | None) -> None:
        self._compact_state = compact_state
        self._master_weights = master_weights
        self._backend = backend
        self._masks: dict[torch.Tensor, BitMask] = {}
        self._compactions: dict[torch.Tensor, Compaction] = {}  # of the parameters whose state is compact now
        if any(group.get("differentiable") for group in self.param_groups):
            raise ValueError(f"{self._name}: differentiable=True is not supported; use torch.optim")

    @property
    def _name(self) -> str:
        return type(self).__name__

    # -- what a rule must say ----------------------------------------------------------------------------------------

    def _state_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Names, in torch's state, of the tensors this rule keeps per weight (at most three)."""
        raise AssertionError("a subclass says which")

    def _constants(self, group: dict[str, Any], step: int) -> dict[str, float]:
        """The kernel's constants for the ``step``-th update (1 is the first) of a parameter of this group."""
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
            Each of the parameter's shape, on its device.

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
            if mask.shape != p.shape:
                raise ShapeError(f"{self._name}.set_masks: expected shape {tuple(p.shape)}, got {tuple(mask.shape)}")
        tensors: list[torch.Tensor] = []
        bits: list[BitMask] = []
        for p, mask in masks.items():
            # Compact state has another shape: what is pruned in it goes when it is repacked.
            found = [p.detach(), *(v for v in self.state.get(p, {}).values() if _is_per_weight(p, v))]
            tensors += found
            bits += [mask] * len(found)
        apply_masks_(tensors, bits, backend=self._backend)
        for p, mask in masks.items():
            self._masks[p] = mask.clone()
        if self._compact_state:
            self._repack([p for p in masks if self.state.get(p)])

    def master_weight(self, parameter: torch.Tensor) -> torch.Tensor | None:
        """Return the float32 copy that the arithmetic of ``parameter`` runs on; None if there is none (yet)."""
        master: torch.Tensor | None = self.state.get(parameter, {}).get(MASTER)
        return master

    def _repack(self, parameters: Iterable[torch.Tensor]) -> None:
        """Store the state of these parameters for the weights their masks keep, whatever its layout was."""
        moves: list[StateMove] = []
        layouts: dict[torch.Tensor, Compaction] = {}
        for p in parameters:
            implementation = choose(self._backend, p.device)
            layouts[p] = implementation.compaction(self._masks[p].packed, p.numel())
            for key, value in self.state[p].items():
                if key == MASTER or not isinstance(value, torch.Tensor) or value.ndim == 0:
                    continue
                packed = torch.empty(layouts[p].num_kept, dtype=value.dtype, device=value.device)
                moves.append(StateMove(value, self._compactions.get(p), packed, layouts[p], p.numel()))
                self.state[p][key] = packed
        if moves:
            choose(self._backend, moves[0].source.device).move_state(moves)
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
        DTypeError, LayoutError
            A parameter or gradient the kernels do not take. Nothing has been updated when one is raised.

        Notes
        -----
        One pass: weights, gradients and state are read and written once; blocks of 64 bytes of weights that are all
        pruned are not touched at all.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and found_inf.item():
            return loss
        grad_scale = getattr(self, "grad_scale", None)
        factor = 1.0 if grad_scale is None else 1.0 / float(grad_scale)

        active = [(group, p, self._checked_grad(p)) for group in self.param_groups for p in group["params"]
                  if p.grad is not None]  # fmt: skip
        if not active:
            return loss
        implementation = choose(self._backend, active[0][1].device)
        constants: list[dict[str, float]] = []
        index_of: dict[tuple[int, int], int] = {}
        tensors = []
        for group, p, grad in active:
            is_first = self._init_state(group, p)
            state = self.state[p]
            step = int(state["step"]) + 1 if self.counts_steps else 1 if is_first else 2
            key = (id(group), step)
            if key not in index_of:
                index_of[key] = len(constants)
                constants.append(
                    {**self._constants(group, step), "grad_factor": -factor if group["maximize"] else factor}
                )
            mask = self._masks.get(p)
            tensors.append(
                UpdateTensor(
                    weight=p.detach(),
                    grad=grad,
                    master=state.get(MASTER),
                    state=tuple(state[name] for name in self._state_keys(group)),
                    mask=None if mask is None else mask.packed,
                    compaction=self._compactions.get(p),
                    constants=index_of[key],
                )
            )
        implementation.update(self.rule, tensors, constants)
        torch.autograd.graph.increment_version([tensor.weight for tensor in tensors])
        if self.counts_steps:
            torch._foreach_add_([self.state[p]["step"] for _, p, _ in active], 1)
        return loss

    def _checked_grad(self, p: torch.Tensor) -> torch.Tensor:
        grad = p.grad
        assert grad is not None
        if grad.is_sparse:
            raise RuntimeError(f"{self._name} does not support sparse gradients; use torch.optim.SparseAdam")
        if p.dtype not in DTYPES:
            raise DTypeError(f"{self._name}: expected float32, float64, bfloat16 or float16 parameters, got {p.dtype}")
        if not _is_dense(p):
            raise LayoutError(
                f"{self._name}: expected parameters without gaps in memory, got strides {p.stride()} for shape "
                f"{tuple(p.shape)}; use .contiguous()"
            )
        # The kernel walks memory: a gradient laid out differently is brought into the parameter's order.
        return grad if grad.stride() == p.stride() else torch.empty_like(p).copy_(grad)

    def _init_state(self, group: dict[str, Any], p: torch.Tensor) -> bool:
        """Create what the state lacks; return whether this is the first step of the parameter."""
        state = self.state[p]
        if self.counts_steps and "step" not in state:
            state["step"] = torch.tensor(0.0)
        if self._master_weights and p.dtype in (torch.bfloat16, torch.float16) and MASTER not in state:
            state[MASTER] = p.detach().to(torch.float32, memory_format=torch.preserve_format)
        missing = [name for name in self._state_keys(group) if name not in state]
        if missing and self._compact_state and p in self._masks and p not in self._compactions:
            self._compactions[p] = choose(self._backend, p.device).compaction(self._masks[p].packed, p.numel())
        dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
        layout = self._compactions.get(p)
        for name in missing:
            state[name] = (
                torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
                if layout is None
                else torch.zeros(layout.num_kept, dtype=dtype, device=p.device)
            )
        return bool(missing)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return torch's own format, dense whatever the layout here: ``torch.optim`` can load it.

        Master weights are under ``master_weight``. Memory: compact state is expanded.
        """
        result = super().state_dict()
        for index, p in self._indexed().items():
            if p in self._compactions and index in result["state"]:
                result["state"][index] = self._dense_state(p)
        return result

    def _dense_state(self, p: torch.Tensor) -> dict[str, Any]:
        layout = self._compactions[p]
        dense = dict(self.state[p])
        moves = []
        for key, value in self.state[p].items():
            if key == MASTER or not isinstance(value, torch.Tensor) or value.ndim == 0:
                continue
            dense[key] = torch.empty(p.shape, dtype=value.dtype, device=value.device)
            moves.append(StateMove(value, layout, dense[key], None, p.numel()))
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
        parameters = self._indexed()
        for index, state in state_dict["state"].items():
            p = parameters.get(index)
            for key, value in state.items():
                if p is not None and isinstance(value, torch.Tensor) and value.ndim and value.shape != p.shape:
                    raise StateError(
                        f"{self._name}.load_state_dict: expected '{key}' of shape {tuple(p.shape)} for parameter "
                        f"{index}, got {tuple(value.shape)}; is it the state of another model?"
                    )
        super().load_state_dict(state_dict)
        self._compactions.clear()
        # torch casts state to the parameter's dtype, which would round what is kept in float32 on purpose.
        for index, p in parameters.items():
            for key, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, torch.Tensor) and value.ndim:
                    dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
                    self.state[p][key] = torch.empty_like(p, dtype=dtype).copy_(value)
        self.set_masks({p: mask for p, mask in self._masks.items() if p in self.state})

    def _indexed(self) -> dict[int, torch.Tensor]:
        """Parameters by the number ``state_dict`` gives them."""
        return dict(enumerate(p for group in self.param_groups for p in group["params"]))


def _is_per_weight(p: torch.Tensor, value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape == p.shape


def _is_dense(p: torch.Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlap, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(p.stride(), p.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True
