"""The kernels of the optimizers: the masked step, the gradients' norm, and moves of compact state between layouts."""

from __future__ import annotations

import triton
import triton.language as tl

from gmp_kernels.backends.triton.tiles import (
    CHUNK_OFFSETS,
    MASK,
    MASTER,
    SOURCE,
    SOURCE_MASK,
    SOURCE_OFFSETS,
    STATE,
    TARGET,
    TARGET_MASK,
    TARGET_OFFSETS,
    WEIGHTS,
    N,
    flags_before,
    load_rows,
    mask_bytes,
    places,
    pointer_to,
    row_of,
    spread,
    store_rows,
    widen,
)

# The constants of a step, with the values that change nothing: those of csrc/optim/update_rule.h, in any order.
CONSTANTS = {
    "grad_factor": 1.0,
    "decay": 1.0,
    "weight_decay": 0.0,
    "lr": 0.0,
    "momentum": 0.0,
    "one_minus_dampening": 1.0,
    "nesterov": 0.0,
    "first_step": 0.0,
    "one_minus_beta1": 0.0,
    "beta2": 0.0,
    "one_minus_beta2": 0.0,
    "bias_correction2_sqrt": 1.0,
    "eps": 0.0,
    "step_size": 0.0,
    "rounding_seed": 0.0,
    "skip": 0.0,
}
NUM_CONSTANTS = tl.constexpr(len(CONSTANTS))


@triton.constexpr_function
def _column_of(name):
    return list(CONSTANTS).index(name)


@triton.jit
def _constant(c, NAME: tl.constexpr, T: tl.constexpr):
    """One constant of a row, in the type of the arithmetic."""
    return tl.load(c + _column_of(NAME)).to(T)


@triton.jit
def _narrow(values, dtype: tl.constexpr):
    """Back to the bits of a weight, rounded to nearest even; NaN gets the bits that the CPU's conversions give."""
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
def _load_state(place, held, STATE_TYPE: tl.constexpr):
    return widen(tl.load(place, mask=held, other=0), STATE_TYPE)


@triton.jit
def _store_state(place, values, kept, held, c, STATE_TYPE: tl.constexpr):
    """Store state, which is rounded at random if it is bfloat16: rounded_at_random in csrc/optim/rules.h."""
    if tl.bfloat16 == STATE_TYPE:
        hashed = (tl.load(c + _column_of("rounding_seed")).to(tl.int32).to(tl.uint32) + 1) * 0x9E3779B9
        hashed = (hashed ^ (hashed >> 16)) * 0x7FEB352D
        hashed = (hashed ^ (hashed >> 15)) * 0x846CA68B
        factor = (hashed ^ (hashed >> 16)) | 1
        bits = values.to(tl.uint32, bitcast=True)
        rounded = tl.where(values != values, 0x7FC0, (bits + (bits * factor >> 16)) >> 16).to(tl.int16)
    else:
        rounded = _narrow(values, STATE_TYPE)
    tl.store(place, tl.where(kept, rounded, 0), mask=held)


@triton.jit
def _square_root(values):
    return tl.sqrt_rn(values) if values.dtype == tl.float32 else tl.sqrt(values)


@triton.jit
def _quotient(a, b):
    return tl.div_rn(a, b) if a.dtype == tl.float32 else a / b


@triton.jit
def _lerp(start, end, weight):
    """Interpolate as torch does, from the nearer end, so that weight 1 gives ``end`` exactly."""
    from_start = weight < 0.5
    return tl.fma(end - start, tl.where(from_start, weight, weight - 1.0), tl.where(from_start, start, end))


# The rules of csrc/optim/update_rule.h in the same order, fused where they fuse; compiled without contraction. What
# depends on a constant is selected: branches in between would keep layouts from being simplified.


@triton.jit
def _scale(w, g, c, T: tl.constexpr):
    g = g * _constant(c, "grad_factor", T)
    w = w * _constant(c, "decay", T)
    weight_decay = _constant(c, "weight_decay", T)
    return w, tl.where(weight_decay != 0, tl.fma(w, weight_decay, g), g)


@triton.jit
def _sgd(w, g, momentum, c, STATES: tl.constexpr, T: tl.constexpr):
    w, g = _scale(w, g, c, T)
    if STATES > 0:
        factor = _constant(c, "momentum", T)
        new = tl.fma(g, _constant(c, "one_minus_dampening", T), momentum * factor)
        momentum = tl.where(_constant(c, "first_step", T) != 0, g, new)
        g = tl.where(_constant(c, "nesterov", T) != 0, tl.fma(momentum, factor, g), momentum)
    return tl.fma(g, -_constant(c, "lr", T), w), momentum


