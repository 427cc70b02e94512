"""Training with the masked optimizers: the trajectories of torch.optim held to the masks, in every dtype and layout."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import pytest
import torch
from conftest import KERNELS, ORACLE, SLOW
from hypothesis import given
from hypothesis import strategies as st
from optim_cases import (
    CASES,
    assert_same_run,
    assert_same_state,
    assert_within_ulps,
    assert_zeros_exact,
    clones,
    enforce,
    masked,
    parameters,
    plain,
    prune_more,
    random_gradients,
    random_masks,
    reference_step,
    set_gradients,
)
from optim_cases import one_thread as one_thread
from subprocesses import run_python
from test_determinism import ISA_NEEDS, cpu_flags
from torch import nn

import gmp_kernels
from gmp_kernels import GMPScheduler, schedules
from gmp_kernels.tools.testing import GuardedCopy, assert_bitwise_equal, device_of

SHAPES = [(24, 33), (7,), (65, 9)]
PRUNE_AT = {10: 0.05, 40: 0.5, 90: 0.9, 140: 0.97}
HALF = [torch.bfloat16, torch.float16]


def assert_compact(optimizer, masks):
    for p, mask in masks.items():
        for key, value in optimizer.state[p].items():
            assert key in ("step", "master_weight") or value.shape == (mask.num_kept,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("compact", [False, True], ids=["dense", "compact"])
@pytest.mark.parametrize("case", CASES)
def test_trajectory_is_that_of_torch_held_to_the_masks(case, compact, dtype):
    params = parameters(SHAPES, dtype)
    mirror = clones(params)
    optimizer, reference = masked(case, params, compact_state=compact), plain(case, mirror)
    masks = {}
    for step in range(200 if dtype == torch.float32 else 60):
        if step in PRUNE_AT:
            prune_more(optimizer, [params[0], params[2]], masks, PRUNE_AT[step])
        given = [masks.get(p) for p in params]
        with torch.no_grad():
            for p, q in zip(params, mirror, strict=True):
                q.copy_(p)
        enforce(reference, mirror, given)
        before = clones(params)
        gradients = random_gradients(params, step)
        set_gradients(params, gradients, masks)
        optimizer.step()
        reference_step(reference, mirror, gradients, given)
        for p, q, old in zip(params, mirror, before, strict=True):
            if case in ("sgd", "sgd_decay", "momentum", "momentum_maximize", "nesterov"):
                assert_bitwise_equal(p, q, "weights")
            assert_within_ulps(p.detach(), q.detach(), old.detach())
        # Equal to the bit, so that the next step again begins from a common state.
        assert_same_state(optimizer.state_dict()["state"], reference.state_dict()["state"])
        assert_zeros_exact(params, masks)
        if compact:
            assert_compact(optimizer, masks)
    assert len(masks) == 2


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("compact", [False, True], ids=["dense", "compact"])
@pytest.mark.parametrize("case", ["sgd_decay", "nesterov", "adam_short_betas", "adamw_amsgrad"])
def test_16_bit_weights_are_the_float32_step_rounded(case, compact, dtype):
    """The float32 step is itself compared with torch's above."""
    params = parameters(SHAPES, dtype)
    wide = [nn.Parameter(p.detach().float()) for p in params]
    optimizer, reference = masked(case, params, compact_state=compact), masked(case, wide)
    masks = {}
    for step in range(150):
        if step in PRUNE_AT:
            prune_more(optimizer, [params[0], params[2]], masks, PRUNE_AT[step])
            reference.set_masks({wide[i]: masks[params[i]] for i in (0, 2)})
        with torch.no_grad():
            for p, w in zip(params, wide, strict=True):
                w.copy_(p)
        gradients = random_gradients(params, step)
        set_gradients(params, gradients, masks)
        set_gradients(wide, [gradient.float() for gradient in gradients], {})
        optimizer.step()
        reference.step()
        for p, w in zip(params, wide, strict=True):
            assert_bitwise_equal(p, w.to(dtype), "weights")
        assert_same_state(optimizer.state_dict()["state"], reference.state_dict()["state"])
        for p, mask in masks.items():
            assert torch.equal(p[~mask.to_bool()], torch.zeros(p.numel() - mask.num_kept, dtype=dtype))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", ["nesterov", "adamw"])
