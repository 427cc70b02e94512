"""The dtypes whose magnitudes have an order here. Every other table of dtypes in Python derives from this one."""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["DTYPES"]


class _Row(NamedTuple):
    """Names of one dtype, and how its values and their bits are written elsewhere.

    Attributes
    ----------
    name : str
        As in csrc/order/dtypes.h.
    stored : str
        As in safetensors files.
    integer : torch.dtype
        Of the same size, for its bits.
    value, bits : str
        A floating-point format that holds all its values, and the integers of that size, as struct and numpy call them.
    shift : int
        Low bits of that format that the dtype does not have.
    """

    name: str
    stored: str
    integer: torch.dtype
    value: str
    bits: str
    shift: int


# In the order of csrc/order/dtypes.h, where a dtype's position is its code.
DTYPES = {
    torch.float32: _Row("float32", "F32", torch.int32, "<f", "<I", 0),
    torch.float64: _Row("float64", "F64", torch.int64, "<d", "<Q", 0),
    torch.float16: _Row("float16", "F16", torch.int16, "<e", "<H", 0),
    torch.bfloat16: _Row("bfloat16", "BF16", torch.int16, "<f", "<I", 16),
}
