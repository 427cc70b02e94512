"""The suite that torch ships for optimizers: its inputs, its errors, and what its own tests do with them.

==================================  ================================================================================
Where torch                         these optimizers
==================================  ================================================================================
computes derivatives of the step    refuse ``differentiable`` with a ValueError, in every group
takes complex parameters            refuse them with a DTypeError when they are given
steps a parameter twice per step    refuse a group that has one twice at the step, with a LayoutError
takes parameters with gaps          refuse them at the step, with a LayoutError
keeps state in the weights' dtype   keep it in float32 (float64 for float64), and step counts in float32
adds up sparse momentum             keep it dense; the values are the same but for the order of sums
copies state it loads by reference  load copies, so that what was loaded stays as it is
runs other loops for other flags    run one pass whatever ``foreach`` and ``fused`` say: the bits of the plain loop for
                                    SGD, within 2 ulp of it for Adam and AdamW
==================================  ================================================================================
"""

from __future__ import annotations

import copy
import inspect
import sys
import types
import unittest
from typing import Any

import pytest
import torch
from optim_cases import (
    assert_same_state,
    assert_within_ulps,
    clones,
    parameters,
    random_gradients,
    random_masks,
    set_gradients,
)
from optim_cases import one_thread as one_thread
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from gmp_kernels import BitMask, optim
from gmp_kernels.errors import DTypeError, LayoutError
from gmp_kernels.tools.testing import assert_bitwise_equal

# For tests of its own, torch's module asks for a package that has nothing to do with optimizers.
sys.modules.setdefault("expecttest", types.ModuleType("expecttest")).__dict__.setdefault("TestCase", unittest.TestCase)
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db  # noqa: E402

INFOS = {info.optim_cls.__name__: info for info in optim_db if info.optim_cls.__name__ in optim.__all__}
SHAPES = [(17, 5), (9,), (), (0,), (4, 3, 2)]
FLAGS: list[dict[str, Any]] = [{}, {"foreach": True}, {"fused": True}]
INPUTS = [
    pytest.param(name, {**given.kwargs, **flags}, id="-".join([name, given.desc.replace(" ", "_"), *flags]))
    for name, info in INFOS.items()
    for given in info.optim_inputs_func(device="cpu")
    for flags in FLAGS
    if not (isinstance(given.kwargs.get("lr"), torch.Tensor) and flags.get("foreach"))
]


def pair(name: str, kwargs: dict[str, Any], given: Any, mirrored: Any, **options: Any) -> tuple[Any, Any]:
    """One of our optimizers, and torch's in its plain loop."""
    reference = {**kwargs, "foreach": False, "fused": False}
    return getattr(optim, name)(given, **kwargs, **options), getattr(torch.optim, name)(mirrored, **reference)


def optim_masks(params: list[Any]) -> dict[Any, Any]:
    return random_masks([p for p in params if p.numel()], 0.5)


def step_both(ours: Any, torchs: Any, params: list[Any], mirror: list[Any], step: int) -> None:
    """A step of both from common weights, and a look at what it made of them."""
    with torch.no_grad():
        for p, q in zip(params, mirror, strict=True):
            p.copy_(q)
    before = clones(params)
    for group in (params, mirror):
        set_gradients(group, random_gradients(group, step), {})
    ours.step()
    torchs.step()
    for p, q, old in zip(params, mirror, before, strict=True):
        if isinstance(ours, torch.optim.SGD):
            assert_bitwise_equal(p.detach(), q.detach())
        elif p.numel():
            assert_within_ulps(p.detach(), q.detach(), old.detach())
    assert_same_state(ours.state_dict()["state"], torchs.state_dict()["state"])


def test_there_are_inputs_for_every_optimizer() -> None:
    assert set(INFOS) == {"SGD", "Adam", "AdamW"} and len(INPUTS) > 40