@triton.jit
def _adam(w, g, average, squares, maximum, c, STATES: tl.constexpr, T: tl.constexpr):
    w, g = _scale(w, g, c, T)
    average = _lerp(average, g, _constant(c, "one_minus_beta1", T))
    squares = tl.fma(_constant(c, "one_minus_beta2", T) * g, g, squares * _constant(c, "beta2", T))
    second = squares
    if STATES > 2:
        maximum = tl.where((maximum > squares) | (maximum != maximum), maximum, squares)  # passes NaN on
        second = maximum
    root = _quotient(_square_root(second), _constant(c, "bias_correction2_sqrt", T))
    step = _quotient(-_constant(c, "step_size", T) * average, root + _constant(c, "eps", T))
    return w + step, average, squares, maximum


@triton.jit
def _step(w, g, s0, s1, s2, c, RULE: tl.constexpr, STATES: tl.constexpr, T: tl.constexpr):
    """Take one step by a rule; return weights and state."""
    if RULE == "sgd":
        w, s0 = _sgd(w, g, s0, c, STATES, T)
    elif RULE == "adam":
        w, s0, s1, s2 = _adam(w, g, s0, s1, s2, c, STATES, T)
    elif RULE == "average":
        w = _lerp(w, g, _constant(c, "one_minus_beta1", T))
    else:
        tl.static_assert(False, "unknown rule")
    return w, s0, s1, s2


