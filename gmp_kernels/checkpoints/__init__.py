"""Safetensors checkpoints on disk: pruned or inspected piece by piece, in memory that does not depend on their size."""

from gmp_kernels.checkpoints.files import Checkpoint, open_checkpoint
from gmp_kernels.checkpoints.inspect import BINS_PER_OCTAVE, TensorStatistics, inspect_checkpoint, total_of
from gmp_kernels.checkpoints.masks import MASK_SUFFIX, mask_metadata
from gmp_kernels.checkpoints.prune import DEFAULT_MEMORY, PruneJob, PruneReport
from gmp_kernels.checkpoints.targets import DEFAULT_RULE

__all__ = [
    "BINS_PER_OCTAVE",
    "DEFAULT_MEMORY",
    "DEFAULT_RULE",
    "MASK_SUFFIX",
    "Checkpoint",
    "PruneJob",
    "PruneReport",
    "TensorStatistics",
    "inspect_checkpoint",
    "mask_metadata",
    "open_checkpoint",
    "total_of",
]
