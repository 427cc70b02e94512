"""What a parameter, its gradient and its state must be before a kernel walks them, and that it was all looked at."""

from __future__ import annotations

import operator
from typing import Any

import torch

from gmp_kernels.backends import Compaction, UpdateTensor
from gmp_kernels.checks import DTYPES
from gmp_kernels.errors import DTypeError, LayoutError, ShapeError, StateError
from gmp_kernels.masks import BitMask
from gmp_kernels.sharding import local

__all__ = ["MASTER", "Ready", "check_state", "checked_grad", "is_per_weight", "state_dtype"]

MASTER = "master_weight"  # the name of the float32 copy in the state


class Ready:
    """A parameter that has passed every check, and what a step needs of it.

    Attributes
    ----------
    parameter : torch.Tensor
    state : dict
        Its entry in the optimizer's state.
    tensor : UpdateTensor
    written : list of torch.Tensor
        All that a step changes.
    is_empty : bool
        Whether there is nothing of it here.
    """

    __slots__ = (
        *("parameter", "state", "tensor", "written", "is_empty"),
        *("_pointer", "_shape", "_stride", "_dtype", "_keys", "_names", "_held"),
    )

    def __init__(
        self,
        parameter: torch.Tensor,
        weight: torch.Tensor,
        state: dict[str, Any],
        keys: tuple[str, ...],
        tensor: UpdateTensor,
    ) -> None:
        self.parameter = parameter
        self.state = state
        self.tensor = tensor
        # A plain parameter and what is detached from it count versions together.
        own = [parameter] if weight is parameter else [parameter, tensor.weight]
        self.written = [t for t in (*own, tensor.master, *tensor.state) if t is not None]
        self.is_empty = weight.numel() == 0
        self._pointer = weight.data_ptr()
        self._shape, self._stride, self._dtype = weight.shape, weight.stride(), weight.dtype
        self._keys = keys
        self._names = (MASTER, *keys) if MASTER in state else keys
        self._held = tuple(map(state.get, self._names))

    def holds(self, p: torch.Tensor, grad: torch.Tensor, state: dict[str, Any] | None, keys: tuple[str, ...]) -> bool:
        """Whether parameter and state are still those that were checked, and the gradient is like them."""
        return (
            state is self.state
            and p.data_ptr() == self._pointer
            and not grad.is_sparse
            and grad.dtype is self._dtype
            and grad.stride() == self._stride
            and p.shape == self._shape  # its strides and dtype are the gradient's
            and keys == self._keys
            and all(map(operator.is_, map(state.get, self._names), self._held))
        )


def checked_grad(
    optimizer: str, p: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, mask: BitMask | None
) -> torch.Tensor:
    """Return the gradient in the layout of ``weight``, which is what this process holds of ``p``.

    Raises
    ------
    RuntimeError
        It is sparse.
    DTypeError, LayoutError, ShapeError
        Weight, gradient or mask that the kernels do not take, or that do not fit each other.
    """
    if grad.is_sparse:
        raise RuntimeError(f"{optimizer} does not support sparse gradients; use torch.optim.SparseAdam")
    if p.dtype not in DTYPES:
        raise DTypeError(f"{optimizer}: expected float32, float64, bfloat16 or float16 parameters, got {p.dtype}")
    if grad.dtype != p.dtype:
        raise DTypeError(f"{optimizer}: expected gradients of their parameter's {p.dtype}, got {grad.dtype}; cast")
    if mask is not None and mask.shape != weight.shape:
        raise ShapeError(
            f"{optimizer}: expected the shape {tuple(mask.shape)} that the mask was made for, got a parameter of "
            f"{tuple(weight.shape)}; set another mask"
        )
    if mask is not None and mask.packed.device != p.device:
        raise LayoutError(
            f"{optimizer}: expected the mask of a parameter on {p.device} there, got it on {mask.packed.device}; "
            "set masks again after moving a model"
        )
    # A mask counts in the order of the dimensions; without one any order will do.
    if not (_is_dense(weight) if mask is None else weight.is_contiguous()):
        wanted = "parameters without gaps in memory" if mask is None else "contiguous parameters under a mask"
        raise LayoutError(
            f"{optimizer}: expected {wanted}, got strides {weight.stride()} for shape {tuple(weight.shape)}; "
            "use .contiguous()"
        )
    # The kernel walks memory: a gradient laid out differently is brought into the parameter's order.
    return grad if grad.stride() == weight.stride() else torch.empty_like(weight).copy_(grad)


def check_state(
    optimizer: str, p: torch.Tensor, state: dict[str, Any], keys: tuple[str, ...], layout: Compaction | None
) -> None:
    """Refuse state that does not belong to the parameter as it is now: the kernel would walk past its end.

    Raises
    ------
    StateError
    """
    for key in (*keys, MASTER):
        stored = state.get(key)
        value = None if stored is None else local(stored)
        shape = local(p).shape if layout is None or key == MASTER else (layout.num_kept,)
        dtype = torch.float32 if key == MASTER else state_dtype(p)
        if value is not None and (value.shape != shape or value.dtype != dtype or value.device != p.device):
            raise StateError(
                f"{optimizer}: expected '{key}' as {dtype} of shape {tuple(shape)} on {p.device} for a parameter "
                f"that is now {p.dtype} of shape {tuple(p.shape)}, got {value.dtype} of shape {tuple(value.shape)} "
                f"on {value.device}; load the state again after converting or moving a model"
            )


def is_per_weight(key: str, value: object) -> bool:
    """Whether this entry of the state has a value for each weight, which a parameter without dimensions has too."""
    return isinstance(value, torch.Tensor) and key != "step"


def state_dtype(p: torch.Tensor) -> torch.dtype:
    """Return the dtype in which the state of a parameter is kept."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def _is_dense(p: torch.Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlap, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(p.stride(), p.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True
