"""Tensors and arrays that are no run of numbers in memory: refused by name, alone or among others, known or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.masked import masked_tensor
from wrapper_tensors import Codes

from gmp_kernels import (
    BitMask,
    DTypeError,
    GMPError,
    LayoutError,
    NonFiniteError,
    ShapeError,
    apply_masks_,
    checks,
    magnitude_threshold,
    prune_,
)
from gmp_kernels.backends.layouts import layouts_of
from gmp_kernels.optim import ema_update_
from gmp_kernels.tools.testing import assert_bitwise_equal

N = 64


def values() -> torch.Tensor:
    return torch.linspace(-1.0, 1.0, N)


def cut(size: int) -> torch.Tensor:
    tensor = values()
    tensor.untyped_storage().resize_(size)
    return tensor


def view_of_freed() -> torch.Tensor:
    tensor = torch.ones(2 * N)
    view = tensor[N:]
    tensor.untyped_storage().resize_(0)
    return view


def nested(layout: torch.layout) -> torch.Tensor:
    return torch.nested.nested_tensor([values(), values()], layout=layout)


REFUSED: list[tuple[str, Callable[[], object], type[GMPError], str]] = [
    ("negated view", lambda: torch._neg_view(values()), LayoutError, "a view that negates; use .resolve_neg()"),
    ("conjugate", lambda: torch.zeros(N, dtype=torch.complex64).conj(), DTypeError, "prune its torch.view_as_real"),
    ("wrapper", lambda: Codes(values()), LayoutError, "got a Codes, which keeps its values elsewhere; prune before"),
    (
        "wrapper in a parameter",
        lambda: torch.nn.Parameter(Codes(values()), requires_grad=False),
        LayoutError,
        "got a Codes, which keeps its values elsewhere",
    ),
    ("fake", lambda: FakeTensorMode().from_tensor(values()), LayoutError, "got a FakeTensor, which keeps"),
    ("functional", lambda: torch._to_functional_tensor(values()), LayoutError, "got one inside a function transform"),
    ("masked tensor", lambda: masked_tensor(values(), values() > 0), LayoutError, "got a MaskedTensor, which keeps"),
    ("sparse", lambda: values().to_sparse(), LayoutError, "a dense tensor for .*, got layout torch.sparse_coo"),
    ("mkldnn", lambda: values().to_mkldnn(), LayoutError, "a dense tensor for .*, got layout torch._mkldnn"),
    ("nested", lambda: nested(torch.strided), LayoutError, "a dense tensor for .*, got a nested one"),
    ("jagged", lambda: nested(torch.jagged), LayoutError, "a dense tensor for .*, got a nested one"),
    (
        "quantized",
        lambda: torch.quantize_per_tensor(values(), 0.1, 0, torch.qint8),
        DTypeError,
        "got torch.qint8; prune before quantizing",
    ),
    ("lazy", torch.nn.UninitializedParameter, LayoutError, "got a lazy parameter; run the model on a batch first"),
    (
        "expanded",
        lambda: torch.ones(1).expand(N),
        LayoutError,
        r"a contiguous or channels_last tensor for .*, got strides \(0,\)",
    ),
    ("overlapping", lambda: values().as_strided((8, 8), (1, 1)), LayoutError, "a contiguous or channels_last tensor"),
    ("freed", lambda: cut(0), LayoutError, "in memory, got a tensor whose storage was freed or cut"),
    ("cut", lambda: cut(16), LayoutError, "in memory, got a tensor whose storage was freed or cut"),
    ("view of freed memory", view_of_freed, LayoutError, "in memory, got a tensor whose storage was freed or cut"),
    ("empty", lambda: torch.empty(0, 3), ShapeError, r"at least one weight in .*, got shape \(0, 3\)"),
    ("masked array", lambda: np.ma.masked_less(values().numpy(), 0), LayoutError, "a plain array .*got a masked one"),
    ("bytes swapped", lambda: values().numpy().astype(">f4"), DTypeError, "in native byte order"),
    ("records", lambda: np.zeros(N, dtype=[("a", np.float32)]), DTypeError, "expected float32, float64 or float16"),
    ("numpy scalar", lambda: np.float32(1.0), DTypeError, "torch.Tensor or numpy.ndarray for .*, got float32"),
]


@pytest.mark.parametrize(("make", "error", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_one_that_is_refused_leaves_the_others_alone(
    host_backend: str, make: Callable[[], object], error: type[GMPError], message: str
) -> None:
    others = [values() + i for i in range(9)]
    for others_known in (False, True):
        if others_known:
            prune_([other.clone() for other in others], sparsity=0.5, backend=host_backend)
        before = [other.clone() for other in others]
        weights = [*others[:4], make(), *others[4:]]
        masks = [BitMask.from_bool(torch.arange(N) % 2 == 0) for _ in weights]
        bits = [mask.clone() for mask in masks]
        for _ in range(2):  # nor is it known the second time
            with pytest.raises(error, match=message):
                prune_(weights, sparsity=0.5, backend=host_backend)
            with pytest.raises(error, match=message):
                prune_(weights, sparsity=0.5, scope="global", masks=masks, backend=host_backend)
            with pytest.raises(error, match=message):
                apply_masks_(weights, masks, backend=host_backend)
            with pytest.raises(error, match=message):
                magnitude_threshold(weights[4], 3, backend=host_backend)
        for other, was in zip(others, before, strict=True):
            assert_bitwise_equal(other, was)
        assert masks == bits


class Named(torch.Tensor):
    """A subclass whose values are its own memory."""


def of_inference() -> torch.Tensor:
    with torch.inference_mode():
        return values()


TAKEN: dict[str, Callable[[], torch.Tensor | np.ndarray]] = {
    "subclass": lambda: values().as_subclass(Named),
    "buffer": lambda: torch.nn.Buffer(values()),
    "leaf with a gradient": lambda: values().requires_grad_(),
    "inference tensor": of_inference,
    "shared between processes": lambda: values().share_memory_(),
    "0 dimensions": lambda: values()[3],
    "stride 0 of one row": lambda: values().as_strided((1, N), (0, 1)),
    "real view of a complex one": lambda: torch.view_as_real(torch.complex(values(), values())),
    "matrix": lambda: np.matrix(values().numpy()),
    "between two addresses": lambda: np.frombuffer(bytearray(4 * N + 1), dtype=np.float32, offset=1),
}


@pytest.mark.parametrize("make", TAKEN.values(), ids=TAKEN)
def test_what_has_plain_memory_is_pruned_in_place(make: Callable[[], torch.Tensor | np.ndarray]) -> None:
    weight = make()
    plain = torch.as_tensor(np.array(weight) if isinstance(weight, np.ndarray) else weight.detach().clone())
    expected = prune_(plain, sparsity=1.0, backend="reference")
    assert prune_(weight, sparsity=1.0).num_pruned == expected.num_pruned
    assert not (weight.any() if isinstance(weight, np.ndarray) else weight.detach().any())


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_file_in_memory_is_written_only_where_it_may_be(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "weights"
    path.write_bytes(values().numpy().tobytes())
    mapped = np.memmap(path, dtype=np.float32, mode=mode)
    if mode == "r":
        with pytest.raises(LayoutError, match="a read-only one; copy it"):
            prune_(mapped, sparsity=0.5)
        assert path.read_bytes() == values().numpy().tobytes()
    else:
        prune_(mapped, sparsity=0.5)
        mapped.flush()
        assert np.fromfile(path, dtype=np.float32).tolist() == mapped.tolist() and (mapped == 0).sum() == N // 2


def test_a_negated_view_of_what_is_known_is_refused_too() -> None:
    weight = values()
    prune_(weight, num_prune=3)
    with pytest.raises(LayoutError, match="a view that negates"):
        prune_(torch._neg_view(weight), num_prune=5)
    assert int((weight == 0).sum()) == 3


def test_memory_that_was_cut_where_a_whole_weight_was_known_is_refused() -> None:
    checks.forget()
    weight = values()
    prune_(weight, num_prune=3)
    (known,) = [facts for (_, _, address), facts in checks._known.items() if address == weight.data_ptr()]
    again = torch.empty(N)
    again.untyped_storage().resize_(16)
    # As the allocator may, by chance, place what is cut: the same address as the weight's.
    place = layouts_of([again], True)
    checks._known["weights and masks", 1, again.data_ptr()] = known._replace(signature=[place, *known.signature[1:]])
    with pytest.raises(LayoutError, match="whose storage was freed or cut"):
        prune_(again, num_prune=3)


def test_bits_that_were_cut_where_those_of_a_whole_mask_were_known_are_refused() -> None:
    checks.forget()
    weight, mask = values(), BitMask.ones((N,))
    prune_(weight, num_prune=3, masks=mask)
    (known,) = [facts for (_, _, address), facts in checks._known.items() if address == weight.data_ptr()]
    mask.packed.untyped_storage().resize_(1)
    place = layouts_of([weight, mask.packed], True)
    checks._known["weights and masks", 1, weight.data_ptr()] = known._replace(signature=[place, *known.signature[1:]])
    with pytest.raises(ShapeError, match="contiguous bytes as the mask"):
        prune_(weight, num_prune=5, masks=mask)
    assert int((weight == 0).sum()) == 3


def average_of(*averages: object) -> None:
    ema_update_(averages, [torch.ones(N) for _ in averages], 0.5)  # type: ignore[arg-type]


def test_averages_that_cannot_be_written_are_refused_before_any_is() -> None:
    average, frozen = values(), values().numpy()
    frozen.flags.writeable = False
    for others, message in [
        ([frozen], r"a writable array for 'averages\[1\]', got a read-only one"),
        ([average], r"share no memory, but those of 'averages\[0\]' and 'averages\[1\]' overlap"),
        ([Codes(values())], r"a plain tensor for 'averages\[1\]', got a Codes"),
    ]:
        with pytest.raises(LayoutError, match=message):
            average_of(average, *others)
        assert_bitwise_equal(average, values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_subnormal_weights_are_ranked_where_the_cpu_flushes_them(dtype: torch.dtype, num_threads: int) -> None:
    """torch.set_flush_denormal holds for the thread that calls, and stays as it was."""
    smallest = torch.finfo(dtype).smallest_normal
    weight = torch.arange(1, 40_001).to(torch.float64).mul(smallest / 50_000).to(dtype)
    expected = weight.clone()
    wanted = prune_(expected, sparsity=0.5, backend="reference")
    tiny = torch.tensor([smallest], dtype=dtype)
    torch.set_flush_denormal(True)
    try:
        found = prune_(weight, sparsity=0.5, backend="cpu")
        flushes = not (tiny * 0.5).any()
    finally:
        torch.set_flush_denormal(False)
    assert flushes and found.masks[0] == wanted.masks[0] and found.thresholds == wanted.thresholds
    assert_bitwise_equal(weight, expected)


def test_nan_written_behind_torchs_back_is_found(backend: str, device: torch.device) -> None:
    """Writes through ``.data`` count no version, and the tensors are known from the call before."""
    weights = [values().to(device), values().to(device)]
    masks = [BitMask.ones(weight.shape, device) for weight in weights]
    prune_(weights, sparsity=0.25, masks=masks, backend=backend)
    weights[1].data[N - 1] = torch.nan
    before, bits = [weight.clone() for weight in weights], [mask.clone() for mask in masks]
    with pytest.raises(NonFiniteError, match=rf"NaN or Inf in weights\[1\] at flat index {N - 1}") as caught:
        prune_(weights, sparsity=0.5, masks=masks, backend=backend)
    assert (caught.value.layer, caught.value.index) == (1, N - 1)
    for weight, was in zip(weights, before, strict=True):
        assert_bitwise_equal(weight, was)
    assert masks == bits
