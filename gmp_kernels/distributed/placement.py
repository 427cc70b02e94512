"""Sharded parameters: the part that this process holds, and its place in the whole."""

from __future__ import annotations

import torch
import torch.distributed as dist

from gmp_kernels.errors import LayoutError, StateError
from gmp_kernels.formats import ROW_MAJOR
from gmp_kernels.masks import BitMask
from gmp_kernels.search.placement import Region

__all__ = [
    "gathered_mask",
    "is_sharded",
    "local",
    "local_grad",
    "local_mask",
    "region_of",
    "sharded_like",
    "sharding_of",
    "sum_over_shards",
    "whole_mask",
]

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether this is a ``DTensor``, of which a process holds only a part."""
    return type(tensor) not in _PLAIN and hasattr(tensor, "to_local")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a ``DTensor`` that this process holds, sharing its memory; other tensors as they are."""
    if type(tensor) in _PLAIN or not is_sharded(tensor):
        return tensor
    # What to_local() returns without a gradient, which takes a hundred times as long: models have hundreds of these.
    held: torch.Tensor | None = getattr(tensor, "_local_tensor", None)
    if held is None:
        with torch.no_grad():
            held = tensor.to_local()  # type: ignore[attr-defined]
    return held


def local_grad(parameter: torch.Tensor) -> torch.Tensor:
    """Return ``local`` of the gradient, redistributed like the parameter if it is laid out differently."""
    grad = parameter.grad
    assert grad is not None
    if is_sharded(grad) and grad.placements != parameter.placements:  # type: ignore[attr-defined]
        # Autograd does not sum the gradient over processes that share a replicated parameter; this does.
        grad = grad.redistribute(placements=parameter.placements)  # type: ignore[attr-defined]
    return local(grad)


def region_of(name: str, tensor: torch.Tensor) -> Region:
    """Return the region of ``tensor`` that ``local(tensor)`` is.

    Raises
    ------
    LayoutError
        The tensor is still to be summed over processes (``Partial``), so its local part is no weights.
    """
    shape = tuple(tensor.shape)
    if not is_sharded(tensor):
        return Region(shape, (0,) * len(shape), shape)
    if any(placement.is_partial() for placement in tensor.placements):  # type: ignore[attr-defined]
        raise LayoutError(
            f"GMPScheduler: expected '{name}' sharded or replicated, got placements "
            f"{tensor.placements}; redistribute it"  # type: ignore[attr-defined]
        )
    # torch.distributed.checkpoint uses the same method, which knows every kind of placement.
    (chunk,) = tensor.__create_chunk_list__()  # type: ignore[attr-defined]
    return Region(shape, tuple(chunk.offsets), tuple(chunk.sizes))


def sharding_of(tensor: torch.Tensor) -> object:
    """Return a key of how a tensor is sharded, equal for tensors sharded alike; None for plain ones."""
    return (tensor.device_mesh, tensor.placements) if is_sharded(tensor) else None  # type: ignore[attr-defined]


def sum_over_shards(value: float | torch.Tensor, tensor: torch.Tensor) -> float | torch.Tensor:
    """Add up a number that each process has found for its part of ``tensor``; copies count once."""
    if not is_sharded(tensor):
        return value
    total = torch.as_tensor(value, dtype=torch.float64, device=local(tensor).device).clone()
    for dimension, placement in enumerate(tensor.placements):  # type: ignore[attr-defined]
        if not placement.is_replicate():
            dist.all_reduce(total, group=tensor.device_mesh.get_group(dimension))  # type: ignore[attr-defined]
    return total


def sharded_like(values: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Return values for the local part of ``parameter`` as a tensor that is sharded like it."""
    if not is_sharded(parameter):
        return values
    from torch.distributed.tensor import DTensor

    whole: torch.Tensor = DTensor.from_local(
        values.view(local(parameter).shape),
        parameter.device_mesh,  # type: ignore[attr-defined]
        parameter.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return whole


def whole_mask(mask: BitMask, parameter: torch.Tensor) -> torch.Tensor:
    """Return a copy of this process's part of a mask, in the form that checkpoints hold.

    It is packed bits in row-major order for a plain parameter. For a ``DTensor`` it is a bool tensor of its shape,
    sharded like it, which can be resharded.
    """
    if is_sharded(parameter):
        return sharded_like(mask.to_bool(), parameter)
    return mask.to(memory_format=ROW_MAJOR).packed.clone()


def gathered_mask(stored: torch.Tensor) -> torch.Tensor:
    """Return the packed bits of a whole mask that ``whole_mask`` has returned. Every rank has to call it."""
    return BitMask.from_bool(stored.full_tensor().contiguous()).packed if is_sharded(stored) else stored  # type: ignore[attr-defined]


def local_mask(stored: torch.Tensor, parameter: torch.Tensor) -> BitMask:
    """Return this process's part of a mask that ``whole_mask`` has returned, for a parameter sharded in any way.

    Raises
    ------
    StateError
        The mask has another shape, or is sharded in another way than the parameter is now.
    """
    held = local(parameter)
    if not is_sharded(stored):
        whole = BitMask(stored, parameter.shape) if stored.dtype == torch.uint8 else BitMask.from_bool(stored)
        if whole.shape != parameter.shape:
            raise StateError(
                f"load_state_dict: expected a mask of shape {tuple(parameter.shape)}, got {tuple(whole.shape)}; is it "
                "the state of another model?"
            )
        if not is_sharded(parameter):
            return whole
        region = region_of("mask", parameter)
        box = tuple(slice(at, at + size) for at, size in zip(region.offsets, region.sizes, strict=True))
        return BitMask.from_bool(whole.to_bool()[box])
    if local(stored).shape != held.shape:
        raise StateError(
            f"load_state_dict: expected masks sharded like the parameters, {tuple(held.shape)} here, got "
            f"{tuple(local(stored).shape)}; load them with torch.distributed.checkpoint into state_dict()"
        )
    return BitMask.from_bool(local(stored))
