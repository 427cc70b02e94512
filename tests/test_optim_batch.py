"""The look of a step at parameters that were good at the step before: it looks at them only briefly."""

from __future__ import annotations

import copy

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
    parameters,
    plain,
    random_gradients,
    set_gradients,
    started,
)
from optim_cases import one_thread as one_thread
from torch import nn

from gmp_kernels import BitMask, optim
from gmp_kernels.errors import DTypeError, LayoutError, ShapeError
from gmp_kernels.tools.testing import assert_bitwise_equal


def columns_first(params, optimizer):
    params[2].grad = params[2].grad.t().contiguous().t()


def expanded(params, optimizer):
    params[0].grad = torch.tensor(0.25).expand(24, 33)


def other_entry(params, optimizer):
    optimizer.state[params[0]]["exp_avg"] = torch.full((24, 33), 0.5)


def other_entries(params, optimizer):
    optimizer.state[params[1]] = {key: value + 1 for key, value in optimizer.state[params[1]].items()}


def no_entries(params, optimizer):
    optimizer.state.clear()


def other_memory(params, optimizer):
    params[1].data = params[1].data + 1


def fewer_gradients(params, optimizer):
    params[1].grad = None


def other_order(params, optimizer):
    optimizer.param_groups[0]["params"].reverse()


def other_group(params, optimizer):
    del optimizer.param_groups[0]["params"][2]  # the order stays
    optimizer.add_param_group({"params": [params[2]], "lr": 0.3})


def other_rule(params, optimizer):
    optimizer.param_groups[0].update(amsgrad=True, lr=0.5, weight_decay=0.2)


def other_count(params, optimizer):
    optimizer.state[params[2]]["step"] += 5


def other_count_and_order(params, optimizer):
    other_count(params, optimizer)
    other_order(params, optimizer)


def other_count_tensor(params, optimizer):
    optimizer.state[params[2]]["step"] = torch.tensor(9.0)


@pytest.mark.parametrize(
    "change",
    [
        *(columns_first, expanded, other_entry, other_entries, no_entries, other_memory, fewer_gradients),
        *(
            other_order,
            other_group,
            other_rule,
            other_count,
            other_count_and_order,
            other_count_tensor,
        ),
    ],
    ids=lambda f: f.__name__,
)
def test_what_changes_between_two_steps_is_seen(change):
    """A step looks briefly at parameters that were good before; a copy of the optimizer has not seen any yet."""
    params, optimizer = started()
    copied = copy.deepcopy((params, optimizer))
    for p, q in zip(params, copied[0], strict=True):
        q.grad = p.grad.clone()
    for run_of in ((params, optimizer), copied):
        change(*run_of)
        run_of[1].step()
    assert_same_run(params, optimizer, *copied)


def test_a_square_parameter_that_was_transposed_in_place_is_seen():
    """Address and shape stay; the gradient belongs to the new order."""
    runs = []
    for copied in (False, True):
        p = nn.Parameter(torch.randn(24, 24, generator=torch.Generator().manual_seed(0)))
        optimizer = optim.AdamW([p], lr=0.1)
        for step in range(2):
            p.grad = torch.randn(24, 24, generator=torch.Generator().manual_seed(step + 1))
            optimizer.step()
        if copied:  # has seen no parameter yet
            p, optimizer = copy.deepcopy((p, optimizer))
        p.data = p.data.t()
        p.grad = torch.randn(24, 24, generator=torch.Generator().manual_seed(9))
        optimizer.step()
        runs.append(p.detach().contiguous())
    assert_bitwise_equal(*runs, "weights")


def test_parameters_and_gradients_whose_storage_was_freed_are_refused():
    params, optimizer = started()
    params[0].grad.untyped_storage().resize_(0)
    before = clones(params)
    with pytest.raises((LayoutError, ValueError)):
        optimizer.step()
    fresh = masked("adamw", params)
    with pytest.raises(LayoutError, match="in memory, got a tensor of shape"):
        fresh.step()
    for p, q in zip(params, before, strict=True):
        assert_bitwise_equal(p.detach(), q.detach(), "weights")


