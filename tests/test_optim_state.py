"""Optimizer state across checkpoints, processes, copies and torch.optim; GradScaler, closures, bad input."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from optim_cases import (
    LAYOUTS,
    SHAPES,
    assert_same_run,
    assert_same_state,
    assert_within_ulps,
    clones,
    masked,
    masks_of,
    parameters,
    plain,
    random_gradients,
    random_masks,
    run,
    set_gradients,
    started,
)
from optim_cases import one_thread as one_thread
from subprocesses import run_python
from torch import nn

from gmp_kernels import BitMask, optim
from gmp_kernels.errors import DTypeError, LayoutError, ShapeError, StateError, TargetError
from gmp_kernels.optim import clip_grad_norm_, ema_update_
from gmp_kernels.optim.compact import layout_of
from gmp_kernels.tools.testing import assert_bitwise_equal, device_of

RULES = pytest.mark.parametrize("case", ["sgd", "nesterov", "adamw_amsgrad"])


@LAYOUTS
@RULES
def test_a_run_moves_to_torch_and_back(case, compact):
    """Masked gradients keep torch's own step off the pruned weights: they and their state are zero and stay so."""
    params, optimizer = started(case, compact)
    masks = masks_of(params)
    mirror = clones(params)
    reference = plain(case, mirror)
    reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch would share what it loads
    gradients = [
        g if p not in masks else g * masks[p].to_bool()
        for p, g in zip(params, random_gradients(params, 3), strict=True)
    ]
    before = clones(params)
    for group, stepping in ((params, optimizer), (mirror, reference)):
        set_gradients(group, gradients, {})
        stepping.step()
    for p, q, old in zip(params, mirror, before, strict=True):
        assert_within_ulps(p.detach(), q.detach(), old.detach())
    assert_same_state(optimizer.state_dict()["state"], reference.state_dict()["state"])

    returned = masked(case, mirror, compact_state=not compact)
    returned.set_masks({mirror[i]: masks[params[i]] for i in (0, 2)})
    returned.load_state_dict(reference.state_dict())
    assert_same_state(returned.state_dict()["state"], reference.state_dict()["state"])


@LAYOUTS
@RULES
def test_copies_and_pickles_go_on_as_the_original(case, compact):
    params, optimizer = started(case, compact)
    for again in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        other_params, other = again((params, optimizer))
        run(other_params, other, range(3, 6))
        mine_params, mine = copy.deepcopy((params, optimizer))
        run(mine_params, mine, range(3, 6))
        assert_same_run(other_params, other, mine_params, mine)
        assert not any(p is q for p in other_params for q in params)


RESUME = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_optim_state import SHAPES, masked, masks_of, parameters, run
torch.set_num_threads(1)
checkpoint = torch.load(sys.argv[2])
params = parameters(SHAPES, getattr(torch, sys.argv[5]))
optimizer = masked(sys.argv[3], params, compact_state=sys.argv[4] == "True", master_weights=True)
with torch.no_grad():
    for p, saved in zip(params, checkpoint["weights"], strict=True):
        p.copy_(saved)
