"""Permissions of outputs: those of the input, so that private checkpoints stay private."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ["keep_folder_permissions", "keep_permissions"]

OWNER = 0o700


def keep_permissions(descriptor: int, origin: os.stat_result, *, least: int = 0) -> None:
    """Give an open file or folder the permissions and, where that is allowed, the group of its ``origin``.

    Where the group cannot be given, the new group may do only what everybody may. ``least`` is granted in any case. A
    file system without permissions keeps its own.
    """
    mode = origin.st_mode & 0o777
    if os.fstat(descriptor).st_gid != origin.st_gid:
        try:
            os.fchown(descriptor, -1, origin.st_gid)
        except OSError:
            mode &= ~0o070 | (mode & 0o007) << 3
    with contextlib.suppress(PermissionError):
        os.fchmod(descriptor, mode | least)


def keep_folder_permissions(folder: Path, root: Path) -> None:
    """Give ``folder`` and all folders below it the permissions of their namesakes in ``root``.

    A folder without a namesake gets those of ``root`` itself. The owner keeps full access to all.
    """
    for path, _, _ in os.walk(folder):
        like = root / Path(path).relative_to(folder)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            keep_permissions(descriptor, (like if like.is_dir() else root).stat(), least=OWNER)
        finally:
            os.close(descriptor)
