"""The kernels of a selection by few programs: bracket by a sample, narrow until one key is left, and place the cut.

What reads all weights is in _triton_count.py. A group is the layers that share a threshold; its state stays on the
device from the first launch to the last. All sums are of integers and lists are used as sets of each chunk's keys, so
nothing depends on the order in which programs run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gmp_kernels.backends.triton.tiles import (
    FIELDS,
    FIRST,
    MASK,
    OFFSET,
    WEIGHTS,
    N,
    end_of_segment,
    flags_before,
    keys_of_chunk,
    magnitude_keys,
)

# Fields of a group that stay: its weights, its rows in the table, their number in bits, and its chunks.
SIZE, FIRST_ROW, NUM_ROWS, ROW_BITS, FIRST_CHUNK, NUM_CHUNKS = map(tl.constexpr, range(6))
GROUP_FIELDS = tl.constexpr(6)

# State of a part, each field with an entry per group; then per layer; before all of them how many groups are done, and
# how many of those keep ties.
LO, HI, SHIFT, MODE, BELOW, PRUNED, KEY, NUM_BELOW, TIES, KEPT = map(tl.constexpr, range(10))
STATE_FIELDS = tl.constexpr(10)
NUM_DONE, NUM_WITH_TIES, HEADER = map(tl.constexpr, range(3))
CUT, NONFINITE, LAYER_FIELDS = map(tl.constexpr, range(3))

# What is known of the keys inside a group's bracket: segments list them, or have to be read again; or nothing more is
# needed, the lists' sizes being the ties or not.
LISTED, UNLISTED, DONE, TIES_COUNTED = map(tl.constexpr, range(4))

COUNTERS = tl.constexpr(4)  # below, pruned and inside, a cache sector to the slot


@triton.jit
def state_of_layers(state, num_groups):
    return state + HEADER + STATE_FIELDS * num_groups


@triton.jit
def ties_of_segments(work, num_groups, num_bins, slots):
    """The ties of each segment that count_ties found, behind the bins and counters of all groups."""
    return work + num_groups * (num_bins + COUNTERS * slots)


@triton.jit(do_not_specialize=["num_groups"], do_not_specialize_on_alignment=["state", "wanted"])
def begin(
    table, groups, wanted, state, num_groups, BITS: tl.constexpr, INFINITY: tl.constexpr, KEY_BITS: tl.constexpr,
    BIN_BITS: tl.constexpr, EIGHTS: tl.constexpr,
):  # fmt: skip
    """Bracket one group's wanted key by a sample: it very probably lies inside; surely, where the sample is the group.

    Eights of weights are read all over the group, in step with no period of the weights; of a small one all there are.
    Source: Floyd and Rivest, CACM 18(3), 1975.
    """
    group = tl.program_id(0).to(tl.int64)
    info = groups + group * GROUP_FIELDS
    size = tl.load(info + SIZE)
    wide = size.to(tl.float64)
    number = tl.arange(0, EIGHTS)
    eights = tl.minimum((size + 7) // 8, EIGHTS)
    stride = tl.maximum(wide / eights.to(tl.float64), 8.0)
    golden = number.to(tl.float64) * 0.6180339887498949
    jitter = golden - tl.floor(golden)
    place = (number.to(tl.float64) * stride + jitter * (stride - 8.0)).to(tl.int64)
    exists = (number < eights) & (place < size)

    layer = tl.zeros([EIGHTS], tl.int64) + tl.load(info + FIRST_ROW)
    last = layer + tl.load(info + NUM_ROWS) - 1
    for _ in range(tl.load(info + ROW_BITS)):
        middle = (layer + last + 1) // 2
        reached = tl.load(table + middle * FIELDS + OFFSET) <= place
        layer = tl.where(reached, middle, layer)
        last = tl.where(reached, last, middle - 1)
    row = table + layer * FIELDS
    place = (place - tl.load(row + OFFSET)) // 8 * 8
    n, mask = tl.load(row + N), tl.load(row + MASK)
    index = place[:, None] + tl.arange(0, 8)[None, :]
    there = exists[:, None] & (index < n[:, None])
    bits = tl.load(mask.to(tl.pointer_type(tl.uint8)) + place // 8, mask=exists & (place < n) & (mask != 0), other=255)
    raw = tl.load(tl.load(row + WEIGHTS).to(tl.pointer_type(BITS))[:, None] + index, mask=there, other=0)
    kept = (bits.to(tl.int32)[:, None] >> tl.arange(0, 8)[None, :]) & 1 != 0
    # Pruned weights come first in the order, what is not there behind NaN.
    keys = tl.where(there, tl.where(kept, magnitude_keys(raw, INFINITY), -1), INFINITY + 2)

    valid = tl.sum(there.to(tl.int32)).to(tl.float64)
    share = tl.load(wanted + group).to(tl.float64) / wide
    is_all = valid == wide
    rank = tl.where(is_all, tl.load(wanted + group).to(tl.float64), share * valid)
    half = tl.where(is_all, 0.0, 2.0 + 4.0 * tl.sqrt(rank * (1.0 - share)))  # fails once in 10^4 selections
    low = tl.floor(rank - 1.0 - half).to(tl.int32)
    high = tl.ceil(rank - 1.0 + half).to(tl.int32)
    # The low-th and the high-th key: the smallest with more than so many at or below it.
    lo, hi = tl.full([], -1, keys.dtype), tl.full([], -1, keys.dtype)
    lo_end, hi_end = tl.full([], INFINITY + 2, keys.dtype), tl.full([], INFINITY + 2, keys.dtype)
    for _ in range(KEY_BITS + 1):
        lo_middle, hi_middle = lo + (lo_end - lo) // 2, hi + (hi_end - hi) // 2
        # Both counts in one sum, of 16 bits each: sums are what takes the time here.
        reached = tl.sum((keys <= lo_middle).to(tl.int32) + ((keys <= hi_middle).to(tl.int32) << 16))
        enough = (reached & 0xFFFF) > low
        lo, lo_end = tl.where(enough, lo, lo_middle + 1), tl.where(enough, lo_middle, lo_end)
        enough = (reached >> 16) > high
        hi, hi_end = tl.where(enough, hi, hi_middle + 1), tl.where(enough, hi_middle, hi_end)
    # Below the sample and above it anything may lie.
    lo = tl.where(low < 0, 0, tl.maximum(lo, 0)).to(tl.int64)
    hi = tl.where(high.to(tl.float64) >= valid, INFINITY + 1, tl.minimum(hi, INFINITY + 1)).to(tl.int64)
    # The exponent of a float64 gives the length of the span in bits, or one more where it is rounded up.
    length = tl.maximum((tl.maximum(hi - lo, 0).to(tl.float64).to(tl.int64, bitcast=True) >> 52) - 1022, 0)
    state += HEADER + group
    tl.store(state + LO * num_groups, lo)
    tl.store(state + HI * num_groups, hi)
    tl.store(state + SHIFT * num_groups, length - BIN_BITS)
    tl.store(state + MODE * num_groups, UNLISTED)


@triton.jit(do_not_specialize=["num_groups", "slots"], do_not_specialize_on_alignment=["state", "wanted", "work"])
def narrow(
    groups, wanted, state, num_groups, work, slots,
    KEY_BITS: tl.constexpr, LARGEST: tl.constexpr, BIN_BITS: tl.constexpr, MAX_SLOTS: tl.constexpr,
    AFTER_COUNT: tl.constexpr,
):  # fmt: skip
    """Prove one group's bracket by what was counted; after a recount, shrink it to the bin with the wanted key."""
    group = tl.program_id(0).to(tl.int64)
    header = state
    state += HEADER + group
    mode = tl.load(state + MODE * num_groups)
    if mode < DONE:
        bins = work + group * ((1 << BIN_BITS) + COUNTERS * slots)
        lo, hi = tl.load(state + LO * num_groups), tl.load(state + HI * num_groups)
        shift, num_prune = tl.load(state + SHIFT * num_groups), tl.load(wanted + group)
        if AFTER_COUNT:
            slot = tl.arange(0, MAX_SLOTS)
            counters = bins + (1 << BIN_BITS) + slot * COUNTERS
            below = tl.sum(tl.load(counters, mask=slot < slots, other=0))
            pruned = tl.sum(tl.load(counters + 1, mask=slot < slots, other=0))
            inside = tl.sum(tl.load(counters + 2, mask=slot < slots, other=0))
            tl.store(state + PRUNED * num_groups, pruned)
            rank = num_prune - pruned - 1 - below  # in the bracket
            first, last, ties, lower = lo, hi, inside, below
            is_key, finer = lo == hi, shift
        else:
            below, pruned = tl.load(state + BELOW * num_groups), tl.load(state + PRUNED * num_groups)
            number = tl.arange(0, 1 << BIN_BITS)
            counts = tl.load(bins + number)
            tl.store(bins + number, tl.zeros([1 << BIN_BITS], tl.int64))
            inside = tl.sum(counts)
            rank = num_prune - pruned - 1 - below
            # Where bins are more than keys, 2^left of them are one key's.
            right, left = tl.maximum(shift, 0), tl.maximum(-shift, 0)
            bin = tl.minimum(tl.sum((tl.cumsum(counts, 0) <= rank).to(tl.int64)), (1 << BIN_BITS) - 1) >> left
            first = lo + (bin << right)
            last = tl.minimum(first + (tl.full([], 1, tl.int64) << right) - 1, hi)
            ties = tl.sum(tl.where(number >> left == bin, counts, 0))
            lower = below + tl.sum(tl.where(number >> left < bin, counts, 0))
            is_key, finer = shift <= 0, shift - BIN_BITS

        too_high = rank < 0
        proven = (rank >= 0) & (rank < inside)
        nothing = num_prune <= pruned
        exact = proven & is_key
        ties_kept = pruned + lower + ties - num_prune
        if nothing | exact:
            tl.store(state + KEY * num_groups, tl.where(nothing, 0, first))
            tl.store(state + NUM_BELOW * num_groups, pruned + tl.where(nothing, 0, lower))
            tl.store(state + TIES * num_groups, tl.where(nothing, 0, ties))
            tl.store(state + KEPT * num_groups, tl.where(nothing, 0, ties_kept))
            counted = (lo == hi) & (mode == UNLISTED)
            tl.store(state + MODE * num_groups, tl.where(counted, TIES_COUNTED, DONE).to(tl.int64))
            tl.atomic_add(header + NUM_DONE, 1)
            if (ties_kept > 0) & (nothing == 0):
                tl.atomic_add(header + NUM_WITH_TIES, 1)
        else:
            tl.store(state + LO * num_groups, tl.where(proven, first, tl.where(too_high, 0, hi + 1)))
            tl.store(state + HI * num_groups, tl.where(proven, last, tl.where(too_high, lo - 1, LARGEST)))
            widest = KEY_BITS - BIN_BITS if KEY_BITS > BIN_BITS else 0
            tl.store(state + SHIFT * num_groups, tl.where(proven, finer, widest))
            tl.store(state + BELOW * num_groups, tl.where(proven, lower, tl.where(too_high, 0, below + inside)))
            tl.store(state + MODE * num_groups, tl.where(proven, LISTED, UNLISTED).to(tl.int64))


