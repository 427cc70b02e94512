"""BitMask: the layout of numpy.packbits at every size around a byte, counts, copies, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gmp_kernels import BitMask, DTypeError, ShapeError

bool_arrays = hnp.arrays(bool, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9))


@pytest.mark.parametrize("n", range(71))
def test_layout_is_that_of_packbits(n: int) -> None:
    kept = np.random.default_rng(n).random(n) < 0.5
    mask = BitMask.from_bool(torch.from_numpy(kept))
    assert mask.packed.numpy().tobytes() == np.packbits(kept, bitorder="little").tobytes()
    assert mask.numel == n and mask.num_kept == kept.sum()
    assert mask.to_bool().tolist() == kept.tolist()
    assert BitMask.ones((n,)) == BitMask.from_bool(torch.ones(n, dtype=torch.bool))
    assert BitMask.ones((n,)).num_kept == n


@given(kept=bool_arrays)
def test_round_trip_keeps_shape_and_bits(kept: np.ndarray) -> None:
    mask = BitMask.from_bool(kept)
    assert mask.shape == kept.shape
    np.testing.assert_array_equal(mask.to_bool().numpy(), kept)
    assert mask.num_kept == np.count_nonzero(kept)
    assert mask.sparsity == (1 - np.count_nonzero(kept) / kept.size if kept.size else 0.0)
    assert BitMask(mask.packed, mask.shape) == mask


@given(kept=bool_arrays, data=st.data())
def test_masks_differ_exactly_when_a_bit_does(kept: np.ndarray, data: st.DataObject) -> None:
    mask = BitMask.from_bool(kept)
    assert mask == BitMask.from_bool(kept.copy())
    assert mask != BitMask.from_bool(np.append(kept, True))
    if kept.size:
        flipped = kept.copy().reshape(-1)
        flipped[data.draw(st.integers(0, kept.size - 1))] ^= True
        assert mask != BitMask.from_bool(flipped.reshape(kept.shape))


def test_non_contiguous_bools_pack_in_logical_order() -> None:
    kept = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) < 0.5
    assert BitMask.from_bool(kept.t()) == BitMask.from_bool(kept.t().contiguous())


def test_clone_is_independent_and_wrapping_is_not() -> None:
    mask = BitMask.ones((3, 5))
    clone, wrapped = mask.clone(), BitMask(mask.packed, mask.shape)
    mask.packed[0] = 0
    assert clone == BitMask.ones((3, 5))
    assert wrapped == mask and mask.num_kept == 7


def test_to_a_device_it_is_already_on_is_itself() -> None:
    mask = BitMask.ones((9,))
    assert mask.to("cpu") is mask


def test_is_not_hashable_and_compares_with_anything() -> None:
    with pytest.raises(TypeError, match="unhashable"):
        hash(BitMask.ones((3,)))
    assert BitMask.ones((3,)) != "mask"


def test_repr_names_shape_sparsity_and_device() -> None:
    mask = BitMask.from_bool(torch.tensor([[True, False], [False, False]]))
    assert repr(mask) == "BitMask(shape=(2, 2), sparsity=0.7500, device='cpu')"


@pytest.mark.parametrize(
    ("packed", "shape", "error", "message"),
    [
        (torch.zeros(2, dtype=torch.bool), (9,), DTypeError, "expected packed bits as uint8, got torch.bool"),
        (torch.zeros(2), (9,), DTypeError, "expected packed bits as uint8, got torch.float32"),
        (torch.zeros(1, dtype=torch.uint8), (9,), ShapeError, r"expected 2 contiguous bytes .* shape \(1,\)"),
        (torch.zeros(2, 1, dtype=torch.uint8), (9,), ShapeError, r"expected 2 contiguous bytes .* shape \(2, 1\)"),
        (torch.zeros(4, dtype=torch.uint8)[::2], (9,), ShapeError, "expected 2 contiguous bytes"),
        (torch.tensor([255, 2], dtype=torch.uint8), (9,), ShapeError, "bits past element 9 are set"),
        (torch.tensor([128], dtype=torch.uint8), (7,), ShapeError, "bits past element 7 are set"),
    ],
)
def test_refuses_bits_that_are_no_mask(
    packed: torch.Tensor, shape: tuple[int, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        BitMask(packed, shape)


def test_from_bool_refuses_numbers() -> None:
    with pytest.raises(DTypeError, match=r"expected bool, got torch\.float32; write e\.g\. `weight != 0`"):
        BitMask.from_bool(torch.ones(3))


def test_no_mask_is_made_by_looking_at_bits_on_a_device() -> None:
    """A device that has no bits to look at: torch refuses to."""
    mask = BitMask(torch.empty(2, dtype=torch.uint8, device="meta"), (3, 4))
    for made in (
        mask.clone(),
        mask.to("meta"),
        BitMask.ones((3, 4), "meta"),
        BitMask.ones((3, 4)).to("meta"),
        BitMask.from_bool(torch.ones(3, 4, dtype=torch.bool, device="meta")),
    ):
        assert (made.packed.shape, made.packed.device.type, made.shape) == ((2,), "meta", (3, 4))
    with pytest.raises(RuntimeError, match="meta"):
        assert mask.num_kept


class Elsewhere(torch.Tensor):
    """Bits in host memory that say they are on a device."""

    device = torch.device("cuda", 0)


@pytest.mark.parametrize("inference", [False, True])
def test_bits_past_the_end_are_cleared_on_a_device_and_refused_on_the_cpu(inference: bool) -> None:
    with torch.inference_mode(inference):
        bits = torch.tensor([0b11111111, 0b10111], dtype=torch.uint8)
    with pytest.raises(ShapeError, match="bits past element 12 are set"):
        BitMask(bits, (12,))
    mask = BitMask(bits.as_subclass(Elsewhere), (12,))
    assert mask.packed.data_ptr() == bits.data_ptr()
    assert bits.tolist() == [0b11111111, 0b111]
