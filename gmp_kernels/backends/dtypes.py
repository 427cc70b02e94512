"""The dtypes whose magnitudes have an order here. Every other table of dtypes in Python derives from this one."""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["DTYPES"]


class _Row(NamedTuple):
    """Names of one dtype, and the parts of its bits.

    Attributes
    ----------
    name : str
        As in csrc/order/dtypes.h.
    stored : str
        As in safetensors files.
    integer : torch.dtype
        Integer dtype of the same size, for its bits.
    fraction_bits : int
        Number of low bits that hold the fraction, without the leading one of normal numbers. The bits between them and
        the sign are the exponent.
    bias : int
        Stored exponent of 1.0.
    """

    name: str
    stored: str
    integer: torch.dtype
    fraction_bits: int
    bias: int


# In the order of csrc/order/dtypes.h, where a dtype's position is its code.
DTYPES = {
    torch.float32: _Row("float32", "F32", torch.int32, 23, 127),
    torch.float64: _Row("float64", "F64", torch.int64, 52, 1023),
    torch.float16: _Row("float16", "F16", torch.int16, 10, 15),
    torch.bfloat16: _Row("bfloat16", "BF16", torch.int16, 7, 127),
}