@triton.jit
def _first_reached(counts, number, target):
    """Position where the running sum exceeds ``target``, and what of it is left there."""
    at = tl.sum((tl.cumsum(counts, 0) <= target).to(tl.int64))
    return at, target - tl.sum(tl.where(number < at, counts, 0))


@triton.jit
def _segment_of(table, id, first_row, num_rows, row_bits, run):
    """The row and the first chunk of a segment, given its number: that of its run plus that of its row."""
    owner, last = first_row, first_row + num_rows - 1
    for _ in range(row_bits):
        middle = (owner + last + 1) // 2
        reached = tl.load(table + middle * FIELDS + FIRST) // run + middle <= id
        owner = tl.where(reached, middle, owner)
        last = tl.where(reached, last, middle - 1)
    return owner, tl.maximum((id - owner) * run, tl.load(table + owner * FIELDS + FIRST))


@triton.jit
def _chunk_of(ends, num_chunks, place, SCAN: tl.constexpr):
    """The chunk of a place in a segment's list, counted from its first, and where the chunk's part of it starts."""
    chunk, start = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    number = tl.arange(0, SCAN)
    for base in range(0, num_chunks, SCAN):
        own = tl.load(ends + base + number, mask=base + number < num_chunks, other=0).to(tl.int64)
        before = (base + number < num_chunks) & (own <= place)
        chunk += tl.sum(before.to(tl.int64))
        start = tl.maximum(start, tl.max(tl.where(before, own, 0)))
    return chunk, start


