"""The kernel that applies a selection: it writes zeros and mask bits."""

from __future__ import annotations

import triton
import triton.language as tl

from gmp_kernels.backends.triton.tiles import (
    CHANNELS,
    COUNTERS,
    MASK,
    POSITIONS,
    WEIGHTS,
    N,
    load_rows,
    magnitude_keys,
    mask_bytes,
    places,
    pointer_to,
    row_of,
    spread,
    store_bits,
    store_rows,
)

# Columns of a request, each with an entry per layer.
KEY, TIE_INDEX, OUT = map(tl.constexpr, range(3))


@triton.jit
def are_before(row, index, begin, tie_index, BLOCK: tl.constexpr, PERMUTED: tl.constexpr):
    """Whether weights come before a flat index. PERMUTED: memory may hold a filter in another order than row-major."""
    before = index < tie_index
    if PERMUTED:
        channels = tl.load(row + CHANNELS)
        size = channels * tl.load(row + POSITIONS)
        first = tie_index // size * size
        # Only in the filter of the tie index the orders differ.
        if (begin < first + size) & (first < begin + BLOCK):
            place = index - first
            row_major = place % channels * (size // channels) + place // channels
            before = tl.where((place >= 0) & (place < size), row_major < tie_index - first, before)
    return before


@triton.jit
def store_zeros(weights, index, n, raw, stays, FULL: tl.constexpr):
    """Zero the weights that do not stay, in rows that this changes."""
    changes = tl.max(tl.where(stays, 0, raw != 0).to(tl.int32), axis=1) != 0
    store_rows(weights, index, n, changes, tl.where(stays, raw, 0), FULL)


@triton.jit
def add_up(counts, layer, chunk, slots, kept, stays):
    """Count the weights kept before and now."""
    # Atomic sums at one address wait for one another, so neighbouring chunks add to different ones.
    counters = counts + (layer * slots + chunk % slots) * COUNTERS
    tl.atomic_add(counters, tl.sum(kept.to(tl.int32)).to(tl.int64))
    tl.atomic_add(counters + 1, tl.sum(stays.to(tl.int32)).to(tl.int64))


@triton.jit
def _apply(
    row, begin, chunk, layer, asked, num_layers, counts, slots,
    BITS: tl.constexpr, INFINITY: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, PERMUTED: tl.constexpr,
    SELECTED: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    n = tl.load(row + N)
    index = places(begin, BLOCK)
    kept = spread(mask_bytes(tl.load(row + MASK), begin, n, BLOCK, FULL), index, n, FULL)
    weights = pointer_to(tl.load(row + WEIGHTS), BITS, ALIGNED)
    raw = load_rows(weights, index, n, tl.full([BLOCK // 8], 1, tl.int1), FULL)
    stays = kept
    if SELECTED:
        keys = magnitude_keys(raw, INFINITY)
        threshold = tl.load(asked + KEY * num_layers + layer).to(keys.dtype)
        tie_index = tl.load(asked + TIE_INDEX * num_layers + layer)
        before = are_before(row, index, begin, tie_index, BLOCK, PERMUTED)
        stays = kept & ((keys > threshold) | ((keys == threshold) & before))
    store_zeros(weights, index, n, raw, stays, FULL)
    if SELECTED:
        store_bits(tl.load(asked + OUT * num_layers + layer), begin, n, stays, BLOCK)
        add_up(counts, layer, chunk, slots, kept, stays)


@triton.jit(do_not_specialize=["num_layers", "slots"], do_not_specialize_on_alignment=["asked", "counts"])
def apply(
    table, owners, asked, num_layers, counts, slots,
    BITS: tl.constexpr, INFINITY: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, PERMUTED: tl.constexpr,
    SELECTED: tl.constexpr,
):  # fmt: skip
    """Zero the weights below the cutoffs, in rows that this changes, and write the new bits.

    Without SELECTED the masks alone decide.
    """
    chunk = tl.program_id(0).to(tl.int64)
    row, begin = row_of(table, owners, chunk, BLOCK)
    layer = tl.load(owners + chunk).to(tl.int64)
    if begin + BLOCK <= tl.load(row + N):
        _apply(
            row, begin, chunk, layer, asked, num_layers, counts, slots,
            BITS, INFINITY, BLOCK, ALIGNED, PERMUTED, SELECTED, True,
        )  # fmt: skip
    else:
        _apply(
            row, begin, chunk, layer, asked, num_layers, counts, slots,
            BITS, INFINITY, BLOCK, ALIGNED, PERMUTED, SELECTED, False,
        )  # fmt: skip
