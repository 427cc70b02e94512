"""The kernels of patterns and scores: which weights are protected, the sums of blocks, and the writes of both.

A layer of a pattern or scores is ranked as a plain one (``Implementation.ranked``). What settles its weights is found
anew where they are written, so that nothing but the numbers of units has to be kept in between.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gmp_kernels.backends.addresses import element_address
from gmp_kernels.backends.layers import Layer, ranked_dtype
from gmp_kernels.backends.triton.apply import KEY, OUT, TIE_INDEX, add_up, are_before, store_zeros
from gmp_kernels.backends.triton.tables import INTERPRETED
from gmp_kernels.backends.triton.tiles import (
    CHANNELS,
    FIRST_UNIT,
    MASK,
    PATTERN,
    POSITIONS,
    SCORES,
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
    widen,
)
from gmp_kernels.patterns import BLOCKS, GROUPS, MOST, NONE

__all__ = ["Form", "fields_of", "find_protected", "form_of", "mark_eligible", "settle", "sum_blocks"]

# Kinds beside those of patterns.py: groups that are whole rows, which may be long; and groups of four neighbours, which
# lie in the registers of one thread.
ROWS, FOURS = 3, 4
# What one program takes: blocks of a layer; rows of a layer, and how many weights of each at a time. A warp each.
UNITS = 4096 if INTERPRETED else 64
TILE_ROWS, TILE_COLUMNS = (64, 256) if INTERPRETED else (1, 512)

_UNITS, _TILE_ROWS, _TILE_COLUMNS = map(tl.constexpr, (UNITS, TILE_ROWS, TILE_COLUMNS))
_GROUPS, _BLOCKS, _ROWS, _FOURS = map(tl.constexpr, (GROUPS, BLOCKS, ROWS, FOURS))


class Form(NamedTuple):
    """Constants for which launches are compiled, of a layer with a pattern or scores.

    Attributes
    ----------
    kind : int
    cols : int
        Of a block; 0 for other kinds.
    source, ranked : torch.dtype
        Of what ranks the layer, and of what is ranked of it.
    is_scored : bool
        Whether scores rank it.
    """

    kind: int
    cols: int
    source: torch.dtype
    ranked: torch.dtype
    is_scored: bool

    @property
    def has_pattern(self) -> bool:
        return self.kind != NONE

    @property
    def is_summed(self) -> bool:
        """Whether what is ranked are the numbers of units."""
        return self.kind == BLOCKS

    @property
    def kernel(self) -> tuple[str, int] | None:
        """The kernel that finds a number for each unit, and how many units a program takes; None if none is needed."""
        return {BLOCKS: ("sum_blocks", UNITS), ROWS: ("find_protected", TILE_ROWS)}.get(self.kind)

    @property
    def numbers(self) -> tuple[int, torch.dtype]:
        """Number of values of a unit, and their dtype."""
        return (1, self.ranked) if self.kind == BLOCKS else (2, torch.int64)


def form_of(layer: Layer) -> Form | None:
    """Return the form of a layer; None if it is plain."""
    if layer.is_plain:
        return None
    kind, _, b, c = _numbers_of(layer)
    if kind == GROUPS and c == 1:
        is_row = b == layer.weight[0].numel() and (b > MOST or layer.is_channels_last)
        kind = ROWS if is_row else FOURS if b == 4 else GROUPS
    cols = b if kind == BLOCKS else 0
    return Form(kind, cols, layer.source.dtype, ranked_dtype(layer), layer.scores is not None)


def fields_of(layer: Layer, form: Form | None, first_unit: int) -> tuple[tuple[int, ...], int]:
    """Return the fields of a layer's row from SCORES on, and how many units have numbers."""
    if form is None:
        return (), 0
    _, a, b, c = _numbers_of(layer)
    units = layer.weight.numel() // (a * b) if form.kind == BLOCKS else len(layer.weight) if form.kind == ROWS else 0
    return (element_address(layer.source), a, b, c, first_unit), units


def _numbers_of(layer: Layer) -> tuple[int, int, int, int]:
    if layer.pattern is None:
        return NONE, 0, 0, 0
    return layer.pattern.row(layer.tensor.shape, is_channels_last=layer.is_channels_last)


@triton.jit
def _row_and_column(row, place, width, PERMUTED: tl.constexpr, INDEX: tl.constexpr):
    """Return the row and column in the matrix of a layer of a place in memory; columns are in row-major order."""
    height = place // width
    column = place - height * width
    if PERMUTED:
        channels, positions = tl.load(row + CHANNELS).to(INDEX), tl.load(row + POSITIONS).to(INDEX)
        column = column % channels * positions + column // channels
    return height, column


