"""Streams of files through a few buffers: threads read the next and write the last while one is worked on.

Files are read and written by calls, not memory maps. With a memory map, a file that shrinks or a disk that is full or
fails would kill the process by a signal, and touched pages would count as memory of the process.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from io import FileIO
from pathlib import Path
from typing import NamedTuple, Self

import torch

from gmp_kernels.checkpoints.blocks import BLOCK, BlockFile, write_whole
from gmp_kernels.checkpoints.files import Span
from gmp_kernels.checkpoints.outputs import keep_permissions
from gmp_kernels.errors import CheckpointError

__all__ = ["NOTHING", "PIECE_UNIT", "Piece", "Stream", "num_pieces", "opened", "read_into"]

# Bytes of 8 elements of the widest dtype, so that no piece begins within a byte of a packed mask.
PIECE_UNIT = 64
# Threads that write past the page cache, so that the disk always has more to do.
DIRECT_WRITERS = 3
# Bytes in the page cache after which a sync starts, so that the disk works while more is read and computed.
SYNC_BYTES = 1 << 28
# Errors of a kernel that cannot copy between these two files itself.
NO_KERNEL_COPY = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}
NOTHING = Span(0, 0)
# The future of work that is done.
DONE: Future[None] = Future()
DONE.set_result(None)


def opened(path: Path) -> FileIO:
    """Open a file that is read from its beginning to its end.

    Raises
    ------
    CheckpointError
    """
    try:
        file = FileIO(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
    return file


def read_into(buffer: torch.Tensor, source: FileIO, offset: int) -> None:
    """Fill ``buffer``, of uint8, with the bytes of a file from ``offset`` on.

    Raises
    ------
    CheckpointError
        The file ends too early, or cannot be read.
    """
    view = buffer.numpy().data
    try:
        while view:
            count = os.preadv(source.fileno(), [view], offset)
            if not count:
                raise CheckpointError(f"{source.name}: expected {len(view)} more bytes at {offset}, got the end")
            view, offset = view[count:], offset + count
    except OSError as error:
        raise CheckpointError(f"{source.name}: cannot be read at byte {offset}: {error.strerror}") from error


def num_pieces(span: Span, piece_bytes: int) -> int:
    """Return in how many pieces of up to so many bytes a range is read."""
    return -(-span.nbytes // _size(span, piece_bytes))


class Piece(NamedTuple):
    """Piece of a range of a file, in a buffer.

    Attributes
    ----------
    begin : int
        Offset in the range, in elements of ``data``.
    data : torch.Tensor
    buffer : int
        Number of the stream's buffer that holds it.
    """

    begin: int
    data: torch.Tensor
    buffer: int


class Stream:
    """Buffers and threads through which files pass; a context manager.

    Parameters
    ----------
    piece_bytes : int
        Size of each buffer; a multiple of PIECE_UNIT, and not below the unit of any range.
    num_buffers : int
        At least 2. They take turns, so a piece stays until as many others have been read.
    room_bytes : int
        Size of ``room``; a multiple of PIECE_UNIT.

    Attributes
    ----------
    room : torch.Tensor
        uint8, aligned. It holds candidates between the rounds of counting, so that files are nearly always read once.
    advance : callable
        Called with the number of bytes whenever some are done; does nothing unless another is assigned.
    """

    advance: Callable[[int], None] = staticmethod(lambda num_bytes: None)

    def __init__(self, piece_bytes: int, num_buffers: int, room_bytes: int = 0) -> None:
        self.room = torch.empty(room_bytes, dtype=torch.uint8, device="cpu")
        self._piece_bytes = piece_bytes
        # Each begins at a multiple of BLOCK, and has room for a piece that begins anywhere in its first block.
        size = -(-piece_bytes // BLOCK) * BLOCK + BLOCK
        memory = torch.empty(num_buffers * size + BLOCK, dtype=torch.uint8, device="cpu")
        begin = -memory.data_ptr() % BLOCK
        self._buffers = [memory[at : at + size] for at in range(begin, begin + num_buffers * size, size)]
        # The last write of each buffer; at the beginning, work that is done.
        self._writes = [DONE] * num_buffers
        self._next = 0
        # Reads of at most one range, begun before the range was requested.
        self._ahead: dict[tuple[FileIO, Span], list[Future[Piece]]] = {}
        self._reader = ThreadPoolExecutor(1, "gmp-kernels-reader")
        # To the page cache, where several would wait for each other, and past it.
        self._writer = ThreadPoolExecutor(1, "gmp-kernels-writer")
        self._direct_writer = ThreadPoolExecutor(DIRECT_WRITERS, "gmp-kernels-direct-writer")
        self._syncer = ThreadPoolExecutor(1, "gmp-kernels-syncer")
        self._sync = DONE
        self._unsynced = 0
        # {descriptor: file} of those that are being written.
        self._files: dict[int, BlockFile] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        for threads in (self._reader, self._writer, self._direct_writer, self._syncer):
            threads.shutdown(cancel_futures=True)

    @contextlib.contextmanager
    def created(self, path: Path, origin: FileIO) -> Iterator[int]:
        """Create a file with the permissions of ``origin``, and its folder; yield its descriptor.

        At the end of the block, unless it raises, everything is written and has reached the disk.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        # A file left by an interrupted run may be read-only.
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        file = self._files[descriptor] = BlockFile(descriptor)
        try:
            keep_permissions(descriptor, os.fstat(origin.fileno()))
            yield descriptor
            for write in self._writes:
                write.result()
            file.finish()
            self._wait_for_sync()
            os.fsync(descriptor)
        finally:
            # Nothing may write to a closed descriptor, because its number may by then be that of another file.
            wait([*self._writes, self._sync])
            del self._files[descriptor]
            file.close()
            os.close(descriptor)

    def holds(self, span: Span) -> bool:
        """Whether the buffers hold all pieces of a range at a time."""
        return num_pieces(span, self._piece_bytes) <= len(self._buffers)

    def pieces(
        self, source: FileIO, span: Span, dtype: torch.dtype = torch.uint8, following: Span = NOTHING
    ) -> Iterator[Piece]:
        """Read a range of a file; yield each piece, of this dtype.

        A piece may be changed and written until the next one is requested. If the buffers hold all pieces of the range,
        all may be, until the next range is requested. ``following`` is that next range, which is read ahead into
        buffers that are left over.
        """
        reads = self._ahead.pop((source, span), [])
        self._ahead.clear()
        num_buffers, count = len(self._buffers), num_pieces(span, self._piece_bytes)
        for i in range(count):
            self._begin_reads(reads, source, span, i + num_buffers)
            begin, data, buffer = reads[i].result()
            if data.data_ptr() % dtype.itemsize:
                # Few files hold tensors at such places. Elements in memory have to lie at multiples of their size.
                memory = self._buffers[buffer][: len(data)]
                memory.numpy()[:] = data.numpy()
                data = memory
            yield Piece(begin // dtype.itemsize, data.view(dtype), buffer)
        ahead = self._ahead[source, following] = []
        self._begin_reads(ahead, source, following, max(0, num_buffers - count))

    def write(self, descriptor: int, tensor: torch.Tensor, offset: int, buffer: int) -> None:
        """Write the bytes of ``tensor`` at ``offset``, in the background; a later call raises its error.

        ``buffer`` holds the piece that ``tensor`` is, or was made from. Nothing is read into it before the write ends.
        """
        file, memory, shift = self._files[descriptor], self._buffers[buffer], offset % BLOCK
        if file.is_direct and tensor.data_ptr() == memory.data_ptr() + shift:
            writer, writes = self._direct_writer, file.writes(memory[: shift + tensor.nbytes].numpy().data, offset)
        else:
            writer, data = self._writer, tensor.view(torch.uint8).numpy().data
            writes = [partial(write_whole, descriptor, data, offset)]
            self._unsynced += tensor.nbytes
        for write in writes:
            self._writes[buffer] = writer.submit(_write, write, self._writes[buffer])
        if self._unsynced >= SYNC_BYTES and self._sync.done():
            self._wait_for_sync()
            self._unsynced, self._sync = 0, self._syncer.submit(os.fdatasync, descriptor)

    def copy(self, source: FileIO, begin: int, nbytes: int, descriptor: int, offset: int) -> None:
        """Copy a range of bytes from file to file, within the kernel where it can."""
        try:
            while nbytes:
                count = os.copy_file_range(source.fileno(), descriptor, nbytes, begin, offset)
                if not count:
                    break  # the read below raises the error
                begin, offset, nbytes = begin + count, offset + count, nbytes - count
        except OSError as error:
            if error.errno not in NO_KERNEL_COPY:
                raise
        for piece in self.pieces(source, Span(begin, nbytes)):
            self.write(descriptor, piece.data, offset + piece.begin, piece.buffer)

    def _begin_reads(self, reads: list[Future[Piece]], source: FileIO, span: Span, until: int) -> None:
        """Append reads of the next pieces of a range to ``reads``, until it has ``until`` or all of them."""
        for begin in range(0, span.nbytes, _size(span, self._piece_bytes))[len(reads) : until]:
            reads.append(self._reader.submit(self._read, source, span, begin, self._next))
            self._next = (self._next + 1) % len(self._buffers)

    def _read(self, source: FileIO, span: Span, begin: int, buffer: int) -> Piece:
        self._writes[buffer].result()
        # In memory a piece begins as far from a multiple of BLOCK as in the file.
        shift = (span.begin + begin) % BLOCK
        data = self._buffers[buffer][shift : shift + min(_size(span, self._piece_bytes), span.nbytes - begin)]
        read_into(data, source, span.begin + begin)
        return Piece(begin, data, buffer)

    def _wait_for_sync(self) -> None:
        pending, self._sync = self._sync, DONE
        pending.result()  # the system reports each failure once, so it must not get lost here


def _size(span: Span, piece_bytes: int) -> int:
    """Return the bytes of each piece of a range but the last."""
    return piece_bytes // span.unit * span.unit


def _write(write: Callable[[], None], before: Future[None]) -> None:
    before.result()  # raises its error, after which no later write counts
    write()
