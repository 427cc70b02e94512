"""The place of an output: checks of it, permissions like those of the input, and renames that replace nothing else.

A private checkpoint stays private. Renaming is a single step where the file system supports that.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from gmp_kernels.checkpoints.files import open_checkpoint
from gmp_kernels.errors import CheckpointError, OutputError

__all__ = [
    "check_named",
    "check_target",
    "keep_folder_permissions",
    "keep_permissions",
    "rename_new",
    "rename_over",
    "reserve",
]

OWNER = 0o700
# What a file system says that has no room for a file.
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
AT_FDCWD = -100
RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2


def check_named(target: Path) -> None:
    """Refuse a path that does not end in the name of a file.

    Raises
    ------
    OutputError
    """
    if target.name in ("", "..") or "\0" in str(target):
        raise OutputError(f"{target}: expected the name of an output, got none in {os.fspath(target)!r}; add one")


def check_target(target: Path, inputs: Sequence[Path], *, root: Path, force: bool) -> None:
    """Refuse an output that exists already, or that would lie in or above the input.

    Raises
    ------
    OutputError
    """
    try:
        place = target.resolve()
        if not place.parent.is_dir():
            raise OutputError(f"{target}: expected its folder to be there, got none; create {target.parent}")
        if place.is_relative_to(root.resolve()) or any(p.resolve().is_relative_to(place) for p in (root, *inputs)):
            raise OutputError(f"{target}: expected an output apart from the input {root}, got one in or above it")
        if os.path.lexists(target):
            _check_replaced(target, is_folder=root.is_dir(), force=force)
    except OutputError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # a RuntimeError is a loop of links
        reason = error.strerror if isinstance(error, OSError) else error
        raise OutputError(f"{target}: cannot be an output: {reason}; name another") from None


def reserve(descriptor: int, num_bytes: int) -> None:
    """Give a new file its size and its place on the disk, where the file system can do so without writing.

    Writing then takes half the time on ext4, which otherwise finds a place for every page. ``os.posix_fallocate`` would
    write to every block where the file system cannot.

    Raises
    ------
    OSError
        There is no room.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if num_bytes and libc.fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(num_bytes)) != 0:
        code = ctypes.get_errno()
        if code in NO_ROOM:
            raise OSError(code, os.strerror(code))


def keep_permissions(descriptor: int, origin: os.stat_result, *, least: int = 0) -> None:
    """Give an open file or folder the permissions and, where that is allowed, the group of its ``origin``.

    If the group cannot be given, the group that the file has gets only the permissions of everybody. ``least`` is
    granted in any case. On a file system without permissions, nothing changes.
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


def rename_new(source: Path, target: Path) -> None:
    """Move a file or folder to a free name; raise FileExistsError if the name is taken, even at the last moment."""
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
    """Move a file or folder over one of the same kind, which is then gone or has the old name of the new one."""
    if not source.is_dir():
        source.replace(target)
    elif not _rename(source, target, RENAME_EXCHANGE):
        # The file system has no single step. If a run is stopped between the two renames, the old output has this name.
        old = target.with_name(f".{target.name}.replaced")
        if os.path.lexists(old):
            raise FileExistsError(errno.EEXIST, f"{old.name} beside it is in the way")
        target.rename(old)
        source.rename(target)
        shutil.rmtree(old)


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
    if not is_folder and target.stat().st_size:
        try:
            open_checkpoint(target)
        except CheckpointError:
            raise OutputError(
                f"{target}: expected a checkpoint to replace, got another file; remove it yourself"
            ) from None


def _rename(source: Path, target: Path, flags: int) -> bool:
    """Rename with flags of Linux; return False if the file system does not support them."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code not in (errno.EINVAL, errno.ENOSYS):
        raise OSError(code, os.strerror(code), os.fspath(source), None, os.fspath(target))
    return False
