"""Choice of the tensors of a checkpoint to prune, from their names, dtypes and shapes: it has no module types."""

from __future__ import annotations

from collections.abc import Sequence

from gmp_kernels.checkpoints.files import DTYPES, TensorInfo
from gmp_kernels.model.coverage import CoveredTensor
from gmp_kernels.model.roles import COMPLEX, DEFAULT_RULE, EMPTY, NO_WEIGHTS, QUANTIZED, SMALL, Roles, effective_name
from gmp_kernels.model.selection import TargetIndex

__all__ = ["DEFAULT_RULE", "TensorIndex"]

# Several quantized weights lie packed in one of these.
PACKED = {"I8", "U8", "I16", "U16", "I32", "U32"}


class TensorIndex(TargetIndex):
    """All names by which the tensors of a checkpoint can be given.

    Entries are names of tensors or modules, globs, or ``re:`` patterns, as ``GMPScheduler`` takes them. Modules and
    patterns in ``targets`` leave out biases, norms and scales, and dtypes without a magnitude order.
    """

    WORDS = "names, globs or 're:' patterns found in the checkpoint"
    NOUN = "tensor"

    def __init__(self, tensors: Sequence[TensorInfo]) -> None:
        shapes = {tensor.name: tensor.shape for tensor in tensors}
        roles = Roles(shapes, {})
        covered = []
        for tensor in tensors:
            role, refusal = roles.reason_against(tensor.name), _refusal(tensor) or roles.obstacle(tensor.name)
            reason = (role if role == SMALL else refusal or role) or ""
            can_be_target = role != SMALL and refusal is None
            shown = CoveredTensor(tensor.name, tensor.shape, tensor.dtype, reason, can_be_target)
            covered.append((shown, refusal, refusal))
        super().__init__(covered, {name: effective_name(name, shapes) for name in shapes})


def _refusal(tensor: TensorInfo) -> str | None:
    """Return why a tensor of this dtype and size cannot be pruned at all."""
    if tensor.dtype in DTYPES:
        return None if tensor.numel else EMPTY
    if tensor.dtype.startswith("C"):
        return COMPLEX
    return QUANTIZED if tensor.dtype in PACKED or tensor.dtype.startswith("F") else NO_WEIGHTS
