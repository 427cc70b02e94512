"""Choice of the tensors of a checkpoint to prune. Only names, dtypes and shapes are known there, no module types."""

from __future__ import annotations

import difflib
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
    """Every name by which the tensors of a checkpoint can be meant.

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
        self._tensors = {tensor.name: tensor for tensor in tensors}
        roles = Roles({name: tensor.shape for name, tensor in self._tensors.items()}, {})
        covered = []
        for name, tensor in self._tensors.items():
            role, obstacle = roles.reason_against(name), _obstacle(tensor, roles)
            reason = role if role == SMALL else obstacle or role
            can_be_target = role != SMALL and obstacle is None
            covered.append((CoveredTensor(name, tensor.shape, tensor.dtype, reason or "", can_be_target), obstacle))
        super().__init__(covered, {name: effective_name(name, self._tensors) for name in self._tensors})

    def _is_exact(self, entry: str) -> bool:
        return entry in self._tensors

    def _named(self, reached: list[str]) -> list[str]:
        tensor = self._tensors[reached[0]]
        if tensor.dtype not in DTYPES:
            raise DTypeError(
                f"targets: expected one of {', '.join(DTYPES)} for '{tensor.name}', got {tensor.dtype}; "
                "prune before quantizing, or leave it out, and it is copied as it is"
            )
        if not tensor.numel:
            raise ShapeError(f"targets: expected weights in '{tensor.name}', got shape {tensor.shape}; leave it out")
        return reached

    def _near(self, what: str, entry: str) -> str:
        names = [name for name in self._covered if what != "targets" or self._is_free(name)]
        near = difflib.get_close_matches(entry.removeprefix("re:"), names, n=3, cutoff=0.5) or names[:3]
        return f"there are e.g. {', '.join(map(repr, near))}"

    def _reason_against(self, entry: str, reached: Sequence[str]) -> str:
        largest = max((self._tensors[name] for name in reached), key=lambda tensor: tensor.numel)
        reason = self._obstacles[largest.name] or self._covered[largest.name].reason
        return (
            f"floating-point weights of two or more dimensions, got {entry!r}, which matches only others; "
            f"'{largest.name}' of dtype {largest.dtype}, for one, is {reason}"
        )

    def _advice(self, coverage: Coverage) -> str:
        largest = max(self._tensors.values(), key=lambda tensor: tensor.nbytes, default=None)
        reason = "" if largest is None else self._covered[largest.name].reason
        found = f"; '{largest.name}' is left out: {reason}" if largest is not None and reason else ""
        return f"by default these are {DEFAULT_RULE}{found}"


def _obstacle(tensor: TensorInfo, roles: Roles) -> str | None:
    """Return why a tensor cannot be pruned."""
    if tensor.dtype in DTYPES:
        return roles.obstacle(tensor.name) if tensor.numel else "empty"
    if tensor.dtype.startswith("C"):
        return COMPLEX
    return QUANTIZED if tensor.dtype in PACKED or tensor.dtype.startswith("F") else NO_WEIGHTS
