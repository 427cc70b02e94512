"""Functions on tiles, shared by all Triton kernels: the row of a chunk, its weights, their mask bits and keys.

A tile is one chunk of BLOCK weights of one tensor, as rows of eight whose mask bits are one byte.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Fields of a table's rows, eight-byte integers: those of every row, of a layer, of an UpdateTensor and of a StateMove.
# Of a layer, SCORES and what follows are there if it is not plain: what ranks it, the three numbers of its pattern, and
# how many units of other layers come before its own.
N, FIRST, WEIGHTS, MASK = map(tl.constexpr, range(4))
CHANNELS, POSITIONS, SCORES, PATTERN, FIRST_UNIT = map(tl.constexpr, (4, 5, 6, 7, 10))
MASTER, STATE, CHUNK_OFFSETS = map(tl.constexpr, (4, 5, 8))
SOURCE, SOURCE_MASK, SOURCE_OFFSETS, TARGET, TARGET_MASK, TARGET_OFFSETS = map(tl.constexpr, range(2, 8))
FIELDS = tl.constexpr(11)

NO_INDEX = tl.constexpr((1 << 63) - 1)
COUNTERS = tl.constexpr(4)  # per slot, to fill a cache sector; two are used


@triton.jit
def row_of(table, owners, chunk, BLOCK: tl.constexpr):
    """The row that a chunk belongs to, and the flat index of its first weight."""
    row = table + tl.load(owners + chunk).to(tl.int64) * FIELDS
    return row, (chunk - tl.load(row + FIRST)) * BLOCK


@triton.jit
def end_of_segment(row, chunk, run, BLOCK: tl.constexpr):
    """The end of the chunks in both this chunk's layer and its run of ``run`` chunks."""
    return tl.minimum((chunk // run + 1) * run, tl.load(row + FIRST) + (tl.load(row + N) + BLOCK - 1) // BLOCK)


@triton.jit
def pointer_to(address, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def places(begin, BLOCK: tl.constexpr):
    """Flat indices in rows of eight."""
    return (begin + tl.arange(0, BLOCK // 8) * 8)[:, None] + tl.arange(0, 8)[None, :]


@triton.jit
def mask_bytes(address, begin, n, BLOCK: tl.constexpr, FULL: tl.constexpr):
    """Mask bits of a chunk, a byte per row; all ones without a mask. FULL: the tensor does not end in this chunk."""
    place = begin // 8 + tl.arange(0, BLOCK // 8)
    if address != 0:
        pointer = address.to(tl.pointer_type(tl.uint8)) + place
        bits = (tl.load(pointer) if FULL else tl.load(pointer, mask=place * 8 < n, other=0)).to(tl.int32)
    else:
        bits = tl.full([BLOCK // 8], 255, tl.int32)
    return bits


@triton.jit
def spread(bits, index, n, FULL: tl.constexpr):
    """Booleans from mask bytes, one per weight."""
    flags = (bits[:, None] >> tl.arange(0, 8)[None, :]) & 1 != 0
    return flags if FULL else flags & (index < n)


@triton.jit
def load_rows(pointer, index, n, rows, FULL: tl.constexpr):
    """The weights of the rows in ``rows``, zeros for the others; loaded as vectors if FULL."""
    return tl.load(pointer + index, mask=rows[:, None] if FULL else rows[:, None] & (index < n), other=0)


@triton.jit
def store_rows(pointer, index, n, rows, values, FULL: tl.constexpr):
    tl.store(pointer + index, values, mask=rows[:, None] if FULL else rows[:, None] & (index < n))


@triton.jit
def store_bits(address, begin, n, flags, BLOCK: tl.constexpr):
    """Store the mask bits of a chunk."""
    packed = tl.sum(flags.to(tl.int32) << tl.arange(0, 8)[None, :], axis=1)
    place = begin // 8 + tl.arange(0, BLOCK // 8)
    tl.store(address.to(tl.pointer_type(tl.uint8)) + place, packed.to(tl.uint8), mask=place * 8 < n)


@triton.jit
def widen(raw, dtype: tl.constexpr):
    """Bits of a weight as a number of the type of the arithmetic."""
    if dtype == tl.bfloat16:
        values = (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif dtype == tl.float16:
        values = raw.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        values = raw.to(dtype, bitcast=True)
    return values


@triton.jit
def magnitude_keys(raw, INFINITY: tl.constexpr):
    """Keys as in csrc/order/magnitude_key.h: bits without the sign, one key for all NaN; in 32 bits if they fit."""
    if raw.dtype == tl.int64:
        keys = raw & 0x7FFFFFFFFFFFFFFF
    elif raw.dtype == tl.int32:
        keys = raw & 0x7FFFFFFF
    else:
        keys = raw.to(tl.int32) & 0x7FFF
    return tl.minimum(keys, INFINITY + 1)


@triton.jit
def flags_before(flags, BLOCK: tl.constexpr):
    """Number of flags set before each, in the order of the weights."""
    flat = tl.reshape(flags.to(tl.int32), [BLOCK])
    return tl.reshape(tl.cumsum(flat, 0) - flat, [BLOCK // 8, 8])
