"""The counter of Triton: one read of the weights, each layer against its bracket."""

from __future__ import annotations

import triton
import triton.language as tl

from gmp_kernels.backends.triton.tiles import (
    COUNTERS,
    FIRST,
    MASK,
    NO_INDEX,
    WEIGHTS,
    N,
    end_of_segment,
    magnitude_keys,
    row_of,
)

# Columns of a request, each with an entry per layer; and fields of a layer's answer, behind its bins and counters.
LO, HI, SHIFT, CANDIDATES, CAPACITY = map(tl.constexpr, range(5))
CURSOR, NONFINITE, ANSWER_FIELDS = map(tl.constexpr, range(3))


@triton.jit
def _row_offsets(BLOCK: tl.constexpr, THREADS: tl.constexpr):
    """Beginnings of the rows of a chunk's tile; each of its columns belongs to one thread.

    So sums over columns cost no exchange, and the thread that loads a weight also lists it. With layouts that load 16
    bytes at once, keys, their places and the conditions would have to move to other threads before they are stored.
    Added to the pointers of the first row, these are constants of the loads.
    """
    return tl.arange(0, BLOCK // THREADS)[:, None] * THREADS


@triton.jit
def _bytes(mask, begin, n, BLOCK: tl.constexpr, THREADS: tl.constexpr, MASKED: tl.constexpr):
    """Mask bytes of a chunk's weights, eight times each."""
    if MASKED:
        place = tl.arange(0, BLOCK) // 8
        limit = tl.minimum(n - begin + 7, BLOCK).to(tl.int32) // 8
        there = place < tl.where(mask != 0, limit, 0)
        bytes = tl.load(mask.to(tl.pointer_type(tl.uint8)) + begin // 8 + place, mask=there, other=255).to(tl.int32)
        bytes = tl.reshape(bytes, [BLOCK // THREADS, THREADS])
    else:
        bytes = tl.full([BLOCK // THREADS, THREADS], 255, tl.int32)
    return bytes


@triton.jit
def _raw(
    weights, begin, n, bytes, exists, BLOCK: tl.constexpr, THREADS: tl.constexpr, MASKED: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    pointers = (weights + begin + tl.arange(0, THREADS))[None, :]
    there = _everywhere(exists, THREADS)
    if MASKED:
        there = there & (bytes != 0)
    if not FULL:
        there = there & _there(begin, n, BLOCK, THREADS)
    return tl.load(pointers + _row_offsets(BLOCK, THREADS), mask=there, other=0)


@triton.jit
def _everywhere(condition, THREADS: tl.constexpr):
    """One condition for all columns, in a form that loads take under the interpreter too."""
    return (tl.arange(0, THREADS) < tl.where(condition, THREADS, 0))[None, :]


@triton.jit
def _there(begin, n, BLOCK: tl.constexpr, THREADS: tl.constexpr):
    """Mask of the weights of a chunk that exist."""
    offsets = _row_offsets(BLOCK, THREADS) + tl.arange(0, THREADS)[None, :]
    return offsets < tl.minimum(n - begin, BLOCK).to(tl.int32)


@triton.jit
def _keys(
    raw, bytes, begin, n, INFINITY: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr, MASKED: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """Keys of a chunk's weights; pruned or missing ones get -1, which lies below every bracket."""
    keys = magnitude_keys(raw, INFINITY)
    if MASKED:
        keys = tl.where((bytes >> (tl.arange(0, THREADS) % 8)[None, :]) & 1 != 0, keys, -1)
    if not FULL:
        keys = tl.where(_there(begin, n, BLOCK, THREADS), keys, -1)
    return keys


@triton.jit
def _take(
    keys, lo, size, shift, bins, candidates, capacity, cursor, kept, below, top,
    BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Count a chunk's keys, and bin and list those of the ``size`` from ``lo`` on; sums are kept by column."""
    if MASKED:
        kept += tl.sum((keys >= 0).to(tl.int32), axis=0)
    distance = keys - lo
    below += tl.sum((distance < 0).to(tl.int32), axis=0)
    top = tl.maximum(top, tl.max(keys, axis=0))
    unsigned: tl.constexpr = tl.uint64 if keys.dtype == tl.int64 else tl.uint32
    inside = distance.to(unsigned, bitcast=True) < size.to(unsigned, bitcast=True)
    tl.atomic_add(bins + (distance >> shift), tl.full(keys.shape, 1, tl.int64), mask=inside)
    if capacity > 0:
        flags = inside.to(tl.int32)
        column = tl.sum(flags, axis=0)
        first = tl.atomic_add(cursor, tl.sum(column).to(tl.int64))
        place = first + (tl.cumsum(column, 0) - column)[None, :] + tl.cumsum(flags, 0) - flags
        # Stored in one dimension, for which all versions of triton choose the layout that the keys have.
        listed = tl.reshape(inside & (place < capacity), [BLOCK])
        tl.store(candidates + tl.reshape(place, [BLOCK]), tl.reshape(keys, [BLOCK]), mask=listed)
    return kept, below, top


@triton.jit
def _read(
    row, chunk, end, lo, hi, shift, bins, candidates, capacity, cursor,
    BITS: tl.constexpr, INFINITY: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Read a segment; return how many keys lie below the bracket, how many are pruned, and the largest."""
    WIDE: tl.constexpr = tl.int64 if BITS.primitive_bitwidth == 64 else tl.int32
    lo, size, shift = lo.to(WIDE), tl.maximum(hi - lo + 1, 0).to(WIDE), shift.to(WIDE)
    n, first = tl.load(row + N), tl.load(row + FIRST)
    weights, mask = tl.load(row + WEIGHTS).to(tl.pointer_type(BITS)), tl.load(row + MASK)
    whole = tl.minimum(end, first + n // BLOCK)
    kept = tl.zeros([THREADS], tl.int32)
    below, top = kept, kept.to(WIDE)
    # The next chunk is loaded while one is counted, but not with a mask, which takes more registers.
    begin = (chunk - first) * BLOCK
    ahead = chunk if MASKED else whole
    raw = _raw(weights, begin, n, 0, chunk < ahead, BLOCK, THREADS, False, True)
    for c in range(chunk, whole):
        bytes = _bytes(mask, begin, n, BLOCK, THREADS, MASKED)
        if MASKED:
            raw = _raw(weights, begin, n, bytes, True, BLOCK, THREADS, MASKED, True)
        keys = _keys(raw, bytes, begin, n, INFINITY, BLOCK, THREADS, MASKED, True)
        begin += BLOCK
        if not MASKED:
            raw = _raw(weights, begin, n, bytes, c + 1 < ahead, BLOCK, THREADS, MASKED, True)
        kept, below, top = _take(
            keys, lo, size, shift, bins, candidates, capacity, cursor, kept, below, top, BLOCK, MASKED
        )
    if whole < end:
        bytes = _bytes(mask, begin, n, BLOCK, THREADS, MASKED)
        raw = _raw(weights, begin, n, bytes, begin < n, BLOCK, THREADS, MASKED, False)
        keys = _keys(raw, bytes, begin, n, INFINITY, BLOCK, THREADS, MASKED, False)
        kept, below, top = _take(
            keys, lo, size, shift, bins, candidates, capacity, cursor, kept, below, top, BLOCK, MASKED
        )
    num_there = tl.minimum((end - first) * BLOCK, n) - (chunk - first) * BLOCK
    num_kept = tl.sum(kept).to(tl.int64) if MASKED else num_there
    num_below = tl.sum(below).to(tl.int64) - ((end - chunk) * BLOCK - num_kept)
    return num_below, num_there - num_kept, tl.max(top)


@triton.jit
def _first_nonfinite(
    row, chunk, end, BITS: tl.constexpr, INFINITY: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Index of the first NaN or Inf in a segment that has one, which is read again, chunk by chunk."""
    n, weights = tl.load(row + N), tl.load(row + WEIGHTS).to(tl.pointer_type(BITS))
    mask = tl.load(row + MASK)
    index = _row_offsets(BLOCK, THREADS) + tl.arange(0, THREADS)[None, :]
    found = tl.full([], NO_INDEX, tl.int64)
    for c in range(chunk, end):
        begin = (c - tl.load(row + FIRST)) * BLOCK
        bytes = _bytes(mask, begin, n, BLOCK, THREADS, MASKED)
        raw = _raw(weights, begin, n, bytes, begin < n, BLOCK, THREADS, MASKED, False)
        keys = _keys(raw, bytes, begin, n, INFINITY, BLOCK, THREADS, MASKED, False)
        first = tl.min(tl.where(keys >= INFINITY, index, BLOCK))
        found = tl.minimum(found, tl.where(first < BLOCK, begin + first, NO_INDEX))
    return found


@triton.jit(
    do_not_specialize=["num_chunks", "run", "num_layers", "num_bins", "slots"],
    do_not_specialize_on_alignment=["answers"],
)
def count(
    table, owners, num_chunks, run, asked, num_layers, answers, num_bins, slots,
    BITS: tl.constexpr, INFINITY: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Count each layer's keys against its bracket; count those inside by bin, and list them in any order."""
    program = tl.program_id(0).to(tl.int64)
    chunk = program * run
    while chunk < tl.minimum((program + 1) * run, num_chunks):
        layer = tl.load(owners + chunk).to(tl.int64)
        row, _ = row_of(table, owners, chunk, BLOCK)
        end = end_of_segment(row, chunk, run, BLOCK)
        own = asked + layer
        lo, hi = tl.load(own + LO * num_layers), tl.load(own + HI * num_layers)
        candidates = tl.load(own + CANDIDATES * num_layers).to(tl.pointer_type(BITS))
        bins = answers + layer * (num_bins + COUNTERS * slots + ANSWER_FIELDS)
        fields = bins + num_bins + COUNTERS * slots
        below, pruned, top = _read(
            row, chunk, end, lo, hi, tl.load(own + SHIFT * num_layers), bins, candidates,
            tl.load(own + CAPACITY * num_layers), fields + CURSOR, BITS, INFINITY, BLOCK, THREADS, MASKED,
        )  # fmt: skip
        # Atomic sums at one address wait for one another, so neighbouring programs add to different ones.
        counters = bins + num_bins + program % slots * COUNTERS
        tl.atomic_add(counters, below, mask=below > 0)
        tl.atomic_add(counters + 1, pruned, mask=pruned > 0)
        if top >= INFINITY:
            first = _first_nonfinite(row, chunk, end, BITS, INFINITY, BLOCK, THREADS, MASKED)
            # Stored so that 0 means there is none.
            tl.atomic_max(fields + NONFINITE, -first + NO_INDEX)
        chunk = end
