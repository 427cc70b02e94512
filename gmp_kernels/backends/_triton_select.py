"""The kernels of a selection: bracket by a sample, count, narrow until one key is left, and place the cut among ties.

A group is the layers that share a threshold; its state stays on the device from the first launch to the last. Sums are
of integers and lists are used as sets, so nothing depends on the order in which programs run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gmp_kernels.backends._triton_tiles import (
    FIELDS,
    GROUP,
    MASK,
    NO_INDEX,
    OFFSET,
    WEIGHTS,
    N,
    flags_before,
    keys_of_chunk,
    magnitude_keys,
    row_of,
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

# What is known of the keys inside a group's bracket: chunks list them, or have to be read again; or nothing more is
# needed, the lists' sizes being the ties or not.
LISTED, UNLISTED, DONE, TIES_COUNTED = map(tl.constexpr, range(4))

COUNTERS = tl.constexpr(4)  # below, pruned and inside, a cache sector to the slot


@triton.jit
def state_of_layers(state, num_groups):
    return state + HEADER + STATE_FIELDS * num_groups


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
    length = (tl.maximum(hi - lo, 0).to(tl.float64).to(tl.int64, bitcast=True) >> 52) - 1022
    state += HEADER + group
    tl.store(state + LO * num_groups, lo)
    tl.store(state + HI * num_groups, hi)
    tl.store(state + SHIFT * num_groups, tl.maximum(length - BIN_BITS, 0))
    tl.store(state + MODE * num_groups, UNLISTED)


@triton.jit
def _list(keys, inside, num_inside, chunk, lists, capacity, sizes, BLOCK: tl.constexpr):
    """Keep the keys inside the bracket, in any order, if they fit; the size of the list says whether."""
    if (num_inside > 0) & (num_inside <= capacity):
        tl.store(lists + chunk * capacity + flags_before(inside, BLOCK), keys, mask=inside)
    tl.store(sizes + chunk, num_inside)


@triton.jit
def _bin(keys, inside, num_inside, lo, hi, state, num_groups, group, bins):
    if lo == hi:  # all in one bin: no need to go there one by one
        tl.atomic_add(bins, num_inside.to(tl.int64))
    else:
        bin = (keys - lo) >> tl.load(state + HEADER + SHIFT * num_groups + group).to(keys.dtype)
        tl.atomic_add(bins + bin, tl.full(bin.shape, 1, tl.int64), mask=inside)


@triton.jit
def _sums(keys, lo, hi, INFINITY: tl.constexpr):
    """Number of keys at or above ``lo``, of keys above ``hi``, and of rows with NaN or Inf.

    In 16 bits each of one sum, because a sum over a tile waits for all of its threads; one over a row is a thread's.
    """
    rows = tl.sum((keys >= lo).to(tl.int32) + ((keys > hi).to(tl.int32) << 16), axis=1)
    strange = (tl.max(keys, axis=1) >= INFINITY).to(tl.int64)
    total = tl.sum(rows.to(tl.int64) | (strange << 32))
    return total & 0xFFFF, (total >> 16) & 0xFFFF, total >> 32


@triton.jit
def _count(
    row, begin, chunk, state, num_groups, nonfinite, stop, work, num_bins, slots, lists, capacity, sizes,
    BITS: tl.constexpr, INFINITY: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, LISTS: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    n, group = tl.load(row + N), tl.load(row + GROUP)
    keys, kept, index = keys_of_chunk(row, begin, BITS, INFINITY, BLOCK, ALIGNED, FULL)
    num_kept = tl.minimum(n - begin, BLOCK)
    if tl.load(row + MASK) != 0:
        num_kept = tl.sum(kept.to(tl.int32)).to(tl.int64)
    keys = tl.where(kept, keys, -1)
    lo = tl.load(state + HEADER + LO * num_groups + group).to(keys.dtype)
    hi = tl.load(state + HEADER + HI * num_groups + group).to(keys.dtype)
    not_below, above, num_strange = _sums(keys, lo, hi, INFINITY)
    inside = (keys >= lo) & (keys <= hi)
    below, num_inside = num_kept - not_below, tl.maximum(not_below - above, 0)
    pruned = tl.minimum(n - begin, BLOCK) - num_kept
    bins = work + group * (num_bins + COUNTERS * slots)
    # Sums of one address wait for one another: neighbours add to different ones.
    counters = bins + num_bins + chunk % slots * COUNTERS
    tl.atomic_add(counters, below, mask=below > 0)
    tl.atomic_add(counters + 1, pruned, mask=pruned > 0)
    if num_strange > 0:
        first = tl.min(tl.where(keys >= INFINITY, index, NO_INDEX))
        tl.atomic_max(nonfinite, -first + NO_INDEX)  # so that zeros say there is none
        tl.store(stop, 1)
    if LISTS:
        tl.atomic_add(counters + 2, num_inside, mask=num_inside > 0)
        _list(keys, inside, num_inside, chunk, lists, capacity, sizes, BLOCK)
    elif num_inside > 0:
        _bin(keys, inside, num_inside, lo, hi, state, num_groups, group, bins)


@triton.jit(
    do_not_specialize=["num_groups", "num_bins", "slots", "capacity"],
    do_not_specialize_on_alignment=["state", "work"],
)
def count(
    table, owners, state, num_groups, stop, work, num_bins, slots, lists, capacity, sizes,
    BITS: tl.constexpr, INFINITY: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, LISTS: tl.constexpr,
):  # fmt: skip
    """One read of the weights: how many lie below the bracket and in it, and a list of those; without LISTS their bins.

    ``stop`` is set where a weight is NaN or Inf.
    """
    chunk = tl.program_id(0).to(tl.int64)
    row, begin = row_of(table, owners, chunk, BLOCK)
    nonfinite = state_of_layers(state, num_groups) + tl.load(owners + chunk) * LAYER_FIELDS + NONFINITE
    if begin + BLOCK <= tl.load(row + N):
        _count(
            row, begin, chunk, state, num_groups, nonfinite, stop, work, num_bins, slots, lists, capacity, sizes,
            BITS, INFINITY, BLOCK, ALIGNED, LISTS, True,
        )  # fmt: skip
    else:
        _count(
            row, begin, chunk, state, num_groups, nonfinite, stop, work, num_bins, slots, lists, capacity, sizes,
            BITS, INFINITY, BLOCK, ALIGNED, LISTS, False,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_groups", "slots"], do_not_specialize_on_alignment=["state", "wanted"])
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
            bin = tl.minimum(tl.sum((tl.cumsum(counts, 0) <= rank).to(tl.int64)), (1 << BIN_BITS) - 1)
            first = lo + (bin << shift)
            last = tl.minimum(first + (tl.full([], 1, tl.int64) << shift) - 1, hi)
            ties = tl.sum(tl.where(number == bin, counts, 0))
            lower = below + tl.sum(tl.where(number < bin, counts, 0))
            is_key, finer = shift == 0, tl.maximum(shift - BIN_BITS, 0)

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
def _recount(
    row, begin, chunk, state, num_groups, bins, lists, capacity, sizes,
    BITS: tl.constexpr, INFINITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group = tl.load(row + GROUP)
    keys, kept, _ = keys_of_chunk(row, begin, BITS, INFINITY, BLOCK, False, False)
    lo = tl.load(state + HEADER + LO * num_groups + group).to(keys.dtype)
    hi = tl.load(state + HEADER + HI * num_groups + group).to(keys.dtype)
    inside = kept & (keys >= lo) & (keys <= hi)
    num_inside = tl.sum(inside.to(tl.int32))
    if num_inside > 0:
        _bin(keys, inside, num_inside, lo, hi, state, num_groups, group, bins)
    _list(keys, inside, num_inside, chunk, lists, capacity, sizes, BLOCK)


@triton.jit(
    do_not_specialize=["num_chunks", "num_groups", "num_bins", "slots", "capacity"],
    do_not_specialize_on_alignment=["state"],
)
def recount(
    table, owners, num_chunks, state, num_groups, work, num_bins, slots, lists, capacity, sizes,
    BITS: tl.constexpr, INFINITY: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Bins of the keys inside the brackets, from the lists of ROWS chunks at a time.

    Chunks whose list did not fit, and all where the bracket was wrong, are read again and listed again.
    """
    if tl.load(state + NUM_DONE) != num_groups:
        for start in range(tl.program_id(0) * ROWS, num_chunks, tl.num_programs(0) * ROWS):
            number = tl.arange(0, ROWS)
            chunk = number.to(tl.int64) + start
            exists = chunk < num_chunks
            owner = tl.load(owners + chunk, mask=exists, other=0).to(tl.int64)
            group = tl.load(table + owner * FIELDS + GROUP)
            mode = tl.load(state + HEADER + MODE * num_groups + group, mask=exists, other=DONE)
            size = tl.load(sizes + chunk, mask=exists, other=0).to(tl.int32)
            again = (mode == UNLISTED) | ((mode == LISTED) & (size > capacity))
            listed = (mode == LISTED) & (size <= capacity)
            place = tl.arange(0, WIDTH)[None, :]
            present = listed[:, None] & (place < size[:, None])
            keys = tl.load(lists + chunk[:, None] * capacity + place, mask=present, other=0).to(tl.int64)
            lo = tl.load(state + HEADER + LO * num_groups + group)[:, None]
            inside = present & (keys >= lo) & (keys <= tl.load(state + HEADER + HI * num_groups + group)[:, None])
            bin = (keys - lo) >> tl.load(state + HEADER + SHIFT * num_groups + group)[:, None]
            bins = work + group * (num_bins + COUNTERS * slots)
            tl.atomic_add(bins[:, None] + bin, tl.full([ROWS, WIDTH], 1, tl.int64), mask=inside)
            if tl.max(again.to(tl.int32)) != 0:
                for i in range(ROWS):
                    if tl.max(tl.where(number == i, again.to(tl.int32), 0)) != 0:
                        one = tl.max(tl.where(number == i, chunk, 0))
                        row, begin = row_of(table, owners, one, BLOCK)
                        own = work + tl.load(row + GROUP) * (num_bins + COUNTERS * slots)
                        _recount(row, begin, one, state, num_groups, own, lists, capacity, sizes, BITS, INFINITY, BLOCK)


