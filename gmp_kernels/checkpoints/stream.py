"""Files through a few buffers of fixed size: while one is worked on, threads read the next and write those before.

Reading and writing calls rather than a memory map: a map of a file that shrinks, or of a disk that is full or fails,
kills the process by a signal, and what it has touched counts as memory of the process.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Self

import torch

from gmp_kernels.checkpoints.files import TensorInfo
from gmp_kernels.errors import CheckpointError

__all__ = ["PIECE_UNIT", "Source", "Stream"]

# Bytes of 8 elements of the widest dtype: no piece begins within a byte of a packed mask.
PIECE_UNIT = 64
NUM_BUFFERS = 4
# Bytes per call. The page cache takes memory in blocks as large as the call; large free ones are rare, and in a virtual
# machine often not there before they are touched, which has been seen to make this five times slower.
WRITE_BYTES = 1 << 18
# After so many bytes the disk is told to begin, so that it works while more is read and computed.
SYNC_BYTES = 1 << 28
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
    """The buffers and the threads; a context manager.

    Parameters
    ----------
    piece_bytes : int
        Of each buffer; a multiple of PIECE_UNIT.
    """

    def __init__(self, piece_bytes: int) -> None:
        self.piece_bytes = piece_bytes
        self._buffers = [torch.empty(piece_bytes, dtype=torch.uint8) for _ in range(NUM_BUFFERS)]
        self._writes: list[Future[None] | None] = [None] * NUM_BUFFERS
        self._current = 0
        self._reader = ThreadPoolExecutor(1, "gmp-kernels-reader")
        self._writer = ThreadPoolExecutor(1, "gmp-kernels-writer")
        self._syncer = ThreadPoolExecutor(1, "gmp-kernels-syncer")
        self._sync: Future[None] | None = None
        self._unsynced = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        for threads in (self._reader, self._writer, self._syncer):
            threads.shutdown(cancel_futures=True)

    @contextlib.contextmanager
    def created(self, path: Path) -> Iterator[int]:
        """Open a file to be written, empty, in a folder made if it is not there; yield its descriptor.

        At the end of the block, if it has not raised, everything is written and has reached the disk.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            yield descriptor
            for i in range(NUM_BUFFERS):
                self._wait(i)
            self._wait_for_sync()
            os.fsync(descriptor)
        finally:
            # Nothing may write to a descriptor that is closed: the number can be that of another file by then.
            wait([future for future in (*self._writes, self._sync) if future is not None])
            os.close(descriptor)

    def pieces(self, source: Source, begin: int, nbytes: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Read a range of a file; yield each piece, of uint8, with its place in the range.

        A piece may be changed, and passed to ``write``, until the next one is asked for.
        """
        offset = 0
        ahead = self._read_ahead(source, begin, nbytes) if nbytes else None
        while ahead is not None:
            piece = ahead.result()
            self._current = (self._current + 1) % NUM_BUFFERS
            end = offset + piece.nbytes
            ahead = self._read_ahead(source, begin + end, nbytes - end) if end < nbytes else None
            yield offset, piece
            offset = end

    def weights(self, source: Source, tensor: TensorInfo, dtype: torch.dtype) -> Iterator[tuple[int, torch.Tensor]]:
        """Read a tensor; yield pieces of it, flat, each with the flat index of its first element."""
        for offset, piece in self.pieces(source, tensor.begin, tensor.nbytes):
            yield offset // dtype.itemsize, piece.view(dtype)

    def write(self, descriptor: int, tensor: torch.Tensor, offset: int) -> None:
        """Write the bytes of ``tensor`` from ``offset`` on, soon; errors come with a later call."""
        waiting = self._writes[self._current]
        self._writes[self._current] = self._writer.submit(_write, descriptor, tensor, offset, waiting)
        self._unsynced += tensor.nbytes
        if self._unsynced >= SYNC_BYTES and (self._sync is None or self._sync.done()):
            self._wait_for_sync()
            self._unsynced, self._sync = 0, self._syncer.submit(os.fdatasync, descriptor)

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

    def _read_ahead(self, source: Source, begin: int, nbytes: int) -> Future[torch.Tensor]:
        """Begin to read into the buffer after the current one."""
        i = (self._current + 1) % NUM_BUFFERS

        def read() -> torch.Tensor:
            self._wait(i)
            piece = self._buffers[i][: min(self.piece_bytes, nbytes)]
            source.read(piece, begin)
            return piece

        return self._reader.submit(read)

    def _wait(self, i: int) -> None:
        pending, self._writes[i] = self._writes[i], None
        if pending is not None:
            pending.result()

    def _wait_for_sync(self) -> None:
        pending, self._sync = self._sync, None
        if pending is not None:
            pending.result()  # the system tells of each failure once, so it must not get lost here


def _write(descriptor: int, tensor: torch.Tensor, offset: int, before: Future[None] | None) -> None:
    if before is not None:
        before.result()  # for its error: nothing that comes after it counts
    view = tensor.view(torch.uint8).numpy().data
    while view:
        count = os.pwrite(descriptor, view[:WRITE_BYTES], offset)
        view, offset = view[count:], offset + count
