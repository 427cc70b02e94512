"""Knowledge that a call has from an earlier one on the same tensors, and that it notices whatever has changed since."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import BACKENDS, HOST_BACKENDS

from gmp_kernels import (
    BitMask,
    DTypeError,
    GMPError,
    LayoutError,
    ShapeError,
    apply_masks_,
    checks,
    magnitude_threshold,
    prune_,
)
from gmp_kernels.backends.layouts import BY_DLPACK, by_getters
from gmp_kernels.tools.testing import assert_bitwise_equal

Change = Callable[[list[torch.Tensor], list[BitMask]], object]


def tensors() -> tuple[list[torch.Tensor], list[BitMask]]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(*shape, generator=generator) for shape in ((8, 8), (40,), (64,))]
    weights[0] = torch.nn.Parameter(weights[0])
    return weights, [BitMask.ones(weight.shape) for weight in weights]


# Where it must be there: a BY_DLPACK that is None then fails the tests instead of skipping them.
HAS_EXCHANGE = hasattr(torch.Tensor, "__dlpack_c_exchange_api__") and "cpu" in BACKENDS
needs_exchange = pytest.mark.skipif(not HAS_EXCHANGE, reason="needs torch 2.10 and the C++ extension")
LAYOUTS = {"getters": by_getters, **({"DLPack": BY_DLPACK} if HAS_EXCHANGE else {})}


@pytest.fixture(params=LAYOUTS)
def full_checks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the operations whose tensors have been looked at one by one."""
    monkeypatch.setattr(checks, "layouts_of", LAYOUTS[request.param])
    checks.forget()
    found: list[str] = []
    check = checks.check_tensors
    monkeypatch.setattr(checks, "check_tensors", lambda op, *rest: found.append(op) or check(op, *rest))
    return found


def test_tensors_are_looked_at_once(full_checks: list[str]) -> None:
    weights, masks = tensors()
    for _ in range(3):
        prune_(weights, sparsity=0.5, masks=masks)
        apply_masks_(weights, masks)
        prune_([w.detach() for w in weights], sparsity=0.25, masks=masks, scope="global")  # other objects, same memory
        magnitude_threshold(weights[0], 7)
    assert full_checks == ["prune_", "apply_masks_", "magnitude_threshold"]


def test_masks_at_other_places_are_not_looked_at_again(full_checks: list[str]) -> None:
    """A pruner gives copies of its masks at every update, where optimizer state is laid out by the bits before."""
    weights, masks = tensors()
    for sparsity in (0.25, 0.5, 0.75):
        copies = [mask.clone() for mask in masks]
        before = [mask.packed.clone() for mask in masks]
        result = prune_(weights, sparsity=sparsity, masks=copies)
        assert result.num_pruned == [round(sparsity * weight.numel()) for weight in weights]
        assert all(torch.equal(mask.packed, bits) for mask, bits in zip(masks, before, strict=True))
        assert all(mask == BitMask.from_zeros(weight) for mask, weight in zip(copies, weights, strict=True))
        masks = copies
    assert full_checks == ["prune_"]


def overlapping(mask: BitMask, other: BitMask) -> torch.Tensor:
    return other.packed[:]


def cut(mask: BitMask, other: BitMask) -> torch.Tensor:
    bits = mask.packed.clone()
    bits.untyped_storage().resize_(3)
    return bits


def cut_before_its_bits(mask: BitMask, other: BitMask) -> torch.Tensor:
    bits = torch.full((16,), 0xFF, dtype=torch.uint8)[8:]
    bits.untyped_storage().resize_(8)
    return bits


def of_integers(mask: BitMask, other: BitMask) -> torch.Tensor:
    return mask.packed.to(torch.int8)