@pytest.mark.parametrize("compact", [False, True], ids=["dense", "compact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "kwargs"), INPUTS)
def test_every_input_gives_the_steps_of_torch(
    name: str, kwargs: dict[str, Any], dtype: torch.dtype, compact: bool
) -> None:
    params = parameters(SHAPES, dtype)
    mirror = clones(params)
    ours, torchs = pair(name, kwargs, params, mirror, compact_state=compact)
    repr(ours)
    for step in range(4):
        step_both(ours, torchs, params, mirror, step)
    assert [set(group) for group in ours.param_groups] == [set(group) for group in torchs.param_groups]


@pytest.mark.parametrize(("name", "kwargs"), INPUTS)
def test_differentiable_is_refused_whatever_comes_with_it(name: str, kwargs: dict[str, Any]) -> None:
    params = parameters([(3,)])
    with pytest.raises(ValueError, match="differentiable"):
        getattr(optim, name)(params, **{**kwargs, "differentiable": True})
    with pytest.raises(ValueError, match="differentiable"):
        getattr(optim, name)([{"params": params, "differentiable": True}], **kwargs)
    optimizer = getattr(optim, name)(params, **kwargs)
    with pytest.raises(ValueError, match="differentiable"):
        optimizer.add_param_group({"params": parameters([(2,)]), "differentiable": True})
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0]["differentiable"] = True
    set_gradients(params, random_gradients(params, 0), {})
    before = clones(params)
    with pytest.raises(ValueError, match="differentiable"):
        optimizer.step()
    assert_bitwise_equal(params[0].detach(), before[0].detach())
    assert not optimizer.state


@pytest.mark.parametrize("name", INFOS)
@pytest.mark.filterwarnings("error:optimizer contains a parameter group with duplicate")
def test_errors_are_those_of_torch(name: str) -> None:
    errors = INFOS[name].optim_error_inputs_func("cpu", torch.float32)
    assert len(errors) >= 6
    for error in errors:
        given = error.optimizer_error_input
        assert error.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
        params = [nn.Parameter(torch.ones(2))] if given.params is None else given.params
        with pytest.raises(error.error_type, match=error.error_regex):
            getattr(optim, name)(params, **given.kwargs)


@pytest.mark.parametrize("name", INFOS)
def test_signatures_take_what_torch_takes(name: str) -> None:
    params = parameters([(2,)])
    positional = [p.name for p in inspect.signature(getattr(torch.optim, name)).parameters.values()][1:]
    defaults = getattr(torch.optim, name)(params).defaults
    assert {"compact_state", "master_weights", "backend"} <= set(inspect.signature(getattr(optim, name)).parameters)
    assert getattr(optim, name)(params).defaults == defaults
    for key in positional:
        if key in defaults and key != "differentiable":
            assert getattr(optim, name)(params, **{key: defaults[key]}).defaults == defaults


@pytest.mark.parametrize("name", INFOS)
def test_a_parameter_that_is_there_twice_is_refused_at_the_step(name: str) -> None:
    (p,) = parameters([(5,)])
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = getattr(optim, name)([p, p])
    p.grad = torch.ones_like(p)
    before = p.detach().clone()
    with pytest.raises(LayoutError, match="once"):
        optimizer.step()
    assert_bitwise_equal(p.detach(), before)
    assert not optimizer.state


@pytest.mark.parametrize("name", INFOS)
def test_a_parameter_with_gaps_in_memory_is_refused_at_the_step(name: str) -> None:
    p = nn.Parameter(torch.randn(10, 5, 2)[..., 0])
    optimizer = getattr(optim, name)([p])
    p.grad = torch.ones_like(p)
    before = p.detach().clone()
    with pytest.raises(LayoutError, match="without gaps in memory"):
        optimizer.step()
    assert_bitwise_equal(p.detach(), before)
    assert not optimizer.state


@pytest.mark.parametrize("name", INFOS)
def test_complex_parameters_are_refused_when_they_are_given(name: str) -> None:
    make = getattr(optim, name)
    bad, good = nn.Parameter(torch.ones(3, dtype=torch.complex64)), nn.Parameter(torch.ones(3))
    for given in ([bad], [good, bad], [("w", bad)], [{"params": bad}], iter([good, bad])):
        with pytest.raises(DTypeError, match=r"expected real parameters, got torch\.complex64"):
            make(given)
    optimizer = make([good])
    with pytest.raises(DTypeError, match="expected real parameters"):
        optimizer.add_param_group({"params": bad})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("name", INFOS)
def test_state_dicts_of_older_versions_are_taken(name: str) -> None:
    params = parameters(SHAPES)
    mirror = clones(params)
    ours, torchs = pair(name, {}, params, mirror)
    for step in range(2):
        step_both(ours, torchs, params, mirror, step)
    saved = copy.deepcopy(torchs.state_dict())
    for group in saved["param_groups"]:
        for key in ("maximize", "foreach", "fused", "differentiable", "capturable", "amsgrad", "nesterov"):
            group.pop(key, None)
    for state in saved["state"].values():
        if "step" in state:
            state["step"] = state["step"].item()
    before = copy.deepcopy(saved)
    for _ in range(2):
        ours.load_state_dict(saved)
        torchs.load_state_dict(copy.deepcopy(saved))
        step_both(ours, torchs, params, mirror, 7)
    assert saved["param_groups"] == before["param_groups"]
    for index, state in before["state"].items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(saved["state"][index][key]), torch.as_tensor(value))


