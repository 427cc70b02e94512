"""Selection against the oracle: adversarial weights at every block edge, masks, scopes, odd offsets, wrong hints."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from conftest import thinned
from hypothesis import given
from hypothesis import strategies as st

from gmp_kernels import BitMask, Threshold, magnitude_threshold
from gmp_kernels.tools.testing import DTYPES, adversarial_cases, assert_same_pruning, device_of

CASE_NAMES = list(adversarial_cases(1, torch.float32))
# One below, at and one above: a byte of the mask, 8/16/32 lanes, the smallest sample (1024), a chunk (16384).
SMALL_SIZES = [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65]
LARGE_SIZES = [1023, 1024, 1025, 16383, 16384, 16385, 2 * 16384 + 9]
OFFSETS = [None, 0, 1, 3]


cases = functools.cache(adversarial_cases)


def random_mask(shape: torch.Size, density: float, seed: int = 0) -> BitMask:
    return BitMask.from_bool(torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density)


def counts_of(n: int) -> list[int]:
    return sorted({0, 1, n // 2, n - 1, n})


@pytest.mark.parametrize("name", CASE_NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_sizes(kernels: str, dtype: torch.dtype, name: str) -> None:
    offsets, masked = itertools.cycle(OFFSETS), itertools.cycle([False, True, True])
    requests = [(n, num_prune, next(offsets), next(masked)) for n in SMALL_SIZES for num_prune in counts_of(n)]
    for n, num_prune, offset, is_masked in thinned(kernels, requests, CASE_NAMES.index(name) + DTYPES.index(dtype)):
        weight = cases(n, dtype)[name]
        masks = [random_mask(weight.shape, 0.5, seed=num_prune)] if is_masked else None
        request = {"num_prune": num_prune, "masks": masks, "nonfinite": "keep"}
        assert_same_pruning([weight], backend=kernels, offset=offset, **request)


@pytest.mark.parametrize("name", CASE_NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_sizes(kernels: str, dtype: torch.dtype, name: str) -> None:
    # Cycles of coprime lengths pair every option with every other over the cases, without their product.
    start = CASE_NAMES.index(name) + len(CASE_NAMES) * DTYPES.index(dtype)
    for i, n in enumerate(LARGE_SIZES, start):
        weight = cases(n, dtype)[name]
        density = (None, 0.9, 0.05)[i % 3]
        assert_same_pruning(
            [weight],
            backend=kernels,
            masks=None if density is None else [random_mask(weight.shape, density)],
            offset=OFFSETS[i % 4],
            num_prune=(0, 1, n // 2, n - 1, n)[i % 5],
            nonfinite="keep",
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_larger_than_the_caches(kernels: str, dtype: torch.dtype) -> None:
    n = 2**20 + 3
    weights = adversarial_cases(n, dtype)
    names = CASE_NAMES[DTYPES.index(dtype) :: len(DTYPES)]
    for i, name in enumerate(thinned(kernels, names, DTYPES.index(dtype))):
        masks = [random_mask(weights[name].shape, 0.7)] if i % 2 else None
        num_prune = (n // 2, n // 20 * 19, n - 1)[i % 3]
        request = {"num_prune": num_prune, "masks": masks, "nonfinite": "keep"}
        assert_same_pruning([weights[name]], backend=kernels, offset=1, **request)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_threshold_may_be_nan(kernels: str, dtype: torch.dtype, share: float) -> None:
    """And then the bracket lies among bit patterns that all are the same key."""
    for n in (1000, 40_000):
        generator = torch.Generator().manual_seed(n)
        weight = torch.randn(n, generator=generator).to(dtype)
        weight[torch.rand(n, generator=generator) < share] = math.nan
        weight[torch.rand(n, generator=generator) < share / 10] = math.inf
        weight.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])[weight.isnan()] += torch.randint(
            0, 2, (int(weight.isnan().sum()),), generator=generator
        )
        for num_prune in {n // 2, round(n * (1 - share / 2)), round(n * (1 - share)), n - 1}:
            assert_same_pruning([weight], backend=kernels, num_prune=num_prune, nonfinite="keep")


@st.composite
def requests(draw: st.DrawFn) -> tuple[list[torch.Tensor], dict]:
    """A call of ``prune_`` without the backend."""
    scope = draw(st.sampled_from(["layer", "global"]))
    shared_dtype = draw(st.sampled_from(DTYPES))
    sizes = st.sampled_from([*SMALL_SIZES, *LARGE_SIZES, 100, 777, 3001])
    weights = []
    for n in draw(st.lists(sizes, min_size=1, max_size=6)):
        dtype = shared_dtype if scope == "global" else draw(st.sampled_from(DTYPES))
        weights.append(cases(n, dtype)[draw(st.sampled_from(CASE_NAMES))])
    numels = [weight.numel() for weight in weights]
    density = draw(st.sampled_from([None, 0.0, 0.03, 0.5, 0.97, 1.0]))
    masks = None if density is None else [random_mask(w.shape, density, seed) for seed, w in enumerate(weights)]
    groups = [sum(numels)] if scope == "global" else numels
    num_prune = [draw(st.one_of(st.sampled_from(counts_of(n)), st.integers(0, n))) for n in groups]
    offset = draw(st.sampled_from(OFFSETS))
    return weights, {
        "scope": scope,
        "masks": masks,
        "num_prune": num_prune,
        "offset": offset,
        "nonfinite": "keep",
    }


@given(drawn=requests())
def test_any_request(kernels: str, drawn: tuple) -> None:
    weights, request = drawn
    assert_same_pruning(weights, backend=kernels, **request)


whole = st.integers(-(2**63), 2**63 - 1)
anything = st.builds(Threshold, st.floats(), whole, whole, whole)


@given(drawn=requests(), data=st.data())
def test_hints_never_change_the_result(kernels: str, drawn: tuple, data: st.DataObject) -> None:
    weights, request = drawn
    counts = request["num_prune"] if request["scope"] == "layer" else request["num_prune"] * len(weights)
    # A count that agrees makes a wrong value credible.
    hints = [
        data.draw(st.one_of(st.none(), anything, st.builds(Threshold, st.floats(0.0), *map(st.just, (k, 1, 1)))))
        for k in counts
    ]
    assert_same_pruning(weights, backend=kernels, previous=hints, **request)


@pytest.mark.parametrize("value", [0.0, 1e-300, 0.1, 0.6744, 0.7, 3.0, 1e30, math.inf, math.nan, -0.6744])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hints_from_exact_to_absurd(kernels: str, dtype: torch.dtype, value: float) -> None:
    n = 100_003
    weight = cases(n, dtype)["random"].to(device_of(kernels))
    right = magnitude_threshold(weight, n // 2, backend=kernels)
    hint = right if value == 0.6744 else Threshold(value, n // 2 - 1, 1, 0)
    assert magnitude_threshold(weight, n // 2, previous=hint, backend=kernels) == right
    assert_same_pruning([weight], backend=kernels, num_prune=n // 2, previous=[hint])


def two_neighbours(n: int, dtype: torch.dtype) -> torch.Tensor:
    """Half 1.0, half the next number: no bracket holds few of them, and one gather of them all fills the memory."""
    neighbour = 1.0 + torch.finfo(dtype).eps
    return torch.where(torch.rand(n, generator=torch.Generator().manual_seed(n)) < 0.5, 1.0, neighbour).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_candidates_than_memory_allows(kernels: str, dtype: torch.dtype) -> None:
    n = 1_500_000
    assert_same_pruning([two_neighbours(n, dtype)], backend=kernels, num_prune=n // 2, offset=1)


def test_many_layers_full_of_candidates(kernels: str) -> None:
    """Together they exceed the memory for candidates several times; each alone does not."""
    layers = [two_neighbours(300_000 + i, torch.float32) if i % 5 else torch.ones(300_000 + i) for i in range(20)]
    counts = [layer.numel() // 2 + 100 * i for i, layer in enumerate(layers)]
    assert_same_pruning(layers, backend=kernels, num_prune=counts)


def test_global_scope_over_very_different_sizes(kernels: str, num_threads: int) -> None:
    sizes = [1, 600_000, 3, 17, 16384 * 8, 40_000, 2]
    layers = [adversarial_cases(n, torch.float32)["random"] * (1 + i) for i, n in enumerate(sizes)]
    for share in (0.001, 0.5, 0.999):
        assert_same_pruning(layers, backend=kernels, num_prune=round(share * sum(sizes)), scope="global")


def test_global_scope_over_layers_too_small_to_sample(kernels: str) -> None:
    layers = [cases(1 + i % 5, torch.float32)["random"] for i in range(3000)]
    assert_same_pruning(layers, backend=kernels, num_prune=4321, scope="global")


def test_where_the_sample_sees_nothing_of_the_layer_that_decides(kernels: str) -> None:
    """In global scope small layers among huge ones have no line of the sample; the bracket then fails and widens."""
    layers = [torch.full((400_000,), 9.0), *(torch.full((7,), 0.5 + i) for i in range(60))]
    assert_same_pruning(layers, backend=kernels, num_prune=200, scope="global")


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_ties_keep_the_lowest_index_across_chunks_and_layers(kernels: str, scope: str) -> None:
    layers = [torch.full((16384 * 2 + 5,), 0.5) for _ in range(3)]
    total = sum(layer.numel() for layer in layers)
    for num_kept in (0, 1, 16383, 16384, 16385, 16384 * 2 + 4, 16384 * 2 + 5):
        counts = [layers[0].numel() - num_kept] * 3 if scope == "layer" else total - num_kept
        result = assert_same_pruning(layers, backend=kernels, num_prune=counts, scope=scope)
        firsts = torch.arange(layers[0].numel()) < num_kept
        assert torch.equal(result.masks[0].to_bool().cpu(), firsts)
        assert result.masks[2].num_kept == (num_kept if scope == "layer" else 0)