@pytest.mark.parametrize("change", [overlapping, cut, cut_before_its_bits, of_integers])
def test_masks_at_other_places_are_refused_as_ever(
    full_checks: list[str], change: Callable[[BitMask, BitMask], torch.Tensor]
) -> None:
    weights = [torch.randn(64) for _ in range(2)]
    masks = [BitMask.ones((64,)) for _ in weights]
    prune_(weights, sparsity=0.25, masks=masks)
    others = [mask.clone() for mask in masks]
    others[1].packed = change(others[1], others[0])
    values = [weight.clone() for weight in weights]
    with pytest.raises(LayoutError if change is overlapping else ShapeError):
        prune_(weights, sparsity=0.5, masks=others)
    assert all(map(torch.equal, weights, values))


def test_what_may_be_read_may_not_be_written_yet(full_checks: list[str]) -> None:
    """Each kind of call has checks of its own."""
    weight, mask = torch.randn(16), BitMask.ones((16,))
    for _ in range(2):
        magnitude_threshold(weight, 3, mask=mask)
        apply_masks_(weight, mask)
        prune_(weight, num_prune=3, masks=mask)
    assert full_checks == ["magnitude_threshold", "apply_masks_", "prune_"]


def as_integers(weights: list[torch.Tensor], masks: list[BitMask]) -> None:
    weights[1].data = weights[1].data.view(torch.int32)


def transposed(weights: list[torch.Tensor], masks: list[BitMask]) -> None:
    weights[0].data = weights[0].data.t()


def reshaped(weights: list[torch.Tensor], masks: list[BitMask]) -> None:
    weights[0].data = weights[0].data.view(4, 16)


def shrunk(weights: list[torch.Tensor], masks: list[BitMask]) -> None:
    weights[1].data.resize_(10)
    weights[1].data = weights[1].data[:10]


def tied(weights: list[torch.Tensor], masks: list[BitMask]) -> None:
    weights[1].data = weights[0].data.view(-1)[24:]


def sparse(weights: list[torch.Tensor], masks: list[BitMask]) -> None:
    weights[2] = weights[2].detach().to_sparse()


def elsewhere(weights: list[torch.Tensor], masks: list[BitMask]) -> None:
    weights[2] = weights[2].detach().to("meta")


def no_mask(weights: list[torch.Tensor], masks: list[BitMask]) -> None:
    masks[1] = masks[1].packed  # type: ignore[call-overload]


def bits_shared(weights: list[torch.Tensor], masks: list[BitMask]) -> None:
    masks[1].packed = masks[0].packed[:5]


def bits_cut_off(weights: list[torch.Tensor], masks: list[BitMask]) -> None:
    masks[1].packed.resize_(4)


def bits_of_other_type(weights: list[torch.Tensor], masks: list[BitMask]) -> None:
    masks[1].packed = masks[1].packed.to(torch.int64)


def every_second_byte(weights: list[torch.Tensor], masks: list[BitMask]) -> None:
    """The same address and number of bytes."""
    masks[1].packed = masks[1].packed.as_strided((5,), (0,))


def signed_bits(weights: list[torch.Tensor], masks: list[BitMask]) -> None:
    masks[1].packed = masks[1].packed.view(torch.int8)


def freed(weights: list[torch.Tensor], masks: list[BitMask]) -> None:
    weights[1].untyped_storage().resize_(0)


def mask_reshaped(weights: list[torch.Tensor], masks: list[BitMask]) -> None:
    masks[0].shape = torch.Size((64,))


def mask_elsewhere(weights: list[torch.Tensor], masks: list[BitMask]) -> None:
    masks[1] = masks[1].to("meta")


