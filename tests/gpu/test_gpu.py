"""Tests of what only a GPU can show: streams, its memory, its errors. Run by ``make gpu-check`` alone."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import usable
from on_gpu import GPU, ON_GPU, SHAPES, hand_out, random_weight, started
from optim_cases import assert_same_run, clones, masked, parameters, random_gradients, random_masks, set_gradients
from subprocesses import run_python

from gmp_kernels import BitMask, prune_
from gmp_kernels.errors import DeviceError, LayoutError
from gmp_kernels.tools.testing import DTYPES, adversarial_cases, assert_bitwise_equal, assert_same_pruning

OTHER_DEVICES = ["cpu", *(f"cuda:{i}" for i in range(1, torch.cuda.device_count()))]
ROOM = 1e6  # bytes, less than the allocator takes of the device at a time


@pytest.fixture(params=ON_GPU)
def gpu(request: pytest.FixtureRequest) -> str:
    """Name of every backend whose tensors are on a GPU."""
    return usable(request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_weights_have_the_bits_of_the_cpu(gpu: str, dtype: torch.dtype) -> None:
    layers = [adversarial_cases(n, dtype)["random"] for n in (2**24 + 3, 1_000_003)]
    for request in ({"sparsity": 0.9}, {"sparsity": 0.5, "scope": "global"}):
        assert_same_pruning(layers, backend=gpu, against="cpu", **request)


def test_a_hundred_times_the_same_bits(gpu: str) -> None:
    sizes = (1_000_003, 7, 70_000, 16384)
    layers = [adversarial_cases(n, torch.bfloat16)["random"].to(GPU) for n in sizes]
    first = None
    for _ in range(100):
        pruned = [layer.clone() for layer in layers]
        result = prune_(pruned, sparsity=0.8, scope="global", backend=gpu)
        found = [*pruned, *(mask.packed for mask in result.masks)]
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True))


@pytest.mark.parametrize("compact", [False, True], ids=["dense", "compact"])
@pytest.mark.parametrize("case", ["momentum", "adamw_amsgrad"])
def test_a_hundred_times_the_same_step(gpu: str, case: str, compact: bool) -> None:
    runs = []
    for _ in range(100):
        params, optimizer, _ = started(gpu, case, compact_state=compact)
        runs = [*runs[:1], (params, optimizer)]
        assert_same_run(*runs[-1], *runs[0])


def test_work_goes_to_the_current_stream(gpu: str) -> None:
    n = 1 << 24
    source = random_weight(n)
    expected = source.clone()
    expected_masks = prune_(expected, sparsity=0.9, backend=gpu).masks
    weight, side = torch.zeros_like(source), torch.cuda.Stream()
    params, optimizer, _ = started(gpu)
    mirror, other = copy.deepcopy((params, optimizer))
    hand_out(params, 4)
    optimizer.step()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        # What reads the weights from another stream finds zeros for as long as this takes.
        torch.cuda._sleep(100_000_000)
        weight.copy_(source)
        masks = prune_(weight, sparsity=0.9, backend=gpu).masks
        torch.cuda._sleep(100_000_000)
        set_gradients(mirror, random_gradients(mirror, 4), {})
        other.step()
    side.synchronize()
    assert masks == expected_masks
    assert torch.equal(weight, expected)
    assert_same_run(mirror, other, params, optimizer)


@pytest.mark.parametrize("case", ["momentum", "adamw"])
def test_a_step_does_not_wait_for_the_device(gpu: str, case: str) -> None:
    params, optimizer, _ = started(gpu, case)
    averages = clones(params)
    hand_out(params, 4)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not torch.equal(averages[0], params[0])


@pytest.mark.parametrize("has_masks", [False, True])
def test_out_of_memory_is_named_and_changes_nothing(gpu: str, has_masks: bool) -> None:
    weight = random_weight(1 << 28)
    before = weight.clone()
    masks = BitMask.ones(weight.shape, GPU) if has_masks else None
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(GPU).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(GPU) + ROOM) / total, GPU)
    try:
        # New masks may come before or after it; that every allocation may fail is tested where there is no GPU.
        with pytest.raises(DeviceError, match=r"no memory left on cuda:0 for the (workspace|masks)"):
            prune_(weight, sparsity=0.9, masks=masks, backend=gpu)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, GPU)
    assert torch.equal(weight, before)
    assert masks is None or masks.num_kept == masks.numel
    assert prune_(weight, sparsity=0.9, masks=masks, backend=gpu).num_pruned == [round(0.9 * weight.numel())]


EARLIER_ERROR = """
import sys, torch, gmp_kernels
from gmp_kernels.errors import DeviceError
weight = torch.ones(1000, device="cuda")
gmp_kernels.prune_(weight, sparsity=0.1, backend=sys.argv[1])
torch.ones(3, device="cuda")[torch.tensor([7], device="cuda")]  # fails on the device, some time later
try:
    gmp_kernels.prune_(weight, sparsity=0.5, backend=sys.argv[1])
