"""Choice of the tensors of a checkpoint to prune. Only names, dtypes and shapes are known there, no module types."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from gmp_kernels.checkpoints.files import DTYPES, TensorInfo
from gmp_kernels.coverage import IGNORED, NOT_A_TARGET, Coverage, CoveredTensor
from gmp_kernels.errors import DTypeError, ShapeError, TargetError
from gmp_kernels.roles import COMPLEX, DEFAULT_RULE, NO_WEIGHTS, QUANTIZED, SMALL, Facts, Roles, effective_name
from gmp_kernels.targets import reached_by_name

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
    if targets is None:
        reached = {name for name in index.by_name if index.reason_against(name) is None}
    else:
        reached = {name for entry in targets for name in index.find_target(entry)}
    ignored = {name for entry in ignore or () for name in index.find("ignore", entry)}
    chosen = [tensor for tensor in tensors if tensor.name in reached - ignored]
    if not chosen:
        raise TargetError(
            f"targets: expected at least one tensor to prune, got none from targets={targets!r} and ignore={ignore!r}; "
            f"by default these are {DEFAULT_RULE}"
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
    tensors: Sequence[TensorInfo], chosen: Sequence[TensorInfo], ignore: Sequence[str] | None, *, by_default: bool
) -> Coverage:
    """Return the coverage of a checkpoint by the tensors that ``select_tensors`` has chosen."""
    index = _Index(tensors)
    names = {tensor.name for tensor in chosen}
    ignored: dict[str, str] = {}
    for entry in ignore or ():
        ignored = dict.fromkeys(index.find("ignore", entry), f"{IGNORED} {entry!r}") | ignored
    covered = []
    for tensor in tensors:
        reason = "" if tensor.name in names else index.reason_against(tensor.name)
        if reason not in (None, "", SMALL) and not by_default:
            reason = index.obstacle(tensor.name)
        if reason is None:
            reason = ignored.get(tensor.name, NOT_A_TARGET)
        covered.append(CoveredTensor(tensor.name, tensor.shape, tensor.dtype, reason, index.is_free(tensor.name)))
    return Coverage(tuple(t for t in covered if not t.reason), tuple(t for t in covered if t.reason))


class _Index:
    """Every name of a checkpoint, and what the tensor is."""

    def __init__(self, tensors: Sequence[TensorInfo]) -> None:
        self.by_name = {tensor.name: tensor for tensor in tensors}
        self._effective = {name: effective_name(name, self.by_name) for name in self.by_name}
        self._roles = Roles({name: Facts(tensor.shape) for name, tensor in self.by_name.items()})

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
            name = max(reached, key=lambda name: self.by_name[name].numel)
            role = self._roles.reason_against(name)
            raise TargetError(
                f"targets: expected floating-point weights of two or more dimensions, got {entry!r}, "
                f"which matches others only; '{name}' of dtype {self.by_name[name].dtype}, for one, is {self.obstacle(name) or role}"
            )
        return free
