"""Every way to call the operations wrong: the error, what it says, and that not one byte has changed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, init_device_mesh

from gmp_kernels import (
    BackendUnavailableError,
    BitMask,
    DTypeError,
    GMPError,
    LayoutError,
    NonFiniteError,
    ShapeError,
    SparsityError,
    Threshold,
    apply_masks_,
    magnitude_threshold,
    prune_,
)


class Desk:
    """Good inputs to go wrong with, and a record of the bytes of everything that must not change."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = device
        self._kept: list[tuple[torch.Tensor | np.ndarray, bytes]] = []
        self.w = self.keep(torch.linspace(-1, 1, 24, device=device).view(4, 6))
        self.v = self.keep(torch.linspace(-2, 3, 5, device=device))
        self.w_mask = self.mask(4, 6)
        self.v_mask = self.mask(5)

    def keep(self, values: Any) -> Any:
        """Remember the bytes of ``values`` as they are now."""
        self._kept.append((values, _bytes(values)))
        return values

    def mask(self, *shape: int) -> BitMask:
        mask = BitMask.from_bool(torch.arange(torch.Size(shape).numel(), device=self._device).view(shape) % 3 > 0)
        self.keep(mask.packed)
        return mask

    def with_value(self, value: float, index: int) -> torch.Tensor:
        """100 ones, the one at ``index`` replaced."""
        weight = torch.ones(100, device=self._device)
        weight[index] = value
        return self.keep(weight)

    def strided(self) -> np.ndarray:
        return self.keep(np.ones((4, 6), dtype=np.float32))[:, ::2]

    def read_only(self) -> np.ndarray:
        array = self.keep(np.ones(9, dtype=np.float32))
        array.flags.writeable = False
        return array

    def assert_unchanged(self) -> None:
        for values, before in self._kept:
            assert _bytes(values) == before


def _bytes(values: torch.Tensor | np.ndarray) -> bytes:
    return values.tobytes() if isinstance(values, np.ndarray) else bytes(values.detach().cpu().untyped_storage())


class Bad(NamedTuple):
    name: str
    call: Callable[[Desk], object]
    error: type[GMPError]
    builtin: type[Exception]
    message: str


TIED = r"expected weights that share no memory, but those of weights\[0\] and weights\[\d\] overlap"
WRITING = [
    Bad("tied", lambda d: prune_([d.w, d.v, d.w], sparsity=0.5), LayoutError, ValueError, TIED),
    Bad("view", lambda d: prune_([d.w, d.w[1]], sparsity=0.5), LayoutError, ValueError, TIED),
    Bad("array of it", lambda d: prune_([d.w, d.w.numpy()], sparsity=0.5), LayoutError, ValueError, TIED),
    Bad("tied in apply", lambda d: apply_masks_([d.v, d.v], [d.v_mask] * 2), LayoutError, ValueError, TIED),
    Bad(
        "shared mask",
        lambda d: prune_([d.v, d.v.clone()], sparsity=0.5, masks=[d.v_mask] * 2),
        LayoutError,
        ValueError,
        "expected masks that share no memory",
    ),
    Bad("read-only", lambda d: prune_(d.read_only(), sparsity=0.5), LayoutError, ValueError, "a read-only one; copy"),
    Bad(
        "read-only in apply",
        lambda d: apply_masks_(d.read_only(), d.mask(9)),
        LayoutError,
        ValueError,
        "expected a writable array for weights",
    ),
]