optimizer.load_state_dict(checkpoint["optimizer"])
run(params, optimizer, range(3, 8))
torch.save({"weights": [p.detach() for p in params], "optimizer": optimizer.state_dict()}, sys.argv[2])
"""


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@LAYOUTS
@RULES
def test_resuming_in_a_new_process_is_the_uninterrupted_run(case, compact, dtype, tmp_path):
    params, optimizer = started(case, compact, dtype=getattr(torch, dtype), master_weights=True)
    file = tmp_path / "checkpoint.pt"
    torch.save({"weights": [p.detach() for p in params], "optimizer": optimizer.state_dict()}, file)
    run(params, optimizer, range(3, 8))
    done = run_python("-c", RESUME, Path(__file__).parent, file, case, str(compact), dtype)
    assert done.returncode == 0, done.stderr
    resumed = torch.load(file)
    for saved, p in zip(resumed["weights"], params, strict=True):
        assert_bitwise_equal(saved, p.detach(), "weights")
    for i, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if value is not None:
                assert_bitwise_equal(resumed["optimizer"]["state"][i][key], value, key)


def test_compact_state_takes_the_bytes_of_the_kept_weights():
    p = nn.Parameter(torch.randn(1000, 1000))
    optimizer = optim.AdamW([p], compact_state=True)
    optimizer.set_masks(random_masks([p], 0.9))
    p.grad = torch.ones_like(p)
    optimizer.step()
    layout = layout_of(optimizer.state[p])
    ours = sum(v.nbytes for k, v in optimizer.state[p].items() if k != "step") + layout.chunk_offsets.nbytes
    assert ours <= 0.105 * 8 * p.numel() + p.numel() / 8


@LAYOUTS
def test_grad_scaler_skips_overflows_and_unscales(compact):
    params, optimizer = started("adamw", compact)
    expected_params, expected = copy.deepcopy((params, optimizer))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    gradients = random_gradients(params, 9)
    scaler.scale(torch.zeros(1))  # the scaler makes its scale on first use
    before = clones(params)
    set_gradients(params, [gradient * 1024 for gradient in gradients], {})
    params[1].grad[3] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    for p, q in zip(params, before, strict=True):
        assert_bitwise_equal(p.detach(), q.detach(), "weights after an overflow")
    assert scaler.get_scale() == 512.0
    set_gradients(params, [gradient * 512 for gradient in gradients], {})
    set_gradients(expected_params, gradients, {})
    scaler.step(optimizer)
    expected.step()
    assert_same_run(params, optimizer, expected_params, expected)


def test_closure_scheduler_and_new_group():
    params, optimizer = started("momentum")
    extra = nn.Parameter(torch.ones(5))
    optimizer.add_param_group({"params": [extra], "lr": 0.5, "momentum": 0.0})
    lr_scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)

    def closure():
        optimizer.zero_grad()
        loss = extra.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 5.0
    lr_scheduler.step()
    assert extra.tolist() == [0.5] * 5
    optimizer.step(closure)
    torch.testing.assert_close(extra.detach(), torch.full((5,), 0.45))
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.005, 0.05])
    assert params[0].grad is None


def test_the_learning_rate_may_be_a_tensor():
    a, b = parameters([(40,)]), parameters([(40,)])
    number, tensor = optim.AdamW(a, lr=0.01), optim.AdamW(b, lr=torch.tensor(0.01, dtype=torch.float64))
    for group, optimizer in ((a, number), (b, tensor)):
        set_gradients(group, random_gradients(group, 0), {})
        optimizer.step()
    assert_bitwise_equal(a[0].detach(), b[0].detach())


def broken(change):
    """The message of the error that ``change`` leads to, after checking that no weight or state has changed."""
    params, optimizer = started()
    set_gradients(params, random_gradients(params, 5), {})
    before, state = clones(params), copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises((RuntimeError, ValueError, TypeError, KeyError)) as caught:
        change(params, optimizer)
    for p, q in zip(params, before, strict=True):
        if p.shape == q.shape and p.dtype == q.dtype:
            assert_bitwise_equal(p.detach(), q.detach(), "weights")
    for i, entries in state.items():
        for key, value in entries.items():
            assert_bitwise_equal(optimizer.state_dict()["state"][i][key], value, key)
    return caught.value


def test_bad_input_is_named_and_changes_nothing():
    def sparse(params, optimizer):
        params[2].grad = params[2].grad.to_sparse()
        optimizer.step()

    def other_model(params, optimizer):
        optimizer.set_masks({nn.Parameter(torch.ones(3)): BitMask.ones((3,))})

    def other_shape(params, optimizer):
        optimizer.set_masks({params[0]: BitMask.ones((24, 33)), params[2]: BitMask.ones((9, 65))})

    def other_state(params, optimizer):
        state = copy.deepcopy(optimizer.state_dict())
        state["state"][2]["exp_avg"] = torch.zeros(3)
        optimizer.load_state_dict(state)

    def strided(params, optimizer):
        params[2].data = torch.zeros(65, 18)[:, ::2].copy_(params[2].data)
        optimizer.step()

    assert "does not support sparse gradients" in str(broken(sparse))
    assert isinstance(broken(other_model), TargetError)
    assert isinstance(broken(other_shape), ShapeError)
    assert isinstance(broken(other_state), StateError)
    assert isinstance(broken(strided), LayoutError)


def test_counts_of_a_run_are_raised_together_and_load_into_torch_one_by_one(tmp_path):
    params, optimizer = started()
    counts = [optimizer.state[p]["step"] for p in params]
    assert all(count.ndim == 0 and count._base is counts[0]._base is not None for count in counts)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    reference = plain("adamw", clones(params))
    reference.load_state_dict(torch.load(tmp_path / "state.pt"))
    for p in reference.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    reference.step()
    assert [state["step"].item() for state in reference.state.values()] == [4.0] * 3
    assert [count.item() for count in counts] == [3.0] * 3


def test_complex_and_integer_parameters_are_refused():
    p = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    p.grad = torch.ones_like(p)
    with pytest.raises(DTypeError, match="complex64"):
        optim.AdamW([p]).step()


@pytest.mark.parametrize("arguments", [{"lr": -1.0}, {"betas": (1.5, 0.9)}, {"eps": -1.0}, {"weight_decay": -1.0}])
def test_constructor_errors_are_those_of_torch(arguments):
    messages = []
    for module in (torch.optim, optim):
        with pytest.raises(ValueError) as caught:
            module.AdamW([nn.Parameter(torch.ones(3))], **arguments)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_clipping_sees_only_kept_positions(dtype):
    params = parameters(SHAPES, dtype)
    masks = masks_of(params)
    gradients = random_gradients(params, 0)
    set_gradients(params, gradients, masks)
    kept = [g if p not in masks else g * masks[p].to_bool() for p, g in zip(params, gradients, strict=True)]
    expected = torch.cat([g.flatten() for g in kept]).double().norm()
    norm = clip_grad_norm_(params, 1.0, masks=[masks.get(p) for p in params])
    torch.testing.assert_close(norm.double(), expected, rtol=1e-6, atol=0)
    for p, g in zip(params, kept, strict=True):
        clipped = p.grad if p not in masks else torch.where(masks[p].to_bool(), p.grad, 0.0)
        torch.testing.assert_close(clipped, (g / (expected + 1e-6)).to(dtype), rtol=1e-5, atol=1e-7)


def test_averages_are_dead_where_the_weights_are():
    params = parameters(SHAPES)
    averages = [torch.full_like(p.detach(), 2.0) for p in params]
    masks = [masks_of(params).get(p) for p in params]
    ema_update_(averages, params, 0.9, masks=masks)
    for average, p, mask in zip(averages, params, masks, strict=True):
        expected = 0.9 * 2.0 + 0.1 * p.detach()
        if mask is not None:
            assert not average[~mask.to_bool()].any()
            expected = expected * mask.to_bool()
        torch.testing.assert_close(average, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sparsity", [0.5, 1.0])
def test_averages_are_zero_in_blocks_that_are_all_pruned(backend, sparsity):
    """An update skips such blocks, so it cannot be what zeroes them."""
    device = device_of(backend)
    weight, average = torch.ones(3, 4096, device=device), torch.full((3, 4096), 2.0, device=device)
    kept = torch.zeros(3, 4096, dtype=torch.bool, device=device)
    kept[:, : round(4096 * (1.0 - sparsity))] = True
    ema_update_([average], [weight], 0.75, masks=[BitMask.from_bool(kept)], backend=backend)
    assert torch.equal(average, torch.where(kept, 1.75, 0.0))
