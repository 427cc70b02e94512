"""Brackets from samples: they may miss, but seldom; whatever the weights are, they are brackets."""

from __future__ import annotations

import sys
from functools import partial

import numpy as np
import pytest
import torch

from gmp_kernels.backends import choose
from gmp_kernels.backends.keys import keys_of, largest_key
from gmp_kernels.backends.types import Brackets, Layer
from gmp_kernels.masks import BitMask
from gmp_kernels.search.sample import estimate
from gmp_kernels.tools.testing import DTYPES, adversarial_cases

CPU = torch.device("cpu")


@pytest.fixture(params=["numpy", "cpu"], autouse=True)
def draw(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample with torch and numpy, or with the kernels of the CPU."""
    if request.param == "cpu":
        monkeypatch.setattr(sys.modules[__name__], "estimate", partial(estimate, draw=choose("cpu", CPU).draw))


def pruned(weight: torch.Tensor, sparsity: float) -> Layer:
    """A layer after an update."""
    mask = BitMask.ones(weight.shape, CPU)
    layers, reference = [Layer(weight, mask.packed)], choose("reference", CPU)
    reference.prune(layers, reference.select(layers, [round(sparsity * weight.numel())], [1]), [mask.packed])
    return layers[0]


def estimated(groups: list[list[Layer]], share: float, num_parts: int) -> tuple[Brackets, np.ndarray]:
    """Bracket the key below which so much of the unpruned weights of each group lies."""
    sizes = [sum(layer.weight.numel() for layer in group) for group in groups]
    kept = [sum(BitMask(layer.mask, layer.weight.shape).num_kept for layer in group) for group in groups]
    pruned = [n - k for n, k in zip(sizes, kept, strict=True)]
    wanted = [p + round(share * k) for p, k in zip(pruned, kept, strict=True)]
    return estimate(groups, wanted, pruned, sizes, [num_parts] * len(groups))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_pieces", [1, 4])
def test_the_union_of_narrow_brackets_holds_the_threshold(dtype: torch.dtype, num_pieces: int) -> None:
    generator = torch.Generator().manual_seed(num_pieces)
    pieces = [pruned(torch.randn(1 << 18, generator=generator).to(dtype), 0.7) for _ in range(num_pieces)]
    found = [estimated([[piece]], 0.1, num_pieces) for piece in pieces]
    lo, hi = min(brackets.lo[0] for brackets, _ in found), max(brackets.hi[0] for brackets, _ in found)
    keys = torch.cat([keys_of(layer.weight)[BitMask(layer.mask, layer.weight.shape).to_bool()] for layer in pieces])
    threshold = keys.sort().values[round(0.1 * len(keys))]
    assert lo <= threshold <= hi
    inside = int(((keys >= lo) & (keys <= hi)).sum()) / (num_pieces << 18)
    assert inside < 0.05
    expected = sum(density[0] for _, density in found) / num_pieces * (hi - lo + 1)
    # Half of the few keys that a 16-bit dtype has may be at the ends.
    assert dtype.itemsize == 2 or 0.6 < inside / expected < 1.6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 7, 16, 1000, 40_003])
def test_anything_gets_a_bracket(dtype: torch.dtype, n: int) -> None:
    layers = [pruned(weight, 0.3) for weight in adversarial_cases(n, dtype).values()]
    for share in (0.0, 0.5, 1.0):
        (lo, hi), densities = estimated([[layer] for layer in layers] + [layers], share, 4)
        assert ((lo >= 0) & (lo <= hi) & (hi <= largest_key(dtype))).all()
        assert ((densities > 0) & (densities <= 1)).all()


def test_a_bracket_is_empty_where_nothing_is_left() -> None:
    layer = pruned(torch.randn(1000), 1.0)
    (lo, hi), _ = estimated([[layer]], 0.5, 2)
    assert lo[0] > hi[0]


def test_groups_of_tiny_layers_get_a_bracket_beside_others() -> None:
    generator = torch.Generator().manual_seed(0)
    groups = [[pruned(torch.randn(n, generator=generator), 0.5) for n in sizes] for sizes in ([3000], [20] * 400, [9])]
    (lo, hi), densities = estimated(groups, 0.5, 1)
    for i, group in enumerate(groups):
        kept = torch.cat([keys_of(la.weight)[BitMask(la.mask, la.weight.shape).to_bool()] for la in group])
        assert lo[i] <= kept.sort().values[len(kept) // 2] <= hi[i] and densities[i] > 0


def test_a_group_is_sampled_as_one() -> None:
    """Layers of other scales, and one too small to be looked at."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(n, generator=generator) * scale for n, scale in ((100_000, 1.0), (30_000, 9.0), (5, 1e9))]
    (lo, hi), _ = estimated([[pruned(weight, 0.0) for weight in weights]], 0.5, 1)
    keys = keys_of(torch.cat(weights)).sort().values
    assert lo[0] <= keys[len(keys) // 2] <= hi[0]


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_weights_pruned_already_are_sampled_where_their_number_is_unknown(sparsity: float) -> None:
    n = 1 << 18
    layer = pruned(torch.randn(n, generator=torch.Generator().manual_seed(0)), sparsity)
    for mask in (layer.mask, None) if sparsity == 0.0 else (layer.mask,):
        (lo, hi), _ = estimate([[Layer(layer.weight, mask)]], [round(0.8 * n)], [None], [n], [1])
        keys = keys_of(layer.weight).sort().values.numpy()
        assert lo <= keys[round(0.8 * n)] <= hi
        assert ((keys >= lo) & (keys <= hi)).sum() < 0.1 * n
