"""The bits that tell apply which weights to look at after a selection are never too few (see csrc/cuda/counter.cuh)."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import needs_simt

from gmp_kernels import BitMask, Threshold, checks
from gmp_kernels.backends.cuda import selection_tables
from gmp_kernels.tools.testing import adversarial_cases, assert_same_pruning

pytestmark = needs_simt


@pytest.mark.parametrize("lies", ["in dead eights", "in living eights", "everywhere"])
@pytest.mark.parametrize("garbage", [math.nan, -0.0, 1e-30, 5.0, math.inf])
def test_what_lies_under_the_mask_goes_wherever_it_lies(garbage: float, lies: str) -> None:
    """The bits that tell apply where to look are never too few: one weight of many comes back, or all do."""
    index = torch.arange(5 * 16384 + 77)
    for n in (index.numel(), 5 * 16384):
        dead = (index[:n] // 8 % 4 == 0) | (index[:n] % 8 == 3)
        there = {"in dead eights": 8 * 252 + 5, "in living eights": 8 * 253 + 3}
        where = dead & (index[:n] % 4096 == there[lies]) if lies in there else dead
        assert where.any()
        weight = torch.where(dead, 0.0, torch.randn(n, generator=torch.Generator().manual_seed(0)))
        masks = [BitMask.from_bool(~dead)]
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            dirty = torch.where(where, garbage, weight).to(dtype)
            for offset in (None, 1):
                for num_prune in (0, int(dead.sum()), n // 2, n):
                    assert_same_pruning([dirty], masks=masks, backend="simt", offset=offset, num_prune=num_prune)


def missed(value: float, num_prune: int) -> Threshold:
    """A hint that is believed and wrong."""
    return Threshold(value, num_prune - 1, 1, 0)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("hint", [1e-6, 0.3, 30.0])
def test_what_apply_skips_follows_the_bracket(monkeypatch: pytest.MonkeyPatch, hint: float, scope: str) -> None:
    """The bracket may fail on either side, lists may overflow, and some layers get no bits for want of memory."""
    sizes = (40_000, 3 * 16384, 9_001)
    generator = torch.Generator().manual_seed(1)
    for case in ("random", "constant", "small_integers"):
        layers = [adversarial_cases(n, torch.float32)[case] for n in sizes]
        masks = [BitMask.from_bool(torch.rand(n, generator=generator) < 0.3) for n in sizes]
        counts = [sum(sizes) * 3 // 4] if scope == "global" else [n * 3 // 4 for n in sizes]
        hints = [missed(hint, count) for count in counts] * (3 if scope == "global" else 1)
        request = {"masks": masks, "backend": "simt", "scope": scope, "previous": hints}
        for room in (None, 900_000, 1_000):
            if room is not None:
                monkeypatch.setattr(selection_tables, "MEMORY_BYTES", room)
            checks.forget()  # or a template made for another room would be used
            num_prune = counts[0] if scope == "global" else counts
            assert_same_pruning(layers, num_prune=num_prune, **request)
        monkeypatch.undo()


def test_nan_are_kept_and_pruned_where_apply_has_bits() -> None:
    weight = torch.randn(40_000, generator=torch.Generator().manual_seed(0))
    weight[::7] = math.nan
    weight[::11] = -math.inf
    masks = [BitMask.from_bool(torch.arange(40_000) % 3 > 0)]
    for num_prune in (13_334, 30_000, 35_900, 39_990, 40_000):
        assert_same_pruning([weight], masks=masks, backend="simt", num_prune=num_prune, nonfinite="keep")