DTYPE_CASES = [
    Bad(
        f"{dtype}",
        lambda d, dtype=dtype: prune_([d.w, d.keep(torch.ones(8).to(dtype))], sparsity=0.5),
        DTypeError,
        TypeError,
        rf"expected float32, float64, bfloat16 or float16 for weights\[1\], got {dtype}; {advice}",
    )
    for dtype, advice in [
        *[
            (dtype, "prune before quantizing")
            for dtype in (torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool, torch.float8_e4m3fn)
        ],
        (torch.complex64, "prune its torch.view_as_real"),
    ]
]
ARRAY_CASES = [
    Bad(
        f"array {dtype}",
        lambda d, dtype=dtype: prune_([d.w, d.keep(np.ones(8, dtype=dtype))], sparsity=0.5),
        DTypeError,
        TypeError,
        rf"in native byte order for weights\[1\], got {re.escape(np.dtype(dtype).str)}; use .astype",
    )
    for dtype in ("int64", "bool", "complex128", "longdouble", ">f4", ">f8", "object")
]
SPARSITY_CASES = [
    Bad(
        f"sparsity {value!r}",
        lambda d, value=value: prune_([d.w, d.v], sparsity=[0.5, value], masks=[d.w_mask, d.v_mask]),
        SparsityError,
        ValueError,
        r"expected a sparsity in \[0, 1\] \(a fraction, not a percentage\), got",
    )
    for value in (-0.1, 1.0001, 90, float("nan"), float("inf"), True, np.True_, "0.5", None, 0.5 + 0j)
]
COUNT_CASES = [
    Bad(
        f"num_prune {value!r}",
        lambda d, value=value: prune_([d.w, d.v], num_prune=[1, value], masks=[d.w_mask, d.v_mask]),
        SparsityError,
        ValueError,
        message,
    )
    for value, message in [
        (-1, r"expected 0 <= num_prune <= 5 \(the number of weights\), got -1"),
        (6, "expected 0 <= num_prune <= 5"),
        (2**70, "expected 0 <= num_prune <= 5"),
        (0.5, "expected an integer num_prune, got 0.5; a fraction goes in sparsity="),
        (2.0, "expected an integer num_prune, got 2.0"),
        (True, "expected an integer num_prune, got True"),
        ("3", "expected an integer num_prune, got '3'"),
    ]
]
OTHER_CASES = [
    Bad("neither", lambda d: prune_(d.w), SparsityError, ValueError, "exactly one .* got neither"),
    Bad("both", lambda d: prune_(d.w, sparsity=0.5, num_prune=3), SparsityError, ValueError, "exactly one .* got both"),
    Bad(
        "threshold beyond n",
        lambda d: magnitude_threshold(d.w, 25),
        SparsityError,
        ValueError,
        "magnitude_threshold: expected 0 <= num_prune <= 24",
    ),
    Bad(
        "global beyond n",
        lambda d: prune_([d.w, d.v], num_prune=30, scope="global"),
        SparsityError,
        ValueError,
        "expected 0 <= num_prune <= 29",
    ),
    Bad(
        "many sparsities",
        lambda d: prune_([d.w, d.v], sparsity=[0.5] * 3),
        ShapeError,
        ValueError,
        "expected 1 or 2 values of sparsity or num_prune, got 3",
    ),
    Bad(
        "list in global scope",
        lambda d: prune_([d.w, d.v], sparsity=[0.5, 0.5], scope="global"),
        ShapeError,
        ValueError,
        "expected a single value for scope='global'",
    ),
    Bad(
        "few masks",
        lambda d: prune_([d.w, d.v], sparsity=0.5, masks=[d.w_mask]),
        ShapeError,
        ValueError,
        "expected one mask per weight, got 1 masks for 2 weights",
    ),
    Bad(
        "few masks in apply",
        lambda d: apply_masks_([d.w, d.v], d.w_mask),
        ShapeError,
        ValueError,
        "apply_masks_: expected one mask per weight",
    ),
    Bad(
        "few names",
        lambda d: prune_([d.w, d.v], sparsity=0.5, names=["w"]),
        ShapeError,
        ValueError,
        "expected one name per weight, got 1 names for 2 weights",
    ),
    Bad(
        "few previous",
        lambda d: prune_([d.w, d.v], sparsity=0.5, previous=[Threshold(0.5, 1, 1, 0)]),
        ShapeError,
        ValueError,
        "expected one previous threshold per weight, got 1 for 2",
    ),
    Bad(
        "mask of another shape",
        lambda d: prune_([d.v, d.w], sparsity=0.5, masks=[d.v_mask, d.mask(6, 4)]),
        ShapeError,
        ValueError,
        r"expected a mask of shape \(4, 6\) for weights\[1\], got \(6, 4\)",
    ),
    Bad(
        "mask of another shape in apply",
        lambda d: apply_masks_([d.v, d.w], [d.v_mask, d.mask(24)]),
        ShapeError,
        ValueError,
        r"expected a mask of shape \(4, 6\) for weights\[1\], got \(24,\)",
    ),
    Bad(
        "bool tensor as mask",
        lambda d: prune_([d.v], sparsity=0.5, masks=[d.keep(d.v > 0)]),
        DTypeError,
        TypeError,
        r"expected a BitMask for weights\[0\], got Tensor; use BitMask.from_bool",
    ),
    Bad(
        "mask on another device",
        lambda d: prune_(
            [d.w, d.keep(torch.ones(8))],
            sparsity=0.5,
            masks=[d.w_mask, BitMask(torch.empty(1, dtype=torch.uint8, device="meta"), (8,))],
        ),
        LayoutError,
        ValueError,
        r"expected the mask of weights\[1\] on cpu, got meta; use mask.to",
    ),
    Bad(
        "meta tensor",
        lambda d: prune_(torch.ones(5, device="meta"), sparsity=0.5),
        LayoutError,
        ValueError,
        "expected weights in memory, got them on the meta device; load the model first",
    ),
    Bad(
        "two devices",
        lambda d: prune_([d.w, torch.ones(5, device="meta")], sparsity=0.5),
        LayoutError,
        ValueError,
        r"expected all weights on one device, got \['cpu', 'meta'\]",
    ),
    Bad(
        "transposed",
        lambda d: prune_([d.v, d.w.t()], sparsity=0.5),
        LayoutError,
        ValueError,
        r"expected a contiguous or channels_last tensor for weights\[1\] \(shape \(6, 4\)\), got strides \(1, 6\); "
        r"use .contiguous\(\)",
    ),
    Bad(
        "every second",
        lambda d: apply_masks_([d.v, d.w.view(-1)[::2]], [d.v_mask, d.mask(12)]),
        LayoutError,
        ValueError,
        "expected a contiguous or channels_last tensor",
    ),
    Bad(
        "expanded",
        lambda d: prune_([d.v, d.keep(torch.ones(1)).expand(9)], sparsity=0.5),
        LayoutError,
        ValueError,
        "expected a contiguous or channels_last tensor",
    ),
    Bad(
        "channels first",
        lambda d: prune_([d.v, d.keep(torch.ones(3, 2, 4, 4)).transpose(0, 1)], sparsity=0.5),
        LayoutError,
        ValueError,
        r"expected a contiguous or channels_last tensor for weights\[1\] .*, got strides \(16, 32, 4, 1\)",
    ),
    Bad(
        "strided array",
        lambda d: prune_([d.v, d.strided()], sparsity=0.5),
        LayoutError,
        ValueError,
        r"expected a C-contiguous array for weights\[1\], got strides \(24, 8\)",
    ),
    Bad(
        "sparse",
        lambda d: prune_([d.v, torch.eye(3).to_sparse()], sparsity=0.5),
        LayoutError,
        ValueError,
        r"got layout torch\.sparse_coo",
    ),
    Bad(
        "sparse rows",
        lambda d: prune_([d.v, torch.eye(3).to_sparse_csr()], sparsity=0.5),
        LayoutError,
        ValueError,
        r"got layout torch\.sparse_csr",
    ),
    Bad(
        "empty",
        lambda d: prune_([d.v, torch.empty(3, 0)], sparsity=0.5),
        ShapeError,
        ValueError,
        r"expected at least one weight in weights\[1\], got shape \(3, 0\); leave it out",
    ),
    Bad(
        "empty array",
        lambda d: magnitude_threshold(np.empty(0, dtype=np.float32), 0),
        ShapeError,
        ValueError,
        "expected at least one weight",
    ),
    Bad(
        "list of numbers",
        lambda d: prune_([d.v, [1.0, 2.0]], sparsity=0.5),
        DTypeError,
        TypeError,
        r"expected a torch.Tensor or numpy.ndarray for weights\[1\], got list",
    ),
    Bad(
        "dtypes in global scope",
        lambda d: prune_([d.w, d.keep(torch.ones(5).double())], sparsity=0.5, scope="global"),
        DTypeError,
        TypeError,
        r"expected one dtype for scope='global', got torch\.float32, torch\.float64",
    ),
    Bad(
        "unknown backend",
        lambda d: prune_(d.w, sparsity=0.5, backend="gpu"),
        BackendUnavailableError,
        RuntimeError,
        r"backend: expected one of \[.*'reference'.*\], got 'gpu'",
    ),
    Bad(
        "named",
        lambda d: prune_([d.w, d.v.t().int()], sparsity=0.5, names=["encoder.weight", "head.weight"]),
        DTypeError,
        TypeError,
        "for 'head.weight', got torch.int32",
    ),
]

