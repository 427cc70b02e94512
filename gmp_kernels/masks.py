"""Bit-packed masks: one bit per weight, 1 = kept."""

from __future__ import annotations

from typing import Self

import numpy as np
import torch

from gmp_kernels.errors import DTypeError, ShapeError

__all__ = ["BitMask"]


class BitMask:
    """One bit per weight: bit ``i`` of byte ``j`` says whether flat element ``8 j + i`` is kept.

    The layout is that of ``numpy.packbits(..., bitorder="little")`` on the row-major flattened
    mask. Unused bits of the last byte are zero, so two masks are equal exactly when their bytes are.

    Parameters
    ----------
    packed : torch.Tensor
        uint8, 1-d, contiguous, ``ceil(numel / 8)`` bytes. Kept by reference, not copied.
    shape : sequence of int
        Shape of the weight the mask belongs to.

    Raises
    ------
    DTypeError, ShapeError
        ``packed`` is not a contiguous 1-d uint8 tensor of the right length, or has a bit set past the end.

    Notes
    -----
    Checking bits past the end would wait for a GPU. On a GPU they are cleared instead, in place.
    """

    __slots__ = ("packed", "shape")

    packed: torch.Tensor
    shape: torch.Size

    def __init__(self, packed: torch.Tensor, shape: torch.Size | tuple[int, ...] | list[int]) -> None:
        if packed.dtype != torch.uint8:
            raise DTypeError(f"BitMask: expected packed bits as uint8, got {packed.dtype}; use BitMask.from_bool")
        self.packed = packed
        self.shape = torch.Size(shape)
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
    def ones(cls, shape: torch.Size | tuple[int, ...] | list[int], device: torch.device | str = "cpu") -> Self:
        """Return a mask that keeps every weight of ``shape``, on ``device``."""
        numel = torch.Size(shape).numel()
        packed = torch.full((-(-numel // 8),), 0xFF, dtype=torch.uint8, device=device)
        if numel % 8:
            packed[-1] = (1 << (numel % 8)) - 1
        return cls.of(packed, torch.Size(shape))

    @classmethod
    def of(cls, packed: torch.Tensor, shape: torch.Size) -> Self:
        """Return a mask of bits known to be valid, without the checks of the constructor."""
        mask = cls.__new__(cls)
        mask.packed = packed
        mask.shape = shape
        return mask

    @classmethod
    def empty(cls, shape: torch.Size, device: torch.device) -> Self:
        """Return a mask of undefined bits, all of which a kernel is about to write, the zeros past the end included."""
        return cls.of(torch.empty(-(-shape.numel() // 8), dtype=torch.uint8, device=device), shape)

    @classmethod
    def from_bool(cls, kept: torch.Tensor | np.ndarray) -> Self:
        """Pack a bool tensor or array (True = kept) of any shape. Temporary memory: 2 bytes per weight."""
        if not isinstance(kept, torch.Tensor):
            kept = torch.as_tensor(kept, device="cpu")
        if kept.dtype != torch.bool:
            raise DTypeError(f"BitMask.from_bool: expected bool, got {kept.dtype}; write e.g. `weight != 0`")
        padded = torch.zeros(-(-kept.numel() // 8) * 8, dtype=torch.uint8, device=kept.device)
        padded[: kept.numel()] = kept.reshape(-1)
        bit = torch.arange(8, dtype=torch.uint8, device=kept.device)
        return cls.of((padded.view(-1, 8) << bit).sum(1, dtype=torch.uint8), kept.shape)

    @classmethod
    def from_zeros(cls, weight: torch.Tensor) -> Self:
        """Return the mask that keeps the nonzero elements of a tensor of any dtype. Temporary memory: about 4 MB."""
        flat = weight.detach().reshape(-1)
        # Each slice fills whole bytes of the mask.
        parts = [cls.from_bool(part != 0).packed for part in torch.split(flat, 1 << 20)]
        return cls.of(torch.cat(parts), weight.shape)

    def to_bool(self) -> torch.Tensor:
        """Unpack to a bool tensor of ``shape`` (True = kept). Memory: 1 byte per weight, 2 while unpacking."""
        bit = torch.arange(8, dtype=torch.uint8, device=self.packed.device)
        bits = (self.packed.unsqueeze(1) >> bit).bitwise_and_(1)
        return bits.view(torch.bool).view(-1)[: self.numel].view(self.shape)

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
        return BitMask.of(self.packed.clone(), self.shape)

    def to(self, device: torch.device | str) -> BitMask:
        """Return this mask on ``device``; if it is already there, return it itself, as ``torch.Tensor.to`` does."""
        packed = self.packed.to(device)
        return self if packed is self.packed else BitMask.of(packed, self.shape)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BitMask):
            return NotImplemented
        return self.shape == other.shape and torch.equal(self.packed, other.packed.to(self.packed.device))

    __hash__ = None  # type: ignore[assignment]  # mutable, like a tensor's contents

    def __repr__(self) -> str:
        return f"BitMask(shape={tuple(self.shape)}, sparsity={self.sparsity:.4f}, device='{self.packed.device}')"
