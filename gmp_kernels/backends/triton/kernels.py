"""All kernels of backend triton: a table's rows in device memory say where their programs read and write."""

from __future__ import annotations

import triton.language as tl

from gmp_kernels.backends.dtypes import NAMES
from gmp_kernels.backends.triton.apply import apply
from gmp_kernels.backends.triton.count import count
from gmp_kernels.backends.triton.patterns import find_protected, mark_eligible, settle, sum_blocks
from gmp_kernels.backends.triton.update import count_kept, move_state, sum_squares, update

__all__ = [
    "FLOATS",
    "INTEGERS",
    "apply",
    "count",
    "count_kept",
    "find_protected",
    "mark_eligible",
    "move_state",
    "settle",
    "sum_blocks",
    "sum_squares",
    "update",
]

INTEGERS = {2: tl.int16, 4: tl.int32, 8: tl.int64}  # by size
FLOATS = {dtype: getattr(tl, name) for dtype, name in NAMES.items()}
