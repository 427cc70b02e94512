"""Renames that replace nothing, or only what they are meant to, in one step where the file system has one."""

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
    """Move a file or folder to a name that is free; raise FileExistsError if it is taken, even at the last moment."""
    if _rename(source, target, RENAME_NOREPLACE):
        return
    if source.is_dir():
        # An empty folder takes the name first; the rename then replaces it.
        target.mkdir(mode=0o700)
        source.replace(target)
    else:
        os.link(source, target)
        source.unlink()


def rename_over(source: Path, target: Path) -> None:
    """Move a file or folder over one of the same kind, which is gone afterwards or lies where the new one was."""
    if not source.is_dir():
        source.replace(target)
    elif not _rename(source, target, RENAME_EXCHANGE):
        # The file system has no single step. Stopped between these two, the old output is found under this name.
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
