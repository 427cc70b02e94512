"""Refusals of the scheduler: bad options, unfit or changed models, state of another run; nothing changes then."""

import io

import pytest
import torch
from scheduler_cases import (
    RAMP,
    assert_dead,
    make,
    make_model,
    run,
    snapshot,
    train_step,
)
from torch import nn

from gmp_kernels import GMPScheduler, schedules
from gmp_kernels.errors import DTypeError, LayoutError, NonFiniteError, SparsityError, StateError, TargetError
from gmp_kernels.pruner import layers


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"targets": "nothing"}, TargetError, "'nothing', which matches nothing"),
        ({"overrides": {"5": 0.5}}, TargetError, "overrides: .*'5'"),
        ({"overrides": {"1": 0.5}}, TargetError, "not pruned"),
        ({"overrides": {"3": 1.5}}, SparsityError, "1.5"),
        ({"overrides": {"3": 0.5}, "scope": "global"}, TargetError, "overrides"),
        ({"distribution": "erk", "scope": "global"}, ValueError, "uniform"),
        ({"distribution": "even"}, ValueError, "'uniform', 'erk'"),
        ({"scope": "Global"}, ValueError, "GMPScheduler: .*'layer', 'global'"),
        ({"nonfinite": "raise"}, ValueError, "GMPScheduler: .*'error', 'keep'"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        make(**options)


def test_bad_objects():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="Module"):
        GMPScheduler(model.parameters(), optimizer, RAMP)
    with pytest.raises(TypeError, match="Optimizer"):
        GMPScheduler(model, torch.optim.lr_scheduler.StepLR(optimizer, 1), RAMP)
    with pytest.raises(TypeError, match="Schedule"):
        GMPScheduler(model, optimizer, 0.9)


def test_every_target_is_in_the_optimizer():
    model = make_model()
    optimizer = torch.optim.SGD(model[3:].parameters(), lr=0.1)
    with pytest.raises(TargetError, match=r"'0\.weight'.*ignore="):
        GMPScheduler(model, optimizer, RAMP, targets="0.weight")
    assert list(GMPScheduler(model, optimizer, RAMP, ignore="0").masks) == ["3.weight", "4.weight"]


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda m: m.to(torch.float8_e4m3fn), DTypeError),
        (lambda m: setattr(m[1].weight, "data", m[1].weight.data.t()), LayoutError),
        (lambda m: m[4].weight.data.view(-1)[7].fill_(torch.nan), NonFiniteError),
    ],
)
def test_unfit_weights_are_refused_before_training(damage, error):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(4, 4))
    damage(model)
    with pytest.raises(error, match=r"'\d\.weight'"):
        GMPScheduler(model, torch.optim.SGD(model.parameters(), lr=0.1), RAMP)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_non_finite_weights_change_nothing_and_can_be_repaired(scope):
    steady, broken = make(scope=scope), make(scope=scope)
    for parts in (steady, broken):
        run(*parts, range(6))
        train_step(parts[0], parts[1], 6)
    weight = broken[0][4].weight.data.view(-1)
    index = int(broken[2].masks["4.weight"].to_bool().view(-1).nonzero()[5])
    good = weight[index].item()
    weight[index] = torch.inf
    before = snapshot(*broken)
    with pytest.raises(NonFiniteError, match=rf"'4\.weight' at flat index {index}"):
        broken[2].step()
    assert snapshot(*broken) == before
    weight[index] = good
    assert broken[2].step().step == steady[2].step().step == 6
    assert broken[2].masks == steady[2].masks


def test_non_finite_weights_can_be_kept():
    model, _, pruner = make(schedules.OneShot(0.9), nonfinite="keep")
    model[4].weight.data.view(-1)[7] = torch.nan
    pruner.step()
    assert model[4].weight.view(-1)[7].isnan()


def test_one_call_per_device_is_all_or_nothing_too(monkeypatch):
    parts = model, _, pruner = make()
    monkeypatch.setattr(layers, "_by_device", lambda held, names, scope: [[name] for name in names])
    run(*parts, range(6))
    train_step(*parts[:2], 6)
    model[4].weight.data.fill_(torch.nan)
    before = snapshot(*parts)
    with pytest.raises(NonFiniteError):
        pruner.step()
    assert snapshot(*parts) == before
    model[4].weight.data.fill_(1.0)
    assert [layer.num_pruned for layer in pruner.step().layers] == [
        round(RAMP.sparsity_at(6) * n) for n in (36, 1024, 48)
    ]


