"""Backends: their common interface (``types``), the choice of one (``registry``), and the backends themselves."""

from gmp_kernels.backends.registry import Backend, available, choose, register
from gmp_kernels.backends.types import (
    BracketCounts,
    Brackets,
    Compaction,
    Constants,
    Cutoffs,
    Implementation,
    Layer,
    PruneCounts,
    Selection,
    StateMove,
    Threshold,
    UpdateBatch,
    UpdateTensor,
)

__all__ = [
    "Backend",
    "BracketCounts",
    "Brackets",
    "Compaction",
    "Constants",
    "Cutoffs",
    "Implementation",
    "Layer",
    "PruneCounts",
    "Selection",
    "StateMove",
    "Threshold",
    "UpdateBatch",
    "UpdateTensor",
    "available",
    "choose",
    "register",
]
