"""Choice of the tensors of a checkpoint to prune. Only names, dtypes and shapes are known there, no module types."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import cached_property

from gmp_kernels.checkpoints.files import DTYPES, TensorInfo
from gmp_kernels.errors import DTypeError, ShapeError, TargetError
from gmp_kernels.model.coverage import IGNORED, NOT_A_TARGET, Coverage, CoveredTensor
from gmp_kernels.model.roles import COMPLEX, DEFAULT_RULE, NO_WEIGHTS, QUANTIZED, SMALL, Facts, Roles, effective_name
from gmp_kernels.model.targets import reached_by_name

__all__ = ["DEFAULT_RULE", "cover_tensors", "find_tensors", "select_tensors"]

# Several quantized weights lie packed in one of these.
PACKED = {"I8", "U8", "I16", "U16", "I32", "U32"}


def select_tensors(
    tensors: Sequence[TensorInfo], targets: Sequence[str] | None, ignore: Sequence[str] | None
) -> list[TensorInfo]:
    """Return the tensors that ``targets`` reach and ``ignore`` does not, in the order given.

    Entries are names of tensors or modules, globs, or ``re:`` patterns, as ``GMPScheduler`` takes them. The default is
    ``DEFAULT_RULE``. Modules and patterns in ``targets`` leave out biases, norms and scales, and dtypes without a
    magnitude order; an exact name does not.

    Raises
    ------
    TargetError
        An entry reaches nothing, or nothing is left.
    DTypeError, ShapeError
        A tensor named exactly has a dtype without a magnitude order, such as float8, or is empty.
    """
    index = _Index(tensors)
    ignored = index.ignored(ignore)
    reached = index.reached(targets) - ignored.keys()
    chosen = [tensor for tensor in tensors if tensor.name in reached]
    if not chosen:
        raise TargetError(
            f"targets: expected at least one tensor to prune, got none from targets={targets!r} and ignore={ignore!r}; "
            f"by default these are {DEFAULT_RULE}{index.largest_left_out()}"
        )
    for tensor in chosen:
        if tensor.dtype not in DTYPES:
            raise DTypeError(
                f"targets: expected one of {', '.join(DTYPES)} for '{tensor.name}', got {tensor.dtype}; "
                "prune before quantizing, or leave it out, and it is copied as it is"
            )
        if not tensor.numel:
            raise ShapeError(f"targets: expected weights in '{tensor.name}', got shape {tensor.shape}; leave it out")
    return chosen


def find_tensors(what: str, entry: str, tensors: Sequence[TensorInfo]) -> list[str]:
    """Return the names ``entry`` reaches; raise TargetError calling it an entry of ``what`` if there are none."""
    return _Index(tensors).find(what, entry)


def cover_tensors(
    tensors: Sequence[TensorInfo], targets: Sequence[str] | None, ignore: Sequence[str] | None
) -> Coverage:
    """Return the coverage of a checkpoint by what ``select_tensors`` chooses of it."""
    index = _Index(tensors)
    reached, ignored = index.reached(targets), index.ignored(ignore)
    chosen: list[CoveredTensor] = []
    left_out: list[CoveredTensor] = []
    for tensor in tensors:
        name = tensor.name
        if name in reached:
            reason = f"{IGNORED} {ignored[name]!r}" if name in ignored else ""
        else:
            role = index.reason_against(name)
            reason = (role if targets is None or role == SMALL else index.obstacle(name)) or NOT_A_TARGET
        covered = CoveredTensor(name, tensor.shape, tensor.dtype, reason, index.is_free(name))
        (left_out if reason else chosen).append(covered)
    return Coverage(tuple(chosen), tuple(left_out))


class _Index:
    """Every name of a checkpoint, and what the tensor is."""

    def __init__(self, tensors: Sequence[TensorInfo]) -> None:
        self.by_name = {tensor.name: tensor for tensor in tensors}
        self._effective = {name: effective_name(name, self.by_name) for name in self.by_name}

    @cached_property
    def _roles(self) -> Roles:
        return Roles({name: Facts(tensor.shape) for name, tensor in self.by_name.items()})

    def reached(self, targets: Sequence[str] | None) -> set[str]:
        if targets is None:
            return {name for name in self.by_name if self.reason_against(name) is None}
        return {name for entry in targets for name in self.find_target(entry)}

    def ignored(self, ignore: Sequence[str] | None) -> dict[str, str]:
        """Return {name: the first entry that reaches it}."""
        ignored: dict[str, str] = {}
        for entry in ignore or ():
            ignored = dict.fromkeys(self.find("ignore", entry), entry) | ignored
        return ignored

    def reason_against(self, name: str) -> str | None:
        """Return why the tensor is no default target; None if it is one."""
        role = self._roles.reason_against(name)
        return role if role == SMALL else self.obstacle(name) or role

    def obstacle(self, name: str) -> str | None:
        """Return why the tensor cannot be pruned."""
        tensor = self.by_name[name]
        if tensor.dtype not in DTYPES:
            if tensor.dtype.startswith("C"):
                return COMPLEX
            return QUANTIZED if tensor.dtype in PACKED or tensor.dtype.startswith("F") else NO_WEIGHTS
        return self._roles.obstacle(name) if tensor.numel else "empty"

    def is_free(self, name: str) -> bool:
        """Whether a module or a pattern in ``targets`` takes the tensor."""
        return self._roles.reason_against(name) != SMALL and self.obstacle(name) is None

    def largest_left_out(self) -> str:
        """Say of the largest tensor why it is no default target, if it is none."""
        largest = max(self.by_name.values(), key=lambda tensor: tensor.nbytes, default=None)
        reason = None if largest is None else self.reason_against(largest.name)
        return "" if largest is None or reason is None else f"; '{largest.name}' is left out: {reason}"

    def find(self, what: str, entry: str) -> list[str]:
        reached = reached_by_name(what, entry, self._effective)
        if not reached:
            names = [name for name in self.by_name if what != "targets" or self.is_free(name)]
            near = difflib.get_close_matches(entry.removeprefix("re:"), names, n=3, cutoff=0.5) or names[:3]
            raise TargetError(
                f"{what}: expected names, globs or 're:' patterns found in the checkpoint, got {entry!r}, "
                f"which matches nothing; there are e.g. {', '.join(map(repr, near))}"
            )
        return reached

    def find_target(self, entry: str) -> list[str]:
        reached = self.find("targets", entry)
        free = [name for name in reached if self.is_free(name)]
        if entry in self.by_name or (free and entry in self._effective.values()):
            return [entry] if entry in self.by_name else free
        if not free:
            largest = max((self.by_name[name] for name in reached), key=lambda tensor: tensor.numel)
            reason = self.obstacle(largest.name) or self._roles.reason_against(largest.name)
            raise TargetError(
                f"targets: expected floating-point weights of two or more dimensions, got {entry!r}, which matches "
                f"only others; '{largest.name}' of dtype {largest.dtype}, for one, is {reason}"
            )
        return free