def test_16_bit_sgd_and_adamw_with_master_weights_follow_the_float32_run(case, dtype):
    params = parameters(SHAPES, dtype)
    wide = [nn.Parameter(p.detach().float()) for p in params]
    optimizer, reference = masked(case, params, master_weights=True, compact_state=True), masked(case, wide)
    masks, wide_masks = {}, {}
    for step in range(150):
        gradients = random_gradients(params, step)
        set_gradients(params, gradients, masks)
        set_gradients(wide, [gradient.float() for gradient in gradients], wide_masks)
        optimizer.step()
        reference.step()
        if step in PRUNE_AT:
            prune_more(optimizer, params, masks, PRUNE_AT[step])
            prune_more(reference, wide, wide_masks, PRUNE_AT[step])
        for p, w in zip(params, wide, strict=True):
            assert_bitwise_equal(optimizer.master_weight(p), w, "master weights")
            assert_bitwise_equal(p, w.to(dtype), "weights")


def small_model(dtype=torch.float32):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(19, 33), nn.ReLU(), nn.Linear(33, 5)).to(dtype)


def train(model, optimizer, pruner, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(12, 19, generator=generator).to(model[0].weight.dtype)
        y = torch.randint(5, (12,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).float(), y).backward()
        optimizer.step()
        yield step, pruner.step()


RAMP = schedules.Cubic(0.2, 0.9, begin_step=2, end_step=22, frequency=4)


@pytest.mark.parametrize("compact", [False, True], ids=["dense", "compact"])
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("case", ["momentum", "adamw"])
def test_the_scheduler_hands_over_its_masks_and_enforces_nothing_itself(case, scope, compact):
    model, mirror = small_model(), small_model()
    optimizer = masked(case, model.parameters(), compact_state=compact)
    reference = plain(case, mirror.parameters())
    pruner = GMPScheduler(model, optimizer, RAMP, scope=scope)
    follower = GMPScheduler(mirror, reference, RAMP, scope=scope)
    assert not optimizer._optimizer_step_post_hooks and reference._optimizer_step_post_hooks
    for (_, report), (_, expected) in zip(
        train(model, optimizer, pruner, range(40)), train(mirror, reference, follower, range(40)), strict=True
    ):
        assert (report is None) == (expected is None)
        for name, mask in pruner.masks.items():
            p = model.get_parameter(name)
            assert torch.equal(p == 0, ~mask.to_bool())
            index = next(i for i, other in enumerate(model.parameters()) if other is p)
            for key, value in optimizer.state_dict()["state"][index].items():
                assert key == "step" or not value[~mask.to_bool()].any()
    assert pruner.sparsity == follower.sparsity == pytest.approx(0.9, abs=2e-3)
    for p, q in zip(model.parameters(), mirror.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", ["momentum", "adamw_amsgrad"])
def test_the_scheduler_ranks_the_master_and_the_copy_always_is_the_master_rounded(case, dtype):
    model = small_model(dtype)
    optimizer = masked(case, model.parameters(), master_weights=True, compact_state=True)
    pruner = GMPScheduler(model, optimizer, RAMP)
    previous = {}
    for _, report in train(model, optimizer, pruner, range(30)):
        for p in model.parameters():
            assert_bitwise_equal(p, optimizer.master_weight(p).to(dtype), "16-bit copy")
        for name, mask in pruner.masks.items():
            p = model.get_parameter(name)
            master = optimizer.master_weight(p)
            assert int((master == 0).sum()) == mask.numel - mask.num_kept
            if report is not None:
                threshold = next(layer.threshold for layer in report.layers if layer.name == name)
                assert master[mask.to_bool()].abs().min() >= threshold
                # A threshold that 16 bits cannot hold is one of the master's.
                previous[name] = previous.get(name, False) or float(torch.tensor(threshold).to(dtype)) != threshold
    assert all(previous.values()) and len(previous) == 2


EDGES = [1, 7, 15, 16, 17, 16383, 16384, 16385, 3 * 16384 + 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
@pytest.mark.parametrize("compact", [False, True], ids=["dense", "compact"])
def test_every_size_of_a_tail_and_chunk_gives_the_bits_of_a_padded_tensor(compact, dtype):
    """Elements do not know their neighbours: the first n of a longer tensor must come out the same."""
    longest = max(EDGES) + 64
    (whole,) = parameters([(longest,)], dtype)
    (gradient,) = random_gradients([whole], 0)
    (mask,) = random_masks([whole], 0.6).values()
    parts = [nn.Parameter(whole.detach()[:n].clone()) for n in EDGES]
    part_masks = {p: gmp_kernels.BitMask.from_bool(mask.to_bool()[: p.numel()]) for p in parts}
    optimizer, expected = masked("adamw_amsgrad", parts, compact_state=compact), masked("adamw_amsgrad", [whole])
    optimizer.set_masks(part_masks)
    expected.set_masks({whole: mask})
    for _ in range(3):
        set_gradients(parts, [gradient[: p.numel()] for p in parts], part_masks)
        set_gradients([whole], [gradient], {whole: mask})
        optimizer.step()
        expected.step()
    state = optimizer.state_dict()["state"]
    for i, p in enumerate(parts):
        assert_bitwise_equal(p, whole[: p.numel()], f"{p.numel()} weights")
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            assert_bitwise_equal(state[i][key], expected.state[whole][key][: p.numel()], f"{key} of {p.numel()}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
@pytest.mark.parametrize("compact", [False, True], ids=["dense", "compact"])
@pytest.mark.parametrize("case", ["nesterov", "amsgrad"])
def test_nothing_is_written_outside_weights_gradients_and_state(kernels, case, compact, dtype):
    for n in (1, 7, 17, 65, 16385):
        (value,) = parameters([(n,)], dtype, device=device_of(kernels))
        (gradient,) = random_gradients([value], 0)
        guards = {"weights": GuardedCopy(value.detach(), 3), "gradients": GuardedCopy(gradient, 5)}
        p = nn.Parameter(guards["weights"].view)
        p.grad = guards["gradients"].view
        masks = random_masks([p], 0.5, seed=n)
        optimizer = masked(case, [p], compact_state=compact, backend=kernels)
        expected = masked(case, [value], compact_state=compact, backend=kernels)
        optimizer.set_masks(masks)
        expected.set_masks({value: masks[p]})
        for step in range(3):
            value.grad = gradient.clone()
            optimizer.step()
            expected.step()
            if step == 0:
                for key, tensor in optimizer.state[p].items():
                    if key != "step":
                        guards[key] = GuardedCopy(tensor, 1)
                        optimizer.state[p][key] = guards[key].view
        assert_same_run([p], optimizer, [value], expected)
        assert_bitwise_equal(p.grad, gradient, "gradients")
        assert len(guards) == (3 if case == "nesterov" else 5)
        for what, guard in guards.items():
            guard.assert_intact(what)


@given(
    shapes=st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), min_size=1, max_size=4),
    case=st.sampled_from(sorted(CASES)),
    dtype=st.sampled_from([torch.float32, torch.float64, *HALF]),
    sparsities=st.lists(st.sampled_from([0.0, 0.3, 0.9, 1.0]), min_size=1, max_size=3),
    master=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_backend_dense_equals_compact_and_nearly_the_reference(shapes, case, dtype, sparsities, master, seed):
    runs = []
    for backend, compact in itertools.product([*KERNELS, ORACLE], [False, True]):
        params = parameters(shapes, dtype, seed, device_of(backend))
        optimizer = masked(case, params, compact_state=compact, master_weights=master, backend=backend)
        for step, sparsity in enumerate(sparsities):
            # Not nested: what comes back from the dead does so with zero state.
            masks = random_masks([p for p in params if p.numel() and p is not params[-1]], sparsity, seed + step)
            optimizer.set_masks(masks)
            set_gradients(params, random_gradients(params, step), masks)
            optimizer.step()
        runs.append((params, optimizer))
    (params, dense), *others = runs
    for other_params, other in others[:-2]:
        assert_same_run(other_params, other, params, dense)
    for reference_params, reference in others[-2:]:
        close = {"rtol": 2e-2, "atol": 1e-2} if dtype in HALF else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close([*reference_params], [*params], check_device=False, **close)
        for i, state in dense.state_dict()["state"].items():
            torch.testing.assert_close(reference.state_dict()["state"][i], state, check_device=False, **close)


DIGEST = Path(__file__).with_name("optim_digest.py")


SHARE = "11"  # no multiple of the number of rules, dtypes or layouts, so that each of them comes


@functools.cache
def digest_of_plain_loops(share):
    """Hash of one case in ``share``."""
    done = run_python(DIGEST, share, "1", GMP_KERNELS_ISA="portable")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip()) == 64
    return done.stdout.strip()


@pytest.mark.parametrize("share", [SHARE, pytest.param("1", marks=pytest.mark.thorough)])
@pytest.mark.parametrize("isa", [isa for isa, needs in ISA_NEEDS.items() if cpu_flags() >= needs])
def test_threads_and_instruction_sets_do_not_change_a_bit(isa, share):
    done = run_python(DIGEST, share, "2", "3", GMP_KERNELS_ISA=isa)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [digest_of_plain_loops(share)] * 2


@pytest.mark.parametrize(
    ("kernels", "share"),
    [(name, SHARE) for name in KERNELS]
    + [pytest.param(name, "1", marks=pytest.mark.thorough) for name in KERNELS if name not in SLOW],
    indirect=["kernels"],
)
def test_every_backend_writes_the_bits_of_the_cpu(kernels, share):
    done = run_python(DIGEST, share, "1", GMP_KERNELS_BACKEND=kernels)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == digest_of_plain_loops(share)