@triton.jit
def _listed_chunk(list, size, ends, num_chunks, key, rank, SCAN: tl.constexpr):
    """The chunk of a list's tie of this rank, counted from the segment's first, and the rank it has there."""
    number = tl.arange(0, SCAN)
    place, before = tl.full([], -1, tl.int64), tl.full([], 0, tl.int64)
    for base in range(0, size, SCAN):
        keys = tl.load(list + base + number, mask=base + number < size, other=0)
        ties = ((base + number < size) & (keys == key.to(keys.dtype))).to(tl.int64)
        at, _ = _first_reached(ties, number, rank - before)
        place = tl.where((place < 0) & (at < SCAN), base + at, place)
        before += tl.sum(ties)
    chunk, start = _chunk_of(ends, num_chunks, place, SCAN)
    before = tl.full([], 0, tl.int64)
    for base in range(0, start, SCAN):
        keys = tl.load(list + base + number, mask=base + number < start, other=0)
        before += tl.sum(((base + number < start) & (keys == key.to(keys.dtype))).to(tl.int64))
    return chunk, rank - before


@triton.jit(
    do_not_specialize=["run", "num_groups", "num_bins", "slots", "capacity"],
    do_not_specialize_on_alignment=["state", "work"],
)
def place_cuts(
    table, groups, run, state, num_groups, work, num_bins, slots, lists, capacity, ends,
    BITS: tl.constexpr, INFINITY: tl.constexpr, BLOCK: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """Cuts of one group's layers: all ties stay before the one that is the first not to, none behind it."""
    group = tl.program_id(0).to(tl.int64)
    info = groups + group * GROUP_FIELDS
    first_row, num_rows = tl.load(info + FIRST_ROW), tl.load(info + NUM_ROWS)
    kept = tl.load(state + HEADER + KEPT * num_groups + group)
    owner = tl.where(tl.load(state + HEADER + TIES * num_groups + group) == 0, first_row + num_rows, first_row - 1)
    cut = tl.full([], 0, tl.int64)
    number = tl.arange(0, SCAN)
    if kept > 0:
        key = tl.load(state + HEADER + KEY * num_groups + group)
        # The segment with the first tie that does not stay.
        first_chunk = tl.load(info + FIRST_CHUNK)
        last_chunk = first_chunk + tl.load(info + NUM_CHUNKS) - 1
        ties = ties_of_segments(work, num_groups, num_bins, slots)
        id, rank = tl.full([], -1, tl.int64), kept
        target = kept
        for base in range(first_chunk // run + first_row, last_chunk // run + first_row + num_rows, SCAN):
            exists = base + number < last_chunk // run + first_row + num_rows
            found = tl.load(ties + base + number, mask=exists, other=0)
            at, left = _first_reached(found, number, target)
            here = (id < 0) & (at < SCAN)
            id, rank = tl.where(here, base + at, id), tl.where(here, left, rank)
            target -= tl.sum(found)
        owner, chunk = _segment_of(table, id, first_row, num_rows, tl.load(info + ROW_BITS), run)
        row = table + owner * FIELDS
        end = end_of_segment(row, chunk, run, BLOCK)
        # Its chunk with that tie: from the list, or where ``ends`` has the ties, from those.
        size = tl.load(ends + end - 1)
        counted = tl.load(state + HEADER + MODE * num_groups + group) == TIES_COUNTED
        if counted | (size > (end - chunk) * capacity):
            at, start = _chunk_of(ends + chunk, end - chunk, rank, SCAN)
            rank -= start
        else:
            at, rank = _listed_chunk(lists + chunk * capacity, size, ends + chunk, end - chunk, key, rank, SCAN)
        begin = (chunk + at - tl.load(row + FIRST)) * BLOCK
        keys, stays, index = keys_of_chunk(row, begin, BITS, INFINITY, BLOCK, False, False)
        tie = stays & (keys == key)
        cut = tl.sum(tl.where(tie & (flags_before(tie, BLOCK) == rank), index, 0))
    layers = state_of_layers(state, num_groups)
    for base in range(0, num_rows, SCAN):
        exists = base + number < num_rows
        row = first_row + base + number
        n = tl.load(table + row * FIELDS + N, mask=exists, other=0)
        value = tl.where(row < owner, n, tl.where(row == owner, cut, 0))
        tl.store(layers + row * LAYER_FIELDS + CUT, value, mask=exists)