def test_a_gradient_of_another_dtype_is_refused_also_after_good_ones():
    params, optimizer = started()
    whole, params[1].grad = params[1].data, None
    # As mixed precision by hand does it: the weights come back to where they were, the gradient stays.
    params[1].data = whole.half()
    params[1].grad = torch.ones_like(params[1])
    params[1].data = whole
    with pytest.raises(DTypeError, match="expected gradients of their parameter's"):
        optimizer.step()


def test_a_gradient_of_another_shape_is_refused_also_after_good_ones():
    """A kernel would read past its end; only a parameter that had another shape meanwhile can have one."""
    params, optimizer = started()
    whole, params[0].grad = params[0].data, None
    params[0].data = whole[:2]
    params[0].grad = torch.ones(2, 33)
    params[0].data = whole
    before = clones(params)
    with pytest.raises(ShapeError, match=r"gradients of their parameter's shape \(24, 33\), got \(2, 33\)"):
        optimizer.step()
    for p, q in zip(params, before, strict=True):
        assert_bitwise_equal(p.detach(), q.detach())


@LAYOUTS
@pytest.mark.parametrize("capturable", [False, True], ids=["host", "device"])
def test_parameters_without_a_gradient_now_and_then_count_steps_of_their_own(capturable, compact):
    """Steps whose counts differ within a group are those of torch, whose loop counts one by one."""
    params = parameters([*SHAPES, (3,), (0,)])
    mirror = clones(params)
    optimizer = masked("adamw", params, compact_state=compact)
    for group in optimizer.param_groups:
        group["capturable"] = capturable
    reference = plain("adamw", mirror)
    optimizer.set_masks({p: BitMask.ones(p.shape) for p in params[:2]})
    for step in range(9):
        gradients = random_gradients(params, step)
        for i, (p, q, gradient) in enumerate(zip(params, mirror, gradients, strict=True)):
            has_one = step < 2 or (step >> (i % 3)) & 1
            p.grad, q.grad = (gradient.clone(), gradient.clone()) if has_one else (None, None)
        if step == 5:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        if step == 6:
            params, optimizer = copy.deepcopy((params, optimizer))
            for p, gradient, q in zip(params, gradients, mirror, strict=True):
                p.grad = None if q.grad is None else gradient.clone()
        with torch.no_grad():
            for p, q in zip(params, mirror, strict=True):
                q.copy_(p)
        before = clones(params)
        optimizer.step()
        reference.step()
        for p, q, old in zip(params[:4], mirror[:4], before[:4], strict=True):
            assert_within_ulps(p.detach(), q.detach(), old.detach())
        assert_same_state(optimizer.state_dict()["state"], reference.state_dict()["state"])


def test_a_parameter_that_takes_the_place_of_another_is_stepped_instead():
    params, optimizer = started()
    before = params[1].detach().clone()
    p = nn.Parameter(before.clone())
    p.grad = params[1].grad = torch.ones_like(p)
    optimizer.param_groups[0]["params"][1] = p
    optimizer.step()
    assert_bitwise_equal(params[1].detach(), before)
    assert (p != before).all() and optimizer.state[p]["step"] == 1


def test_a_parameter_that_moves_to_the_group_before_is_stepped_as_that_says():
    params = parameters(SHAPES)
    optimizer = masked("sgd", [{"params": params[:1], "lr": 0.5}, {"params": params[1:], "lr": 0.1}])
    for lr in (0.1, 0.5):
        set_gradients(params, random_gradients(params, 0), {})
        expected = params[1].detach() - lr * params[1].grad
        optimizer.step()
        torch.testing.assert_close(params[1].detach(), expected)
        optimizer.param_groups[0]["params"] = params[:2]
        optimizer.param_groups[1]["params"] = params[2:]


def test_other_parameters_of_the_same_shape_have_gradients_in_turn():
    params = parameters([(9,)] * 3)
    mirror = clones(params)
    optimizer, reference = masked("momentum", params), plain("momentum", mirror)
    for step, without in enumerate((2, 0, 1, 1, 2)):
        for group in (params, mirror):
            set_gradients(group, random_gradients(group, step), {})
            group[without].grad = None
        version = params[without]._version
        optimizer.step()
        assert params[without]._version == version
        reference.step()
        for p, q in zip(params, mirror, strict=True):
            assert_bitwise_equal(p.detach(), q.detach())
