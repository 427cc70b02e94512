"""Gradual magnitude pruning for PyTorch: exact thresholds, bit-packed masks, a scheduler for any training loop."""

from gmp_kernels import optim, patterns, schedules
from gmp_kernels.errors import (
    BackendUnavailableError,
    CaptureError,
    DeviceError,
    DistributedError,
    DTypeError,
    GMPError,
    GMPWarning,
    LayoutError,
    NonFiniteError,
    ScheduleError,
    ShapeError,
    SparsityError,
    StateError,
    TargetError,
)
from gmp_kernels.masks import BitMask
from gmp_kernels.ops import PruneResult, Threshold, apply_masks_, magnitude_threshold, prune_
from gmp_kernels.run import Run
from gmp_kernels.scheduler import GMPScheduler, StepReport
from gmp_kernels.stages import Stages

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailableError",
    "BitMask",
    "CaptureError",
    "DTypeError",
    "DeviceError",
    "DistributedError",
    "GMPError",
    "GMPScheduler",
    "GMPWarning",
    "LayoutError",
    "NonFiniteError",
    "PruneResult",
    "Run",
    "ScheduleError",
    "ShapeError",
    "SparsityError",
    "Stages",
    "StateError",
    "StepReport",
    "TargetError",
    "Threshold",
    "apply_masks_",
    "magnitude_threshold",
    "optim",
    "patterns",
    "prune_",
    "schedules",
]
