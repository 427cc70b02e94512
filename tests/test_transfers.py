"""Tables on their way to a device and back, and those that stay there."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import simt_extension

from gmp_kernels import BitMask, apply_masks_
from gmp_kernels.backends import uploads

_simt = simt_extension()


def test_numbers_are_put_into_tables_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones by a launch or several, large ones by a copy."""
    stored = []
    runtime = SimpleNamespace(
        MOST_STORED=_simt.MOST_STORED, store=lambda *args: (stored.append(args[2].size), _simt.store(*args))
    )
    launch, most = _simt.launch_on(0, 0, 4), _simt.MOST_STORED
    for size in (1, 255, 480, 481, 1000, most, most + 1):
        numbers = np.random.default_rng(size).integers(-(1 << 63), (1 << 63) - 1, size)
        table = torch.zeros(size + 1, dtype=torch.int64)
        uploads.put(runtime, launch, numbers, table)
        found = np.empty(size + 1, np.int64)
        _simt.fetch(launch, table.data_ptr(), found)
        assert np.array_equal(found[:-1], numbers) and found[-1] == 0
    assert stored == [1, 255, 480, 481, 1000, most]


def test_masks_are_applied_from_tables_that_stay_and_hold_no_tensor() -> None:
    """One call after another, on tensors at the same addresses; they are free once their owner lets go of them."""
    weights = [torch.randn(1000), torch.randn(300).bfloat16()]
    masks = [BitMask.from_bool(torch.rand(weight.shape) < 0.5) for weight in weights]
    apply_masks_(weights, masks, backend="simt")
    _simt.take_traffic()
    for weight in weights:
        weight.fill_(1.0)
    apply_masks_(weights, masks, backend="simt")
    assert {row[0].partition("<")[0] for row in _simt.take_traffic()} == {"kernels::apply"}
    for weight, mask in zip(weights, masks, strict=True):
        assert torch.equal(weight != 0, mask.to_bool())
    known = [weakref.ref(weight) for weight in weights]
    del weights, weight
    gc.collect()
    assert [ref() for ref in known] == [None, None]