CASES = WRITING + DTYPE_CASES + ARRAY_CASES + SPARSITY_CASES + COUNT_CASES + OTHER_CASES


@pytest.mark.parametrize("bad", CASES, ids=lambda bad: bad.name)
def test_bad_input_is_explained_and_changes_nothing(bad: Bad) -> None:
    desk = Desk()
    with pytest.raises(bad.error, match=bad.message) as caught:
        bad.call(desk)
    assert isinstance(caught.value, bad.builtin)
    desk.assert_unchanged()


@pytest.mark.parametrize("choice", ["scope", "nonfinite"])
def test_unknown_words_are_refused(choice: str) -> None:
    desk = Desk()
    with pytest.raises(ValueError, match=rf"prune_: expected {choice} to be one of \(.*\), got 'sometimes'"):
        prune_(desk.w, sparsity=0.5, **{choice: "sometimes"})
    desk.assert_unchanged()


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_nonfinite_weight_is_named_and_nothing_is_written(
    backend: str, device: torch.device, scope: str, value: float
) -> None:
    desk = Desk(device)
    weights = [desk.w, desk.with_value(value, 71), desk.v]
    masks = [desk.w_mask, desk.mask(100), desk.v_mask]
    with pytest.raises(NonFiniteError, match=r"got NaN or Inf in weights\[1\] at flat index 71; nothing") as caught:
        prune_(weights, sparsity=0.9, masks=masks, scope=scope, backend=backend)
    assert (caught.value.layer, caught.value.index) == (1, 71)
    assert isinstance(caught.value, ValueError)
    with pytest.raises(NonFiniteError, match=r"in 'b\.weight' at flat index 71"):
        prune_(weights, sparsity=0.9, scope=scope, names=["a", "b.weight", "c"], backend=backend)
    with pytest.raises(NonFiniteError, match="magnitude_threshold: expected finite weights"):
        magnitude_threshold(weights[1], 0, backend=backend)
    desk.assert_unchanged()


