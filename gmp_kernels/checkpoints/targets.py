"""Choice of the tensors of a checkpoint to prune, from their names, dtypes and shapes: it has no module types."""

from __future__ import annotations

from collections.abc import Sequence

from gmp_kernels.checkpoints.files import DTYPES, TensorInfo
from gmp_kernels.errors import DTypeError, ShapeError
from gmp_kernels.model.coverage import Coverage, CoveredTensor
from gmp_kernels.model.roles import COMPLEX, DEFAULT_RULE, NO_WEIGHTS, QUANTIZED, SMALL, Roles, effective_name
from gmp_kernels.model.selection import TargetIndex

__all__ = ["DEFAULT_RULE", "TensorIndex"]

# Several quantized weights lie packed in one of these.
PACKED = {"I8", "U8", "I16", "U16", "I32", "U32"}


class TensorIndex(TargetIndex[str]):
    """All names by which the tensors of a checkpoint can be given.

    Entries are names of tensors or modules, globs, or ``re:`` patterns, as ``GMPScheduler`` takes them. Modules and
    patterns in ``targets`` leave out biases, norms and scales, and dtypes without a magnitude order.

    Raises
    ------
    DTypeError, ShapeError
        A target named exactly has a dtype without a magnitude order, such as float8, or is empty.
    """

    WORDS = "names, globs or 're:' patterns found in the checkpoint"
    NOUN = "tensor"

    def __init__(self, tensors: Sequence[TensorInfo]) -> None:
        shapes = {tensor.name: tensor.shape for tensor in tensors}
        roles = Roles(shapes, {})
        covered = []
        for tensor in tensors:
            role, obstacle = roles.reason_against(tensor.name), _obstacle(tensor, roles)
            reason = (role if role == SMALL else obstacle or role) or ""
            can_be_target = role != SMALL and obstacle is None
            covered.append((CoveredTensor(tensor.name, tensor.shape, tensor.dtype, reason, can_be_target), obstacle))
        super().__init__(covered, {name: effective_name(name, shapes) for name in shapes})
        self._largest = max(tensors, key=lambda tensor: tensor.nbytes, default=None)

    def _named(self, reached: list[str]) -> list[str]:
        tensor = self._covered[reached[0]]
        if tensor.dtype not in DTYPES:
            raise DTypeError(
                f"targets: expected one of {', '.join(DTYPES)} for '{tensor.name}', got {tensor.dtype}; "
                "prune before quantizing, or leave it out, and it is copied as it is"
            )
        if not tensor.num_weights:
            raise ShapeError(f"targets: expected weights in '{tensor.name}', got shape {tensor.shape}; leave it out")
        return reached

    def _advice(self, coverage: Coverage) -> str:
        name = "" if self._largest is None else self._largest.name
        reason = self._covered[name].reason if name in self._covered else ""
        return f"by default these are {DEFAULT_RULE}" + (f"; '{name}' is left out: {reason}" if reason else "")


def _obstacle(tensor: TensorInfo, roles: Roles) -> str | None:
    """Return why a tensor cannot be pruned."""
    if tensor.dtype in DTYPES:
        return roles.obstacle(tensor.name) if tensor.numel else "empty"
    if tensor.dtype.startswith("C"):
        return COMPLEX
    return QUANTIZED if tensor.dtype in PACKED or tensor.dtype.startswith("F") else NO_WEIGHTS
