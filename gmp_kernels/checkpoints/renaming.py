"""Renames that replace nothing, or exactly what they are meant to, each in one step where the file system has one."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from pathlib import Path

__all__ = ["rename_new", "rename_over"]

AT_FDCWD = -100
RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2


def rename_new(source: Path, target: Path) -> None:
    """Move a file or folder to a name that nothing has; raise FileExistsError if something has it, whenever it came."""
    if _rename(source, target, RENAME_NOREPLACE):
        return
    if source.is_dir():
        # The name is taken first, by a folder that is empty, which the rename then replaces.
        target.mkdir(mode=0o700)
        source.replace(target)
    else:
        os.link(source, target)
        source.unlink()


def rename_over(source: Path, target: Path) -> None:
    """Move a file or folder to a name that one of the same kind has, which is gone afterwards, or in its place."""
    if not source.is_dir():
        source.replace(target)
    elif not _rename(source, target, RENAME_EXCHANGE):
        # Two steps where the file system has no single one; stopped between them, the old output is under this name.
        old = target.with_name(f".{target.name}.replaced")
        if os.path.lexists(old):
            raise FileExistsError(errno.EEXIST, f"{old.name} beside it is in the way")
        target.rename(old)
        source.rename(target)
        shutil.rmtree(old)


def _rename(source: Path, target: Path, flags: int) -> bool:
    """Rename with flags of Linux; return False if the file system does not know them."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code not in (errno.EINVAL, errno.ENOSYS):
        raise OSError(code, os.strerror(code), os.fspath(source), None, os.fspath(target))
    return False
