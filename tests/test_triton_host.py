"""The host's part of Triton operations: few torch operations, no waits, little memory, and no part in a CUDA graph."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from optim_cases import parameters
from torch.utils._python_dispatch import TorchDispatchMode

from gmp_kernels import BitMask, CaptureError, apply_masks_, prune_
from gmp_kernels.backends import choose, compactions, devices, triton
from gmp_kernels.backends.layers import Layers
from gmp_kernels.backends.triton import Triton
from gmp_kernels.backends.triton import tables as triton_tables
from gmp_kernels.backends.types import (
    BracketCounts,
    Brackets,
    Constants,
    Cutoffs,
    Layer,
    Selection,
    UpdateBatch,
    UpdateTensor,
)
from gmp_kernels.optim import AdamW, clip_grad_norm_, ema_update_
from gmp_kernels.patterns import NM, Block, Pattern, Unstructured
from gmp_kernels.search.driver import select_with
from gmp_kernels.tools.testing import DTYPES, assert_bitwise_equal, device_of

DEVICE = device_of("triton")


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> Triton:
    """A backend whose launches do nothing."""
    monkeypatch.setattr(Triton, "_launch", lambda *args, **constants: None)
    return Triton()


def layers_of(*sizes: int, dtype: torch.dtype = torch.float32) -> list[Layer]:
    """Layers that nobody reads or writes, with masks."""
    return [
        Layer(torch.empty(n, dtype=dtype, device=DEVICE), torch.empty((n + 7) // 8, dtype=torch.uint8, device=DEVICE))
        for n in sizes
    ]


def batch_of(layers: list[Layer]) -> UpdateBatch:
    return UpdateBatch([UpdateTensor(layer.weight, mask=layer.mask) for layer in layers])


class Operations(TorchDispatchMode):
    """Names of the torch operations that run in it, and the most bytes that tensors made in it held at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.bytes = self.peak = 0
        self._storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            storage = result.untyped_storage()
            if storage.data_ptr() and storage._cdata not in self._storages and not func.is_view:
                self._storages.add(storage._cdata)
                self.bytes += storage.nbytes()
                self.peak = max(self.peak, self.bytes)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return result

    def _free(self, key: int, nbytes: int) -> None:
        self._storages.discard(key)
        self.bytes -= nbytes


def cutoffs_of(layers: list[Layer]) -> Selection:
    return Selection(Cutoffs.of([(1, 0, 0, 0, 0, -1)] * len(layers)))


def test_an_operation_is_few_torch_operations_whatever_the_number_of_layers(idle: Triton) -> None:
    counts = []
    for number in (2, 60):
        layers = layers_of(*[100] * number)
        for _ in range(2):
            with Operations() as counting:
                idle.count(layers, Brackets.of([1] * number, [5] * number), 4)
            with Operations() as pruning:
                idle.prune(layers, cutoffs_of(layers), [layer.mask for layer in layers], finite=True)
        counts.append((len(counting.names), len(pruning.names)))
    assert counts[0] == counts[1] <= (8, 8)


def test_a_step_of_plain_numbers_is_no_torch_operation_but_its_uploads(idle: Triton) -> None:
    layers = layers_of(*[100] * 60)
    batch, gradients = batch_of(layers), [torch.empty_like(layer.weight) for layer in layers]
    arguments = (batch, gradients, [0] * 60)
    idle.update("sgd", *arguments, Constants([({"lr": 0.1}, 1)], []))
    with Operations() as operations:
        idle.update("sgd", *arguments, Constants([({"lr": 0.1}, 1)], []))
    assert operations.names == []


