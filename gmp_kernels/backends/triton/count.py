"""The kernels of a selection that read all weights, or the lists of those inside the brackets.

A program takes a run of chunks. The chunks of one layer in a run are a segment: what a program finds in one it adds up
in registers, and adds to what others found by one atomic per sum; the keys inside the bracket it lists one after
another, as far as the memory set aside for the segment's chunks reaches. For each chunk ``ends`` says how many keys
inside the bracket there are from the segment's start to the chunk's end, whether they were listed or not.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gmp_kernels.backends.triton.select import (
    COUNTERS,
    DONE,
    HEADER,
    HI,
    KEPT,
    KEY,
    LAYER_FIELDS,
    LISTED,
    LO,
    MODE,
    NONFINITE,
    NUM_DONE,
    NUM_WITH_TIES,
    SHIFT,
    TIES_COUNTED,
    state_of_layers,
    ties_of_segments,
)
from gmp_kernels.backends.triton.tiles import (
    FIELDS,
    FIRST,
    GROUP,
    MASK,
    NO_INDEX,
    WEIGHTS,
    N,
    end_of_segment,
    magnitude_keys,
)


@triton.jit
def _row_offsets(BLOCK: tl.constexpr, THREADS: tl.constexpr):
    """Beginnings of the rows of a chunk's tile; its columns are a thread's each.

    Then sums over columns cost no exchange, and what is loaded is listed by the same thread: layouts that load 16 bytes
    at once would have the keys, their places and the conditions brought to another thread each to be stored. Added to
    the pointers of the first row, these are constants of the loads.
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
    """A condition for all columns, as loads take it under the interpreter too."""
    return (tl.arange(0, THREADS) < tl.where(condition, THREADS, 0))[None, :]


@triton.jit
def _there(begin, n, BLOCK: tl.constexpr, THREADS: tl.constexpr):
    """Mask of the weights of a chunk that are there."""
    offsets = _row_offsets(BLOCK, THREADS) + tl.arange(0, THREADS)[None, :]
    return offsets < tl.minimum(n - begin, BLOCK).to(tl.int32)


