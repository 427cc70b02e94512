"""The kernels of backend triton: the rows of a table in device memory say where a program reads and writes.

A program takes one chunk of BLOCK weights of one layer, as rows of eight whose mask bits are one byte. Sums are of
integers and lists are used as sets, so nothing depends on the order in which programs run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

INTEGERS = {2: tl.int16, 4: tl.int32, 8: tl.int64}
FLOATS = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}

# Fields of a layer's row, of an UpdateTensor's and of a StateMove's; rows of eight-byte integers, addresses first.
WEIGHTS, MASK, OUT, N, FIRST, GROUP, KEY, CUT = map(tl.constexpr, range(8))
GRADS, MASTER, STATE, RANKS, CONSTANTS = map(tl.constexpr, (2, 5, 6, 9, 10))
SOURCE, SOURCE_MASK, SOURCE_RANKS, TARGET, TARGET_MASK, TARGET_RANKS = map(tl.constexpr, (0, 1, 2, 5, 6, 7))
FIELDS = tl.constexpr(11)

# Fields of an optimizer step's constants, in the order of triton.py.
GRAD_FACTOR, DECAY, WEIGHT_DECAY, LR, MOMENTUM, ONE_MINUS_DAMPENING, NESTEROV, FIRST_STEP = map(tl.constexpr, range(8))
ONE_MINUS_BETA1, BETA2, ONE_MINUS_BETA2, BIAS_CORRECTION2_SQRT, EPS, STEP_SIZE = map(tl.constexpr, range(8, 14))
NUM_CONSTANTS = tl.constexpr(14)

# What a group's next pass reads.
READ_WEIGHTS, READ_LISTS = map(tl.constexpr, range(2))
NO_INDEX = tl.constexpr((1 << 63) - 1)


@triton.jit
def _chunk(table, owners, BLOCK: tl.constexpr):
    """The row that this program's chunk belongs to, and its first weight's flat index."""
    chunk = tl.program_id(0).to(tl.int64)
    row = table + tl.load(owners + chunk) * FIELDS
    return row, (chunk - tl.load(row + FIRST)) * BLOCK


@triton.jit
def _pointer(address, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _places(begin, BLOCK: tl.constexpr):
    """Flat indices in rows of eight."""
    return begin + (tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :])


@triton.jit
def _bytes(address, begin, n, BLOCK: tl.constexpr, FULL: tl.constexpr):
    """Mask bits of a chunk, a row to the byte; all ones where there is no mask. FULL: the tensor does not end here."""
    place = begin // 8 + tl.arange(0, BLOCK // 8)
    if address != 0:
        pointer = address.to(tl.pointer_type(tl.uint8)) + place
        bits = (tl.load(pointer) if FULL else tl.load(pointer, mask=place * 8 < n, other=0)).to(tl.int32)
    else:
        bits = tl.full([BLOCK // 8], 255, tl.int32)
    return bits


@triton.jit
def _spread(bits, index, n, FULL: tl.constexpr):
    """Bytes to booleans, one per weight."""
    flags = (bits[:, None] >> tl.arange(0, 8)[None, :]) & 1 != 0
    return flags if FULL else flags & (index < n)


@triton.jit
def _load(pointer, index, n, rows, FULL: tl.constexpr):
    """The weights of the rows that are asked for, zeros for the others; in vectors if FULL."""
    return tl.load(pointer + index, mask=rows[:, None] if FULL else rows[:, None] & (index < n), other=0)


@triton.jit
def _store(pointer, index, n, rows, values, FULL: tl.constexpr):
    tl.store(pointer + index, values, mask=rows[:, None] if FULL else rows[:, None] & (index < n))


@triton.jit
def _keys(raw, INFINITY: tl.constexpr):
    """csrc/magnitude_key.h: bits without the sign, all NaN being one key; in 32 bits where they fit."""
    if raw.dtype == tl.int64:
        keys = raw & 0x7FFFFFFFFFFFFFFF
    elif raw.dtype == tl.int32:
        keys = raw & 0x7FFFFFFF
    else:
        keys = raw.to(tl.int32) & 0x7FFF
    return tl.minimum(keys, INFINITY + 1)


@triton.jit
def _before(flags, BLOCK: tl.constexpr):
    """How many flags are set before each, in the order of the weights."""
    flat = tl.reshape(flags.to(tl.int32), [BLOCK])
    return tl.reshape(tl.cumsum(flat, 0) - flat, [BLOCK // 8, 8])


@triton.jit
def sample(
    table, owners, places, count, keys, BITS: tl.constexpr, INFINITY: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Keys of eights of weights: -1 where pruned already, above NaN where there is none."""
    eight = tl.program_id(0).to(tl.int64) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    exists = eight < count
    row = table + tl.load(owners + eight, mask=exists, other=0) * FIELDS
    place = tl.load(places + eight, mask=exists, other=NO_INDEX - 8)
    n, mask = tl.load(row + N), tl.load(row + MASK)
    index = place[:, None] + tl.arange(0, 8)[None, :]
    there = index < n[:, None]
    bits = tl.load(mask.to(tl.pointer_type(tl.uint8)) + place // 8, mask=(place < n) & (mask != 0), other=255)
    raw = tl.load(tl.load(row + WEIGHTS).to(tl.pointer_type(BITS))[:, None] + index, mask=there, other=0)
    kept = (bits.to(tl.int32)[:, None] >> tl.arange(0, 8)[None, :]) & 1 != 0
    found = tl.where(there, tl.where(kept, _keys(raw, INFINITY), -1), INFINITY + 2)
    tl.store(keys + eight[:, None] * 8 + tl.arange(0, 8)[None, :], found, mask=exists[:, None])


@triton.jit
def _count(
    table, owners, state, num_groups, bins, num_bins, counters, nonfinite, lists, sizes, matches,
    BITS: tl.constexpr, INFINITY: tl.constexpr, BLOCK: tl.constexpr, CAPACITY: tl.constexpr,
    ALIGNED: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    row, begin = _chunk(table, owners, BLOCK)
    chunk, group, n = tl.program_id(0).to(tl.int64), tl.load(row + GROUP), tl.load(row + N)
    index = _places(begin, BLOCK)
    bits = _bytes(tl.load(row + MASK), begin, n, BLOCK, FULL)
    kept = _spread(bits, index, n, FULL)
    keys = _keys(_load(_pointer(tl.load(row + WEIGHTS), BITS, ALIGNED), index, n, bits != 0, FULL), INFINITY)
    lo = tl.load(state + group).to(keys.dtype)
    hi = tl.load(state + num_groups + group).to(keys.dtype)
    inside = kept & (keys >= lo) & (keys <= hi)
    num_inside = tl.sum(inside.to(tl.int32))
    tl.atomic_add(counters + 3 * group, tl.sum((kept & (keys < lo)).to(tl.int32)).to(tl.int64))
    tl.atomic_add(counters + 3 * group + 1, tl.sum(kept.to(tl.int32)).to(tl.int64))
    if tl.max(tl.where(kept, keys, 0)) >= INFINITY:
        first = tl.min(tl.where(kept & (keys >= INFINITY), index, NO_INDEX))
        tl.atomic_min(nonfinite + tl.load(owners + chunk), first)
    if lo == hi:  # all in one bin: no need to go there one by one
        tl.atomic_add(bins + group * num_bins, num_inside.to(tl.int64))
    elif num_inside > 0:
        bin = (keys - lo) >> tl.load(state + 2 * num_groups + group).to(keys.dtype)
        tl.atomic_add(bins + group * num_bins + bin, tl.full(bin.shape, 1, tl.int64), mask=inside)
        if CAPACITY > 0:
            tl.atomic_max(counters + 3 * group + 2, num_inside.to(tl.int64))
            place = _before(inside, BLOCK)
            tl.store(lists + chunk * CAPACITY + place, keys, mask=inside & (place < CAPACITY))
    tl.store(sizes + chunk, num_inside)
    tl.store(matches + chunk, num_inside)


@triton.jit
def count(
    table, owners, state, num_groups, bins, num_bins, counters, nonfinite, lists, sizes, matches,
    BITS: tl.constexpr, INFINITY: tl.constexpr, BLOCK: tl.constexpr, CAPACITY: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """One read of the weights: how many lie below the bracket, which bins those inside fall into, and a list of them.

    ``state`` has the bracket of each group, ``counters`` its sums: below, kept, and the longest list.
    """
    row, begin = _chunk(table, owners, BLOCK)
    if tl.load(state + 3 * num_groups + tl.load(row + GROUP)) == READ_WEIGHTS:
        if begin + BLOCK <= tl.load(row + N):
            _count(
                table, owners, state, num_groups, bins, num_bins, counters, nonfinite, lists, sizes, matches,
                BITS, INFINITY, BLOCK, CAPACITY, ALIGNED, True,
            )  # fmt: skip
        else:
            _count(
                table, owners, state, num_groups, bins, num_bins, counters, nonfinite, lists, sizes, matches,
                BITS, INFINITY, BLOCK, CAPACITY, ALIGNED, False,
            )  # fmt: skip


@triton.jit
def recount(
    table, owners, num_chunks, state, num_groups, bins, num_bins, lists, sizes, matches,
    CAPACITY: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The same from the lists, of groups whose lists hold every key inside the bracket."""
    chunk = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = chunk < num_chunks
    group = tl.load(table + tl.load(owners + chunk, mask=exists, other=0) * FIELDS + GROUP)
    exists = exists & (tl.load(state + 3 * num_groups + group) == READ_LISTS)
    place = tl.arange(0, CAPACITY)[None, :]
    listed = place < tl.load(sizes + chunk, mask=exists, other=0)[:, None]
    keys = tl.load(lists + chunk[:, None] * CAPACITY + place, mask=listed, other=0)
    lo = tl.load(state + group)[:, None]
    inside = listed & (keys >= lo) & (keys <= tl.load(state + num_groups + group)[:, None])
    bin = (keys - lo) >> tl.load(state + 2 * num_groups + group)[:, None]
    tl.atomic_add(bins + group[:, None] * num_bins + bin, tl.full(bin.shape, 1, tl.int64), mask=inside)
    tl.store(matches + chunk, tl.sum(inside.to(tl.int32), axis=1), mask=exists)


@triton.jit
def collect(
    table, owners, state, num_groups, cursors, BITS: tl.constexpr, INFINITY: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The keys inside the brackets, in any order; ``cursors`` say how many there are already."""
    row, begin = _chunk(table, owners, BLOCK)
    room = tl.load(row + OUT)
    if room != 0:
        group, n = tl.load(row + GROUP), tl.load(row + N)
        index = _places(begin, BLOCK)
        bits = _bytes(tl.load(row + MASK), begin, n, BLOCK, False)
        raw = _load(_pointer(tl.load(row + WEIGHTS), BITS, False), index, n, bits != 0, False)
        keys = _keys(raw, INFINITY)
        lo = tl.load(state + group).to(keys.dtype)
        hi = tl.load(state + num_groups + group).to(keys.dtype)
        inside = _spread(bits, index, n, False) & (keys >= lo) & (keys <= hi)
        first = tl.atomic_add(cursors + group, tl.sum(inside.to(tl.int32)).to(tl.int64))
        tl.store(room.to(tl.pointer_type(BITS)) + first + _before(inside, BLOCK), keys, mask=inside)


@triton.jit
def place_cut(
    table, owners, chunks, ranks, keys, cuts, BITS: tl.constexpr, INFINITY: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The flat index of the tie that ``ranks`` others come before in its chunk."""
    group = tl.program_id(0)
    rank = tl.load(ranks + group)
    if rank >= 0:
        chunk = tl.load(chunks + group)
        row = table + tl.load(owners + chunk) * FIELDS
        begin = (chunk - tl.load(row + FIRST)) * BLOCK
        n = tl.load(row + N)
        index = _places(begin, BLOCK)
        bits = _bytes(tl.load(row + MASK), begin, n, BLOCK, False)
        raw = _load(_pointer(tl.load(row + WEIGHTS), BITS, False), index, n, bits != 0, False)
        tie = _spread(bits, index, n, False) & (_keys(raw, INFINITY) == tl.load(keys + group))
        tl.store(cuts + group, tl.sum(tl.where(tie & (_before(tie, BLOCK) == rank), index, 0)))


@triton.jit
def _apply(
    table, owners, counts,
    BITS: tl.constexpr, INFINITY: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    row, begin = _chunk(table, owners, BLOCK)
    n = tl.load(row + N)
    index = _places(begin, BLOCK)
    kept = _spread(_bytes(tl.load(row + MASK), begin, n, BLOCK, FULL), index, n, FULL)
    weights = _pointer(tl.load(row + WEIGHTS), BITS, ALIGNED)
    raw = _load(weights, index, n, tl.full([BLOCK // 8], 1, tl.int1), FULL)
    keys = _keys(raw, INFINITY)
    threshold = tl.load(row + KEY).to(keys.dtype)
    stays = kept & ((keys > threshold) | ((keys == threshold) & (index < tl.load(row + CUT))))
    changes = tl.max(tl.where(stays, 0, raw != 0).to(tl.int32), axis=1) != 0
    _store(weights, index, n, changes, tl.where(stays, raw, 0), FULL)
    out = tl.load(row + OUT)
    if out != 0:
        packed = tl.sum(stays.to(tl.int32) << tl.arange(0, 8)[None, :], axis=1)
        place = begin // 8 + tl.arange(0, BLOCK // 8)
        tl.store(out.to(tl.pointer_type(tl.uint8)) + place, packed.to(tl.uint8), mask=place * 8 < n)
        layer = tl.load(owners + tl.program_id(0))
        tl.atomic_add(counts + 2 * layer, tl.sum(kept.to(tl.int32)).to(tl.int64))
        tl.atomic_add(counts + 2 * layer + 1, tl.sum(stays.to(tl.int32)).to(tl.int64))


@triton.jit
def apply(
    table, owners, counts,
    BITS: tl.constexpr, INFINITY: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Zero what lies below the cut, in the rows where that changes something, and write the new bits."""
    row, begin = _chunk(table, owners, BLOCK)
    if begin + BLOCK <= tl.load(row + N):
        _apply(table, owners, counts, BITS, INFINITY, BLOCK, ALIGNED, True)
    else:
        _apply(table, owners, counts, BITS, INFINITY, BLOCK, ALIGNED, False)


@triton.jit
def _widen(raw, dtype: tl.constexpr):
    """Bits of a weight to what is computed with."""
    if dtype == tl.bfloat16:
        values = (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif dtype == tl.float16:
        values = raw.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        values = raw.to(dtype, bitcast=True)
    return values


@triton.jit
def _narrow(values, dtype: tl.constexpr):
    """The way back, rounded to nearest even; of NaN the bits that the CPU's conversions give."""
    if dtype == tl.bfloat16:
        wide = values.to(tl.int32, bitcast=True)
        rounded = (wide + 0x7FFF + ((wide >> 16) & 1)) >> 16
        bits = tl.where(values != values, 0x7FC0, rounded).to(tl.int16)
    elif dtype == tl.float16:
        wide = values.to(tl.int32, bitcast=True)
        nan = ((wide >> 16) & 0x8000) | 0x7E00 | ((wide >> 13) & 0x3FF)
        rounded = values.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
        bits = tl.where(values != values, nan, rounded).to(tl.int16)
    elif dtype == tl.float32:
        bits = values.to(tl.int32, bitcast=True)
    else:
        bits = values.to(tl.int64, bitcast=True)
    return bits


@triton.jit
def _square_root(values):
    return tl.sqrt_rn(values) if values.dtype == tl.float32 else tl.sqrt(values)


@triton.jit
def _quotient(a, b):
    return tl.div_rn(a, b) if a.dtype == tl.float32 else a / b


@triton.jit
def _lerp(start, end, weight):
    """torch's: from the nearer end, so that weight 1 gives ``end`` exactly."""
    from_start = weight < 0.5
    return tl.fma(end - start, tl.where(from_start, weight, weight - 1.0), tl.where(from_start, start, end))


@triton.jit
def _step(w, g, s0, s1, s2, c, RULE: tl.constexpr, STATES: tl.constexpr, T: tl.constexpr):
    """csrc/update_rule.h in the same order, fused where it fuses; compiled without contraction.

    What depends on a constant is selected: branches in between would keep layouts from being simplified.
    """
    if RULE == "average":
        w = _lerp(w, g, tl.load(c + ONE_MINUS_BETA1).to(T))
    else:
        g = g * tl.load(c + GRAD_FACTOR).to(T)
        w = w * tl.load(c + DECAY).to(T)
        weight_decay = tl.load(c + WEIGHT_DECAY).to(T)
        g = tl.where(weight_decay != 0, tl.fma(w, weight_decay, g), g)
    if RULE == "sgd":
        if STATES > 0:
            momentum = tl.load(c + MOMENTUM).to(T)
            weight = tl.load(c + ONE_MINUS_DAMPENING).to(T)
            s0 = tl.where(tl.load(c + FIRST_STEP) != 0, g, tl.fma(g, weight, s0 * momentum))
            g = tl.where(tl.load(c + NESTEROV) != 0, tl.fma(s0, momentum, g), s0)
        w = tl.fma(g, -tl.load(c + LR).to(T), w)
    if RULE == "adam":
        s0 = _lerp(s0, g, tl.load(c + ONE_MINUS_BETA1).to(T))
        s1 = tl.fma(tl.load(c + ONE_MINUS_BETA2).to(T) * g, g, s1 * tl.load(c + BETA2).to(T))
        second = s1
        if STATES > 2:
            s2 = tl.where((s2 > s1) | (s2 != s2), s2, s1)  # hands a NaN on, from either side
            second = s2
        bias = tl.load(c + BIAS_CORRECTION2_SQRT).to(T)
        denominator = _quotient(_square_root(second), bias) + tl.load(c + EPS).to(T)
        w = w + _quotient(-tl.load(c + STEP_SIZE).to(T) * s0, denominator)
    return w, s0, s1, s2


@triton.jit
def _update(
    table, owners, constants,
    RULE: tl.constexpr, STATES: tl.constexpr, COMPACT: tl.constexpr, HAS_MASTER: tl.constexpr,
    dtype: tl.constexpr, BITS: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    row, begin = _chunk(table, owners, BLOCK)
    n = tl.load(row + N)
    index = _places(begin, BLOCK)
    bits = _bytes(tl.load(row + MASK), begin, n, BLOCK, FULL)
    kept = _spread(bits, index, n, FULL)
    live = bits != 0
    g = _widen(_load(_pointer(tl.load(row + GRADS), BITS, ALIGNED), index, n, live, FULL), dtype)
    weights = _pointer(tl.load(row + WEIGHTS), BITS, ALIGNED)
    if HAS_MASTER:
        master = _pointer(tl.load(row + MASTER), T, ALIGNED)
        w = _load(master, index, n, live, FULL)
    else:
        w = _widen(_load(weights, index, n, live, FULL), dtype)

    if COMPACT:
        ranks = tl.load(row + RANKS).to(tl.pointer_type(tl.int64))
        place = tl.load(ranks + begin // BLOCK) + _before(kept, BLOCK)
        held = kept
    else:
        place = index
        held = live[:, None] if FULL else live[:, None] & (index < n)
    s0, s1, s2 = g, g, g
    if STATES > 0:
        p0 = _pointer(tl.load(row + STATE), T, ALIGNED) + place
        s0 = tl.load(p0, mask=held, other=0)
    if STATES > 1:
        p1 = _pointer(tl.load(row + STATE + 1), T, ALIGNED) + place
        s1 = tl.load(p1, mask=held, other=0)
    if STATES > 2:
        p2 = _pointer(tl.load(row + STATE + 2), T, ALIGNED) + place
        s2 = tl.load(p2, mask=held, other=0)

    c = constants + tl.load(row + CONSTANTS) * NUM_CONSTANTS
    w, s0, s1, s2 = _step(w, g, s0, s1, s2, c, RULE, STATES, T)

    if STATES > 0:
        tl.store(p0, tl.where(kept, s0, 0), mask=held)
    if STATES > 1:
        tl.store(p1, tl.where(kept, s1, 0), mask=held)
    if STATES > 2:
        tl.store(p2, tl.where(kept, s2, 0), mask=held)
    if HAS_MASTER:
        _store(master, index, n, live, tl.where(kept, w, 0), FULL)
    _store(weights, index, n, live, tl.where(kept, _narrow(w, dtype), 0), FULL)


@triton.jit
def update(
    table, owners, constants,
    RULE: tl.constexpr, STATES: tl.constexpr, COMPACT: tl.constexpr, HAS_MASTER: tl.constexpr,
    dtype: tl.constexpr, BITS: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The masked step; of rows of eight weights that are all pruned only the mask is read.

    Compact state holds the values of the kept weights, ``ranks`` how many come before each chunk.
    """
    row, begin = _chunk(table, owners, BLOCK)
    if begin + BLOCK <= tl.load(row + N):
        _update(table, owners, constants, RULE, STATES, COMPACT, HAS_MASTER, dtype, BITS, T, BLOCK, ALIGNED, True)
    else:
        _update(table, owners, constants, RULE, STATES, COMPACT, HAS_MASTER, dtype, BITS, T, BLOCK, ALIGNED, False)


@triton.jit
def count_kept(mask, n, counts, BLOCK: tl.constexpr):
    """Kept weights of each chunk of one mask."""
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    place = begin // 8 + tl.arange(0, BLOCK // 8)
    bits = tl.load(mask + place, mask=place * 8 < n, other=0).to(tl.int32)
    kept = _spread(bits, _places(begin, BLOCK), n, False)
    tl.store(counts + tl.program_id(0), tl.sum(kept.to(tl.int32)).to(tl.int64))


@triton.jit
def _layout(mask, ranks, index, begin, n, BLOCK: tl.constexpr):
    """Which weights a layout holds, and where."""
    if mask != 0:
        held = _spread(_bytes(mask, begin, n, BLOCK, False), index, n, False)
        place = tl.load(ranks.to(tl.pointer_type(tl.int64)) + begin // BLOCK) + _before(held, BLOCK)
    else:
        held = index < n
        place = index
    return held, place


@triton.jit
def repack(table, owners, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """State on its way from layout to layout."""
    row, begin = _chunk(table, owners, BLOCK)
    n = tl.load(row + N)
    index = _places(begin, BLOCK)
    held, place = _layout(tl.load(row + SOURCE_MASK), tl.load(row + SOURCE_RANKS), index, begin, n, BLOCK)
    values = tl.load(tl.load(row + SOURCE).to(tl.pointer_type(BITS)) + place, mask=held, other=0)
    held, place = _layout(tl.load(row + TARGET_MASK), tl.load(row + TARGET_RANKS), index, begin, n, BLOCK)
    tl.store(tl.load(row + TARGET).to(tl.pointer_type(BITS)) + place, values, mask=held)


@triton.jit
def _squares(row, begin, dtype: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
             FULL: tl.constexpr):  # fmt: skip
    n = tl.load(row + N)
    index = _places(begin, BLOCK)
    bits = _bytes(tl.load(row + MASK), begin, n, BLOCK, FULL)
    raw = _load(_pointer(tl.load(row + WEIGHTS), BITS, ALIGNED), index, n, bits != 0, FULL)
    values = tl.where(_spread(bits, index, n, FULL), _widen(raw, dtype).to(tl.float64), 0.0)
    return tl.sum(values * values)


@triton.jit
def sum_squares(
    table, owners, sums, dtype: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """Of the kept gradients of each chunk."""
    row, begin = _chunk(table, owners, BLOCK)
    if begin + BLOCK <= tl.load(row + N):
        total = _squares(row, begin, dtype, BITS, BLOCK, ALIGNED, True)
    else:
        total = _squares(row, begin, dtype, BITS, BLOCK, ALIGNED, False)
    tl.store(sums + tl.program_id(0), total)