@triton.jit
def _update(
    row, begin, grads, c,
    RULE: tl.constexpr, STATES: tl.constexpr, COMPACT: tl.constexpr, HAS_MASTER: tl.constexpr,
    dtype: tl.constexpr, BITS: tl.constexpr, T: tl.constexpr, STATE_TYPE: tl.constexpr,
    STATE_BITS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    n = tl.load(row + N)
    index = places(begin, BLOCK)
    bits = mask_bytes(tl.load(row + MASK), begin, n, BLOCK, FULL)
    kept = spread(bits, index, n, FULL)
    live = bits != 0
    g = widen(load_rows(pointer_to(grads, BITS, ALIGNED), index, n, live, FULL), dtype)
    weights = pointer_to(tl.load(row + WEIGHTS), BITS, ALIGNED)
    if HAS_MASTER:
        master = pointer_to(tl.load(row + MASTER), T, ALIGNED)
        w = load_rows(master, index, n, live, FULL)
    else:
        w = widen(load_rows(weights, index, n, live, FULL), dtype)

    if COMPACT:
        offsets = tl.load(row + CHUNK_OFFSETS).to(tl.pointer_type(tl.int64))
        place = tl.load(offsets + begin // BLOCK) + flags_before(kept, BLOCK)
        held = kept
    else:
        place = index
        held = live[:, None] if FULL else live[:, None] & (index < n)
    s0, s1, s2 = g, g, g
    if STATES > 0:
        p0 = pointer_to(tl.load(row + STATE), STATE_BITS, ALIGNED) + place
        s0 = _load_state(p0, held, STATE_TYPE)
    if STATES > 1:
        p1 = pointer_to(tl.load(row + STATE + 1), STATE_BITS, ALIGNED) + place
        s1 = _load_state(p1, held, STATE_TYPE)
    if STATES > 2:
        p2 = pointer_to(tl.load(row + STATE + 2), STATE_BITS, ALIGNED) + place
        s2 = _load_state(p2, held, STATE_TYPE)

    w, s0, s1, s2 = _step(w, g, s0, s1, s2, c, RULE, STATES, T)

    if STATES > 0:
        _store_state(p0, s0, kept, held, c, STATE_TYPE)
    if STATES > 1:
        _store_state(p1, s1, kept, held, c, STATE_TYPE)
    if STATES > 2:
        _store_state(p2, s2, kept, held, c, STATE_TYPE)
    if HAS_MASTER:
        store_rows(master, index, n, live, tl.where(kept, w, 0), FULL)
    store_rows(weights, index, n, live, tl.where(kept, _narrow(w, dtype), 0), FULL)


@triton.jit(do_not_specialize=["num_rows"])
def update(
    table, owners, steps, num_rows, constants,
    RULE: tl.constexpr, STATES: tl.constexpr, COMPACT: tl.constexpr, HAS_MASTER: tl.constexpr,
    dtype: tl.constexpr, BITS: tl.constexpr, T: tl.constexpr, STATE_TYPE: tl.constexpr, STATE_BITS: tl.constexpr,
    BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The masked step. For eight weights in a row that are all pruned, only the mask is read.

    ``steps`` has the gradients of all rows and then the constants of all rows. Compact state holds the values of the
    kept weights, and ``CHUNK_OFFSETS`` how many of them come before each chunk.
    """
    chunk = tl.program_id(0).to(tl.int64)
    row, begin = row_of(table, owners, chunk, BLOCK)
    own = steps + tl.load(owners + chunk)
    grads, c = tl.load(own), constants + tl.load(own + num_rows) * NUM_CONSTANTS
    if _constant(c, "skip", T) == 0:
        if begin + BLOCK <= tl.load(row + N):
            _update(
                row, begin, grads, c, RULE, STATES, COMPACT, HAS_MASTER, dtype, BITS, T, STATE_TYPE, STATE_BITS, BLOCK,
                ALIGNED, True,
            )  # fmt: skip
        elif COMPACT:
            _update(
                row, begin, grads, c, RULE, STATES, COMPACT, HAS_MASTER, dtype, BITS, T, STATE_TYPE, STATE_BITS, BLOCK,
                ALIGNED, False,
            )  # fmt: skip
        else:
            # In pieces, because loads weight by weight take more registers, which every program then has to have.
            PIECE: tl.constexpr = BLOCK // 4
            for at in range(begin, tl.load(row + N), PIECE):
                _update(
                    row, at, grads, c, RULE, STATES, COMPACT, HAS_MASTER, dtype, BITS, T, STATE_TYPE, STATE_BITS, PIECE,
                    ALIGNED, False,
                )  # fmt: skip


@triton.jit
def count_kept(table, owners, counts, BLOCK: tl.constexpr):
    """Kept weights of each chunk of the masks."""
    chunk = tl.program_id(0).to(tl.int64)
    row, begin = row_of(table, owners, chunk, BLOCK)
    n = tl.load(row + N)
    kept = spread(mask_bytes(tl.load(row + MASK), begin, n, BLOCK, False), places(begin, BLOCK), n, False)
    tl.store(counts + chunk, tl.sum(kept.to(tl.int32)).to(tl.int64))


@triton.jit
def _layout(mask, offsets, index, begin, n, BLOCK: tl.constexpr):
    """Weights that a layout holds, and their places."""
    if mask != 0:
        held = spread(mask_bytes(mask, begin, n, BLOCK, False), index, n, False)
        place = tl.load(offsets.to(tl.pointer_type(tl.int64)) + begin // BLOCK) + flags_before(held, BLOCK)
    else:
        held = index < n
        place = index
    return held, place


@triton.jit
def move_state(table, owners, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Move state from one layout to another."""
    row, begin = row_of(table, owners, tl.program_id(0).to(tl.int64), BLOCK)
    n = tl.load(row + N)
    index = places(begin, BLOCK)
    held, place = _layout(tl.load(row + SOURCE_MASK), tl.load(row + SOURCE_OFFSETS), index, begin, n, BLOCK)
    values = tl.load(tl.load(row + SOURCE).to(tl.pointer_type(BITS)) + place, mask=held, other=0)
    held, place = _layout(tl.load(row + TARGET_MASK), tl.load(row + TARGET_OFFSETS), index, begin, n, BLOCK)
    tl.store(tl.load(row + TARGET).to(tl.pointer_type(BITS)) + place, values, mask=held)


@triton.jit
def _squares(row, begin, dtype: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
             FULL: tl.constexpr):  # fmt: skip
    n = tl.load(row + N)
    index = places(begin, BLOCK)
    bits = mask_bytes(tl.load(row + MASK), begin, n, BLOCK, FULL)
    raw = load_rows(pointer_to(tl.load(row + WEIGHTS), BITS, ALIGNED), index, n, bits != 0, FULL)
    values = tl.where(spread(bits, index, n, FULL), widen(raw, dtype).to(tl.float64), 0.0)
    return tl.sum(values * values)


@triton.jit
def sum_squares(
    table, owners, sums, dtype: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """Sum the squares of the kept gradients of each chunk."""
    row, begin = row_of(table, owners, tl.program_id(0).to(tl.int64), BLOCK)
    if begin + BLOCK <= tl.load(row + N):
        total = _squares(row, begin, dtype, BITS, BLOCK, ALIGNED, True)
    else:
        total = _squares(row, begin, dtype, BITS, BLOCK, ALIGNED, False)
    tl.store(sums + tl.program_id(0), total)
