"""The kernels of patterns on a GPU, run on the host: how much they move, what they leave alone, and what fails."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from conftest import needs_simt, simt_extension

from gmp_kernels import BitMask, prune_
from gmp_kernels.errors import NonFiniteError
from gmp_kernels.patterns import NM, Block, Pattern, Unstructured
from gmp_kernels.tools.testing import adversarial_cases, assert_bitwise_equal, assert_same_pruning

_simt = simt_extension()

pytestmark = needs_simt

N = 1 << 18
SHAPE = 512, N // 512
PATTERNS: list[Pattern] = [
    NM(2, 4),
    NM(1, 2),
    NM(3, 8),
    NM(2, 4, 0),
    NM(3, 7),
    NM(20, 32),
    Unstructured(4),
    Block(4, 4),
    Block(3, 2),
    Block(7, 14),
]


def moved_by(run: Callable[[], object], n: int = N) -> float:
    """Bytes per weight, loaded and stored."""
    _simt.take_traffic()
    run()
    return sum(row[2] + row[3] for row in _simt.take_traffic()) / n


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_all_that_groups_allow_is_pruned_in_one_read(dtype: torch.dtype) -> None:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
    floor = 2 * dtype.itemsize + 1 / 8
    run = partial(prune_, sparsity=0.5, pattern=NM(2, 4), backend="simt")
    assert floor <= moved_by(lambda: run(weight.clone(), nonfinite="keep")) <= 1.03 * floor
    # A NaN has to be found before anything is written.
    assert moved_by(lambda: run(weight.clone())) <= 1.03 * (floor + dtype.itemsize)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_ramp_takes_one_read_more_than_without_a_pattern(pattern: Pattern) -> None:
    """The first read is for what may be pruned; a selection and an application follow, of weights or of blocks."""
    weight = torch.randn(504, 16 * 32 * 7, generator=torch.Generator().manual_seed(0))
    n, num_prune = weight.numel(), weight.numel() // 4 // pattern.unit * pattern.unit
    plain = moved_by(lambda: prune_(weight.clone(), num_prune=num_prune, backend="simt"), n)
    moved = moved_by(lambda: prune_(weight.clone(), num_prune=num_prune, pattern=pattern, backend="simt"), n)
    # Of blocks, sums are selected instead of weights.
    assert moved <= (1.3 * plain if pattern.unit > 1 else plain + 1.25 * weight.itemsize)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_views_between_guards(pattern: Pattern, dtype: torch.dtype) -> None:
    """Neither a weight nor a mask outside of the view changes, wherever groups and blocks end."""
    rows = 3 * (pattern.rows if isinstance(pattern, Block) else 32)
    shape = rows, 7 * 32 * 3
    n, most = rows * shape[1], pattern.most(shape)
    for case in ("random", "constant", "small_integers"):
        weight = adversarial_cases(n, dtype)[case].view(shape)
        for offset in (1, 3, 8):
            masks = None
            for share in (0.4, 1.0):
                num_prune = int(share * most) // pattern.unit * pattern.unit
                request = {"num_prune": num_prune, "pattern": pattern, "backend": "simt", "offset": offset}
                masks = assert_same_pruning([weight], masks=masks, **request).masks
                weight = weight * masks[0].to_bool()


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(3, 7), Unstructured(2), Block(4, 2), None], ids=str)
def test_a_nan_anywhere_stops_all_layers(pattern: Pattern | None) -> None:
    """It is seen where it is protected as well, and only the device knows of it when the writes are launched."""
    generator = torch.Generator().manual_seed(3)
    layers = [torch.randn(56, 84, generator=generator) for _ in range(3)]
    for place in (0, 1, 2):
        for bad in (math.nan, -math.inf):
            weights = [layer.clone() for layer in layers]
            weights[place][17, 29] = bad
            before = [weight.clone() for weight in weights]
            masks = [BitMask.ones(weight.shape) for weight in weights]
            patterns = [pattern, NM(2, 4), Block(4, 2)]
            for given in (None, masks):
                with pytest.raises(NonFiniteError, match=rf"weights\[{place}\] at flat index {17 * 84 + 29}"):
                    prune_(weights, sparsity=0.25, masks=given, pattern=patterns, backend="simt")
                for weight, own in zip(weights, before, strict=True):
                    assert_bitwise_equal(weight, own)
            assert all(mask.num_kept == mask.numel for mask in masks)


def test_sums_that_overflow_are_no_error() -> None:
    weight = torch.full((8, 8), 3e38)
    weight[4:] = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    for num_prune in (8, 24, 32, 48):
        assert_same_pruning([weight], backend="simt", num_prune=num_prune, pattern=Block(2, 4))


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(3, 7), Unstructured(2), Block(4, 2)], ids=str)
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_whichever_allocation_fails_nothing_has_changed(
    monkeypatch: pytest.MonkeyPatch, pattern: Pattern, share: float
) -> None:
    """Each in turn, until none is left; a retry then gives what an undisturbed call gives."""
    weight = torch.randn(56, 84, generator=torch.Generator().manual_seed(0))
    scores = torch.rand(56, 84, generator=torch.Generator().manual_seed(1))
    request = {
        "num_prune": int(share * pattern.most(weight.shape)) // pattern.unit * pattern.unit,
        "pattern": pattern,
        "scores": [None, scores][share < 1],
    }
    request = {name: value for name, value in request.items() if value is not None}
    expected = weight.clone()
    wanted = prune_(expected, backend="reference", **request)
    allocators = {name: getattr(torch, name) for name in ("empty", "zeros")}
    left = 0

    def failing(name: str, *args: object, **options: object) -> torch.Tensor:
        nonlocal left
        left -= 1
        if left < 0:
            raise torch.OutOfMemoryError("no memory")
        return allocators[name](*args, **options)

    for nth in range(100):
        left = nth
        pruned = weight.clone()
        with monkeypatch.context() as patch:
            for name in allocators:
                patch.setattr(torch, name, partial(failing, name))
            try:
                found = prune_(pruned, backend="simt", **request)
                break
            except (torch.OutOfMemoryError, RuntimeError):
                assert_bitwise_equal(pruned, weight)
    assert 2 < nth < 100
    assert found.masks == wanted.masks
    assert_bitwise_equal(pruned, expected)
