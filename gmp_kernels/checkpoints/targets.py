"""Choice of the tensors of a checkpoint to prune. Only names, dtypes and shapes are known there, no module types."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from gmp_kernels.checkpoints.files import DTYPES, TensorInfo
from gmp_kernels.errors import DTypeError, ShapeError, TargetError
from gmp_kernels.targets import compile_pattern, is_pattern, matches

__all__ = ["DEFAULT_RULE", "find_tensors", "select_tensors"]

DEFAULT_RULE = (
    "floating-point tensors of two or more dimensions whose name ends in 'weight', but no embeddings, norms or output "
    "heads (a part of the name contains 'embed' or 'norm', or is lm_head, wte, wpe, shared or ln_*)"
)
EXCLUDED = re.compile(r".*embed.*|.*norm.*|lm_head|wte|wpe|shared|ln_.*", re.IGNORECASE)


def select_tensors(
    tensors: Sequence[TensorInfo], targets: Sequence[str] | None, ignore: Sequence[str] | None
) -> list[TensorInfo]:
    """Return the tensors that ``targets`` reach and ``ignore`` does not, in the order given.

    Entries are names of tensors or modules, globs, or ``re:`` patterns, as ``GMPScheduler`` takes them. A module means
    its own ``weight`` and what ``DEFAULT_RULE`` finds below it; patterns in ``targets`` leave out tensors of fewer than
    two dimensions and of dtypes without a magnitude order, which an exact name does not.

    Raises
    ------
    TargetError
        An entry reaches nothing, or nothing is left.
    DTypeError, ShapeError
        A tensor named exactly has a dtype without a magnitude order, such as float8, or is empty.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    reached = {tensor.name for tensor in tensors if targets is None and _by_default(tensor)}
    for entry in targets or ():
        found = find_tensors("targets", entry, tensors)
        if is_pattern(entry):
            found = [name for name in found if _has_order(by_name[name]) and len(by_name[name].shape) >= 2]
            if not found:
                raise TargetError(
                    f"targets: expected floating-point tensors of two or more dimensions, got {entry!r}, which matches "
                    "only others; name those exactly if you mean them"
                )
        reached |= set(found)
    ignored = {name for entry in ignore or () for name in find_tensors("ignore", entry, tensors)}
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
    names = [tensor.name for tensor in tensors]
    if is_pattern(entry):
        pattern = compile_pattern(what, entry)
        reached = [name for name in names if matches(name, pattern)]
    else:
        below = f"{entry}."
        reached = [
            tensor.name
            for tensor in tensors
            if tensor.name in (entry, f"{entry}.weight") or (tensor.name.startswith(below) and _by_default(tensor))
        ]
    if not reached:
        near = difflib.get_close_matches(entry.removeprefix("re:"), names, n=3, cutoff=0.5) or names[:3]
        raise TargetError(
            f"{what}: expected names, globs or 're:' patterns found in the checkpoint, got {entry!r}, which matches "
            f"nothing; there are e.g. {', '.join(map(repr, near))}"
        )
    return reached


def _has_order(tensor: TensorInfo) -> bool:
    return tensor.dtype in DTYPES and tensor.numel > 0


def _by_default(tensor: TensorInfo) -> bool:
    *path, attribute = tensor.name.split(".")
    named = attribute == "weight" and not any(EXCLUDED.fullmatch(part) for part in path)
    return named and _has_order(tensor) and len(tensor.shape) >= 2
