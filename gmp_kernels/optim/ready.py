"""Checks of a parameter, its gradient and its state before a kernel walks them, and a record that they were made."""

from __future__ import annotations

import operator
from typing import Any

import torch

from gmp_kernels.backends import Compaction, UpdateTensor
from gmp_kernels.checks import DTYPES, has_memory
from gmp_kernels.errors import DTypeError, LayoutError, ShapeError, StateError
from gmp_kernels.masks import BitMask
from gmp_kernels.sharding import local

__all__ = ["MASTER", "Ready", "check_state", "checked_grad", "is_dense", "is_per_weight", "state_dtype", "version_of"]

MASTER = "master_weight"  # the name of the float32 copy in the state


class Ready:
    """A parameter that has passed every check, and what a step needs of it.

    Attributes
    ----------
    parameter : torch.Tensor
    state : dict
        Its entry in the optimizer's state.
    tensor : UpdateTensor
    mask : BitMask or None
        Its mask; ``bits`` are the packed ones that were there.
    layout : Compaction or None
        Of compact state; its bits were at ``version``.
    written : list of torch.Tensor
        All that a step changes.
    is_empty : bool
        Whether there is nothing of it here.
    pointer, shape, stride, dtype, device
        Of what is here of the parameter, and therefore of its gradient.
    """

    __slots__ = (
        *("parameter", "state", "tensor", "mask", "bits", "layout", "version", "written", "is_empty"),
        *("pointer", "shape", "stride", "dtype", "device", "_keys", "_names", "_held"),
    )

    def __init__(
        self,
        parameter: torch.Tensor,
        weight: torch.Tensor,
        state: dict[str, Any],
        keys: tuple[str, ...],
        tensor: UpdateTensor,
        mask: BitMask | None,
        version: int,
    ) -> None:
        self.parameter = parameter
        self.state = state
        self.tensor = tensor
        self.mask, self.bits = mask, tensor.mask
        self.layout, self.version = tensor.compaction, version
        # A plain parameter and what is detached from it count versions together.
        own = [parameter] if weight is parameter else [parameter, tensor.weight]
        self.written = [t for t in (*own, tensor.master, *tensor.state) if t is not None]
        self.is_empty = weight.numel() == 0
        self.pointer = weight.data_ptr()
        self.shape, self.stride, self.dtype = weight.shape, weight.stride(), weight.dtype
        self.device = weight.get_device()
        self._keys = keys
        self._names = (MASTER, *keys) if MASTER in state else keys
        self._held = tuple(map(state.get, self._names))

    def holds(self, weight: torch.Tensor, state: dict[str, Any] | None, keys: tuple[str, ...]) -> bool:
        """Whether parameter, mask and state are still those that were checked."""
        return (
            state is self.state
            and weight.data_ptr() == self.pointer
            and weight.shape == self.shape
            and weight.stride() == self.stride
            and weight.dtype is self.dtype
            and keys == self._keys
            and (self.mask is None or self.layout is not None or self.mask.packed is self.bits)
            and all(map(operator.is_, map(state.get, self._names), self._held))
        )

    def fits(self, grad: torch.Tensor) -> bool:
        """Whether a kernel can walk this gradient beside the parameter."""
        return (
            grad.layout is torch.strided
            and grad.dtype is self.dtype
            and grad.shape == self.shape
            and grad.stride() == self.stride
            and grad.get_device() == self.device
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
    if grad.layout is not torch.strided:
        raise RuntimeError(f"{optimizer} does not support sparse gradients; use torch.optim.SparseAdam")
    if p.dtype not in DTYPES:
        raise DTypeError(f"{optimizer}: expected float32, float64, bfloat16 or float16 parameters, got {p.dtype}")
    if grad.dtype != p.dtype:
        raise DTypeError(f"{optimizer}: expected gradients of their parameter's {p.dtype}, got {grad.dtype}; cast")
    if grad.shape != weight.shape:
        raise ShapeError(
            f"{optimizer}: expected gradients of their parameter's shape {tuple(weight.shape)}, got "
            f"{tuple(grad.shape)}; compute them again after reshaping a parameter"
        )
    if grad.device != weight.device:
        raise LayoutError(
            f"{optimizer}: expected gradients on their parameter's {weight.device}, got {grad.device}; compute them "
            "again after moving a model"
        )
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
    if not (is_dense(weight) if mask is None else weight.is_contiguous()):
        wanted = "parameters without gaps in memory" if mask is None else "contiguous parameters under a mask"
        raise LayoutError(
            f"{optimizer}: expected {wanted}, got strides {weight.stride()} for shape {tuple(weight.shape)}; "
            "use .contiguous()"
        )
    if not (has_memory(weight) and has_memory(grad)):
        raise LayoutError(
            f"{optimizer}: expected parameters and gradients in memory, got a tensor of shape {tuple(weight.shape)} "
            "whose storage was freed or cut; gather it"
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


def version_of(tensor: torch.Tensor) -> int:
    """Return how often it was written in place; inference tensors do not count that."""
    return 0 if tensor.is_inference() else tensor._version


def is_per_weight(key: str, value: object) -> bool:
    """Whether this entry of the state has a value for each weight, which a parameter without dimensions has too."""
    return isinstance(value, torch.Tensor) and key != "step"


def state_dtype(p: torch.Tensor) -> torch.dtype:
    """Return the dtype in which the state of a parameter is kept."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def is_dense(p: torch.Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlap, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(p.stride(), p.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True
