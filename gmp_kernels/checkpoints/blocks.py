"""Writes of whole blocks straight from memory to the disk, without a copy in the page cache.

A run ends when its output is on the disk. To copy it to the page cache first, and to find pages for it there, can take
longer than the disk.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from functools import partial

__all__ = ["BLOCK", "BlockFile", "write_whole"]

BLOCK = 1 << 12  # multiples of this are places that every disk can write to, and read from in memory
# Bytes per call. The page cache takes memory in blocks as large as the call. Large free blocks are rare, and a virtual
# machine often has none before they are touched, which can make writing five times slower.
WRITE_BYTES = 1 << 18


class BlockFile:
    """A file that is written from buffers, most of it past the page cache if its file system can do that.

    Parameters
    ----------
    descriptor : int
        The file, open for writing. It has to stay open, and takes what is no whole block.

    Attributes
    ----------
    is_direct : bool
        Whether the file system can do it.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._direct = -1
        with contextlib.suppress(OSError):
            self._direct = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_DIRECT)
        self.is_direct = self._direct >= 0
        # The end of the last data, which begins a block that is not whole yet.
        self._place, self._rest = 0, b""

    def close(self) -> None:
        """Close what this object has opened."""
        if self.is_direct:
            os.close(self._direct)
            self.is_direct = False

    def writes(self, memory: memoryview, offset: int) -> list[Callable[[], None]]:
        """Return the writes that bring data to ``offset``, to be called in any order; ``finish`` writes the rest.

        ``memory`` begins at a multiple of BLOCK. The data lies in it ``offset % BLOCK`` bytes from its beginning up to
        its end, and what lies in front of it may be changed.
        """
        shift = offset % BLOCK
        begin, last = offset - shift, len(memory) // BLOCK * BLOCK
        if not last:
            return [partial(write_whole, self._descriptor, memory[shift:], offset)]
        first, writes = 0, list[Callable[[], None]]()
        if self._place == begin and len(self._rest) == shift:
            memory[:shift] = self._rest
        else:
            first = BLOCK if shift else 0
            parts = (self._rest, self._place), (memory[shift:first], offset)
            writes = [partial(write_whole, self._descriptor, *part) for part in parts]
        self._place, self._rest = begin + last, bytes(memory[last:])
        return [*writes, partial(self._write, memory[first:last], begin + first)]

    def finish(self) -> None:
        """Write what has been left over, once the writes are done."""
        write_whole(self._descriptor, self._rest, self._place)

    def _write(self, blocks: memoryview, offset: int) -> None:
        written = 0
        try:
            written = os.pwrite(self._direct, blocks, offset)
        except OSError as error:
            if error.errno != errno.EINVAL:  # the answer of a file system whose blocks are larger
                raise
        write_whole(self._descriptor, blocks[written:], offset + written)


def write_whole(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of ``data``, even if the system takes it in parts."""
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view[:WRITE_BYTES], offset)
        view, offset = view[count:], offset + count
