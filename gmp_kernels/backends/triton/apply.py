"""The kernels that write what was selected: zeros and mask bits of a prune step, keys inside a bracket."""

from __future__ import annotations

import triton
import triton.language as tl

from gmp_kernels.backends.triton.select import COUNTERS, CUT, HEADER, HI, KEY, LAYER_FIELDS, LO, state_of_layers
from gmp_kernels.backends.triton.tiles import (
    GROUP,
    MASK,
    WEIGHTS,
    N,
    flags_before,
    keys_of_chunk,
    load_rows,
    magnitude_keys,
    mask_bytes,
    places,
    pointer_to,
    row_of,
    spread,
    store_rows,
)


@triton.jit
def _apply(
    row, begin, chunk, layer, outs, state, num_groups, num_layers, slots,
    BITS: tl.constexpr, INFINITY: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, SELECTED: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    n = tl.load(row + N)
    index = places(begin, BLOCK)
    kept = spread(mask_bytes(tl.load(row + MASK), begin, n, BLOCK, FULL), index, n, FULL)
    weights = pointer_to(tl.load(row + WEIGHTS), BITS, ALIGNED)
    raw = load_rows(weights, index, n, tl.full([BLOCK // 8], 1, tl.int1), FULL)
    stays = kept
    if SELECTED:
        keys = magnitude_keys(raw, INFINITY)
        threshold = tl.load(state + HEADER + KEY * num_groups + tl.load(row + GROUP)).to(keys.dtype)
        layers = state_of_layers(state, num_groups)
        cut = tl.load(layers + layer * LAYER_FIELDS + CUT)
        stays = kept & ((keys > threshold) | ((keys == threshold) & (index < cut)))
    changes = tl.max(tl.where(stays, 0, raw != 0).to(tl.int32), axis=1) != 0
    store_rows(weights, index, n, changes, tl.where(stays, raw, 0), FULL)
    if SELECTED:
        packed = tl.sum(stays.to(tl.int32) << tl.arange(0, 8)[None, :], axis=1)
        place = begin // 8 + tl.arange(0, BLOCK // 8)
        out = tl.load(outs + layer).to(tl.pointer_type(tl.uint8))
        tl.store(out + place, packed.to(tl.uint8), mask=place * 8 < n)
        # Sums of one address wait for one another: neighbours add to different ones.
        counters = layers + LAYER_FIELDS * num_layers + (layer * slots + chunk % slots) * COUNTERS
        tl.atomic_add(counters, tl.sum(kept.to(tl.int32)).to(tl.int64))
        tl.atomic_add(counters + 1, tl.sum(stays.to(tl.int32)).to(tl.int64))


@triton.jit(do_not_specialize=["num_groups", "num_layers", "slots"], do_not_specialize_on_alignment=["state", "stop"])
def apply(
    table, owners, outs, state, num_groups, num_layers, slots, stop,
    BITS: tl.constexpr, INFINITY: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, SELECTED: tl.constexpr,
    STOPS: tl.constexpr,
):  # fmt: skip
    """Zero what lies below the cut, in the rows where that changes something, and write the new bits.

    With STOPS nothing is done if ``stop`` is set; without SELECTED the masks alone say what stays.
    """
    chunk = tl.program_id(0).to(tl.int64)
    row, begin = row_of(table, owners, chunk, BLOCK)
    layer = tl.load(owners + chunk).to(tl.int64)
    goes = True
    if STOPS:
        goes = tl.load(stop) == 0
    if goes:
        if begin + BLOCK <= tl.load(row + N):
            _apply(
                row, begin, chunk, layer, outs, state, num_groups, num_layers, slots,
                BITS, INFINITY, BLOCK, ALIGNED, SELECTED, True,
            )  # fmt: skip
        else:
            _apply(
                row, begin, chunk, layer, outs, state, num_groups, num_layers, slots,
                BITS, INFINITY, BLOCK, ALIGNED, SELECTED, False,
            )  # fmt: skip


@triton.jit(do_not_specialize=["num_groups"], do_not_specialize_on_alignment=["state"])
def collect(
    table, owners, outs, state, num_groups, cursors,
    BITS: tl.constexpr, INFINITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The keys inside the brackets, in any order; ``cursors`` say how many there are already."""
    chunk = tl.program_id(0).to(tl.int64)
    row, begin = row_of(table, owners, chunk, BLOCK)
    room = tl.load(outs + tl.load(owners + chunk))
    if room != 0:
        group = tl.load(row + GROUP)
        keys, kept, _ = keys_of_chunk(row, begin, BITS, INFINITY, BLOCK, False, False)
        lo = tl.load(state + HEADER + LO * num_groups + group).to(keys.dtype)
        hi = tl.load(state + HEADER + HI * num_groups + group).to(keys.dtype)
        inside = kept & (keys >= lo) & (keys <= hi)
        first = tl.atomic_add(cursors + group, tl.sum(inside.to(tl.int32)).to(tl.int64))
        tl.store(room.to(tl.pointer_type(BITS)) + first + flags_before(inside, BLOCK), keys, mask=inside)