@triton.jit
def _ties(row, begin, key, BITS: tl.constexpr, INFINITY: tl.constexpr, BLOCK: tl.constexpr):
    keys, kept, _ = keys_of_chunk(row, begin, BITS, INFINITY, BLOCK, False, False)
    return tl.sum((kept & (keys == key)).to(tl.int32))


@triton.jit(
    do_not_specialize=["num_chunks", "num_groups", "num_bins", "slots", "capacity"],
    do_not_specialize_on_alignment=["state"],
)
def count_ties(
    table, owners, num_chunks, groups, state, num_groups, work, num_bins, slots, lists, capacity, sizes,
    BITS: tl.constexpr, INFINITY: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Ties of each chunk of the groups that keep some, in ``sizes``; in the bins those of runs of chunks."""
    if tl.load(state + NUM_WITH_TIES) != 0:
        for start in range(tl.program_id(0) * ROWS, num_chunks, tl.num_programs(0) * ROWS):
            number = tl.arange(0, ROWS)
            chunk = number.to(tl.int64) + start
            exists = chunk < num_chunks
            owner = tl.load(owners + chunk, mask=exists, other=0).to(tl.int64)
            group = tl.load(table + owner * FIELDS + GROUP)
            wanted = tl.load(state + HEADER + KEPT * num_groups + group, mask=exists, other=0) > 0
            counted = tl.load(state + HEADER + MODE * num_groups + group) == TIES_COUNTED
            size = tl.load(sizes + chunk, mask=exists, other=0).to(tl.int32)
            key = tl.load(state + HEADER + KEY * num_groups + group)
            place = tl.arange(0, WIDTH)[None, :]
            present = (wanted & (counted == 0) & (size <= capacity))[:, None] & (place < size[:, None])
            keys = tl.load(lists + chunk[:, None] * capacity + place, mask=present, other=0).to(tl.int64)
            found = tl.sum((present & (keys == key[:, None])).to(tl.int32), axis=1)
            found = tl.where(counted, size, found)
            again = (wanted & (counted == 0) & (size > capacity)).to(tl.int32)
            if tl.max(again) != 0:
                for i in range(ROWS):
                    if tl.max(tl.where(number == i, again, 0)) != 0:
                        row, begin = row_of(table, owners, tl.max(tl.where(number == i, chunk, 0)), BLOCK)
                        tie = tl.load(state + HEADER + KEY * num_groups + tl.load(row + GROUP))
                        found = tl.where(number == i, _ties(row, begin, tie, BITS, INFINITY, BLOCK), found)
            tl.store(sizes + chunk, found, mask=wanted)
            info = groups + group * GROUP_FIELDS
            run = (tl.load(info + NUM_CHUNKS) + num_bins - 1) // num_bins
            at = (chunk - tl.load(info + FIRST_CHUNK)) // run
            bins = work + group * (num_bins + COUNTERS * slots)
            tl.atomic_add(bins + at, found.to(tl.int64), mask=wanted & (found > 0))


@triton.jit
def _first_reached(counts, number, target):
    """Position where the running sum exceeds ``target``, and what of it is left there."""
    at = tl.sum((tl.cumsum(counts, 0) <= target).to(tl.int64))
    return at, target - tl.sum(tl.where(number < at, counts, 0))


@triton.jit(do_not_specialize=["num_groups", "slots"], do_not_specialize_on_alignment=["state"])
def place_cuts(
    table, owners, groups, state, num_groups, work, slots, sizes,
    BITS: tl.constexpr, INFINITY: tl.constexpr, BLOCK: tl.constexpr, BIN_BITS: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """Cuts of one group's layers: all ties stay before the one that is the first not to, none behind it."""
    group = tl.program_id(0).to(tl.int64)
    info = groups + group * GROUP_FIELDS
    first_row, num_rows = tl.load(info + FIRST_ROW), tl.load(info + NUM_ROWS)
    kept = tl.load(state + HEADER + KEPT * num_groups + group)
    ties = tl.load(state + HEADER + TIES * num_groups + group)
    owner = tl.where(ties == 0, first_row + num_rows, first_row - 1)
    cut = tl.full([], 0, tl.int64)
    if kept > 0:
        number = tl.arange(0, 1 << BIN_BITS)
        bins = tl.load(work + group * ((1 << BIN_BITS) + COUNTERS * slots) + number)
        at, target = _first_reached(bins, number, kept)
        num_chunks = tl.load(info + NUM_CHUNKS)
        run = (num_chunks + (1 << BIN_BITS) - 1) // (1 << BIN_BITS)
        end = tl.minimum((at + 1) * run, num_chunks)
        chunk, rank = at * run, target
        searching = tl.full([], 1, tl.int32)
        number = tl.arange(0, SCAN)
        for base in range(at * run, end, SCAN):
            place = base + number
            counts = tl.load(sizes + tl.load(info + FIRST_CHUNK) + place, mask=place < end, other=0).to(tl.int64)
            at, left = _first_reached(counts, number, target)
            here = (searching != 0) & (at < SCAN)
            chunk, rank = tl.where(here, base + at, chunk), tl.where(here, left, rank)
            searching = tl.where(here, 0, searching)
            target -= tl.sum(counts)
        chunk += tl.load(info + FIRST_CHUNK)
        row, begin = row_of(table, owners, chunk, BLOCK)
        owner = tl.load(owners + chunk).to(tl.int64)
        keys, stays, index = keys_of_chunk(row, begin, BITS, INFINITY, BLOCK, False, False)
        tie = stays & (keys == tl.load(state + HEADER + KEY * num_groups + group))
        cut = tl.sum(tl.where(tie & (flags_before(tie, BLOCK) == rank), index, 0))
    layers = state_of_layers(state, num_groups)
    number = tl.arange(0, SCAN)
    for base in range(0, num_rows, SCAN):
        exists = base + number < num_rows
        row = first_row + base + number
        n = tl.load(table + row * FIELDS + N, mask=exists, other=0)
        value = tl.where(row < owner, n, tl.where(row == owner, cut, 0))
        tl.store(layers + row * LAYER_FIELDS + CUT, value, mask=exists)