def remove(model):
    del model[4]


def replace(model):
    model[4].weight = nn.Parameter(model[4].weight.detach().clone())


def reshape(model):
    model[4].weight.data = model[4].weight.data[:2].clone()


@pytest.mark.parametrize("change", [remove, replace, reshape])
def test_changed_models_are_refused_at_the_next_update(change):
    model, optimizer, pruner = make()
    run(model, optimizer, pruner, range(6))
    change(model)
    before = snapshot(model, optimizer, pruner)
    with pytest.raises(TargetError, match=r"'4\.weight'"):
        pruner.step()
    assert snapshot(model, optimizer, pruner) == before


# -- state_dict


def test_state_dict_is_a_copy_of_plain_data():
    parts = make()
    run(*parts, range(7))
    state = parts[2].state_dict()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    run(*parts, range(7, 11))
    other = make()
    for source in (state, loaded):
        other[2].load_state_dict(source)
        assert other[2].step_count == 7
        assert other[2].sparsity == pytest.approx(RAMP.sparsity_at(6), abs=1e-2)
        assert [report.step for report in other[2].history] == [2, 6]


def test_loading_prunes_weights_and_state_at_once():
    source, fresh = make(), make()
    run(*source, range(7))
    train_step(*fresh[:2], 0)
    masks = dict(fresh[2].masks)
    fresh[2].load_state_dict(source[2].state_dict())
    assert all(fresh[2].masks[name] is mask for name, mask in masks.items())
    assert fresh[2].masks == source[2].masks
    assert_dead(*fresh)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ignore": "0"}, r"unexpected: \['0\.weight"),
        ({"targets": "*"}, r"missing: \['1\.weight"),
        ({"scope": "global"}, "scope 'global', got 'layer'"),
        ({"distribution": "erk"}, "distribution"),
        ({"overrides": {"3": 0.5}}, "overrides"),
        ({"schedule": schedules.Cubic(0.05, 0.8, 2, 10, frequency=4)}, "schedule"),
    ],
)
def test_state_of_another_run_changes_nothing(options, message):
    source = make()
    run(*source, range(7))
    if options == {"targets": "*"}:
        options = {"targets": ["1.weight", nn.Conv2d, nn.Linear]}
    other = make(**options)
    before = snapshot(*other)
    with pytest.raises(StateError, match=message):
        other[2].load_state_dict(source[2].state_dict())
    assert snapshot(*other) == before


def test_state_of_another_shape():
    model = nn.Sequential(nn.Linear(4, 4))
    wide = nn.Sequential(nn.Linear(5, 4))
    pruners = [GMPScheduler(m, torch.optim.SGD(m.parameters(), lr=0.1), RAMP) for m in (model, wide)]
    with pytest.raises(StateError, match=r"0\.weight \(5, 4\)|0\.weight \(4, 5\)"):
        pruners[0].load_state_dict(pruners[1].state_dict())


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: [],
        lambda state: {},
        lambda state: {**state, "version": 99},
        lambda state: {key: value for key, value in state.items() if key != "layers"},
        lambda state: {**state, "step_count": None},
        lambda state: {**state, "step_count": float("inf")},
        lambda state: {**state, "history": [{"step": 1}]},
        lambda state: {**state, "layers": {name: {**v, "mask": v["mask"][1:]} for name, v in state["layers"].items()}},
        lambda state: {**state, "layers": {name: {**v, "threshold": [1.0]} for name, v in state["layers"].items()}},
        lambda state: {**state, "layers": []},
    ],
)
def test_damaged_state_changes_nothing(damage):
    source, other = make(), make()
    run(*source, range(7))
    run(*other, range(3))
    before = snapshot(*other)
    with pytest.raises(StateError, match="load_state_dict: expected"):
        other[2].load_state_dict(damage(source[2].state_dict()))
    assert snapshot(*other) == before
