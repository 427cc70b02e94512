"""Whatever a device has no memory for: the error names the device, and nothing has changed."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
from conftest import needs_simt
from optim_cases import parameters, random_gradients, set_gradients

from gmp_kernels import BitMask, DeviceError, prune_
from gmp_kernels.backends import cuda
from gmp_kernels.optim import AdamW
from gmp_kernels.tools.testing import assert_bitwise_equal

pytestmark = needs_simt
NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory")


class Memory:
    """torch's functions that allocate; after ``left`` more there is none left."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, left: int) -> None:
        self.left = left
        for name in ("empty", "zeros", "ones", "full", "tensor", "empty_like", "zeros_like"):
            monkeypatch.setattr(torch, name, partial(self._allocate, getattr(torch, name)))

    def _allocate(self, function: Callable[..., torch.Tensor], *args: object, **kwargs: object) -> torch.Tensor:
        self.left -= 1
        if self.left < 0:
            raise NO_MEMORY
        return function(*args, **kwargs)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("given", [False, True], ids=["new masks", "masks"])
def test_whatever_there_is_no_memory_for_nothing_changes(
    monkeypatch: pytest.MonkeyPatch, given: bool, scope: str
) -> None:
    weights = [torch.randn(1000), torch.randn(40_000)]
    masks = [BitMask.ones(weight.shape) for weight in weights] if given else None
    before = [weight.clone() for weight in weights]
    request = {"sparsity": 0.5, "masks": masks, "scope": scope, "backend": "simt"}
    failed = 0
    while True:
        with monkeypatch.context() as patch:
            Memory(patch, failed)
            try:
                prune_(weights, **request)
                break
            except DeviceError as error:
                assert re.match(r"(prune_|select|prune): no memory left on cpu for the ", str(error))
        failed += 1
        for weight, was in zip(weights, before, strict=True):
            assert_bitwise_equal(weight, was)
        assert all(mask.num_kept == mask.numel for mask in masks or [])
    # The tables and all that comes with them; without masks two of those as well.
    assert failed == (1 if given else 3)


def test_a_step_that_there_is_no_memory_for_leaves_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise NO_MEMORY

    params = parameters([(300,)])
    set_gradients(params, random_gradients(params, 0), {})
    before = params[0].detach().clone()
    monkeypatch.setattr(cuda, "put", fail)
    with pytest.raises(DeviceError, match="no memory left on cpu"):
        AdamW(params, backend="simt").step()
    assert_bitwise_equal(params[0].detach(), before)
