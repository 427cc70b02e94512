"""Files through two buffers of fixed size: read a piece into one while a thread writes the other.

Reading and writing calls rather than a memory map: a map of a file that shrinks, or of a disk that is full or fails,
kills the process by a signal, and what it has touched counts as memory of the process.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

import torch

from gmp_kernels.checkpoints.files import TensorInfo
from gmp_kernels.errors import CheckpointError

__all__ = ["PIECE_UNIT", "Source", "Stream", "created"]

# Bytes of 8 elements of the widest dtype: no piece begins within a byte of a packed mask.
PIECE_UNIT = 64
# What the kernel says when two files are of kinds between which it copies nothing itself.
NO_KERNEL_COPY = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}


class Source:
    """A file being read; a context manager.

    Parameters
    ----------
    path : os.PathLike
    """

    def __init__(self, path: os.PathLike[str]) -> None:
        self.path = path

    def __enter__(self) -> Self:
        self.descriptor = os.open(self.path, os.O_RDONLY)
        os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return self

    def __exit__(self, *_error: object) -> None:
        os.close(self.descriptor)

    def read(self, buffer: torch.Tensor, offset: int) -> None:
        """Fill ``buffer``, of uint8, with the bytes from ``offset`` on.

        Raises
        ------
        CheckpointError
            The file ends before, or cannot be read.
        """
        view = buffer.numpy().data
        try:
            while view:
                count = os.preadv(self.descriptor, [view], offset)
                if not count:
                    raise CheckpointError(f"{self.path}: expected {len(view)} more bytes at {offset}, got the end")
                view, offset = view[count:], offset + count
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read at byte {offset}: {error.strerror}") from error


class Stream:
    """The two buffers and the thread; a context manager.

    Parameters
    ----------
    piece_bytes : int
        Of each buffer; a multiple of PIECE_UNIT.
    """

    def __init__(self, piece_bytes: int) -> None:
        self.piece_bytes = piece_bytes
        self._buffers = [torch.empty(piece_bytes, dtype=torch.uint8) for _ in range(2)]
        self._writes: list[Future[None] | None] = [None, None]
        self._current = 0
        self._thread = ThreadPoolExecutor(1, "gmp-kernels-writer")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def pieces(self, source: Source, begin: int, nbytes: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Read a range of a file; yield each piece, of uint8, with its place in the range.

        A piece may be changed, and passed to ``write``, until the next one is asked for.
        """
        for offset in range(0, nbytes, self.piece_bytes):
            self._current = 1 - self._current
            self._wait(self._current)
            piece = self._buffers[self._current][: min(self.piece_bytes, nbytes - offset)]
            source.read(piece, begin + offset)
            yield offset, piece

    def weights(self, source: Source, tensor: TensorInfo, dtype: torch.dtype) -> Iterator[tuple[int, torch.Tensor]]:
        """Read a tensor; yield pieces of it, flat, each with the flat index of its first element."""
        for offset, piece in self.pieces(source, tensor.begin, tensor.nbytes):
            yield offset // dtype.itemsize, piece.view(dtype)

    def write(self, descriptor: int, tensor: torch.Tensor, offset: int) -> None:
        """Write the bytes of ``tensor`` from ``offset`` on, soon; errors come with a later call."""
        waiting = self._writes[self._current]
        self._writes[self._current] = self._thread.submit(_write, descriptor, tensor, offset, waiting)

    def copy(self, source: Source, begin: int, nbytes: int, descriptor: int, offset: int) -> None:
        """Copy a range of bytes from file to file, within the kernel where it can."""
        try:
            while nbytes:
                count = os.copy_file_range(source.descriptor, descriptor, nbytes, begin, offset)
                if not count:
                    break  # reading says what is wrong
                begin, offset, nbytes = begin + count, offset + count, nbytes - count
        except OSError as error:
            if error.errno not in NO_KERNEL_COPY:
                raise
        for place, piece in self.pieces(source, begin, nbytes):
            self.write(descriptor, piece, offset + place)

    def flush(self) -> None:
        """Wait until everything is written."""
        for i in range(len(self._writes)):
            self._wait(i)

    def _wait(self, i: int) -> None:
        pending, self._writes[i] = self._writes[i], None
        if pending is not None:
            pending.result()


@contextlib.contextmanager
def created(path: Path) -> Iterator[int]:
    """Open a file to be written, empty, in a folder made if it is not there; yield its descriptor."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _write(descriptor: int, tensor: torch.Tensor, offset: int, before: Future[None] | None) -> None:
    if before is not None:
        before.result()  # for its error: nothing that comes after it counts
    view = tensor.view(torch.uint8).numpy().data
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count