@triton.jit
def _place_in_row(row, column, PERMUTED: tl.constexpr, INDEX: tl.constexpr):
    """Return the place of a column in the memory of its row."""
    place = column
    if PERMUTED:
        channels, positions = tl.load(row + CHANNELS).to(INDEX), tl.load(row + POSITIONS).to(INDEX)
        place = column % positions * channels + column // positions
    return place


@triton.jit
def _kept_at(row, place, there):
    """Whether the weights at these places in memory are there and not pruned."""
    mask = tl.load(row + MASK)
    byte = tl.full(place.shape, 255, tl.int32)
    if mask != 0:
        byte = tl.load(mask.to(tl.pointer_type(tl.uint8)) + place // 8, mask=there, other=0).to(tl.int32)
    return there & ((byte >> (place % 8).to(tl.int32)) & 1 != 0)


@triton.jit
def _num_later_of_four(keys, kept, BLOCK: tl.constexpr):
    """Count how many weights of its group of four neighbours are later in the order than each unpruned weight."""
    keys = tl.where(kept, keys, -1)
    even, odd = tl.split(tl.reshape(keys, [BLOCK // 4, 2, 2]))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    # Of equal keys the first is the later one.
    ab, ac, ad = (a >= b).to(tl.int32), (a >= c).to(tl.int32), (a >= d).to(tl.int32)
    bc, bd, cd = (b >= c).to(tl.int32), (b >= d).to(tl.int32), (c >= d).to(tl.int32)
    even = tl.join(3 - ab - ac - ad, ac + bc + 1 - cd)
    odd = tl.join(ab + 2 - bc - bd, ad + bd + cd)
    return tl.reshape(tl.join(even, odd), [BLOCK // 8, 8])


@triton.jit
def _num_later(row, source, place, keys, kept, INFINITY: tl.constexpr, INDEX: tl.constexpr):
    """Count how many weights of its group are later in the order than each unpruned weight."""
    of, stride = tl.load(row + PATTERN + 1).to(INDEX), tl.load(row + PATTERN + 2).to(INDEX)
    other = place - place // stride % of * stride
    later = tl.zeros(keys.shape, tl.int32)
    for _ in range(0, of):
        theirs = magnitude_keys(tl.load(source + other, mask=kept, other=0), INFINITY)
        is_later = (theirs > keys) | ((theirs == keys) & (other < place))
        later += (_kept_at(row, other, kept) & is_later).to(tl.int32)
        other += stride
    return later


@triton.jit
def _are_eligible(
    row, source, index, keys, kept, numbers,
    KIND: tl.constexpr, INFINITY: tl.constexpr, BLOCK: tl.constexpr, PERMUTED: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Whether weights are neither pruned nor protected.

    Other programs, or an attempt that was interrupted, may have written zeros and bits of the same group. These are of
    eligible weights, which only move further to the front by that: the protected ones stay those that come last.
    """
    eligible = kept
    if KIND == _FOURS:
        eligible = kept & (_num_later_of_four(keys, kept, BLOCK) >= tl.load(row + PATTERN))
    elif KIND == _GROUPS:
        later = _num_later(row, source, index.to(INDEX), keys, kept, INFINITY, INDEX)
        eligible = kept & (later >= tl.load(row + PATTERN))
    elif KIND == _ROWS:
        width = tl.load(row + PATTERN + 1).to(INDEX)
        height, column = _row_and_column(row, index.to(INDEX), width, PERMUTED, INDEX)
        own = numbers + (tl.load(row + FIRST_UNIT) + height) * 2
        key = tl.load(own, mask=kept, other=0).to(keys.dtype)
        last = tl.load(own + 1, mask=kept, other=0)
        eligible = kept & ((keys < key) | ((keys == key) & (column > last)))
    return eligible


@triton.jit
def _load(row, index, n, SOURCE: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr):
    """Return the address of the scores of a layer, and those of a chunk."""
    source = pointer_to(tl.load(row + SCORES), SOURCE, ALIGNED)
    return source, load_rows(source, index, n, tl.full([index.shape[0]], 1, tl.int1), FULL)


@triton.jit
def _mark(
    row, begin, out, numbers,
    SOURCE: tl.constexpr, INFINITY: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, PERMUTED: tl.constexpr,
    KIND: tl.constexpr, INDEX: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    n, index = tl.load(row + N), places(begin, BLOCK)
    kept = spread(mask_bytes(tl.load(row + MASK), begin, n, BLOCK, FULL), index, n, FULL)
    source, raw = _load(row, index, n, SOURCE, ALIGNED, FULL)
    keys = magnitude_keys(raw, INFINITY)
    eligible = _are_eligible(row, source, index, keys, kept, numbers, KIND, INFINITY, BLOCK, PERMUTED, INDEX)
    store_bits(out, begin, n, eligible, BLOCK)


@triton.jit(do_not_specialize_on_alignment=["asked", "numbers"])
def mark_eligible(
    table, owners, asked, numbers,
    SOURCE: tl.constexpr, INFINITY: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, PERMUTED: tl.constexpr,
    KIND: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Write a bit per weight: whether it is neither pruned nor protected. ``asked`` are addresses of the bits."""
    chunk = tl.program_id(0).to(tl.int64)
    row, begin = row_of(table, owners, chunk, BLOCK)
    out = tl.load(asked + tl.load(owners + chunk))
    if begin + BLOCK <= tl.load(row + N):
        _mark(row, begin, out, numbers, SOURCE, INFINITY, BLOCK, ALIGNED, PERMUTED, KIND, INDEX, True)
    else:
        _mark(row, begin, out, numbers, SOURCE, INFINITY, BLOCK, ALIGNED, PERMUTED, KIND, INDEX, False)


@triton.jit(do_not_specialize_on_alignment=["asked", "numbers"])
def sum_blocks(
    table, owners, asked, numbers,
    DTYPE: tl.constexpr, SOURCE: tl.constexpr, INFINITY: tl.constexpr, COLS: tl.constexpr, MARKED: tl.constexpr,
    PERMUTED: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Sum the magnitudes of each block in row-major order.

    MARKED: the bits of the blocks, which are those of their first weights, go to the addresses in ``asked``.
    """
    chunk = tl.program_id(0).to(tl.int64)
    row, begin = row_of(table, owners, chunk, _UNITS)
    n, index = tl.load(row + N), places(begin, _UNITS)
    there = index < n
    rows, width = tl.load(row + PATTERN).to(INDEX), tl.load(row + PATTERN + 2).to(INDEX)
    source = tl.load(row + SCORES).to(tl.pointer_type(SOURCE))
    block = index.to(INDEX)
    height = block // (width // COLS)
    column = (block - height * (width // COLS)) * COLS
    first = height * rows * width
    T: tl.constexpr = tl.float64 if tl.float64 == DTYPE else tl.float32
    total = tl.zeros([_UNITS // 8, 8], T)
    for r in range(0, rows):
        for c in tl.static_range(COLS):
            place = first + r * width + _place_in_row(row, column + c, PERMUTED, INDEX)
            total += tl.abs(widen(tl.load(source + place, mask=there, other=0), DTYPE))
    tl.store(numbers + tl.load(row + FIRST_UNIT) + index, total, mask=there)
    if MARKED:
        place = first + _place_in_row(row, column, PERMUTED, INDEX)
        store_bits(tl.load(asked + tl.load(owners + chunk)), begin, n, _kept_at(row, place, there), _UNITS)


@triton.jit
def _num_from(
    row, source, height, there, width, key, end,
    INFINITY: tl.constexpr, PERMUTED: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Count how many unpruned weights of each row have a larger key, or this one and a column before ``end``."""
    number = tl.zeros([_TILE_ROWS], INDEX)
    for begin in range(0, width, _TILE_COLUMNS):
        in_row = begin + tl.arange(0, _TILE_COLUMNS).to(INDEX)[None, :]
        place = height[:, None] * width + in_row
        exists = there[:, None] & (in_row < width)
        keys = magnitude_keys(tl.load(source + place, mask=exists, other=0), INFINITY)
        _, column = _row_and_column(row, place, width, PERMUTED, INDEX)
        is_later = (keys > key[:, None]) | ((keys == key[:, None]) & (column < end[:, None]))
        number += tl.sum((_kept_at(row, place, exists) & is_later).to(tl.int32), axis=1).to(INDEX)
    return number


@triton.jit(do_not_specialize_on_alignment=["asked", "numbers"])
def find_protected(
    table, owners, asked, numbers,
    DTYPE: tl.constexpr, SOURCE: tl.constexpr, INFINITY: tl.constexpr, COLS: tl.constexpr, MARKED: tl.constexpr,
    PERMUTED: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Find the first protected weight of each row in the order, bit by bit: its key and its column."""
    chunk = tl.program_id(0).to(tl.int64)
    row, begin = row_of(table, owners, chunk, _TILE_ROWS)
    height = begin + tl.arange(0, _TILE_ROWS)
    there = height < tl.load(row + N)
    keep, width = tl.load(row + PATTERN).to(INDEX), tl.load(row + PATTERN + 1).to(INDEX)
    source = tl.load(row + SCORES).to(tl.pointer_type(SOURCE))
    WIDE: tl.constexpr = tl.int64 if SOURCE.primitive_bitwidth == 64 else tl.int32
    own = height.to(INDEX)
    key = tl.zeros([_TILE_ROWS], WIDE)
    column = tl.zeros([_TILE_ROWS], INDEX)
    bit = tl.full([], 1, WIDE) << (SOURCE.primitive_bitwidth - 2)
    while bit > 0:
        number = _num_from(row, source, own, there, width, key | bit, column + width, INFINITY, PERMUTED, INDEX)
        key = tl.where(number >= keep, key | bit, key)
        bit = bit >> 1
    step = tl.full([], 1, INDEX)
    while step <= width // 2:
        step = step * 2
    while step > 0:
        number = _num_from(row, source, own, there, width, key, column | step, INFINITY, PERMUTED, INDEX)
        column = tl.where(number < keep, column | step, column)
        step = step >> 1
    place = numbers + (tl.load(row + FIRST_UNIT) + height) * 2
    tl.store(place, key.to(tl.int64), mask=there)
    tl.store(place + 1, column.to(tl.int64), mask=there)


@triton.jit(do_not_specialize=["num_layers", "slots"], do_not_specialize_on_alignment=["asked", "counts", "numbers"])
def settle(
    table, owners, asked, num_layers, counts, slots, numbers,
    BITS: tl.constexpr, SOURCE: tl.constexpr, INFINITY: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
    PERMUTED: tl.constexpr, KIND: tl.constexpr, SCORED: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Zero the weights that are ranked below the cutoffs and not protected, and write the new bits."""
    chunk = tl.program_id(0).to(tl.int64)
    row, begin = row_of(table, owners, chunk, BLOCK)
    layer = tl.load(owners + chunk).to(tl.int64)
    if begin + BLOCK <= tl.load(row + N):
        _settle(
            row, begin, chunk, layer, asked, num_layers, counts, slots, numbers,
            BITS, SOURCE, INFINITY, BLOCK, ALIGNED, PERMUTED, KIND, SCORED, INDEX, True,
        )  # fmt: skip
    else:
        _settle(
            row, begin, chunk, layer, asked, num_layers, counts, slots, numbers,
            BITS, SOURCE, INFINITY, BLOCK, ALIGNED, PERMUTED, KIND, SCORED, INDEX, False,
        )  # fmt: skip


@triton.jit
def _settle(
    row, begin, chunk, layer, asked, num_layers, counts, slots, numbers,
    BITS: tl.constexpr, SOURCE: tl.constexpr, INFINITY: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
    PERMUTED: tl.constexpr, KIND: tl.constexpr, SCORED: tl.constexpr, INDEX: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    n, index = tl.load(row + N), places(begin, BLOCK)
    kept = spread(mask_bytes(tl.load(row + MASK), begin, n, BLOCK, FULL), index, n, FULL)
    weights = pointer_to(tl.load(row + WEIGHTS), BITS, ALIGNED)
    tie_index = tl.load(asked + TIE_INDEX * num_layers + layer)
    if KIND == _BLOCKS:
        cols, width = tl.load(row + PATTERN + 1).to(INDEX), tl.load(row + PATTERN + 2).to(INDEX)
        height, column = _row_and_column(row, index.to(INDEX), width, PERMUTED, INDEX)
        block = height // tl.load(row + PATTERN).to(INDEX) * (width // cols) + column // cols
        own = numbers + tl.load(row + FIRST_UNIT) + block
        keys = magnitude_keys(tl.load(own, mask=kept, other=0).to(SOURCE, bitcast=True), INFINITY)
        eligible, before = kept, block < tie_index
    else:
        source, raw = _load(row, index, n, SOURCE, ALIGNED, FULL)
        keys = magnitude_keys(raw, INFINITY)
        eligible = _are_eligible(row, source, index, keys, kept, numbers, KIND, INFINITY, BLOCK, PERMUTED, INDEX)
        before = are_before(row, index, begin, tie_index, BLOCK, PERMUTED)
    threshold = tl.load(asked + KEY * num_layers + layer).to(keys.dtype)
    stays = kept & ((keys > threshold) | ((keys == threshold) & before) | (eligible == 0))
    if SCORED or KIND == _BLOCKS:
        raw = load_rows(weights, index, n, tl.min(stays.to(tl.int32), axis=1) == 0, FULL)
    store_zeros(weights, index, n, raw, stays, FULL)
    store_bits(tl.load(asked + OUT * num_layers + layer), begin, n, stays, BLOCK)
    add_up(counts, layer, chunk, slots, kept, stays)
