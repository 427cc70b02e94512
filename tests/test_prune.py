"""Promises of prune_, whatever the weights: exact counts, masks that only shrink, scopes, and manners around it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gmp_kernels import BitMask, LayoutError, prune_
from gmp_kernels.ops import NonFinite, Scope, begin_prune
from gmp_kernels.tools.testing import DTYPES, adversarial_cases, assert_bitwise_equal

FINITE_CASES = sorted(set(adversarial_cases(1, torch.float32)) - {"any_bits"})


@st.composite
def finite_weights(draw: st.DrawFn, dtype: torch.dtype | None = None) -> torch.Tensor:
    n = draw(st.one_of(st.integers(1, 200), st.sampled_from([1024, 4099, 16391])))
    dtype = dtype or draw(st.sampled_from(DTYPES))
    return adversarial_cases(n, dtype)[draw(st.sampled_from(FINITE_CASES))]


float_weights = finite_weights(dtype=torch.float32)
sparsities = st.floats(0.0, 1.0)


@pytest.mark.parametrize("nonfinite", ["error", "keep"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_writing_twice_changes_nothing_and_tells_the_same(
    backend: str, device: torch.device, scope: Scope, nonfinite: NonFinite
) -> None:
    weights = [case.to(device) for n in (40, 5000) for case in adversarial_cases(n, torch.float32).values()]
    weights = [weight for weight in weights if weight.isfinite().all()]
    masks = [BitMask.ones(weight.shape, device=device) for weight in weights]
    options = {"scope": scope, "nonfinite": nonfinite, "previous": None, "names": None, "backend": backend}
    write = begin_prune(weights, sparsity=0.6, masks=masks, **options)
    first, bits = write(), [weight.clone() for weight in weights]
    second = write()
    for weight, before in zip(weights, bits, strict=True):
        assert_bitwise_equal(weight, before, "weights")
    assert (second.thresholds, second.num_pruned) == (first.thresholds, first.num_pruned)
    assert second.num_pruned == [mask.numel - mask.num_kept for mask in second.masks]


@given(weight=finite_weights(), sparsity=sparsities)
def test_prunes_exactly_the_rounded_share(
    backend: str, device: torch.device, weight: torch.Tensor, sparsity: float
) -> None:
    n = weight.numel()
    before = weight.to(device)
    weight = weight.to(device, copy=True)
    result = prune_(weight, sparsity=sparsity, backend=backend)
    kept = result.masks[0].to_bool()
    assert result.num_pruned == result.num_newly_pruned == [n - result.masks[0].num_kept] == [round(sparsity * n)]
    assert_bitwise_equal(weight[kept], before[kept], "kept weights")
    assert_bitwise_equal(weight[~kept], torch.zeros_like(weight[~kept]), "pruned weights")
    if kept.any() and not kept.all():
        assert before[kept].abs().min() >= before[~kept].abs().max()


@given(weight=finite_weights(), rising=st.lists(sparsities, min_size=2, max_size=6).map(sorted))
def test_masks_only_shrink(backend: str, device: torch.device, weight: torch.Tensor, rising: list[float]) -> None:
    weight, masks = weight.to(device, copy=True), [BitMask.ones(weight.shape, device)]
    for sparsity in [*rising, rising[0]]:
        before = masks[0].to_bool()
        result = prune_(weight, sparsity=sparsity, masks=masks, backend=backend)
        assert not (masks[0].to_bool() & ~before).any()
        wanted = max(round(sparsity * weight.numel()), int((~before).sum()))
        assert result.num_pruned == [wanted]
        assert result.num_newly_pruned == [wanted - int((~before).sum())]


@given(weight=finite_weights(), sparsity=sparsities)
def test_pruning_twice_changes_nothing(
    backend: str, device: torch.device, weight: torch.Tensor, sparsity: float
) -> None:
    weight = weight.to(device, copy=True)
    masks = prune_(weight, sparsity=sparsity, backend=backend).masks
    once, bits = weight.clone(), masks[0].clone()
    result = prune_(weight, sparsity=sparsity, masks=masks, backend=backend)
    assert result.num_newly_pruned == [0]
    assert masks[0] == bits
    assert_bitwise_equal(weight, once)


@given(weights=st.lists(float_weights, min_size=1, max_size=5), sparsity=sparsities)
def test_global_scope_is_one_tensor_in_pieces(
    backend: str, device: torch.device, weights: list[torch.Tensor], sparsity: float
) -> None:
    whole, pieces = torch.cat(weights).to(device), [weight.to(device, copy=True) for weight in weights]
    expected = prune_(whole, sparsity=sparsity, backend=backend)
    result = prune_(pieces, sparsity=sparsity, scope="global", backend=backend)
    assert_bitwise_equal(torch.cat(pieces), whole)
    assert torch.equal(torch.cat([mask.to_bool() for mask in result.masks]), expected.masks[0].to_bool())
    assert set(result.thresholds) == set(expected.thresholds)
    assert sum(result.num_pruned) == expected.num_pruned[0]


@given(weights=st.lists(finite_weights(), min_size=1, max_size=5), data=st.data())
def test_order_of_layers_is_irrelevant_in_layer_scope(
    backend: str, device: torch.device, weights: list[torch.Tensor], data: st.DataObject
) -> None:
    shares = [data.draw(sparsities) for _ in weights]
    order = data.draw(st.permutations(range(len(weights))))
    expected, actual = ([weights[i].to(device, copy=True) for i in some] for some in (range(len(weights)), order))
    one = prune_(expected, sparsity=shares, backend=backend)
    other = prune_(actual, sparsity=[shares[i] for i in order], backend=backend)
    for position, i in enumerate(order):
        assert_bitwise_equal(actual[position], expected[i])
        assert other.masks[position] == one.masks[i]
        assert other.thresholds[position] == one.thresholds[i]


@given(weight=finite_weights(), sparsity=sparsities, seed=st.integers(0, 99))
def test_what_lies_under_pruned_weights_is_irrelevant(
    backend: str, device: torch.device, weight: torch.Tensor, sparsity: float, seed: int
) -> None:
    kept = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    garbage = torch.where(kept, weight, torch.nan).to(device)
    clean = torch.where(kept, weight, 0.0).to(device)
    masks = [BitMask.from_bool(kept.to(device)), BitMask.from_bool(kept.to(device))]
    result = prune_([garbage, clean], sparsity=sparsity, masks=masks, backend=backend)
    assert_bitwise_equal(garbage, clean)
    assert masks[0] == masks[1]
    assert result.thresholds[0] == result.thresholds[1]


def test_masks_given_are_updated_in_place_and_returned(backend: str, device: torch.device) -> None:
    mask = BitMask.ones((4,), device)
    packed = mask.packed
    result = prune_(torch.tensor([3.0, -1.0, 2.0, 4.0], device=device), num_prune=2, masks=mask, backend=backend)
    assert result.masks[0] is mask and mask.packed is packed
    assert packed.tolist() == [0b1001]


@pytest.mark.parametrize(("n", "num_prune"), [(1, 0), (3, 2), (5, 2), (7, 4)])
def test_half_rounds_to_even(backend: str, device: torch.device, n: int, num_prune: int) -> None:
    assert prune_(torch.ones(n, device=device), sparsity=0.5, backend=backend).num_pruned == [num_prune]


def test_scalars_serve_all_layers_and_lists_one_each(backend: str, device: torch.device) -> None:
    def pruned(**request: object) -> list[int]:
        weights = [torch.arange(1.0, n + 1, device=device) for n in (10, 20)]
        return prune_(weights, backend=backend, **request).num_pruned

    assert pruned(sparsity=0.3) == [3, 6]
    assert pruned(sparsity=[0.1, 0.9]) == [1, 18]
    assert pruned(sparsity=np.array([0.1, 0.9])) == [1, 18]
    assert pruned(sparsity=1) == [10, 20]
    assert pruned(num_prune=4) == [4, 4]
    assert pruned(num_prune=(4, np.int64(5))) == [4, 5]
    assert pruned(sparsity=np.float32(0.5), scope="global") == [7, 8]


@pytest.mark.parametrize("shape", [(), (1,), (3, 5, 7), (2, 3, 3, 3)])
def test_any_shape(backend: str, device: torch.device, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    flat = weight.flatten()
    result = prune_(weight, sparsity=0.6, backend=backend)
    assert result.masks[0].shape == shape
    assert result.masks[0].packed.tolist() == prune_(flat, sparsity=0.6, backend=backend).masks[0].packed.tolist()
    assert_bitwise_equal(weight.flatten(), flat)


def test_dtypes_mix_in_layer_scope(backend: str, device: torch.device) -> None:
    dtypes = [*DTYPES, *DTYPES[::-1]]
    weights = [adversarial_cases(100 + i, dtype)["random"].to(device) for i, dtype in enumerate(dtypes)]
    alone = [weight.clone() for weight in weights]
    result = prune_(weights, sparsity=0.5, backend=backend)
    for weight, single, mask in zip(weights, alone, result.masks, strict=True):
        assert prune_(single, sparsity=0.5, backend=backend).masks == [mask]
        assert_bitwise_equal(weight, single)


def test_no_weights_is_nothing_to_do(backend: str) -> None:
    assert prune_([], sparsity=0.5, backend=backend) == ([], [], [], [])


def test_writes_are_seen_by_autograd(backend: str, device: torch.device) -> None:
    weight = torch.nn.Parameter(torch.arange(1.0, 9.0, device=device))
    loss = (weight * weight).sum()
    version = weight._version
    prune_(weight, sparsity=0.5, backend=backend)
    assert weight._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert weight.requires_grad and weight.grad_fn is None
    (weight * weight).sum().backward()
    assert weight.grad.tolist() == [0.0] * 4 + [10.0, 12.0, 14.0, 16.0]


def test_inference_tensors(backend: str, device: torch.device) -> None:
    with torch.inference_mode():
        weight = torch.arange(1.0, 9.0, device=device)
    assert prune_(weight, sparsity=0.5, backend=backend).masks[0].packed.tolist() == [0xF0]
    assert weight.tolist() == [0.0] * 4 + [5.0, 6.0, 7.0, 8.0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_arrays_are_pruned_in_place(host_backend: str, dtype: type[np.floating]) -> None:
    array = np.arange(1, 10, dtype=dtype).reshape(3, 3)
    prune_(array, num_prune=5, backend=host_backend)
    assert array.tolist() == [[0, 0, 0], [0, 0, 6], [7, 8, 9]]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("n", [5, 100, 16385])
def test_unaligned_arrays(host_backend: str, dtype: type[np.floating], n: int) -> None:
    values = np.random.default_rng(n).standard_normal(n).astype(dtype)
    buffer = np.full(values.nbytes + 9, 0xA5, dtype=np.uint8)
    array = buffer[1:-8].view(dtype)
    array[:] = values
    assert not array.flags.aligned
    if host_backend in ("simt", "triton"):
        # A GPU's typed loads fail there; none of its tensors can lie so but those of other programs.
        before = array.tobytes()
        with pytest.raises(LayoutError, match="begin on a multiple of their element size"):
            prune_([values, array], sparsity=0.7, backend=host_backend)
        assert array.tobytes() == before
        return
    masks = prune_([values, array], sparsity=0.7, backend=host_backend).masks
    assert masks[0] == masks[1]
    assert array.tobytes() == values.tobytes()
    assert buffer[0] == 0xA5 and (buffer[-8:] == 0xA5).all()