CHANGES: list[tuple[Change, type[GMPError], str]] = [
    (as_integers, DTypeError, r"for weights\[1\], got torch.int32"),
    (transposed, LayoutError, r"expected a contiguous or channels_last tensor for weights\[0\]"),
    (reshaped, ShapeError, r"expected a mask of shape \(4, 16\) for weights\[0\], got \(8, 8\)"),
    (shrunk, ShapeError, r"expected a mask of shape \(10,\) for weights\[1\]"),
    (tied, LayoutError, "share no memory"),
    (sparse, LayoutError, "got layout torch.sparse_coo"),
    (elsewhere, LayoutError, r"the mask of weights\[2\] on meta, got cpu"),
    (no_mask, DTypeError, r"expected a BitMask for weights\[1\], got Tensor"),
    (
        bits_cut_off,
        ShapeError,
        r"expected 5 contiguous bytes as the mask of weights\[1\], got torch.uint8 of shape \(4,\)",
    ),
    (bits_of_other_type, ShapeError, r"expected 5 contiguous bytes as the mask of weights\[1\], got torch.int64"),
    (every_second_byte, ShapeError, r"expected 5 contiguous bytes as the mask of weights\[1\], got torch.uint8"),
    (signed_bits, ShapeError, r"expected 5 contiguous bytes as the mask of weights\[1\], got torch.int8"),
    (freed, LayoutError, r"expected weights\[1\] in memory, got a tensor whose storage was freed"),
    (mask_reshaped, ShapeError, r"expected a mask of shape \(8, 8\) for weights\[0\], got \(64,\)"),
    (mask_elsewhere, LayoutError, r"the mask of weights\[1\] on cpu, got meta"),
]


@pytest.mark.parametrize(("change", "error", "message"), CHANGES, ids=[change.__name__ for change, *_ in CHANGES])
@pytest.mark.parametrize("op", [prune_, apply_masks_], ids=lambda op: op.__name__)
def test_what_became_wrong_since_the_last_call_is_refused(
    op: Callable[..., object], change: Change, error: type[GMPError], message: str
) -> None:
    weights, masks = tensors()
    request = {"sparsity": 0.5} if op is prune_ else {}
    for _ in range(2):
        op(weights, masks=masks, **request)
    change(weights, masks)
    for _ in range(2):  # nor is it taken for good the next time
        with pytest.raises(error, match=message):
            op(weights, masks=masks, **request)


def test_masks_that_came_to_share_memory_are_refused() -> None:
    weights, masks = tensors()
    prune_(weights, sparsity=0.5, masks=masks)
    bits_shared(weights, masks)
    with pytest.raises(LayoutError, match="expected masks that share no memory"):
        prune_(weights, sparsity=0.5, masks=masks)


def test_an_array_that_became_read_only_is_refused() -> None:
    array = np.ones(9, dtype=np.float32)
    prune_(array, num_prune=3)
    array.flags.writeable = False
    with pytest.raises(LayoutError, match="a read-only one"):
        prune_(array, num_prune=5)
    assert array.sum() == 6


def weight_moved(weights: list[torch.Tensor], masks: list[BitMask]) -> None:
    weights[1].data = weights[1].data.clone()


def weight_replaced(weights: list[torch.Tensor], masks: list[BitMask]) -> None:
    weights[1] = weights[1].detach().flip(0)


def mask_replaced(weights: list[torch.Tensor], masks: list[BitMask]) -> None:
    masks[1] = BitMask.from_bool(torch.arange(40) % 2 == 0)


def bits_replaced(weights: list[torch.Tensor], masks: list[BitMask]) -> None:
    masks[1].packed = BitMask.from_bool(torch.arange(40) % 2 == 0).packed


def reordered(weights: list[torch.Tensor], masks: list[BitMask]) -> None:
    weights.reverse()
    masks.reverse()


def of_another_type(weights: list[torch.Tensor], masks: list[BitMask]) -> None:
    weights[2].data = weights[2].data.double()


@pytest.mark.parametrize(
    "change",
    [weight_moved, weight_replaced, mask_replaced, bits_replaced, reordered, of_another_type],
    ids=lambda change: change.__name__,
)
def test_what_changed_since_the_last_call_is_what_the_next_one_works_on(host_backend: str, change: Change) -> None:
    weights, masks = tensors()
    for _ in range(2):
        prune_(weights, sparsity=0.3, masks=masks, backend=host_backend)
        apply_masks_(weights, masks, backend=host_backend)
    change(weights, masks)
    expected, expected_masks = [w.detach().clone() for w in weights], [mask.clone() for mask in masks]
    result = prune_(expected, sparsity=0.75, masks=expected_masks, backend="reference")
    assert prune_(weights, sparsity=0.75, masks=masks, backend=host_backend)[1:] == result[1:]
    for weight, wanted in zip(weights, expected, strict=True):
        assert_bitwise_equal(weight.detach(), wanted)
    assert masks == expected_masks


