"""The dtypes whose magnitudes have an order here. Every other table of dtypes in Python derives from this one."""

from __future__ import annotations

import torch

__all__ = ["DTYPES", "NAMES"]

# Names in safetensors files, in the order of csrc/order/dtypes.h, where a dtype's position is its code.
DTYPES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
# Names in csrc/order/dtypes.h, which are torch's own.
NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}
