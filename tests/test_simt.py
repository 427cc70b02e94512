"""The CUDA kernels on the host execution layer: any schedule gives the same bits; and the layer finds what it must."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import simt_extension
from optim_cases import assert_same_run, masked, parameters, random_gradients, random_masks, set_gradients
from subprocesses import ROOT

from gmp_kernels import BitMask, DeviceError, NonFiniteError, StateError, magnitude_threshold, prune_
from gmp_kernels.backends import choose, cuda
from gmp_kernels.backends.cuda.selection_tables import SelectionTables
from gmp_kernels.backends.devices import on_device
from gmp_kernels.backends.keys import key_of, largest_key
from gmp_kernels.backends.types import Brackets, Layer, StateMove
from gmp_kernels.backends.uploads import put
from gmp_kernels.optim import AdamW
from gmp_kernels.search.driver import select_with
from gmp_kernels.tools.testing import DTYPES, adversarial_cases, assert_bitwise_equal, assert_same_pruning, device_of

_simt = simt_extension()
SIMT = ROOT / "csrc/simt"


@pytest.fixture(params=[1, 2, 3])
def shuffled(request: pytest.FixtureRequest) -> Iterator[None]:
    """Blocks and threads run in an order of this seed, and stop in between."""
    _simt.set_seed(request.param)
    yield
    _simt.set_seed(0)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_order_of_blocks_and_threads_gives_the_same_masks(shuffled: None, dtype: torch.dtype, scope: str) -> None:
    for name in ("random", "small_integers", "constant"):
        layers = [adversarial_cases(n, dtype)[name] for n in (7, 40_000, 1, 20_011)]
        # In another memory format, with the cut in a filter that is larger than a chunk.
        layers.append(adversarial_cases(36_000, dtype)[name].view(2, 3, 3, 2000).movedim(-1, 1))
        assert_same_pruning(layers, backend="simt", sparsity=0.7, scope=scope)


def test_any_order_gives_the_same_steps(shuffled: None) -> None:
    runs = []
    for backend in ("simt", "cpu"):
        params = parameters([(40_000,), *[(300,)] * 20])
        # So many that blocks go on from one to the next, with other constants.
        groups = [{"params": [p], "lr": 0.01 * (1 + i)} for i, p in enumerate(params)]
        optimizer = AdamW(groups, compact_state=True, backend=backend)
        for step in range(3):
            masks = random_masks(params[:1], 0.6, seed=step)
            optimizer.set_masks(masks)
            set_gradients(params, random_gradients(params, step), masks)
            optimizer.step()
        runs.append((params, optimizer))
    (params, optimizer), (expected_params, expected) = runs
    assert_same_run(params, optimizer, expected_params, expected)


@pytest.mark.parametrize("case", ["random", "constant"])
def test_any_order_gives_the_same_counts(shuffled: None, case: str) -> None:
    simt, oracle = (choose(name, torch.device("cpu")) for name in ("simt", "reference"))
    layers = tuple(Layer(adversarial_cases(n, torch.float32)[case], None) for n in (50_000, 170_000))
    brackets = Brackets.of([key_of(0.5, torch.float32), 0], [key_of(0.6, torch.float32), largest_key(torch.float32)])
    for own in (brackets, Brackets(*(ends[::-1] for ends in brackets))):
        found, expected = (b.count(layers, own, 64) for b in (simt, oracle))
        for column, right in zip(found, expected, strict=True):
            assert np.array_equal(column, right)
    for num_prune, sizes in (([60_000], [2]), ([30_000, 30_000], [1, 1])):
        along, expected = (b.select(layers, num_prune, sizes).cutoffs for b in (simt, oracle))
        assert along[:4] == expected[:4]
    assert float(simt.sum_squares(layers)) == pytest.approx(oracle.sum_squares(layers), rel=1e-12)


FAULTS = {
    # Threads read what their neighbour has yet to write.
    "race": """
