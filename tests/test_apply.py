"""apply_masks_: +0.0 under every zero bit, every other bit untouched, at every size around a block."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gmp_kernels import BitMask, apply_masks_
from gmp_kernels.tools.testing import DTYPES, GuardedCopy, adversarial_cases, assert_bitwise_equal, device_of


def random_bools(n: int, density: float, seed: int) -> torch.Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) < density


def check(backend: str, weights: list[torch.Tensor], kept: list[torch.Tensor], offset: int | None) -> None:
    device = device_of(backend)
    guarded = [] if offset is None else [GuardedCopy(weight, offset, device) for weight in weights]
    applied = [copy.view for copy in guarded] or [weight.to(device, copy=True) for weight in weights]
    masks = [BitMask.from_bool(k).to(device) for k in kept]
    bits = [mask.clone() for mask in masks]
    apply_masks_(applied, masks, backend=backend)
    for actual, weight, k in zip(applied, weights, kept, strict=True):
        assert_bitwise_equal(actual, weight.masked_fill(~k, 0.0))
    for copy in guarded:
        copy.assert_intact()
    assert masks == bits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
def test_every_size_around_a_block(backend: str, dtype: torch.dtype, density: float) -> None:
    for n in [*range(1, 71), 16383, 16384, 16385, 40_001]:
        # Inf, NaN of every payload, negative numbers: all must become +0 or stay exactly what they are.
        weight = adversarial_cases(n, dtype)["any_bits"]
        check(backend, [weight], [random_bools(n, density, n)], offset=(None, 0, 1, 3)[n % 4])


@given(
    sizes=st.lists(st.sampled_from([1, 7, 8, 9, 63, 64, 65, 16385]), min_size=1, max_size=6),
    density=st.sampled_from([0.0, 0.02, 0.5, 0.98]),
    offset=st.sampled_from([None, 0, 1, 3]),
    data=st.data(),
)
def test_many_layers_of_any_dtype(
    backend: str, sizes: list[int], density: float, offset: int | None, data: st.DataObject
) -> None:
    weights = [adversarial_cases(n, data.draw(st.sampled_from(DTYPES)))["any_bits"] for n in sizes]
    check(backend, weights, [random_bools(n, density, i) for i, n in enumerate(sizes)], offset)


def test_on_any_number_of_threads(backend: str, num_threads: int) -> None:
    weights = [adversarial_cases(n, torch.float32)["random"] for n in (200_003, 5, 70_000)]
    check(backend, weights, [random_bools(weight.numel(), 0.1, 0) for weight in weights], offset=1)


def test_zeros_are_positive(backend: str, device: torch.device) -> None:
    weight = torch.tensor([-0.0, torch.nan, -torch.inf, -1.0, -0.0], device=device)
    mask = BitMask.from_bool(torch.tensor([False, False, False, False, True])).to(device)
    apply_masks_(weight, mask, backend=backend)
    assert [*map(str, weight.tolist())] == ["0.0"] * 4 + ["-0.0"]


def test_one_mask_serves_a_weight_and_its_momentum(backend: str, device: torch.device) -> None:
    mask = BitMask.from_bool(torch.tensor([[True, False], [False, True]])).to(device)
    weight = torch.ones(2, 2, device=device)
    momentum = torch.full((2, 2), 3.0, dtype=torch.float64, device=device)
    apply_masks_([weight, momentum], [mask, mask], backend=backend)
    assert weight.tolist() == [[1, 0], [0, 1]]
    assert momentum.tolist() == [[3, 0], [0, 3]]


def test_writes_are_seen_by_autograd(backend: str, device: torch.device) -> None:
    weight = torch.nn.Parameter(torch.ones(9, device=device))
    loss = (weight * weight).sum()
    apply_masks_(weight, BitMask.from_bool(torch.zeros(9, dtype=torch.bool)).to(device), backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_arrays_and_nothing_at_all(host_backend: str) -> None:
    array = np.ones((2, 2), dtype=np.float16)
    apply_masks_(array, BitMask.from_bool(np.array([[True, False], [False, True]])), backend=host_backend)
    assert array.tolist() == [[1, 0], [0, 1]]
    apply_masks_([], [], backend=host_backend)