@pytest.mark.parametrize("pattern", [NM(2, 4), Block(2, 4), Unstructured(min_kept_per_row=3)], ids=str)
def test_patterns_are_few_torch_operations_and_little_memory(idle: Triton, pattern: Pattern) -> None:
    counts = []
    for number in (2, 60):
        weights = [torch.empty(64, 512, dtype=torch.bfloat16, device=DEVICE) for _ in range(number)]
        n = sum(weight.numel() for weight in weights)
        layers = Layers(weights, None, None, [pattern] * number)
        out = [torch.empty(weight.numel() // 8, dtype=torch.uint8, device=DEVICE) for weight in weights]
        cutoffs = cutoffs_of(list(layers))
        for _ in range(2):
            with Operations() as ranking:
                ranked = idle.ranked(layers)
            with Operations() as pruning:
                idle.prune(layers, cutoffs, out, finite=True)
        bits = sum(layer.mask.nbytes for layer in ranked if layer.mask is not None)
        sums = sum(layer.weight.nbytes for layer in ranked) if pattern.unit > 1 else 0
        assert (bits, sums) == (n // 8 // pattern.unit, 4 * n // 8 if pattern.unit > 1 else 0)
        of_rows = 16 * 64 * number if pattern == Unstructured(min_kept_per_row=3) else 0
        assert bits + sums <= ranking.peak <= bits + sums + of_rows + 20_000
        assert pruning.peak <= sums + of_rows + 20_000
        # A view of each weight is part of its layer.
        counts.append((len(ranking.names) - ranking.names.count("aten.detach.default"), len(pruning.names)))
    assert counts[0] == counts[1] <= (5, 5)


@contextmanager
def _unwatched() -> Iterator[None]:
    with torch.utils._python_dispatch._disable_current_modes():
        yield


def test_numbers_go_to_the_device_by_uploads_alone(idle: Triton, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy from memory that is not pinned waits for the device, and a graph cannot hold it."""
    upload = triton_tables.upload

    def unwatched(*args: Any) -> torch.Tensor:
        with _unwatched():
            return upload(*args)

    for module in (triton, triton_tables, compactions):
        monkeypatch.setattr(module, "upload", unwatched)
    layers = layers_of(100, 3) + layers_of(50, dtype=torch.bfloat16)
    on_device = [("skip", 0, 2, torch.zeros((), dtype=torch.float64, device=DEVICE))]
    with Operations() as operations:
        torch.tensor([1], device=DEVICE)
        pageable = set(operations.names)  # what such a copy is made of
        operations.names.clear()
        idle.prune(layers, cutoffs_of(layers), [layer.mask for layer in layers])
        idle.apply(layers)
        idle.count(layers, Brackets.of([1] * 3, [5] * 3), 4)
        idle.compactions([(layer.mask, layer.weight.numel()) for layer in layers])
        idle.sum_squares(layers)
        idle.update(
            "sgd", batch_of(layers), [layer.weight for layer in layers], [0, 1, 1], Constants([({}, 2)], on_device)
        )
    assert pageable
    assert not pageable & set(operations.names)


class Unseen(torch.Tensor):
    """A tensor on a device that is busy: whoever looks at it waits."""

    def _refuse(self, *_: Any) -> Any:
        raise AssertionError("waited for the device")

    item = tolist = cpu = numpy = __float__ = __int__ = __bool__ = __index__ = _refuse


def test_nothing_is_read_back_but_the_result(idle: Triton, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = layers_of(100, 3) + layers_of(50, dtype=torch.bfloat16)
    readbacks = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: (readbacks.append(tensor.shape), cpu(tensor))[1])
    for name in ("item", "tolist", "__float__", "__int__", "__bool__", "numpy"):
        look = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda t, look=look: look(t) if readbacks else Unseen._refuse(t))
    idle.apply(layers)
    idle.sum_squares(layers)
    idle.update("sgd", batch_of(layers), [layer.weight for layer in layers], [0] * 3, Constants([({}, 1)], []))
    assert readbacks == []
    idle.prune(layers, cutoffs_of(layers), [layer.mask for layer in layers], finite=True)
    idle.count(layers, Brackets.of([1] * 3, [5] * 3), 4)
    assert len(readbacks) == 4  # one of each operation and dtype


@pytest.mark.parametrize("skip", [0.0, 1.0])
def test_constants_on_the_device_are_taken_without_a_look(skip: float) -> None:
    given = {"lr": 0.25, "momentum": 0.5, "grad_factor": -2.0}
    runs = []
    for on_device in (False, True):
        backend = choose("triton", DEVICE)
        params = parameters([(40,), (9,), (3,)], device=DEVICE)
        gradients = [torch.ones_like(p) for p in params]
        state = [torch.ones_like(p) for p in params]
        batch = UpdateBatch([UpdateTensor(p.detach(), state=(s,)) for p, s in zip(params, state, strict=True)])
        if on_device:
            values = {"lr": torch.tensor([9.0, 0.25, 0.25]).double(), "skip": torch.tensor(skip).double()}
            rest = {name: value for name, value in given.items() if name != "lr"}
            columns = [
                (name, 0, 3, torch.Tensor._make_subclass(Unseen, value.to(DEVICE))) for name, value in values.items()
            ]
            constants = Constants([(rest | {"lr": 9.0}, 1), (rest, 2)], columns)
        else:
            constants = Constants([(given | {"lr": 9.0, "skip": skip}, 1), (given | {"skip": skip}, 2)], [])
        before = [p.detach().clone() for p in params]
        for _ in range(2):
            backend.update("sgd", batch, gradients, [2, 1, 0], constants)
        assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True)) == bool(skip)
        runs.append([*params, *state])
    for looked_at, unseen in zip(*runs, strict=True):
        assert_bitwise_equal(unseen, looked_at)


def test_squares_are_summed_to_a_tensor_on_the_device() -> None:
    """A number would have waited for it."""
    layers = [
        Layer(torch.full((n,), 2.0, dtype=dtype, device=DEVICE), None)
        for n, dtype in ((5, torch.float32), (3, torch.float16))
    ]
    total = choose("triton", DEVICE).sum_squares(layers)
    assert isinstance(total, torch.Tensor)
    assert (total.device, total.dtype, total.shape, total.item()) == (DEVICE, torch.float64, (), 32.0)


@pytest.mark.parametrize(
    "sizes",
    [[2**24], [2**28], [2**20] * 40, [20_000] * 1000, [64] * 10_000, [2**16] * 291, [2**26, *[2**25] * 60]],
    ids=["one", "large", "forty", "thousand", "tiny", "many", "language_model"],
)
@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.bfloat16,), DTYPES], ids=str)
def test_a_selection_stays_within_its_memory(
    idle: Triton, monkeypatch: pytest.MonkeyPatch, sizes: list[int], dtypes: tuple[torch.dtype, ...]
) -> None:
    monkeypatch.setattr(triton_tables, "BLOCK", 2048)  # as on a GPU, where chunks are many
    layers = [layer for i, n in enumerate(sizes) for layer in layers_of(n, dtype=dtypes[i % len(dtypes)])]
    counted: list[int] = []

    def count(given: list[Layer], brackets: Brackets, num_bins: int, places: Any = None) -> BracketCounts:
        """One weight of each layer is found inside, in the first bin."""
        found = Triton.count(idle, given, brackets, num_bins, places)
        counted.append(num_bins)
        found.inside[:], found.bins[:, 0] = 1, 1
        return found

    monkeypatch.setattr(idle, "count", count, raising=False)
    for scope in ("layer", "global") if len(dtypes) == 1 else ("layer",):
        group_sizes = [len(layers)] if scope == "global" else [1] * len(layers)
        with Operations() as operations:
            select_with(idle)(layers, [1] * len(group_sizes), group_sizes)
            idle.prune(layers, cutoffs_of(layers), [layer.mask for layer in layers], finite=True)
        assert counted and operations.peak > 1e4
        assert operations.peak <= 0.05 * max(layer.weight.nbytes for layer in layers) + 4_000_000
        counted.clear()


def test_no_operation_lets_itself_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tables are made on the host, which a replay leaves out: it would go on with those of the capture."""
    params = parameters([(40,)], device=DEVICE)
    mask = BitMask.from_bool(torch.arange(40, device=DEVICE) % 2 == 0)
    params[0].grad = torch.ones(40, device=DEVICE)
    optimizer = AdamW(params, backend="triton")
    optimizer.step()
    weight, before = params[0].detach(), params[0].detach().clone()
    operations: dict[str, Callable[[], object]] = {
        "count": lambda: prune_(weight, sparsity=0.5, masks=mask, backend="triton"),
        "ranked": lambda: prune_(weight.view(5, 8), sparsity=0.25, pattern=NM(2, 4), backend="triton"),
        "apply_masks_": lambda: apply_masks_(weight, mask, backend="triton"),
        "sum_squares": lambda: clip_grad_norm_(params, 1.0, backend="triton"),
        "update": lambda: ema_update_([weight], [params[0].grad], 0.5, backend="triton"),
        "AdamW": optimizer.step,
    }
    monkeypatch.setattr(devices, "is_capturing", lambda device: True)
    for name, operation in operations.items():
        with pytest.raises(CaptureError, match=name):
            operation()
    assert_bitwise_equal(weight, before)
