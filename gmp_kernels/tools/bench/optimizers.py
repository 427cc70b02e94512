"""Rows of the speed table on an optimizer step with masks over one large tensor, compared with torch's fused step.

Both sides walk the very same tensors wherever they can: parameter and gradient, and dense state as well. Other arrays
lie elsewhere in memory, and that alone makes the same kernel up to a third slower or faster. So each side goes on from
the values that the other one has left, which costs it nothing: every step reads and writes all of them.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from gmp_kernels.optim import SGD, AdamW
from gmp_kernels.optim.compact import layout_of
from gmp_kernels.tools.bench.measurement import Case, Pair, Timed
from gmp_kernels.tools.bench.weights import NUM_WEIGHTS, SPARSITY, mask_of, parameter_of

__all__ = ["optimizer_cases"]

STATE = ("exp_avg", "exp_avg_sq")


def optimizer_cases() -> list[Case]:
    """Return rows on a step against torch's fused step without masks or with masks by hand, and one on its state."""
    fused = "torch fused, no mask"
    compact = {0.9: (0.75, 0.6), 0.95: (0.6, 0.45), 0.99: (0.25, 0.15)}
    return [
        *(
            Case(f"AdamW, dense state, {sparsity}", fused, 1.0, 0.9, partial(_adamw_and_fused, sparsity), highest=1.1)
            for sparsity in (0, 0.9)
        ),
        *(
            Case(f"AdamW, compact state, {sparsity}", fused, must, aim, partial(_compact_adamw_and_fused, sparsity))
            for sparsity, (must, aim) in compact.items()
        ),
        Case("AdamW, compact bfloat16 state, 0.9", "compact float32 state", 0.9, 0.75, _half_and_compact_adamw),
        Case("SGD momentum, compact state, 0.9", fused, 0.9, 0.7, _sgd_and_fused),
        Case("AdamW, dense state, 0.9", "torch fused + _foreach_mul_", 0.5, 0.35, _adamw_and_masks_by_hand),
        Case("AdamW state, compact, 0.9", "0.105 dense + 1 bit/weight", 1.0, None, _state_bytes, "B", most_processes=1),
    ]


def _masked(optimizer: SGD | AdamW, parameter: nn.Parameter, sparsity: float) -> SGD | AdamW:
    optimizer.set_masks({parameter: mask_of(parameter.numel(), sparsity)})
    optimizer.step()  # creates the state
    return optimizer


def _dense_adamw(sparsity: float, shrink: int) -> tuple[AdamW, torch.optim.AdamW, list[torch.Tensor]]:
    """Return ours, torch's, and the three tensors that both of them write."""
    parameter = parameter_of(NUM_WEIGHTS // shrink)
    masked, fused = AdamW([parameter]), torch.optim.AdamW([parameter], fused=True)
    _masked(masked, parameter, sparsity)
    fused.step()
    shared = {key: masked.state[parameter][key] for key in STATE}
    fused.state[parameter].update(shared)
    return masked, fused, [parameter.detach(), *shared.values()]


def _adamw_and_fused(sparsity: float, shrink: int) -> Pair:
    masked, fused, _ = _dense_adamw(sparsity, shrink)
    return Pair(Timed(masked.step), Timed(fused.step))


def _adamw_and_masks_by_hand(shrink: int) -> Pair:
    masked, fused, written = _dense_adamw(SPARSITY, shrink)
    # The masks are float32, because _foreach_mul_ is slower when it has to convert.
    masks = [mask_of(written[0].numel(), SPARSITY).to_bool().float()] * len(written)

    def step() -> None:
        fused.step()
        torch._foreach_mul_(written, masks)

    return Pair(Timed(masked.step), Timed(step))


def _compact_adamw_and_fused(sparsity: float, shrink: int) -> Pair:
    parameter = parameter_of(NUM_WEIGHTS // shrink)
    masked = _masked(AdamW([parameter], compact_state=True), parameter, sparsity)
    return Pair(Timed(masked.step), Timed(torch.optim.AdamW([parameter], fused=True).step))


def _half_and_compact_adamw(shrink: int) -> Pair:
    parameter = parameter_of(NUM_WEIGHTS // shrink)
    compact = [AdamW([parameter], compact_state=True, state_dtype=d) for d in (torch.bfloat16, torch.float32)]
    half, full = (_masked(optimizer, parameter, SPARSITY) for optimizer in compact)
    return Pair(Timed(half.step), Timed(full.step))


def _sgd_and_fused(shrink: int) -> Pair:
    parameter = parameter_of(NUM_WEIGHTS // shrink)
    masked = _masked(SGD([parameter], lr=1e-3, momentum=0.9, compact_state=True), parameter, SPARSITY)
    return Pair(Timed(masked.step), Timed(torch.optim.SGD([parameter], lr=1e-3, momentum=0.9, fused=True).step))


def _state_bytes(shrink: int) -> Pair:
    parameter = parameter_of(NUM_WEIGHTS // shrink)
    state = _masked(AdamW([parameter], compact_state=True), parameter, SPARSITY).state[parameter]
    # Both sides count the mask. Ours also counts the chunk offsets that address the state.
    layout, n = layout_of(state), parameter.numel()
    assert layout is not None
    return Pair(
        float(sum(state[key].nbytes for key in STATE) + layout.chunk_offsets.nbytes + n / 8), 0.105 * 8 * n + n / 8
    )