def test_nothing_is_kept_alive() -> None:
    weights, masks = tensors()
    prune_(weights, sparsity=0.5, masks=masks)
    apply_masks_(weights, masks)
    alive = [weakref.ref(x) for x in (*weights, *(mask.packed for mask in masks))]
    del weights, masks
    gc.collect()
    assert [ref() for ref in alive] == [None] * len(alive)


@needs_exchange
def test_dlpack_is_asked_in_the_version_that_is_understood() -> None:
    from gmp_kernels._C import describe

    def capsule_of(major: int, older: int | None) -> object:
        header = (ctypes.c_uint32 * 2)(major, 0)
        table = (ctypes.c_void_p * 7)(int.from_bytes(header, "little"), older)
        kept.append(table)
        new = ctypes.pythonapi.PyCapsule_New
        new.argtypes, new.restype = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p), ctypes.py_object
        return new(ctypes.addressof(table), name, None)

    kept: list[object] = []
    name = b"dlpack_exchange_api"
    exchange = torch.Tensor.__dlpack_c_exchange_api__  # type: ignore[attr-defined]
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.argtypes, pointer.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_void_p
    weights = [torch.randn(3, 4)]
    told = describe(exchange, weights, True, False)
    assert describe(capsule_of(9, pointer(exchange, name)), weights, True, False) == told is not None
    assert describe(capsule_of(9, None), weights, True, False) is None
    assert describe(capsule_of(1, None), weights, True, False) is None  # a producer may leave this function out


@needs_exchange
@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_dlpack_is_found_whatever_the_default_device(device: str) -> None:
    program = (
        f"import torch; torch.set_default_device({device!r}); "
        "from gmp_kernels.backends.layouts import BY_DLPACK; assert BY_DLPACK is not None"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("packed", [np.zeros(8, np.uint8), None, [1]], ids=["array", "none", "list"])
def test_bits_that_are_no_tensor_are_refused_by_name(full_checks: list[str], packed: object) -> None:
    weights, masks = tensors()
    masks[1].packed = packed  # type: ignore[assignment]
    for _ in range(2):
        with pytest.raises(DTypeError, match=r"packed bits in the mask of weights\[1\], got "):
            prune_(weights, sparsity=0.5, masks=masks)


def test_what_is_known_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "MOST_LAYERS", 10)
    checks.forget()
    weights = [torch.randn(8) for _ in range(12)]
    known = []
    for number in (4, 4, 2, 1, 12, 3):
        prune_(weights[:number], sparsity=0.5)
        known.append(sorted(layers for _, layers, _ in checks._known))
    # The same call again adds nothing; what does not fit makes room, and what never fits is known alone.
    assert known == [[4], [4], [2, 4], [1, 2, 4], [12], [3]]


@pytest.mark.parametrize("backend", sorted({"cpu", "simt"} & set(HOST_BACKENDS)))  # Triton's interpreter takes no two
def test_threads_share_what_is_known_of_a_layer_and_write_none_of_it(backend: str) -> None:
    weights, masks = tensors()
    expected = [w.detach().clone() for w in weights]
    prune_(expected, sparsity=0.5, backend="reference")
    prune_(weights, sparsity=0.0, masks=masks, backend=backend)

    def run(copies: list[torch.Tensor]) -> list[int]:
        # Of the weights themselves only thresholds are asked for, at once in all threads.
        for _ in range(20):
            magnitude_threshold(weights[0], 32, backend=backend)
            result = prune_(copies, sparsity=0.5, backend=backend)
        return result.num_pruned

    copies = [[w.detach().clone() for w in weights] for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, copies)) == [[32, 20, 32]] * 4
    for own in copies:
        for weight, wanted in zip(own, expected, strict=True):
            assert_bitwise_equal(weight, wanted)