@pytest.mark.parametrize("index", [0, 7, 8, 16383, 16384, 40_000, 100_002])
def test_the_first_nonfinite_index_is_found_anywhere(backend: str, device: torch.device, index: int) -> None:
    weight = torch.ones(100_003, device=device)
    weight[index:] = torch.inf
    with pytest.raises(NonFiniteError) as caught:
        magnitude_threshold(weight, 5, backend=backend)
    assert (caught.value.layer, caught.value.index) == (0, index)
    pruned = BitMask.from_bool(torch.arange(weight.numel(), device=device) != index)
    if index + 1 < weight.numel():
        with pytest.raises(NonFiniteError, match=f"at flat index {index + 1};"):
            magnitude_threshold(weight, 5, mask=pruned, backend=backend)
    else:
        assert magnitude_threshold(weight, 5, mask=pruned, backend=backend).value == 1.0


@pytest.fixture
def dtensor() -> Iterator[DTensor]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    yield DTensor.from_local(torch.ones(4, 4), mesh)
    dist.destroy_process_group()


def test_a_shard_is_not_a_layer(dtensor: DTensor) -> None:
    desk = Desk()
    with pytest.raises(LayoutError, match=r"expected a plain tensor for weights\[1\], got a DTensor"):
        prune_([desk.w, dtensor], sparsity=0.5)
    desk.assert_unchanged()
    assert dtensor.to_local().tolist() == [[1.0] * 4] * 4
