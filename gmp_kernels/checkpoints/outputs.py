"""Checks of the place that an output is to have."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from gmp_kernels.errors import OutputError

__all__ = ["check_named", "check_target"]


def check_named(target: Path) -> None:
    """Refuse a path that does not end in the name of a file.

    Raises
    ------
    OutputError
    """
    if target.name in ("", "..") or "\0" in str(target):
        raise OutputError(f"{target}: expected the name of an output, got none in {os.fspath(target)!r}; add one")


def check_target(target: Path, inputs: Sequence[Path], *, root: Path, force: bool) -> None:
    """Refuse an output that is there, or that would lie in or above the input.

    Raises
    ------
    OutputError
    """
    try:
        _check_place(target, inputs, root)
        if os.path.lexists(target):
            _check_replaced(target, is_folder=root.is_dir(), force=force)
    except OutputError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # a RuntimeError is a loop of links
        reason = error.strerror if isinstance(error, OSError) else error
        raise OutputError(f"{target}: cannot be an output: {reason}; name another") from None


def _check_place(target: Path, inputs: Sequence[Path], root: Path) -> None:
    place = target.resolve()
    if not place.parent.is_dir():
        raise OutputError(f"{target}: expected its folder to be there, got none; create {target.parent}")
    if place.is_relative_to(root.resolve()) or any(path.resolve().is_relative_to(place) for path in (root, *inputs)):
        raise OutputError(f"{target}: expected an output apart from the input {root}, got one in or above it")


def _check_replaced(target: Path, *, is_folder: bool, force: bool) -> None:
    if not force:
        raise OutputError(f"{target}: expected a new output, got one that is there; replace it with --force")
    if not (target.is_dir() if is_folder else target.is_file()):
        found = "a folder" if target.is_dir() else "a file" if target.is_file() else "neither file nor folder"
        raise OutputError(
            f"{target}: expected a {'folder' if is_folder else 'file'} to replace, like the input, got {found}; name "
            "another output, or remove it yourself"
        )
    if is_folder and any(target.iterdir()) and not any(path.is_file() for path in target.glob("*.safetensors")):
        raise OutputError(f"{target}: expected a checkpoint to replace, got a folder without any; remove it yourself")
    if not is_folder and target.stat().st_size and not _is_safetensors(target):
        raise OutputError(f"{target}: expected a checkpoint to replace, got another file; remove it yourself")


def _is_safetensors(path: Path) -> bool:
    try:
        with safe_open(path, "numpy"):
            return True
    except (SafetensorError, OSError):
        return False