except DeviceError as error:
    print(error)
"""


def test_the_error_of_an_earlier_kernel_is_named(gpu: str) -> None:
    done = run_python("-c", EARLIER_ERROR, gpu)
    assert "cuda:0 reports an error, of this" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("other", OTHER_DEVICES)
def test_tensors_on_two_devices_are_refused(gpu: str, other: str) -> None:
    weights = [torch.ones(9, device=GPU), torch.ones(9, device=other)]
    with pytest.raises(LayoutError, match="expected all weights on one device"):
        prune_(weights, sparsity=0.5, backend=gpu)
    with pytest.raises(LayoutError, match=r"expected the mask of weights\[0\] on cuda:0"):
        prune_(weights[0], sparsity=0.5, masks=BitMask.ones((9,), other), backend=gpu)
    params = [torch.nn.Parameter(weight) for weight in weights]
    optimizer = masked("adamw", params, backend=gpu)
    set_gradients(params, random_gradients(params, 0), {})
    with pytest.raises(LayoutError, match="expected all parameters on one device"):
        optimizer.step()
    assert all(torch.equal(weight.cpu(), torch.ones(9)) for weight in weights)


def test_channels_last_has_the_masks_of_the_cpu(gpu: str) -> None:
    weights = [torch.randn(shape).bfloat16() for shape in ((300, 65, 3, 3), (2, 2000, 3, 3), (64, 64, 1, 1))]
    for scope in ("layer", "global"):
        expected = [weight.clone() for weight in weights]
        actual = [weight.to(GPU, memory_format=torch.channels_last) for weight in weights]
        masks = prune_(expected, sparsity=0.4, scope=scope).masks
        found = prune_(actual, sparsity=0.4, scope=scope, backend=gpu).masks
        for sparsity in (0.8, 0.9):
            right = prune_(expected, sparsity=sparsity, scope=scope, masks=masks)
            result = prune_(actual, sparsity=sparsity, scope=scope, masks=found, backend=gpu)
            assert found == [mask.to(GPU) for mask in masks] and result[1:] == right[1:]
            for weight, other in zip(actual, expected, strict=True):
                assert_bitwise_equal(weight, other)


@pytest.mark.parametrize("compact", [False, True], ids=["dense", "compact"])
def test_scaled_training_has_the_bits_of_the_cpu(gpu: str, compact: bool) -> None:
    runs = []
    for device, backend in ((GPU, gpu), (torch.device("cpu"), "cpu")):
        params = parameters(SHAPES, device=device)
        optimizer = masked("adamw", params, compact_state=compact, backend=backend)
        optimizer.set_masks(random_masks(params, 0.6))
        scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
        scaler.scale(torch.zeros(1, device=device))  # the scaler makes its scale on first use
        for step in range(6):
            set_gradients(params, [g * scaler.get_scale() for g in random_gradients(params, step)], {})
            if step == 3:
                params[1].grad.fill_(float("inf"))
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 512.0
        runs.append((params, optimizer))
    assert_same_run(*runs[0], *runs[1])
