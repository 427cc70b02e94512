"""State in bfloat16: how it is rounded, and that nothing else about a run changes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from optim_cases import (
    LAYOUTS,
    SHAPES,
    assert_same_run,
    clones,
    masked,
    parameters,
    plain,
    random_gradients,
    random_masks,
    run,
    set_gradients,
)
from optim_cases import one_thread as one_thread

from gmp_kernels import BitMask, optim
from gmp_kernels.errors import DTypeError
from gmp_kernels.tools.testing import assert_bitwise_equal, device_of

HALF: dict[str, Any] = {"state_dtype": torch.bfloat16}
# A number and its neighbours in bfloat16, both zeros, the smallest subnormals, the largest numbers, and no numbers.
SPECIAL = [
    *(0x3F800000 + i for i in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)),
    *(0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x0000FFFF, 0x00010000),
    *(0x7F7FFFFF, 0x7F7F0000, 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00001, 0x7F800001),
]


def values(count: int, seed: int = 0) -> torch.Tensor:
    numbers = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    numbers[: len(SPECIAL)] = torch.from_numpy(np.array(SPECIAL, np.uint32).view(np.float32))
    return numbers


def rounded(numbers: torch.Tensor, seed: int) -> torch.Tensor:
    """Round in plain integers: a 16-bit hash of number and seed decides, the nearer neighbour being the likelier."""
    factor = (seed + 1) * 0x9E3779B9 % 2**32
    factor = (factor ^ factor >> 16) * 0x7FEB352D % 2**32
    factor = (factor ^ factor >> 15) * 0x846CA68B % 2**32
    factor = (factor ^ factor >> 16) | 1
    results = []
    for bits in numbers.view(torch.int32).tolist():
        bits &= 0xFFFFFFFF
        half = (bits + (bits * factor % 2**32 >> 16)) >> 16
        results.append(0x7FC0 if bits & 0x7FFFFFFF > 0x7F800000 else half)
    return torch.from_numpy(np.array(results, np.uint16).view(np.int16)).view(torch.bfloat16)


@LAYOUTS
def test_every_backend_rounds_by_the_same_random_numbers(backend: str, compact: bool) -> None:
    """Without beta1, exp_avg is the gradient itself, so that what is stored is a rounded gradient."""
    p = torch.nn.Parameter(torch.ones(3_000, device=device_of(backend)))
    optimizer = optim.Adam([p], lr=0.0, betas=(0.0, 0.5), compact_state=compact, backend=backend, **HALF)
    kept = torch.rand(3_000, generator=torch.Generator().manual_seed(1)) < 0.7
    optimizer.set_masks({p: BitMask.from_bool(kept.to(p.device))})
    for step in (1, 2, 3):
        # The arithmetic makes +0 of -0, and NaN of Inf, to which the largest numbers may be rounded.
        numbers = values(3_000, step) + 0.0
        numbers[numbers.isinf() | (~(numbers.abs() < 3e38) & (step < 3))] = 1.0
        p.grad = numbers.to(p.device)
        optimizer.step()
        found = optimizer.state_dict()["state"][0]["exp_avg"].cpu()
        expected = torch.where(kept, rounded(numbers, step), 0.0)
        assert_bitwise_equal(found, expected)


def test_momentum_is_rounded_too(backend: str) -> None:
    numbers = values(2_000)
    p = torch.nn.Parameter(torch.ones(2_000, device=device_of(backend)))
    optimizer = optim.SGD([p], lr=0.0, momentum=0.9, backend=backend, **HALF)
    p.grad = numbers.to(p.device)
    optimizer.step()
    assert_bitwise_equal(optimizer.state[p]["momentum_buffer"].cpu(), rounded(numbers, 1))


@pytest.mark.parametrize("momentum", [0.9, 0.99, 0.999])
@pytest.mark.parametrize("gradient", [1.0, 0.0])
def test_momentum_under_a_steady_gradient_is_right_on_average(momentum: float, gradient: float) -> None:
    """With random numbers that do not change, each buffer comes to rest, too low or too high."""
    p = torch.nn.Parameter(torch.ones(2_000))
    optimizer, steps = optim.SGD([p], lr=0.0, momentum=momentum, **HALF), round(5 / (1 - momentum))
    p.grad = torch.linspace(1.0, 2.0, 2_000)
    optimizer.step()
    expected = p.grad.double()
    p.grad = p.grad * gradient
    for _ in range(steps):
        optimizer.step()
        expected = momentum * expected + p.grad.double()
    ratio = optimizer.state[p]["momentum_buffer"].double().mean() / expected.mean()
    # Buffers that decay for long come to the same values, and from then on their errors are the same as well.
    assert abs(ratio - 1) < (0.002 if gradient else 0.2)


def test_counts_of_steps_follow_the_buffers_of_momentum(one_thread: None) -> None:
    """A state of torch has none, and a buffer that is gone starts anew as in torch, whatever the count."""
    (p,), (q,) = parameters([(40,)]), parameters([(40,)])
    settings: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    theirs, ours = torch.optim.SGD([p], **settings), optim.SGD([q], **settings, **HALF)
    for step in range(5):
        p.grad, q.grad = (gradient.bfloat16().float() for gradient in random_gradients([p, q], step))
        q.grad.copy_(p.grad)
        if step == 2:
            ours.load_state_dict(theirs.state_dict())
            with torch.no_grad():
                q.copy_(p)
        if step == 4:
            theirs.state[p]["momentum_buffer"] = None
            del ours.state[q]["momentum_buffer"]
        theirs.step()
        ours.step()
        number = {0: 1, 1: 2, 2: 2, 3: 3, 4: 1}[step]
        assert ours.state[q]["step"] == number
        expected = theirs.state[p]["momentum_buffer"]
        torch.testing.assert_close(ours.state[q]["momentum_buffer"].float(), expected, rtol=0.03, atol=1e-3)
    theirs.load_state_dict(ours.state_dict())
    theirs.step()


def test_an_average_follows_gradients_that_get_smaller() -> None:
    """It would stay where it is, four times too large at the end, if it were rounded to nearest."""
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.nn.Parameter(torch.zeros(20_000)) for _ in range(2))
    ours, exact = optim.Adam([p], lr=0.0, **HALF), torch.optim.Adam([q], lr=0.0)
    for step in range(3_000):
        p.grad = q.grad = torch.randn(20_000, generator=generator) * (1e-3 if step < 1_500 else 1e-4)
        ours.step()
        exact.step()
    for name in ("exp_avg", "exp_avg_sq"):
        found, expected = ours.state[p][name].double(), exact.state[q][name].double()
        scale = expected.square().mean().sqrt()
        assert ((found - expected).mean() / scale).abs() < 0.005
        assert (found - expected).square().mean().sqrt() / scale < 0.15
    nearest = exact.state[q]["exp_avg_sq"].bfloat16()
    assert torch.equal((nearest * 0.999).bfloat16(), nearest)  # such an average stands still


@pytest.mark.parametrize("case", ["momentum", "adamw", "adamw_amsgrad"])
def test_a_run_ends_near_that_of_torch(case: str) -> None:
    shapes = [(64, 300), (300,)]
    params = parameters(shapes)
    ours, exact = clones(params), clones(params)
    optimizer, reference = masked(case, ours, **HALF), plain(case, exact)
    for step in range(100):
        for ps in (ours, exact):
            set_gradients(ps, random_gradients(ps, step), {})
        optimizer.step()
        reference.step()
    for p, q, start in zip(ours, exact, params, strict=True):
        # Relative to the way that the weights went; a bfloat16 has eight bits.
        assert (p - q).square().mean().sqrt() < 0.02 * (q - start).square().mean().sqrt()


@pytest.mark.parametrize("case", ["momentum", "adamw", "amsgrad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_compact_state_holds_the_values_of_dense_state(case: str, dtype: torch.dtype) -> None:
    runs = []
    for compact in (False, True):
        params = parameters(SHAPES, dtype)
        optimizer = masked(case, params, compact_state=compact, master_weights=True, **HALF)
        run(params, optimizer, range(3))
        optimizer.set_masks(random_masks(params, 0.9, seed=3))
        run(params, optimizer, range(3, 5))
        runs.append((params, optimizer))
        for i in (0, 2):
            kept = optimizer._masks[params[i]].num_kept if compact else params[i].numel()
            for name in set(optimizer.state_names) & optimizer.state[params[i]].keys():
                entry = optimizer.state[params[i]][name]
                assert entry.numel() == kept
                assert entry.dtype == (torch.float64 if dtype == torch.float64 else torch.bfloat16)
    assert_same_run(*runs[0], *runs[1])


@LAYOUTS
@pytest.mark.parametrize("case", ["momentum", "adamw"])
def test_a_run_goes_on_from_its_state_dict(case: str, compact: bool) -> None:
    params = parameters(SHAPES)
    optimizer = masked(case, params, compact_state=compact, **HALF)
    run(params, optimizer, range(3))
    resumed = clones(params)
    again = masked(case, resumed, compact_state=compact, **HALF)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    unpickled_params, unpickled = pickle.loads(pickle.dumps((params, optimizer)))
    for ps, own in ((params, optimizer), (resumed, again), (unpickled_params, unpickled)):
        run(ps, own, range(3, 6))
    assert_same_run(resumed, again, params, optimizer)
    assert_same_run(unpickled_params, unpickled, params, optimizer)


@LAYOUTS
def test_state_is_converted_when_it_is_loaded(compact: bool) -> None:
    params = parameters(SHAPES)
    wide = masked("adamw", params, compact_state=compact)
    run(params, wide, range(3))
    saved = wide.state_dict()
    half = masked("adamw", clones(params), compact_state=compact, **HALF)
    half.load_state_dict(saved)
    half_saved = half.state_dict()
    for index, state in saved["state"].items():
        for name, entry in half_saved["state"][index].items():
            expected = state[name] if name == "step" else state[name].bfloat16()
            assert_bitwise_equal(entry, expected)
    torchs = plain("adamw", clones(params))
    torchs.load_state_dict(half_saved)
    assert all(s["exp_avg"].dtype == torch.float32 for s in torchs.state.values())


def test_step_counts_on_the_device_give_the_same_random_numbers() -> None:
    runs = []
    for capturable in (False, True):
        params = parameters(SHAPES)
        optimizer = masked("adamw", params, capturable=capturable, **HALF)
        run(params, optimizer, range(4))
        runs.append((params, optimizer))
    assert_same_run(*runs[0], *runs[1])


@pytest.mark.parametrize("wrong", [torch.float16, torch.float64, torch.int8, "bfloat16"])
@pytest.mark.parametrize("kind", [optim.SGD, optim.Adam, optim.AdamW])
def test_no_other_dtype_is_taken(kind: Any, wrong: object) -> None:
    with pytest.raises(DTypeError, match=r"expected torch\.float32 or torch\.bfloat16 as state_dtype, got"):
        kind(parameters(SHAPES), lr=0.1, state_dtype=wrong)


def test_older_pickles_keep_float32() -> None:
    params = parameters(SHAPES)
    optimizer = masked("adamw", params)
    state = optimizer.__getstate__()
    del state["_state_dtype"]
    older = object.__new__(optim.AdamW)
    older.__setstate__(state)
    run(params, older, range(2))
    assert {s["exp_avg"].dtype for s in older.state.values()} == {torch.float32}