@triton.jit
def _keys(
    raw, bytes, begin, n, INFINITY: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr, MASKED: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """Keys of a chunk's weights; of those that are pruned or not there -1, which lies below every bracket."""
    keys = magnitude_keys(raw, INFINITY)
    if MASKED:
        keys = tl.where((bytes >> (tl.arange(0, THREADS) % 8)[None, :]) & 1 != 0, keys, -1)
    if not FULL:
        keys = tl.where(_there(begin, n, BLOCK, THREADS), keys, -1)
    return keys


@triton.jit
def _bins(distance, shift, spare):
    """Bins of keys at these distances from the bracket's start; a negative shift leaves several to the key.

    Those are there so that sums of few keys need not all wait for one another.
    """
    right, left = tl.maximum(shift, 0).to(distance.dtype), tl.maximum(-shift, 0).to(distance.dtype)
    return ((distance >> right) << left) + (spare & ((1 << left) - 1)).to(distance.dtype)


@triton.jit
def _take(
    keys, lo, size, shift, spare, bins, cursor, list, room, kept, below, top,
    BLOCK: tl.constexpr, MASKED: tl.constexpr, LISTS: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Count a chunk's keys, and list or bin those of the ``size`` from ``lo`` on; sums are kept by column."""
    if MASKED:
        kept += tl.sum((keys >= 0).to(tl.int32), axis=0)
    distance = keys - lo
    below += tl.sum((distance < 0).to(tl.int32), axis=0)
    top = tl.maximum(top, tl.max(keys, axis=0))
    unsigned: tl.constexpr = tl.uint64 if keys.dtype == tl.int64 else tl.uint32
    inside = distance.to(unsigned, bitcast=True) < size.to(unsigned, bitcast=True)
    flags = inside.to(tl.int32)
    column = tl.sum(flags, axis=0)
    if LISTS:
        place = (cursor + tl.cumsum(column, 0) - column)[None, :] + tl.cumsum(flags, 0) - flags
        # In one dimension, for which all versions of triton choose the layout that the keys have.
        listed = tl.reshape(inside & (place < room), [BLOCK])
        tl.store(list + tl.reshape(place, [BLOCK]), tl.reshape(keys, [BLOCK]), mask=listed)
    if BINS:
        tl.atomic_add(bins + _bins(distance, shift, spare), tl.full(keys.shape, 1, tl.int64), mask=inside)
    return cursor + tl.sum(column), kept, below, top


@triton.jit
def _read(
    row, chunk, end, lo, hi, shift, spare, bins, lists, capacity, ends,
    BITS: tl.constexpr, INFINITY: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr, MASKED: tl.constexpr,
    LISTS: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Read a segment: how many keys lie below the bracket, are pruned and lie inside, and the largest there is."""
    WIDE: tl.constexpr = tl.int64 if BITS.primitive_bitwidth == 64 else tl.int32
    lo, size = lo.to(WIDE), tl.maximum(hi - lo + 1, 0).to(WIDE)
    list, room = lists + chunk * capacity, ((end - chunk) * capacity).to(tl.int32)
    n, first = tl.load(row + N), tl.load(row + FIRST)
    weights, mask = tl.load(row + WEIGHTS).to(tl.pointer_type(BITS)), tl.load(row + MASK)
    whole = tl.minimum(end, first + n // BLOCK)
    kept = tl.zeros([THREADS], tl.int32)
    below, top, cursor = kept, kept.to(WIDE), tl.full([], 0, tl.int32)
    # The next chunk is under way while one is counted; with a mask, of which more is kept in registers, it is not.
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
        cursor, kept, below, top = _take(
            keys, lo, size, shift, spare, bins, cursor, list, room, kept, below, top, BLOCK, MASKED, LISTS, BINS
        )
        if LISTS:
            tl.store(ends + c, cursor)
    if whole < end:
        bytes = _bytes(mask, begin, n, BLOCK, THREADS, MASKED)
        raw = _raw(weights, begin, n, bytes, begin < n, BLOCK, THREADS, MASKED, False)
        keys = _keys(raw, bytes, begin, n, INFINITY, BLOCK, THREADS, MASKED, False)
        cursor, kept, below, top = _take(
            keys, lo, size, shift, spare, bins, cursor, list, room, kept, below, top, BLOCK, MASKED, LISTS, BINS
        )
        if LISTS:
            tl.store(ends + whole, cursor)
    num_there = tl.minimum((end - first) * BLOCK, n) - (chunk - first) * BLOCK
    num_kept = tl.sum(kept).to(tl.int64) if MASKED else num_there
    num_below = tl.sum(below).to(tl.int64) - ((end - chunk) * BLOCK - num_kept)
    return num_below, num_there - num_kept, cursor, tl.max(top)


@triton.jit
def _first_nonfinite(
    row, chunk, end, BITS: tl.constexpr, INFINITY: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Index of the first NaN or Inf in a segment that has one: it is read again, chunk by chunk."""
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
    do_not_specialize=["num_chunks", "run", "num_groups", "num_bins", "slots", "capacity"],
    do_not_specialize_on_alignment=["state", "work"],
)
def count(
    table, owners, num_chunks, run, state, num_groups, stop, work, num_bins, slots, lists, capacity, ends,
    BITS: tl.constexpr, INFINITY: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr, MASKED: tl.constexpr,
    LISTS: tl.constexpr,
):  # fmt: skip
    """One read of the weights: how many lie below the bracket and in it, and a list of those; without LISTS their bins.

    ``stop`` is set where a weight is NaN or Inf.
    """
    program = tl.program_id(0).to(tl.int64)
    chunk = program * run
    while chunk < tl.minimum((program + 1) * run, num_chunks):
        owner = tl.load(owners + chunk).to(tl.int64)
        row = table + owner * FIELDS
        end = end_of_segment(row, chunk, run, BLOCK)
        group = tl.load(row + GROUP)
        own = state + HEADER + group
        lo, hi = tl.load(own + LO * num_groups), tl.load(own + HI * num_groups)
        bins = work + group * (num_bins + COUNTERS * slots)
        below, pruned, inside, top = _read(
            row, chunk, end, lo, hi, tl.load(own + SHIFT * num_groups), program, bins, lists, capacity, ends,
            BITS, INFINITY, BLOCK, THREADS, MASKED, LISTS, not LISTS,
        )  # fmt: skip
        # Sums of one address wait for one another: neighbours add to different ones.
        counters = bins + num_bins + program % slots * COUNTERS
        tl.atomic_add(counters, below, mask=below > 0)
        tl.atomic_add(counters + 1, pruned, mask=pruned > 0)
        tl.atomic_add(counters + 2, inside.to(tl.int64), mask=inside > 0)
        if top >= INFINITY:
            first = _first_nonfinite(row, chunk, end, BITS, INFINITY, BLOCK, THREADS, MASKED)
            # So that zeros say there is none.
            tl.atomic_max(state_of_layers(state, num_groups) + owner * LAYER_FIELDS + NONFINITE, -first + NO_INDEX)
            tl.store(stop, 1)
        chunk = end


@triton.jit(
    do_not_specialize=["num_chunks", "run", "num_groups", "num_bins", "slots", "capacity"],
    do_not_specialize_on_alignment=["state", "work"],
)
def recount(
    table, owners, num_chunks, run, state, num_groups, work, num_bins, slots, lists, capacity, ends,
    BITS: tl.constexpr, INFINITY: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Bins of the keys inside the brackets, from the lists.

    Segments whose list did not fit, and all where the bracket was wrong, are read again and listed again.
    """
    program = tl.program_id(0).to(tl.int64)
    chunk = program * run
    last = tl.minimum(chunk + run, num_chunks)
    if tl.load(state + NUM_DONE) == num_groups:
        last = chunk
    while chunk < last:
        row = table + tl.load(owners + chunk).to(tl.int64) * FIELDS
        end = end_of_segment(row, chunk, run, BLOCK)
        group = tl.load(row + GROUP)
        own = state + HEADER + group
        mode = tl.load(own + MODE * num_groups)
        if mode < DONE:
            lo, hi, shift = (
                tl.load(own + LO * num_groups),
                tl.load(own + HI * num_groups),
                tl.load(own + SHIFT * num_groups),
            )
            bins = work + group * (num_bins + COUNTERS * slots)
            size = tl.load(ends + end - 1)
            if (mode == LISTED) & (size <= (end - chunk) * capacity):
                for at in range(0, size, BLOCK):
                    place = at + tl.arange(0, BLOCK)
                    keys = tl.load(lists + chunk * capacity + place, mask=place < size, other=0)
                    KEY: tl.constexpr = tl.int64 if BITS.primitive_bitwidth == 64 else tl.int32
                    distance = keys.to(KEY) - lo.to(KEY)
                    inside = (place < size) & (distance >= 0) & (distance <= (hi - lo).to(KEY))
                    bin = _bins(distance, shift, program)
                    tl.atomic_add(bins + bin, tl.full([BLOCK], 1, tl.int64), mask=inside)
            else:
                _read(
                    row, chunk, end, lo, hi, shift, program, bins, lists, capacity, ends,
                    BITS, INFINITY, BLOCK, THREADS, MASKED, True, True,
                )  # fmt: skip
        chunk = end


@triton.jit(
    do_not_specialize=["num_chunks", "run", "num_groups", "num_bins", "slots", "capacity"],
    do_not_specialize_on_alignment=["state", "work"],
)
def count_ties(
    table, owners, num_chunks, run, state, num_groups, work, num_bins, slots, lists, capacity, ends,
    BITS: tl.constexpr, INFINITY: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Ties of each segment of the groups that keep some.

    Segments whose list did not fit are read again, to list the ties alone or at least to leave in ``ends`` how many
    there are.
    """
    program = tl.program_id(0).to(tl.int64)
    chunk = program * run
    last = tl.minimum(chunk + run, num_chunks)
    if tl.load(state + NUM_WITH_TIES) == 0:
        last = chunk
    while chunk < last:
        owner = tl.load(owners + chunk).to(tl.int64)
        row = table + owner * FIELDS
        end = end_of_segment(row, chunk, run, BLOCK)
        own = state + HEADER + tl.load(row + GROUP)
        if tl.load(own + KEPT * num_groups) > 0:
            key = tl.load(own + KEY * num_groups)
            size = tl.load(ends + end - 1)
            found = size
            if tl.load(own + MODE * num_groups) != TIES_COUNTED:
                if size <= (end - chunk) * capacity:
                    equal = tl.zeros([BLOCK], tl.int32)
                    for at in range(0, size, BLOCK):
                        place = at + tl.arange(0, BLOCK)
                        keys = tl.load(lists + chunk * capacity + place, mask=place < size, other=0)
                        equal += ((keys == key.to(keys.dtype)) & (place < size)).to(tl.int32)
                    found = tl.sum(equal)
                else:
                    _, _, found, _ = _read(
                        row, chunk, end, key, key, key, program, work, lists, capacity, ends,
                        BITS, INFINITY, BLOCK, THREADS, MASKED, True, False,
                    )  # fmt: skip
            tl.store(ties_of_segments(work, num_groups, num_bins, slots) + chunk // run + owner, found.to(tl.int64))
        chunk = end
