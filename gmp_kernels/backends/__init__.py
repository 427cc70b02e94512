"""Backends: what one has to offer (``types``), which one runs a call (``registry``), and the backends themselves."""

from gmp_kernels.backends.registry import Backend, available, choose, register
from gmp_kernels.backends.types import (
    Bracket,
    Census,
    Compaction,
    Constants,
    Implementation,
    Layer,
    Selection,
    StateMove,
    Threshold,
    UpdateBatch,
    UpdateTensor,
    Written,
    has_nonfinite,
)

__all__ = [
    "Backend",
    "Bracket",
    "Census",
    "Compaction",
    "Constants",
    "Implementation",
    "Layer",
    "Selection",
    "StateMove",
    "Threshold",
    "UpdateBatch",
    "UpdateTensor",
    "Written",
    "available",
    "choose",
    "has_nonfinite",
    "register",
]
