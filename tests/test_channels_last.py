"""Weights in channels_last: the same weights are pruned as of contiguous ones, and all that is read or saved agrees."""

from __future__ import annotations

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from conftest import thinned
from peak_memory import peak, reset_peak

from gmp_kernels import BitMask, LayoutError, NonFiniteError, ShapeError, apply_masks_, magnitude_threshold, prune_
from gmp_kernels.formats import CHANNELS_LAST, format_of
from gmp_kernels.tools.testing import DTYPES, GuardedCopy, adversarial_cases, assert_bitwise_equal

# Filters that are no whole bytes of a mask, smaller and larger than a chunk; a single one; 5 dimensions; and weights
# whose format is both.
SHAPES = [(5, 3, 3, 3), (7, 2, 1, 9), (1, 8, 5, 5), (40, 65, 3, 3), (2, 2000, 3, 3), (4, 3, 2, 3, 2), (8, 12, 1, 1)]
CASES = ["random", "small_integers", "constant", "signed_zeros", "bfloat16_ties"]


def channels_last(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in channels_last."""
    return tensor.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)


def values(shape: tuple[int, ...], dtype: torch.dtype, case: str) -> torch.Tensor:
    return adversarial_cases(torch.Size(shape).numel(), dtype)[case].view(shape)


def random_kept(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(7)) < 0.6


def assert_same(backend: str, device: torch.device, weights: list[torch.Tensor], **request: object) -> None:
    """Prune twice, with and without masks, contiguous with the oracle and in channels_last with the backend."""
    expected = [w.clone() for w in weights]
    copies = [GuardedCopy(w.movedim(1, -1), 3, device) for w in weights]  # misaligned
    actual = [copied.view.movedim(-1, 1) for copied in copies]
    assert all(format_of(one) is format_of(channels_last(w)) for one, w in zip(actual, weights, strict=True))
    masks: list[list[BitMask] | None] = [None, None]
    for sparsity in (0.35, 0.8):
        right = prune_(expected, sparsity=sparsity, masks=masks[0], backend="reference", **request)
        found = prune_(actual, sparsity=sparsity, masks=masks[1], backend=backend, **request)
        masks = [right.masks, found.masks]
        for one, other, mask, truth in zip(actual, expected, found.masks, right.masks, strict=True):
            assert_bitwise_equal(one, other)
            assert torch.equal(mask.to_bool().cpu(), truth.to_bool())
            assert mask.memory_format is format_of(one)
        assert repr(found[1:]) == repr(right[1:])
    for copied in copies:
        copied.assert_intact()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_weights_pruned_are_those_of_contiguous_ones(
    backend: str, device: torch.device, dtype: torch.dtype
) -> None:
    for shape, case in thinned(backend, itertools.product(SHAPES, CASES), 0):
        assert_same(backend, device, [values(shape, dtype, case)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_weights_pruned_over_all_layers_are_those_of_contiguous_ones(
    backend: str, device: torch.device, dtype: torch.dtype
) -> None:
    for case in thinned(backend, CASES, 1):
        assert_same(backend, device, [values(shape, dtype, case) for shape in SHAPES], scope="global")


def test_contiguous_layers_and_others_are_pruned_together(backend: str, device: torch.device) -> None:
    for scope in ("layer", "global"):
        weights = [values((40, 65, 3, 3), torch.bfloat16, "random") for _ in range(3)]
        expected = [w.to(device, copy=True) for w in weights]
        actual = [weights[0].to(device, copy=True), *(channels_last(w).to(device) for w in weights[1:])]
        right = prune_(expected, sparsity=0.6, scope=scope, backend=backend)
        found = prune_(actual, sparsity=0.6, scope=scope, backend=backend)
        for one, other in zip(actual, expected, strict=True):
            assert_bitwise_equal(one, other)
        assert found.masks == right.masks and found[1:] == right[1:]


def test_the_first_nan_is_that_of_row_major_order(backend: str, device: torch.device) -> None:
    weight = values((6, 5, 3, 3), torch.float32, "random").clone()
    for place in ((4, 1, 2, 2), (4, 3, 0, 0)):  # of which memory holds the second one first
        weight[place] = torch.nan
    strided = channels_last(weight).to(device)
    before = strided.clone()
    index = 4 * 45 + 1 * 9 + 8
    with pytest.raises(NonFiniteError, match=f"flat index {index};") as caught:
        prune_([strided.abs(), strided], sparsity=0.5, backend=backend)
    assert (caught.value.layer, caught.value.index) == (0, index)
    assert_bitwise_equal(strided, before)
    mask = BitMask.from_bool(weight.nan_to_num(nan=0.0) != 0)
    assert prune_(strided, sparsity=0.5, masks=mask.to(device), backend=backend).num_pruned == [135]
    kept = magnitude_threshold(strided, 100, nonfinite="keep", backend=backend)
    assert kept == magnitude_threshold(strided.contiguous(), 100, nonfinite="keep", backend=backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_of_any_format_are_taken(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    shape = (40, 65, 3, 3)
    weight, kept = values(shape, dtype, "small_integers"), random_kept(shape)
    expected, truth = weight.clone(), BitMask.from_bool(kept)
    threshold = magnitude_threshold(weight, 17_000, mask=truth, backend="reference")
    right = prune_(expected, sparsity=0.7, masks=truth, backend="reference")
    for of_weight, of_mask in itertools.product((torch.contiguous_format, torch.channels_last), repeat=2):
        one = weight.contiguous(memory_format=of_weight).to(device, copy=True)
        mask = BitMask.from_bool(kept).to(device, memory_format=of_mask)
        assert mask.memory_format is of_mask
        masked, bits = one.clone(), mask.clone()
        apply_masks_(masked, mask, backend=backend)
        assert_bitwise_equal(masked, torch.where(kept, weight, 0.0))
        assert torch.equal(mask.packed, bits.packed)
        assert magnitude_threshold(one, 17_000, mask=mask, backend=backend) == threshold
        found = prune_(one, sparsity=0.7, masks=mask, backend=backend)
        assert found.masks[0] is mask and mask.memory_format is of_weight
        assert mask == truth and found[1:] == right[1:]
        assert_bitwise_equal(one, expected)


def test_a_call_that_raises_leaves_a_mask_of_another_format_alone(backend: str, device: torch.device) -> None:
    weight = channels_last(values((5, 3, 3, 3), torch.float32, "random")).to(device)
    weight[0, 0, 0, 0] = torch.inf
    mask = BitMask.ones(weight.shape, device)
    packed = mask.packed
    with pytest.raises(NonFiniteError):
        prune_(weight, sparsity=0.5, masks=mask, backend=backend)
    if backend not in ("cuda", "simt"):  # which find it while they write, and then write nothing
        assert mask.packed is packed and mask.memory_format is torch.contiguous_format
    assert mask == BitMask.ones(weight.shape, device) and int((weight != 0).sum()) == weight.numel()


def test_bits_that_follow_a_weight_in_inference_mode_can_be_written_outside_of_it(
    backend: str, device: torch.device
) -> None:
    weight = channels_last(values((5, 3, 3, 3), torch.float32, "random")).to(device)
    mask, dense = BitMask.ones(weight.shape, device), BitMask.ones(weight.shape, device)
    with torch.inference_mode():
        prune_(weight, sparsity=0.5, masks=mask, backend=backend)
    assert mask.memory_format is torch.channels_last and torch.equal(weight != 0, mask.to_bool())
    mask.packed.copy_(dense.packed)  # as a scheduler does when it loads a state
    assert mask == dense


# -- masks -------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=SHAPES, ids=str)
def kept(request: pytest.FixtureRequest) -> torch.Tensor:
    return random_kept(request.param)


def test_bits_are_in_the_order_of_memory_and_bools_in_that_of_rows(kept: torch.Tensor) -> None:
    row_major, mask = BitMask.from_bool(kept), BitMask.from_bool(channels_last(kept))
    assert mask.packed.numpy().tobytes() == np.packbits(kept.movedim(1, -1).flatten(), bitorder="little").tobytes()
    assert row_major.packed.numpy().tobytes() == np.packbits(kept.flatten(), bitorder="little").tobytes()
    for one in (mask, row_major):
        assert torch.equal(one.to_bool(), kept) and one.to_bool().is_contiguous()
        assert one.num_kept == int(kept.sum()) and one.shape == kept.shape
    assert mask == row_major and row_major == mask
    other = kept.clone()
    other.view(-1)[-1] ^= True
    assert mask != BitMask.from_bool(other)


def test_masks_are_copied_with_their_format(kept: torch.Tensor) -> None:
    mask = BitMask.from_bool(channels_last(kept))
    pickled = [pickle.loads(pickle.dumps(mask, protocol)) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)]
    for copied in (mask.clone(), copy.deepcopy(mask), *pickled):
        assert copied == mask and copied.memory_format is mask.memory_format
        assert torch.equal(copied.packed, mask.packed) and copied.packed is not mask.packed
    assert mask.to("cpu") is mask.to(memory_format=mask.memory_format) is mask
    back = mask.to(memory_format=torch.contiguous_format)
    assert back.memory_format is torch.contiguous_format
    assert torch.equal(back.packed, BitMask.from_bool(kept).packed)
    weight = channels_last(torch.where(kept, 2.0, 0.0))
    assert torch.equal(BitMask.from_zeros(weight).packed, mask.packed)
    ones = BitMask.ones(kept.shape, memory_format=CHANNELS_LAST[kept.ndim])
    assert ones == BitMask.ones(kept.shape) and ones.memory_format is mask.memory_format
    assert torch.equal(BitMask(mask.packed, kept.shape, mask.memory_format).to_bool(), kept)


def test_bits_are_brought_into_another_format_part_by_part() -> None:
    """Filters larger than a part, fewer filters in the last part, and no more memory than a prune step may take."""
    for shape in ((3, 300_000, 3, 1), (1301, 5, 9, 9), (1 << 17, 3, 3, 1), (1200, 2048, 3, 3)):
        kept = random_kept(shape)
        row_major, mask = BitMask.from_bool(kept), BitMask.from_bool(channels_last(kept))
        reset_peak()
        before = peak()
        found = row_major.to(memory_format=torch.channels_last), mask.to(memory_format=torch.contiguous_format)
        grown = peak() - before
        assert all(map(torch.equal, (one.packed for one in found), (mask.packed, row_major.packed)))
    assert grown < sum(one.packed.nbytes for one in found) + (4 << 20)


def test_a_pickle_from_before_there_were_formats_is_row_major() -> None:
    mask = BitMask.from_bool(random_kept((5, 3, 3, 3)))
    old = BitMask.__new__(BitMask)
    old.__setstate__((None, {"packed": mask.packed, "shape": mask.shape}))
    assert old == mask and old.memory_format is torch.contiguous_format


@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [((4, 9), torch.channels_last), ((2, 2, 3, 3, 1), torch.channels_last), ((6, 6), torch.preserve_format)],
)
def test_a_format_that_is_not_one_of_the_shape_is_refused(
    shape: tuple[int, ...], memory_format: torch.memory_format
) -> None:
    mask = BitMask.ones(shape)
    for call in (
        lambda: BitMask(mask.packed, shape, memory_format),
        lambda: BitMask.ones(shape, memory_format=memory_format),
        lambda: mask.to(memory_format=memory_format),
    ):
        with pytest.raises(ShapeError, match="give the format of the weight"):
            call()


def test_other_strides_are_refused_by_name(backend: str, device: torch.device) -> None:
    for weight in (
        torch.ones(4, 6, device=device).t(),
        torch.ones(3, 4, 5, 5, device=device).transpose(0, 1),
        torch.ones(4, 5, 5, 6, device=device).movedim(-1, 1)[:, :3],
    ):
        with pytest.raises(LayoutError, match="expected a contiguous or channels_last tensor for weights"):
            prune_(weight, sparsity=0.5, backend=backend)
