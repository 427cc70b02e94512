"""Zeros where a mask prunes, in tensors that no kernel takes; and nothing changed where that cannot be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from wrapper_tensors import Codes

from gmp_kernels import BitMask
from gmp_kernels.pruner import zeroing
from gmp_kernels.pruner.zeroing import zero_where_pruned_
from gmp_kernels.tools.testing import device_of

SHAPE = (6, 5, 3, 7)


def values() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) + 3.0


def mask_of(shape: tuple[int, ...] = SHAPE) -> BitMask:
    return BitMask.from_bool(torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.6)


def of_inference() -> torch.Tensor:
    with torch.inference_mode():
        return values()


def with_gaps() -> torch.Tensor:
    wide = torch.full((6, 5, 3, 15), 9.0)
    return wide[..., 1::2].copy_(values())


PLAIN: dict[str, Callable[[], torch.Tensor]] = {
    "contiguous": values,
    "channels_last": lambda: values().to(memory_format=torch.channels_last),
    "transposed bfloat16": lambda: values().bfloat16().transpose(0, 3).contiguous().transpose(0, 3),
    "half with gaps": lambda: with_gaps().half(),
    "with gaps": with_gaps,
    "float8_e4m3fn": lambda: values().to(torch.float8_e4m3fn),
    "float8_e5m2 channels_last": lambda: values().to(torch.float8_e5m2).to(memory_format=torch.channels_last),
    "float8_e4m3fnuz": lambda: values().to(torch.float8_e4m3fnuz),
    "complex": lambda: torch.complex(values(), values()),
    "conjugate view": lambda: torch.complex(values(), values()).conj(),
    "negated view": lambda: torch._neg_view(values()),
    "inference tensor": of_inference,
    "leaf with a gradient": lambda: values().requires_grad_(),
    "NaN": lambda: values().fill_(torch.nan),
}


@pytest.mark.parametrize("size", [zeroing.SLICE, 100, 16, 1], ids="slices of {}".format)
@pytest.mark.parametrize("make", PLAIN.values(), ids=PLAIN)
def test_pruned_places_become_zero_and_the_rest_stays(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], torch.Tensor], size: int
) -> None:
    monkeypatch.setattr(zeroing, "SLICE", size)
    tensor, mask = make(), mask_of()
    expected = torch.where(mask.to_bool(), as_wide(make()), 0.0)
    stride, version = tensor.stride(), None if tensor.is_inference() else tensor._version
    assert zero_where_pruned_(tensor, mask)
    torch.testing.assert_close(as_wide(tensor), expected, rtol=0, atol=0, equal_nan=True)
    assert tensor.stride() == stride and (version is None or tensor._version > version)


def as_wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64)


def test_what_lies_between_the_elements_is_not_written() -> None:
    wide = torch.full((6, 5, 3, 15), 9.0)
    assert zero_where_pruned_(wide[..., 1::2], mask_of())
    assert bool((wide[..., ::2] == 9).all())


def test_a_mask_may_be_on_another_device_than_the_tensor() -> None:
    device = device_of("cuda") if torch.cuda.is_available() else torch.device("cpu")
    tensor = values().to(device)
    assert zero_where_pruned_(tensor, mask_of())
    assert torch.equal(tensor.cpu() == 0, ~mask_of().to_bool())


def test_of_a_sharded_tensor_what_is_here_is_zeroed() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded = distribute_tensor(values(), init_device_mesh("cpu", (1,)), [Shard(0)])
        assert zero_where_pruned_(sharded, mask_of())
        assert torch.equal(sharded.to_local() == 0, ~mask_of().to_bool())
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("zero", [0, 7])
def test_quantized_state_is_written_by_its_copy(zero: int) -> None:
    state, mask = Codes(values(), zero=zero), mask_of()
    before = state.dequantize()
    assert zero_where_pruned_(state, mask)
    after, kept = state.dequantize(), mask.to_bool()
    assert not after[~kept].any()
    torch.testing.assert_close(after[kept], before[kept], rtol=0, atol=float(state.scale))
    codes = state.codes.clone()
    assert zero_where_pruned_(state, mask)  # what is right is not rounded again
    assert torch.equal(state.codes, codes)


class Halves(Codes):
    """Its ``copy_`` writes something else than it is given."""

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.copy_.default:
            args = (args[0], args[1] / 2)
        return super().__torch_dispatch__(function, types, args, kwargs)


class Breaks(Codes):
    """Its ``copy_`` fails when it has written half."""

    is_broken = False

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.copy_.default and cls.is_broken:
            args[0].codes[0] = 1
            raise NotImplementedError
        return super().__torch_dispatch__(function, types, args, kwargs)


def test_a_subclass_that_does_not_hold_what_is_written_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Breaks(values())
    monkeypatch.setattr(Breaks, "is_broken", True)
    silent = Codes(values(), copies=False)
    for state in (Halves(values()), broken, silent):
        codes, scale = state.codes.clone(), state.scale.clone()
        assert not zero_where_pruned_(state, mask_of())
        assert torch.equal(state.codes, codes) and torch.equal(state.scale, scale)


def freed() -> torch.Tensor:
    tensor = values()
    tensor.untyped_storage().resize_(0)
    return tensor


REFUSED: dict[str, Callable[[], torch.Tensor]] = {
    "codes": lambda: values().to(torch.uint8),
    "integers": lambda: values().to(torch.int64),
    "another shape": lambda: values()[1:],
    "expanded": lambda: torch.ones(1, 5, 3, 7).expand(SHAPE),
    "no zero": lambda: values().to(torch.float8_e8m0fnu),
    "sparse": lambda: values().to_sparse(),
    "quantized": lambda: torch.quantize_per_tensor(values(), 0.1, 5, torch.quint8),
    "freed": freed,
    "meta": lambda: values().to("meta"),
    "functional": lambda: torch._to_functional_tensor(values()),
}


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_zeroed_is_left_alone(make: Callable[[], torch.Tensor]) -> None:
    tensor = make()
    assert not zero_where_pruned_(tensor, mask_of())
    if tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.untyped_storage().nbytes():
        assert str(tensor) == str(make())
