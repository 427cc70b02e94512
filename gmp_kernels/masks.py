"""Bit-packed masks: one bit per weight, 1 = kept."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import starmap
from typing import Any, Self

import numpy as np
import torch

from gmp_kernels.errors import DTypeError, ShapeError
from gmp_kernels.formats import (
    CHANNELS_LAST,
    ROW_MAJOR,
    format_of,
    format_of_shape,
    in_memory_order,
    in_row_major_order,
)

__all__ = ["BitMask"]

SLICE = 1 << 19  # weights whose bits are brought into another format at a time


class BitMask:
    """One bit per weight: bit ``i`` of byte ``j`` says whether element ``8 j + i`` is kept.

    The elements are counted in the order in which they lie in the weight's memory. The layout is that of
    ``numpy.packbits(..., bitorder="little")``; unused bits of the last byte are zero. Masks are equal if they keep the
    same weights, whatever their formats.

    Parameters
    ----------
    packed : torch.Tensor
        uint8, 1-d, contiguous, ``ceil(numel / 8)`` bytes. Kept by reference, not copied.
    shape : sequence of int
        Shape of the weight the mask belongs to.
    memory_format : torch.memory_format
        Format of that weight: ``torch.contiguous_format`` (row-major), ``channels_last`` or ``channels_last_3d``.

    Raises
    ------
    DTypeError, ShapeError
        ``packed`` is not a contiguous 1-d uint8 tensor of the right length, or has a bit set past the end; or the
        format is not one of tensors of this shape.

    Notes
    -----
    Checking bits past the end would wait for a GPU. On a GPU they are cleared instead, in place.
    """

    __slots__ = ("memory_format", "packed", "shape")

    packed: torch.Tensor
    shape: torch.Size
    memory_format: torch.memory_format

    def __init__(
        self,
        packed: torch.Tensor,
        shape: torch.Size | tuple[int, ...] | list[int],
        memory_format: torch.memory_format = ROW_MAJOR,
    ) -> None:
        if packed.dtype != torch.uint8:
            raise DTypeError(f"BitMask: expected packed bits as uint8, got {packed.dtype}; use BitMask.from_bool")
        self.packed = packed
        self.shape = torch.Size(shape)
        self.memory_format = _checked(self.shape, memory_format)
        if not self.is_packed:
            raise ShapeError(
                f"BitMask: expected {-(-self.numel // 8)} contiguous bytes for shape {tuple(self.shape)}, "
                f"got a tensor of shape {tuple(packed.shape)}; use BitMask.from_bool to pack"
            )
        used = self.numel % 8
        if used and packed.device.type != "cpu":
            # Outside of this mode, torch refuses to write to inference tensors.
            with torch.inference_mode():
                packed[-1] &= (1 << used) - 1
        elif used and int(packed[-1]) >> used:
            raise ShapeError(
                f"BitMask: bits past element {self.numel} are set; expected zeros there, as numpy.packbits leaves them"
            )

    @classmethod
    def ones(
        cls,
        shape: torch.Size | tuple[int, ...] | list[int],
        device: torch.device | str = "cpu",
        memory_format: torch.memory_format = ROW_MAJOR,
    ) -> Self:
        """Return a mask that keeps every weight of ``shape``, on ``device``."""
        numel = torch.Size(shape).numel()
        packed = torch.full((-(-numel // 8),), 0xFF, dtype=torch.uint8, device=device)
        if numel % 8:
            packed[-1] = (1 << (numel % 8)) - 1
        return cls.of(packed, torch.Size(shape), _checked(shape, memory_format))

    @classmethod
    def of(cls, packed: torch.Tensor, shape: torch.Size, memory_format: torch.memory_format | None = ROW_MAJOR) -> Self:
        """Return a mask of bits known to be valid, without the checks of the constructor."""
        mask = cls.__new__(cls)
        mask.packed = packed
        mask.shape = shape
        mask.memory_format = memory_format or ROW_MAJOR
        return mask

    @classmethod
    def empty(cls, weight: torch.Tensor) -> Self:
        """Return a mask of undefined bits, all of which a kernel is about to write, the zeros past the end included."""
        packed = torch.empty(-(-weight.numel() // 8), dtype=torch.uint8, device=weight.device)
        return cls.of(packed, weight.shape, format_of(weight))

    @classmethod
    def from_bool(cls, kept: torch.Tensor | np.ndarray) -> Self:
        """Pack a bool tensor or array (True = kept) of any shape; the mask has its memory format.

        A tensor of any other strides is packed in row-major order. Temporary memory: 2 bytes per weight.
        """
        if not isinstance(kept, torch.Tensor):
            kept = torch.as_tensor(kept, device="cpu")
        if kept.dtype != torch.bool:
            raise DTypeError(f"BitMask.from_bool: expected bool, got {kept.dtype}; write e.g. `weight != 0`")
        memory_format = format_of(kept) or ROW_MAJOR
        padded = torch.zeros(-(-kept.numel() // 8) * 8, dtype=torch.uint8, device=kept.device)
        padded[: kept.numel()] = in_memory_order(kept, memory_format).reshape(-1)
        bit = torch.arange(8, dtype=torch.uint8, device=kept.device)
        return cls.of((padded.view(-1, 8) << bit).sum(1, dtype=torch.uint8), kept.shape, memory_format)

    @classmethod
    def from_zeros(cls, weight: torch.Tensor) -> Self:
        """Return the mask that keeps the nonzero elements of a tensor of any dtype, in the tensor's memory format.

        Temporary memory: about 4 MB; for strides of no format also a copy of the tensor.
        """
        memory_format = format_of(weight) or ROW_MAJOR
        flat = in_memory_order(weight.detach(), memory_format).reshape(-1)
        # Each slice fills whole bytes of the mask.
        parts = [cls.from_bool(part != 0).packed for part in torch.split(flat, 1 << 20)]
        return cls.of(torch.cat(parts), weight.shape, memory_format)

    def to_bool(self) -> torch.Tensor:
        """Unpack to a contiguous bool tensor of ``shape`` (True = kept), whatever the format of the mask.

        Memory: 1 byte per weight, 2 while unpacking.
        """
        return self._unpacked().contiguous()

    def _unpacked(self) -> torch.Tensor:
        """Return what ``to_bool`` does, in the memory format of the mask."""
        bit = torch.arange(8, dtype=torch.uint8, device=self.packed.device)
        bits = (self.packed.unsqueeze(1) >> bit).bitwise_and_(1).view(torch.bool).view(-1)[: self.numel]
        in_memory = in_memory_order(torch.empty(self.shape, device="meta"), self.memory_format).shape
        return in_row_major_order(bits.view(in_memory), self.memory_format)

    @property
    def is_packed(self) -> bool:
        """Whether ``packed`` has the form described above; the bits themselves are not checked."""
        packed = self.packed
        expected = torch.uint8, 1, -(-self.numel // 8)
        return (packed.dtype, packed.ndim, packed.numel()) == expected and packed.is_contiguous()

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.shape.numel()

    @property
    def num_kept(self) -> int:
        """Number of ones, counted from the bits. Temporary memory: 1 bit per weight."""
        # Counting bits within bytes (pairs, nibbles, byte) works on every device; torch has no popcount.
        x = self.packed
        x = x - ((x >> 1) & 0x55)
        x = (x & 0x33) + ((x >> 2) & 0x33)
        return int(((x + (x >> 4)) & 0x0F).sum(dtype=torch.int64))

    @property
    def sparsity(self) -> float:
        """Fraction of pruned weights, 0.0 for an empty mask."""
        return 1.0 - self.num_kept / self.numel if self.numel else 0.0

    def clone(self) -> BitMask:
        """Return an independent copy."""
        return BitMask.of(self.packed.clone(), self.shape, self.memory_format)

    def to(
        self, device: torch.device | str | None = None, *, memory_format: torch.memory_format | None = None
    ) -> BitMask:
        """Return this mask on a device and in a memory format; if it is so already, return it itself, as torch does.

        The weights kept are the same in every format. Temporary memory for another format: about 3 MB.

        Raises
        ------
        ShapeError
            The format is not one of tensors of this shape.
        """
        packed = self.packed if device is None else self.packed.to(device)
        here = self if packed is self.packed else BitMask.of(packed, self.shape, self.memory_format)
        if memory_format is None or memory_format is here.memory_format:
            return here
        wanted = _checked(self.shape, memory_format)
        if wanted is here.memory_format:
            return here
        # A mask may take over these bits, and outside of that mode torch refuses to write tensors made in it.
        with torch.inference_mode(False):
            parts = [
                BitMask.from_bool(part._unpacked().contiguous(memory_format=wanted)).packed for part in here.parts()
            ]
            return BitMask.of(torch.cat(parts), self.shape, wanted)

    def parts(self, depth: int = 1) -> Iterator[BitMask]:
        """Cut the mask along its first dimension into masks of about a million weights, which share its memory.

        They have whole bytes, and but for the last a multiple of ``depth`` filters, which every format has at the same
        places.
        """
        size = self.shape[1:].numel()
        unit = math.lcm(8 // math.gcd(8, size), depth)
        step = unit * max(1, SLICE // (unit * size))
        for first in range(0, self.shape[0], step):
            shape = torch.Size([min(step, self.shape[0] - first), *self.shape[1:]])
            yield BitMask.of(self.packed[first * size // 8 :][: -(-shape.numel() // 8)], shape, self.memory_format)

    def follow(self, weight: torch.Tensor) -> None:
        """Bring the bits into the memory format of a weight of the same shape, unless its strides are of none."""
        memory_format = format_of(weight)
        if memory_format not in (self.memory_format, None):
            self.become(self.to(memory_format=memory_format))

    def become(self, other: BitMask) -> None:
        """Take over the bits of another mask of the same shape, not copied, and their format, in one step."""
        # In one call of C, so that no interrupt finds bits in another order than they are said to be.
        values = ("packed", other.packed), ("memory_format", other.memory_format)
        deque(starmap(partial(setattr, self), values), maxlen=0)

    def __getstate__(self) -> dict[str, object]:
        # The formats of torch are no objects that every protocol of pickle can name.
        return {"packed": self.packed, "shape": self.shape, "is_row_major": self.memory_format is ROW_MAJOR}

    def __setstate__(self, state: Any) -> None:
        # Pickles made before masks had formats have the attributes alone, and are of row-major bits.
        values = state[1] | {"is_row_major": True} if isinstance(state, tuple) else state
        self.packed, self.shape = values["packed"], values["shape"]
        self.memory_format = ROW_MAJOR if values["is_row_major"] else CHANNELS_LAST[len(self.shape)]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BitMask):
            return NotImplemented
        if self.shape != other.shape:
            return False
        return torch.equal(self.packed, other.to(self.packed.device, memory_format=self.memory_format).packed)

    __hash__ = None  # type: ignore[assignment]  # mutable, like a tensor's contents

    def __repr__(self) -> str:
        shown = "" if self.memory_format is ROW_MAJOR else f", memory_format={self.memory_format}"
        return f"BitMask(shape={tuple(self.shape)}, sparsity={self.sparsity:.4f}, device='{self.packed.device}'{shown})"


def _checked(shape: Sequence[int], memory_format: torch.memory_format) -> torch.memory_format:
    """Return the format as ``format_of`` tells it; raise ShapeError if tensors of this shape do not have it."""
    found = format_of_shape(shape, memory_format)
    if found is None:
        raise ShapeError(
            f"BitMask: expected contiguous_format, channels_last for 4 dimensions or channels_last_3d for 5, got "
            f"{memory_format} for shape {tuple(shape)}; give the format of the weight"
        )
    return found