__shared__ int values[64];
values[threadIdx.x] = 0;
__syncthreads();
values[threadIdx.x] = static_cast<int>(threadIdx.x) + 1;
BARRIER
result[threadIdx.x] = values[63 - threadIdx.x];
""",
    # Half of the block waits for the other half.
    "deadlock": "if (threadIdx.x < 32) __syncthreads(); else __syncwarp(), simt::exchange(0); if (threadIdx.x == 40) "
    "while (true) __syncthreads();",
}
PROGRAM = """
#include <cstdio>
#include <exception>
#include "simt.h"
int main(int argc, char**) {{
  int result[64] = {{}};
  for (unsigned seed = 0; seed < 20; ++seed) {{
    simt::set_seed(seed);
    try {{
      simt::launch("kernel", 1, 64, [&] {{ {body} }});
    }} catch (const std::exception& error) {{
      std::printf("%s\\n", error.what());
      return 0;
    }}
    for (int t = 0; t < 64; ++t) if (result[t] != 64 - t) {{ std::printf("wrong\\n"); return 0; }}
  }}
  std::printf("right\\n");
}}
"""


def output_of(body: str, scratch: Path) -> str:
    (scratch / "main.cpp").write_text(PROGRAM.format(body=body))
    program = scratch / "main"
    sources = [scratch / "main.cpp", SIMT / "simt.cpp"]
    subprocess.run(["g++", "-std=c++17", "-O1", "-fopenmp", f"-I{SIMT}", *sources, "-o", program], check=True)
    return subprocess.run([program], capture_output=True, text=True, check=True, timeout=60).stdout.strip()


def test_a_barrier_that_is_missing_shows(tmp_path: Path) -> None:
    assert output_of(FAULTS["race"].replace("BARRIER", "__syncthreads();"), tmp_path) == "right"
    assert output_of(FAULTS["race"].replace("BARRIER", ""), tmp_path) == "wrong"


def test_a_block_that_cannot_go_on_is_an_error(tmp_path: Path) -> None:
    assert output_of("if (threadIdx.x % 2) __syncwarp();", tmp_path).startswith("kernel: a block cannot go on")


def traffic_of(run: Callable[[], object]) -> tuple[int, float]:
    """Launches, and bytes loaded and stored by them."""
    _simt.take_traffic()
    run()
    rows = [row for row in _simt.take_traffic() if "store<" not in row[0]]  # uploads, which read no weights
    return sum(row[1] for row in rows), sum(row[2] + row[3] for row in rows)


N = 1 << 18


@pytest.mark.parametrize(("dtype", "launches"), [(torch.float32, 7), (torch.bfloat16, 5), (torch.float64, 10)], ids=str)
def test_a_selection_reads_the_weights_once(dtype: torch.dtype, launches: int) -> None:
    weight = torch.randn(N, generator=torch.Generator().manual_seed(0)).to(dtype)
    for share in (0.1, 0.5, 0.9, 0.99):
        found, moved = traffic_of(partial(magnitude_threshold, weight, round(share * N), backend="simt"))
        assert found == launches
        # The weights, a sample of them, and lists of candidates that are written once and read twice or thrice.
        assert weight.nbytes <= moved < 1.25 * weight.nbytes


def test_a_hint_that_holds_spares_the_sample() -> None:
    weight = torch.randn(N, generator=torch.Generator().manual_seed(0))
    hint = magnitude_threshold(weight, N // 2, backend="simt")
    _, moved = traffic_of(lambda: magnitude_threshold(weight, N // 2 + N // 2000, previous=hint, backend="simt"))
    _, sampled = traffic_of(lambda: magnitude_threshold(weight, N // 2 + N // 2000, backend="simt"))
    assert weight.nbytes <= moved < sampled - weight.nbytes / 16


@pytest.mark.parametrize(("dtype", "launches"), [(torch.float32, 8), (torch.bfloat16, 6), (torch.float64, 11)], ids=str)
def test_many_layers_take_no_more_launches_than_one(dtype: torch.dtype, launches: int) -> None:
    layers = [torch.randn(n).to(dtype) for n in (3, 1000, 70_000, 16384, 5) * 20]
    assert traffic_of(lambda: prune_(layers, sparsity=0.5, backend="simt"))[0] == launches <= 12


def test_a_prune_update_reads_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    read = SelectionTables.read

    def counting(tables: SelectionTables) -> npt.NDArray[Any]:
        if tables._read is None:
            reads.append(len(_simt.take_traffic()))
        return read(tables)

    monkeypatch.setattr(SelectionTables, "read", counting)
    _simt.take_traffic()
    prune_([torch.randn(1000), torch.randn(70)], sparsity=0.5, backend="simt")
    assert reads == [5]  # store, begin, count, ties and apply have been launched by then


def test_selections_that_were_looked_at_are_counted_when_they_are_applied(kernels: str) -> None:
    backend, weights = choose(kernels, device_of(kernels)), [torch.randn(n, device=device_of(kernels)) for n in (50, 9)]
    layers = [Layer(weight, BitMask.ones(weight.shape, weight.device).packed) for weight in weights]
    chosen = select_with(backend)(layers, [20, 5], [1, 1], prunes=True)
    assert [below + ties - kept for _, below, ties, kept, *_ in zip(*chosen.cutoffs, strict=True)] == [20, 5]
    assert backend.prune(layers, chosen, [layer.mask for layer in layers]) == ([20, 5], [20, 5])


def test_a_nan_in_any_layer_of_any_dtype_leaves_all_as_they_were() -> None:
    layers = [torch.randn(40_000), torch.randn(500).bfloat16(), torch.randn(20_000)]
    layers[1][77] = float("nan")
    masks = [BitMask.ones(layer.shape) for layer in layers]
    before = [layer.clone() for layer in layers]
    for given in (masks, None):
        with pytest.raises(NonFiniteError, match=r"weights\[1\] at flat index 77"):
            prune_(layers, sparsity=0.5, masks=given, backend="simt")
        for layer, was, mask in zip(layers, before, masks, strict=True):
            assert_bitwise_equal(layer, was)
            assert mask.num_kept == mask.numel


def workspace_of(layers: list[Layer]) -> int:
    tables = SelectionTables(_simt, 132, layers, [1] * len(layers), prunes=True)
    return tables.filled(_simt.launch_on(0, 0, 132), layers, [1] * len(layers)).buffer.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_workspace_keeps_to_the_memory_promised(dtype: torch.dtype) -> None:
    for sizes in ([2**24], [2**20] * 40, [20_000] * 1000, [2**22, *[50] * 500]):
        for share in (0, 8):  # without masks, and with them
            layers = [
                Layer(torch.empty(n, dtype=dtype), torch.empty(-(-n // 8), dtype=torch.uint8) if share else None)
                for n in sizes
            ]
            # Less than the 4 MB promised, of which torch's allocator takes some.
            assert workspace_of(layers) <= 0.05 * max(layer.weight.nbytes for layer in layers) + 3 * 2**20


def test_layers_of_several_dtypes_share_the_memory_promised() -> None:
    for number in (1, 200, 396):
        layers = [Layer(torch.empty(16384, dtype=dtype), None) for dtype in DTYPES for _ in range(number)]
        assert workspace_of(layers) <= 0.05 * 16384 * 8 + 3 * 2**20


def test_apply_writes_only_what_changes() -> None:
    weight = torch.randn(N, generator=torch.Generator().manual_seed(0))
    masks = prune_(weight, sparsity=0.9, backend="simt").masks
    _, again = traffic_of(lambda: prune_(weight, sparsity=0.9, masks=masks, backend="simt"))
    # Nothing is left to prune: selection reads all to see that, and apply next to nothing.
    assert 4 * N < again < 5.4 * N


def test_chunk_offsets_of_many_masks_come_in_one_call() -> None:
    """Whatever their sizes and addresses; those without weights among them."""
    simt = choose("simt", torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    sizes = [0, 5, 16384, 300 * 16384 + 3, 8, 2 * 16384 - 1, 0, 70_000]
    kept = [torch.rand(n, generator=generator) < 0.3 for n in sizes]
    for offset in (0, 1):
        masks = []
        for bits in kept:
            packed = BitMask.from_bool(bits).packed if bits.numel() else torch.empty(0, dtype=torch.uint8)
            guarded = torch.full((packed.numel() + 16,), 255, dtype=torch.uint8)
            view = guarded[offset : offset + packed.numel()]
            view.copy_(packed)
            masks.append((view, bits.numel()))
        for bits, (mask, _), found in zip(kept, masks, simt.compactions(masks), strict=True):
            chunks = [int(chunk.sum()) for chunk in bits.split(16384)] if bits.numel() else []
            assert found.chunk_offsets.tolist() == [0, *itertools.accumulate(chunks)]
            assert found.mask is mask and found.num_kept == int(bits.sum())


def test_constants_as_arguments_or_from_a_table_give_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    most = _simt.MAX_ARGUMENT_CONSTANTS
    uploads = []
    monkeypatch.setattr(cuda, "put", lambda *args: uploads.append(args) or put(*args))
    for groups in (1, most, most + 1):
        runs = []
        for backend in ("simt", "cpu"):
            params = parameters([(300 + i,) for i in range(groups)])
            optimizer = AdamW([{"params": [p], "lr": 0.01 * (1 + i)} for i, p in enumerate(params)], backend=backend)
            for _ in range(2):
                set_gradients(params, random_gradients(params, 0), {})
                optimizer.step()
            runs.append((params, optimizer))
        (params, optimizer), (expected_params, expected) = runs
        assert_same_run(params, optimizer, expected_params, expected)
        # Rows once for other gradients; constants change with every step, and only those that do not fit go in a table.
        assert sum(table.dtype is torch.float64 for *_, table in uploads) == (2 if groups > most else 0)


def test_constants_that_are_no_rows_are_refused() -> None:
    launch = _simt.launch_on(0, 0, 4)
    for values in (b"", b"1234", bytes(8 * len(_simt.CONSTANTS) * (_simt.MAX_ARGUMENT_CONSTANTS + 1))):
        with pytest.raises(ValueError, match="expected 1 to 8 rows of constants"):
            _simt.update(launch, "adam", 0, [(0, 0, 0, 0, 0)], 0, values)


def test_a_step_over_dead_weights_reads_the_mask_only() -> None:
    parameter = torch.nn.Parameter(torch.randn(N))
    parameter.grad = torch.randn(N)
    optimizer = AdamW([parameter], backend="simt")
    optimizer.step()
    dense = traffic_of(optimizer.step)
    assert dense == (1, 28 * N)
    optimizer.set_masks({parameter: BitMask.from_bool(torch.arange(N) < N // 4)})
    _, moved = traffic_of(optimizer.step)
    assert moved == 28 * N // 4 + N // 8


@pytest.mark.parametrize("case", ["nesterov", "adam_short_betas", "adamw_amsgrad"])
def test_numbers_kept_on_the_device_give_the_same_steps(case: str) -> None:
    """With capturable, step counts, scale and overflow flag are tensors that nobody on the host looks at."""
    runs = []
    for capturable in (False, True):
        params = parameters([(300,), (20_000,), (7,)])
        optimizer = masked(case, params, backend="simt")
        for group in optimizer.param_groups:
            group["capturable"] = capturable
        for step in range(6):
            set_gradients(params, random_gradients(params, step), {})
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(float(step == 3))
            optimizer.step()
        optimizer.grad_scale = optimizer.found_inf = None
        optimizer.step()
        runs.append((params, optimizer))
    (params, optimizer), (expected_params, expected) = runs
    assert_same_run(params, optimizer, expected_params, expected)


def test_tables_are_uploaded_only_when_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = []
    monkeypatch.setattr(cuda, "put", lambda *args: uploads.append(args) or put(*args))
    params = parameters([(300,), (20_000,)])
    optimizer = AdamW(params, backend="simt", capturable=True)
    set_gradients(params, random_gradients(params, 0), {})
    optimizer.step()
    assert len(uploads) == 2  # rows and constants
    optimizer.step()
    assert len(uploads) == 2
    set_gradients(params, random_gradients(params, 1), {})
    optimizer.step()
    assert len(uploads) == 3  # other gradients
    optimizer.param_groups[0]["lr"] *= 0.5
    optimizer.step()
    assert len(uploads) == 4


class Failing:
    """The module, but for one function, which fails as a device does."""

    def __init__(self, function: str, error: RuntimeError) -> None:
        self._function, self._error = function, error

    def __getattr__(self, name: str) -> object:
        if name == self._function:

            def fail(*_: object) -> None:
                raise self._error

            return fail
        return getattr(_simt, name)


FAULT = RuntimeError("count: an illegal memory access was encountered")


@pytest.mark.parametrize("function", ["select", "apply"])
def test_a_fault_of_the_device_changes_nothing(monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    simt = choose("simt", torch.device("cpu"))
    monkeypatch.setattr(simt, "_module", Failing(function, FAULT))
    weight, mask = torch.randn(1000), BitMask.ones((1000,))
    before = weight.clone()
    with pytest.raises(DeviceError, match="illegal memory access") as caught:
        prune_(weight, sparsity=0.5, masks=mask, backend="simt")
    assert caught.value.__cause__ is FAULT
    assert_bitwise_equal(weight, before)
    assert mask.num_kept == 1000


def test_a_fault_in_a_step_leaves_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    simt = choose("simt", torch.device("cpu"))
    monkeypatch.setattr(simt, "_module", Failing("update", FAULT))
    params = parameters([(300,)])
    before = params[0].detach().clone()
    optimizer = AdamW(params, backend="simt")
    set_gradients(params, random_gradients(params, 0), {})
    with pytest.raises(DeviceError, match="illegal memory access"):
        optimizer.step()
    assert_bitwise_equal(params[0].detach(), before)
    assert not optimizer.state


def test_state_on_another_device_than_its_parameter_is_refused() -> None:
    params = parameters([(300,)])
    optimizer = AdamW(params, backend="simt")
    set_gradients(params, random_gradients(params, 0), {})
    optimizer.step()
    before = params[0].detach().clone()
    optimizer.state[params[0]]["exp_avg"] = torch.zeros(300, device="meta")
    with pytest.raises(StateError, match="on meta"):
        optimizer.step()
    assert_bitwise_equal(params[0].detach(), before)


def test_nothing_to_do_is_done() -> None:
    simt = choose("simt", torch.device("cpu"))
    simt.move_state([])
    assert simt.compactions([]) == []
    empty = torch.empty(0)
    simt.move_state([StateMove(empty, None, empty.clone(), None, 0)])
    assert float(simt.sum_squares([])) == 0.0


@pytest.mark.parametrize("index", [0, 1])
def test_only_another_gpu_than_the_current_one_is_made_current(monkeypatch: pytest.MonkeyPatch, index: int) -> None:
    made_current = []
    streams = {0: SimpleNamespace(cuda_stream=70), 1: SimpleNamespace(cuda_stream=71)}
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(made_current.append(device.index)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[device.index])
    device = torch.device("cuda", index)
    with on_device(device, "select"):
        assert cuda.Launches(_simt)._launch(device).stream == 70 + index
    assert made_current == [1] * index


def test_a_gpu_too_old_is_refused_whatever_the_first_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    capabilities = {0: (9, 0), 1: (7, 5)}
    monkeypatch.setattr(cuda, "_probe", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index])
    assert cuda._supports(torch.device("cuda", 0)) is None
    assert "compute capability (8, 0) or newer, got (7, 5)" in cuda._supports(torch.device("cuda", 1))