@pytest.mark.parametrize("name", INFOS)
def test_copies_have_all_public_attributes(name: str) -> None:
    optimizer = getattr(optim, name)(parameters(SHAPES))
    names = [{key for key in vars(one) if not key.startswith("_")} for one in (optimizer, copy.deepcopy(optimizer))]
    assert names[0] == names[1]


@pytest.mark.parametrize("name", INFOS)
def test_hooks_are_called_and_see_what_torch_would_show(name: str) -> None:
    params = parameters(SHAPES)
    optimizer = getattr(optim, name)(params, **({"momentum": 0.9} if name == "SGD" else {}), compact_state=True)
    optimizer.set_masks(optim_masks(params))
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    set_gradients(params, random_gradients(params, 0), {})
    optimizer.step()
    assert calls == ["pre", "post"]
    shapes = []

    def seen(_: Any, saved: dict[str, Any]) -> dict[str, Any]:
        shapes.append([v.shape for s in saved["state"].values() for k, v in s.items() if k != "step"])
        return {**saved, "mine": 1}

    optimizer.register_state_dict_pre_hook(lambda _: calls.append("saving"))
    optimizer.register_state_dict_post_hook(seen)
    optimizer.register_load_state_dict_pre_hook(lambda _, given: {**given, "mine": calls.append("loading")})
    optimizer.register_load_state_dict_post_hook(lambda one: calls.append(str(one is optimizer)))
    saved = optimizer.state_dict()
    assert saved["mine"] == 1 and set(shapes[0]) == {torch.Size(shape) for shape in SHAPES}
    optimizer.load_state_dict(saved)
    assert calls[2:] == ["saving", "loading", "True"]
    assert saved["mine"] == 1


@pytest.mark.parametrize("name", INFOS)
def test_steps_are_told_to_whoever_observes_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters(SHAPES)
    optimizer = getattr(optim, name)(params)
    set_gradients(params, random_gradients(params, 0), {})
    told: list[str] = []
    record = torch.autograd.profiler.record_function
    monkeypatch.setattr(torch.autograd.profiler, "record_function", lambda what: told.append(what) or record(what))
    optimizer.step()
    assert told == []
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert told == [f"Optimizer.step#{name}.step"] == [e.key for e in profile.key_averages() if e.key in told]
    called: list[object] = []
    for register in (
        register_optimizer_step_pre_hook,
        register_optimizer_step_post_hook,
        optimizer.register_step_pre_hook,
        optimizer.register_step_post_hook,
    ):
        handle = register(lambda *_: called.append(None))
        optimizer.step()
        handle.remove()
        optimizer.step()
    assert len(called) == 4


@pytest.mark.parametrize("name", INFOS)
def test_names_of_parameters_travel(name: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    named = getattr(optim, name)(model.named_parameters())
    assert named.param_groups[0]["param_names"] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    saved = named.state_dict()
    saved["param_groups"][0]["param_names"] = ["a", "b", "c", "d"]
    named.load_state_dict(saved)
    assert named.param_groups[0]["param_names"] == ["a", "b", "c", "d"]
    del saved["param_groups"][0]["param_names"]
    named.load_state_dict(saved)
    assert named.param_groups[0]["param_names"] == ["a", "b", "c", "d"]


@pytest.mark.parametrize("name", INFOS)
def test_nothing_is_left_behind_where_nothing_is_done(name: str) -> None:
    """No state without gradients; of parameters without elements what torch keeps of them."""
    params = parameters([(0,), (3,)])
    mirror = clones(params)
    for momentum in ({}, {"momentum": 0.9}) if name == "SGD" else ({},):
        ours, torchs = pair(name, momentum, params, mirror)
        ours.zero_grad()
        ours.step()
        assert not ours.state and not ours.state_dict()["state"]
        for p, q in zip(params, mirror, strict=True):
            p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        ours.step()
        torchs.step()
        assert {i: set(s) for i, s in ours.state_dict()["state"].items()} == {
            i: set(s) for i, s in torchs.state_dict()["state"].items()
        }
        ours.zero_grad()
        assert all(p.grad is None for p in params)
        ours.zero_grad(set_to_none=False)


CHANGES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "momentum on, off and on": ("SGD", [{"momentum": 0.9}, {"momentum": 0}, {"momentum": 0.8}]),
    "momentum from none": ("SGD", [{}, {"momentum": 0.9, "dampening": 0.4}, {"nesterov": True, "dampening": 0}]),
    "maximize": ("SGD", [{"maximize": True}, {"maximize": False, "momentum": 0.5}]),
    "maximize Adam": ("Adam", [{"maximize": True}, {"maximize": False, "betas": (0.5, 0.6)}]),
    "amsgrad off and on": ("AdamW", [{"amsgrad": True}, {"amsgrad": False}, {"amsgrad": True}]),
    "weight decay": ("Adam", [{"weight_decay": 0.1}, {"decoupled_weight_decay": True}, {"weight_decay": 0}]),
    "learning rates": ("AdamW", [{"lr": torch.tensor(0.1)}, {"lr": 0.01}, {"eps": 1e-3}]),
}


