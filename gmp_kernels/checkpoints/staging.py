"""The folder where a new checkpoint grows before it gets its name, so that its name never stands for half of one.

Beside the output ``NAME`` there is, for as long as a run is not over, a folder ``.NAME.partial`` with

- ``files/``: what will be the output,
- ``run.json``: the settings of the run and the identity of its input,
- ``finished/``: what became of each shard that lies complete, and on the disk, in ``files/``,
- ``lock``: held by the run.

The last act of a run is a rename. Whatever stops it before leaves the name as it was, and the folder to go on from.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from gmp_kernels.errors import OutputError, StateError

__all__ = ["Staging", "check_target", "output_errors"]

RUN = "run.json"
AT_FDCWD = -100
RENAME_EXCHANGE = 2


@contextlib.contextmanager
def output_errors(target: Path) -> Iterator[None]:
    """Turn what the operating system says about writing into an error that names the output."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(
            f"{target}: cannot be written: {error.strerror or error}; nothing is there that was not there before, and "
            "the input is as it was"
        ) from error


def check_target(target: Path, inputs: Sequence[Path], *, root: Path, force: bool) -> None:
    """Refuse an output that is there, or that would lie in or above the input.

    Raises
    ------
    OutputError
    """
    is_folder = root.is_dir()
    place = target.resolve()
    if not place.parent.is_dir():
        raise OutputError(f"{target}: expected its folder to be there, got none; create {target.parent}")
    if place.is_relative_to(root.resolve()) or any(path.resolve().is_relative_to(place) for path in (root, *inputs)):
        raise OutputError(f"{target}: expected an output apart from the input {root}, got one in or above it")
    if not os.path.lexists(target):
        return
    if not force:
        raise OutputError(f"{target}: expected a new output, got one that is there; replace it with --force")
    if target.is_dir() != is_folder:
        raise OutputError(
            f"{target}: expected a {'folder' if is_folder else 'file'} to replace, like the input, got a "
            f"{'file' if is_folder else 'folder'}; name another output, or remove it yourself"
        )
    if is_folder and any(target.iterdir()) and not any(target.glob("*.safetensors")):
        raise OutputError(f"{target}: expected a checkpoint to replace, got a folder without any; remove it yourself")


class Staging:
    """The ``.partial`` folder of one output; a context manager that leaves it behind only if a shard is finished.

    Parameters
    ----------
    target : Path
        The output.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.folder = target.with_name(f".{target.name}.partial")
        self.files = self.folder / "files"
        self._finished = self.folder / "finished"
        self._lock: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._lock is None:
            return
        if not self.finished():
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)

    def begin(self, settings: Mapping[str, Any], *, resume: bool) -> None:
        """Make the folder ready for a run with these settings: as it was left if ``resume``, empty otherwise.

        Raises
        ------
        OutputError
            Another run holds the folder, or it cannot be written.
        StateError
            The run to resume had other settings or another input.
        """
        settings = json.loads(json.dumps(settings))
        with output_errors(self.target):
            self.folder.mkdir(exist_ok=True)
            self._hold()
            run = self.folder / RUN
            if resume and run.exists():
                _check_same(self.target, json.loads(run.read_text()), settings)
                return
            for path in self.folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != "lock":
                    path.unlink()
            self.files.mkdir()
            self._finished.mkdir()
            _write_durably(run, settings)

    def finish(self, shard: int, record: Any) -> None:
        """Note that a shard lies complete in ``files``, and what became of it."""
        _write_durably(self._finished / f"{shard:05}.json", record)

    def finished(self) -> dict[int, Any]:
        """Return {shard: record} of all that are noted."""
        return {int(path.stem): json.loads(path.read_text()) for path in sorted(self._finished.glob("*.json"))}

    def note(self, name: str, record: Any) -> None:
        """Remember something of the whole run."""
        _write_durably(self.folder / f"{name}.json", record)

    def noted(self, name: str) -> Any:
        """Return what was remembered under this name, None if nothing was."""
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def commit(self, renames: Mapping[str, Path]) -> None:
        """Give the files their names, {path in the folder: name}, each at once, and remove the folder.

        A file that is not in the folder got its name already, in a run that was stopped right here.
        """
        with output_errors(self.target):
            for folder, _, _ in os.walk(self.files):
                _sync(Path(folder))
            for name, target in renames.items():
                source = self.folder / name
                if not source.exists():
                    continue
                if source.is_dir() and target.exists():
                    # Once they are swapped, the old output lies here until it is removed. A run that was stopped
                    # meanwhile must not take it for its own: without its settings it begins anew.
                    (self.folder / RUN).unlink(missing_ok=True)
                    _sync(self.folder)
                _rename(source, target)
                _sync(target.parent)
            shutil.rmtree(self.folder)

    def _hold(self) -> None:
        self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            self._lock = None
            raise OutputError(f"{self.target}: another run is writing it; wait for its end, or stop it") from None


def _check_same(target: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for key in now:
        if before.get(key) != now[key]:
            what = "another input" if key == "input" else f"{key}={before.get(key)!r}, now it is {now[key]!r}"
            raise StateError(
                f"{target}: expected the run to resume to have the same input and settings, but it had {what}; "
                "give the same, or begin anew without --resume"
            )


def _write_durably(path: Path, document: Any) -> None:
    temporary = path.with_name(f"{path.name}.new")
    with temporary.open("w") as file:
        json.dump(document, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename(source: Path, target: Path) -> None:
    """Move a file or folder to where there may be one already, which is gone afterwards."""
    if not source.is_dir() or not target.exists():
        source.replace(target)
    elif not _exchange(source, target):
        # Two steps where the file system has no single one; stopped between them, the old output is under this name.
        old = target.with_name(f".{target.name}.replaced")
        target.rename(old)
        source.rename(target)
        shutil.rmtree(old)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step; return False if the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code not in (errno.EINVAL, errno.ENOSYS):
        raise OSError(code, os.strerror(code), os.fspath(other))
    return False
