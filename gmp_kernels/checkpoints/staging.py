"""The folder where a new checkpoint grows before it gets its name, so that the name never stands for half of one.

As long as a run is not over, there is a folder ``.NAME.partial`` beside the output ``NAME``, for its owner alone:

- ``gmp_kernels.lock``: held by the run; made first, to mark the folder as ours,
- ``files/``: the output as it grows,
- ``run.json``: the settings of the run and the identity of its input,
- ``decisions.json``: the cutoff of each tensor in global scope, once it is counted,
- ``finished/``: a report on each shard in ``files/`` that is complete and on the disk,
- ``placed.json``: the files that the run was about to give their names,
- ``replaced``: masks of an output that is being replaced by one without masks.

The last act of a run is a rename. If the run is stopped before, the name is as it was, and the folder is there to
resume from. A folder of that name without the lock, or with anything else in it, is not ours: it is refused, and never
emptied. A folder that has passed this check is reached by its descriptor, so that nobody can replace it by another.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, Self

from gmp_kernels.checkpoints.outputs import rename_new, rename_over
from gmp_kernels.errors import DTypeError, NonFiniteError, OutputError, StateError

__all__ = ["Staging", "output_errors"]

LOCK = "gmp_kernels.lock"
RUN = "run.json"
PLACED = "placed"
OWN = re.compile(r"gmp_kernels\.lock|files|finished|(run|decisions|placed)\.json(\.new)?|replaced|owner\..*")
# Errors that would come again in another run with the same input and settings.
HOPELESS = (DTypeError, NonFiniteError)


@contextlib.contextmanager
def output_errors(target: Path) -> Iterator[None]:
    """Turn errors of the operating system while writing into ones that name the output."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(
            f"{target}: cannot be written: {error.strerror or error}; nothing is there that was not there before, and "
            "the input is as it was"
        ) from error


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
        self._descriptor: int | None = None
        self._lock: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if self._lock is not None and (isinstance(error, HOPELESS) or not self._records()):
            with contextlib.suppress(OSError):
                self._remove()
        self._let_go()

    @property
    def files(self) -> Path:
        """The folder that will be the output, or holds it; call ``join`` or ``begin`` first."""
        return self._inside / "files"

    def begin(self, settings: Mapping[str, Any], *, resume: bool) -> None:
        """Make the folder ready for a run with these settings: kept as it was left if ``resume``, emptied otherwise.

        Raises
        ------
        OutputError
            Another run holds the folder, it is not ours, or it cannot be written.
        StateError
            The run to resume had other settings or another input.
        """
        settings = json.loads(json.dumps(settings))
        with output_errors(self.target):
            while not self._hold():
                pass
            run = self._inside / RUN
            if resume and run.exists():
                _check_same(self.target, self._read(run), settings)
                return
            self._clear()
            for folder in (self.files, self._inside / "finished"):
                folder.mkdir(mode=0o700)
            _write_durably(run, settings)

    def join(self) -> None:
        """Open the folder that another process has begun, if there is one.

        Raises
        ------
        OutputError
            No run of ours has made it.
        """
        with output_errors(self.target):
            if self._descriptor is None:
                self._open()

    def finish(self, shard: int, record: Any) -> None:
        """Note that a shard is complete in ``files``, with a report on it."""
        self.note(f"finished/{shard:05}", record)

    def finished(self) -> dict[int, Any]:
        """Return {shard: record} of all finished shards."""
        return {int(path.stem): self._read(path) for path in self._records()}

    def is_begun(self) -> bool:
        """Whether there is a run to resume."""
        return all(os.path.lexists(self._inside / name) for name in (LOCK, RUN))

    def note(self, name: str, record: Any) -> None:
        """Keep a record of the whole run under a name."""
        _write_durably(self._inside / f"{name}.json", record)

    def noted(self, name: str) -> Any:
        """Return the record of this name; None if there is none."""
        path = self._inside / f"{name}.json"
        return self._read(path) if path.exists() else None

    def has_placed(self, target: Path) -> bool:
        """Whether ``target`` was placed by a run that was stopped right after, and has not changed since."""
        with contextlib.suppress(OSError, StateError):
            placed = self.noted(PLACED)
            # A run without its settings is over.
            is_open = (self._inside / RUN).exists()
            return is_open and isinstance(placed, dict) and placed.get(target.name) == _identity(target)
        return False

    def commit(self, renames: Mapping[str, Path], *, force: bool, old: Path | None = None) -> None:
        """Rename the files, {path in the folder: final path}, each in one step, and remove the folder.

        A file that is not in the folder got its name already, in a run that was stopped right here. ``old`` is a file
        to remove with the output that is replaced.

        Raises
        ------
        OutputError
            Without ``force``, a name has been taken during the run. The file there stays, and so do finished shards.
        """
        with output_errors(self.target):
            for folder, _, _ in os.walk(self.files):
                sync(Path(folder))
            moves = [(self._inside / name, target) for name, target in renames.items()]
            moves = [(source, target) for source, target in moves if os.path.lexists(source)]
            placed = self.noted(PLACED) or {}
            self.note(PLACED, placed | {target.name: _identity(source) for source, target in moves})
            done: list[tuple[Path, Path]] = []
            try:
                if old is not None:
                    # Moved first, through to the disk, so that it never lies beside an output it does not belong to.
                    aside = self._inside / "replaced"
                    old.rename(aside)
                    done.append((old, aside))
                    sync(old.parent)
                for source, target in moves:
                    self._place(source, target, force=force)
                    done.append((source, target))
            except OSError:  # includes OutputError
                for source, target in done:
                    target.rename(source)
                raise
        try:
            self._remove()
        except OSError as error:
            raise OutputError(
                f"{self.target}: is written, but {self.folder} beside it cannot be removed: {error.strerror}; remove it"
            ) from error

    def _place(self, source: Path, target: Path, *, force: bool) -> None:
        try:
            rename_new(source, target)
        except FileExistsError:
            if not force:
                raise OutputError(
                    f"{target}: expected a new output, got one that has appeared meanwhile; it was kept, and so was "
                    "what is finished: --resume --force replaces it"
                ) from None
            if source.is_dir():
                # After the swap the old output lies here until it is removed. If this run is stopped until then, a
                # resumed one must not take it for its own work. Without settings it begins anew.
                (self._inside / RUN).unlink(missing_ok=True)
                sync(self._inside)
            rename_over(source, target)
        sync(target.parent)

    @property
    def _inside(self) -> Path:
        """The folder by its descriptor, even if another folder has its name by now; by name if there is no /proc."""
        path = Path(f"/proc/self/fd/{self._descriptor}")
        return path if self._descriptor is not None and path.exists() else self.folder

    def _records(self) -> list[Path]:
        return sorted((self._inside / "finished").glob(f"{'[0-9]' * 5}.json"))

    def _open(self) -> bool:
        """Open the folder, never through a link, and check that it is ours; return False if there is none."""
        try:
            self._descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            return False
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
            self._refuse("a file or a link")
        with os.scandir(self._descriptor) as entries:
            names = [entry.name for entry in entries]
        foreign = sorted(name for name in names if not OWN.fullmatch(name))
        if foreign or (names and LOCK not in names):
            self._refuse(f"a folder with {foreign[0] if foreign else names[0]!r} in it")
        return True

    def _refuse(self, found: str) -> NoReturn:
        raise OutputError(
            f"{self.target}: expected {self.folder.name} beside it, where the output grows, to be of an earlier run, "
            f"got {found} that no run has made; nothing was touched. Move it away, or name another output"
        )

    def _hold(self) -> bool:
        """Make and lock the folder; return False if a run that was ending has just removed it."""
        self._let_go()
        try:
            self.folder.mkdir(mode=0o700)
            made = True
        except FileExistsError:
            made = False
        if not self._open():
            return False
        assert self._descriptor is not None
        self._check_owner(self._descriptor)
        try:
            # Made before anything else, so that the folder is known as ours whenever a run is stopped.
            lock = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600, dir_fd=self._descriptor)
        except FileNotFoundError:
            return False
        except OSError:
            if made:
                self.folder.rmdir()
            raise
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), (self._inside / LOCK).lstat()):
                self._lock, lock = lock, -1
            return self._lock is not None
        except BlockingIOError:
            raise OutputError(f"{self.target}: another run is writing it; wait for its end, or stop it") from None
        except FileNotFoundError:
            return False
        finally:
            if lock >= 0:
                os.close(lock)

    def _check_owner(self, descriptor: int) -> None:
        """Refuse a folder that another user has made, who could replace the files that we write.

        On a network file system, a user's files may belong to another user, so the owner of a new file is compared.
        """
        owner = os.fstat(descriptor).st_uid
        if owner != os.geteuid():
            with tempfile.TemporaryFile(dir=self._inside, prefix="owner.") as probe:
                if os.fstat(probe.fileno()).st_uid != owner:
                    self._refuse(f"a folder of the user {owner}")
        with contextlib.suppress(PermissionError):
            # The folder is as private as its file system allows.
            os.fchmod(descriptor, 0o700)

    def _clear(self) -> None:
        """Remove all that runs have made, except the lock; settings first, since nothing resumes without them."""
        assert self._descriptor is not None
        with os.scandir(self._descriptor) as found:
            entries = sorted(found, key=lambda entry: entry.name != RUN)
        for entry in entries:
            if entry.name == LOCK or not OWN.fullmatch(entry.name):
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.name, dir_fd=self._descriptor)
            else:
                os.unlink(entry.name, dir_fd=self._descriptor)

    def _remove(self) -> None:
        assert self._descriptor is not None
        self._clear()
        # The lock goes last, so that the folder is held until then.
        os.unlink(LOCK, dir_fd=self._descriptor)
        with contextlib.suppress(OSError):
            # The folder stays if it holds files that are not ours.
            self.folder.rmdir()
        self._let_go()

    def _let_go(self) -> None:
        for descriptor in (self._lock, self._descriptor):
            if descriptor is not None:
                os.close(descriptor)
        self._lock = self._descriptor = None

    def _read(self, path: Path) -> Any:
        try:
            return json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise StateError(
                f"{self.target}: expected {path.name} of the run to resume, got one that cannot be read ({error}); "
                "begin anew without --resume"
            ) from None


def sync(folder: Path) -> None:
    """Wait until the names in a folder have reached the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_same(target: Path, before: Any, now: Mapping[str, Any]) -> None:
    before = before if isinstance(before, dict) else {}
    for key in now:
        if before.get(key) != now[key]:
            what = "another input" if key == "input" else f"{key}={before.get(key)!r}, now it is {now[key]!r}"
            raise StateError(
                f"{target}: expected the run to resume to have the same input and settings, but it had {what}; "
                "give the same, or begin anew without --resume"
            )


def _write_durably(path: Path, document: Any) -> None:
    temporary = path.with_name(f"{path.name}.new")
    temporary.unlink(missing_ok=True)
    with temporary.open("x") as file:
        json.dump(document, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


def _identity(path: Path) -> list[int]:
    """Return facts of a file or folder that a rename does not change."""
    found = path.lstat()
    return [found.st_dev, found.st_ino, found.st_mtime_ns]