@pytest.mark.parametrize("compact", [False, True], ids=["dense", "compact"])
@pytest.mark.parametrize("change", CHANGES)
def test_hyperparameters_may_change_midway(change: str, compact: bool) -> None:
    name, stages = CHANGES[change]
    params = parameters(SHAPES)
    mirror = clones(params)
    first = {"lr": 0.05, **({"amsgrad": True} if "amsgrad" in change else {})}
    ours, torchs = pair(name, first, params, mirror, compact_state=compact)
    ours.set_masks({p: BitMask.ones(p.shape) for p in params[:3]})
    for number, stage in enumerate(stages):
        for optimizer in (ours, torchs):
            optimizer.param_groups[0].update(stage)
        for step in range(2):
            step_both(ours, torchs, params, mirror, 10 * number + step)


@pytest.mark.parametrize("kwargs", [{}, {"maximize": True}, {"momentum": 0.9, "dampening": 0.3}], ids=str)
@pytest.mark.parametrize("shape", [(7,), (6, 3)], ids=str)
def test_sparse_gradients_step_as_in_torch(kwargs: dict[str, Any], shape: tuple[int, ...]) -> None:
    params = parameters([shape])
    mirror = clones(params)
    ours, torchs = pair("SGD", {"lr": 0.1, **kwargs}, params, mirror)
    for step in range(4):
        rows = torch.tensor([[step, (step + 2) % 5]])
        values = torch.randn(2, *shape[1:], generator=torch.Generator().manual_seed(step))
        for (p,) in (params, mirror):
            p.grad = torch.sparse_coo_tensor(rows, values, shape, check_invariants=True)
        before = clones(params)
        ours.step()
        torchs.step()
        if not kwargs.get("momentum"):
            assert_bitwise_equal(params[0].detach(), mirror[0].detach())
            continue
        # torch adds the terms of its sparse momentum to the weight one by one.
        assert_within_ulps(params[0].detach(), mirror[0].detach(), before[0].detach())
        with torch.no_grad():
            params[0].copy_(mirror[0])
        buffers = [o.state_dict()["state"][0]["momentum_buffer"] for o in (ours, torchs)]
        torch.testing.assert_close(buffers[0], buffers[1].to_dense())


def test_sparse_gradients_are_summed_and_masked() -> None:
    (p,) = parameters([(6, 2)])
    optimizer = optim.SGD([p], lr=1.0)
    optimizer.set_masks(masks := optim_masks([p]))
    before = p.detach().clone()
    kept = masks[p].to_bool()
    values = torch.tensor([[1.0, 2.0], [4.0, 8.0], [1.0, 1.0]])
    p.grad = torch.sparse_coo_tensor([[1, 1, 4]], values, (6, 2), check_invariants=True)
    optimizer.step()
    assert_bitwise_equal(p.detach(), torch.where(kept, before - p.grad.to_dense(), 0.0))


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_sparse_gradients_are_refused_where_torch_refuses_them(name: str) -> None:
    params = parameters([(7,)])
    for module in (optim, torch.optim):
        optimizer = getattr(module, name)(params, weight_decay=0.1)
        params[0].grad = torch.ones(7).to_sparse()
        before = params[0].detach().clone()
        with pytest.raises(RuntimeError):
            optimizer.step()
        assert_bitwise_equal(params[0].detach(), before)
        assert not optimizer.state_dict()["state"] or module is torch.optim


@pytest.mark.parametrize("name", INFOS)
def test_gradients_that_are_views_which_negate_are_resolved(name: str) -> None:
    params = parameters([(9,), (4, 3)])
    mirror = clones(params)
    ours, torchs = pair(name, {"lr": 0.1}, params, mirror)
    for step in range(3):
        with torch.no_grad():
            for p, q in zip(params, mirror, strict=True):
                p.copy_(q)
        gradients = random_gradients(params, step)
        for p, q, gradient in zip(params, mirror, gradients, strict=True):
            # Laid out like the parameter at one step, with gaps at the next.
            negated = torch._neg_view(gradient) if step != 1 else torch.complex(gradient, gradient).conj().imag
            assert negated.is_neg()
            p.grad, q.grad = negated, negated.resolve_neg()
        before = clones(params)
        ours.step()
        torchs.step()
        for p, q, old in zip(params, mirror, before, strict=True):
            assert_within_ulps(p.detach(), q.detach(), old.detach(), ulps=0 if name == "SGD" else 2)
