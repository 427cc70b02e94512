"""The scheduler in real training loops: what it prunes, and what stays pruned."""

import copy
import io
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_cases import (
    OPTIMIZERS,
    RAMP,
    UPDATES,
    assert_dead,
    make,
    make_model,
    run,
    train_step,
)
from torch import nn

from gmp_kernels import BitMask, GMPScheduler, schedules


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_run_reaches_every_target_exactly_and_keeps_it(optimizer, scope):
    model, optimizer, pruner = make(optimizer=optimizer, scope=scope)
    names = ["0.weight", "3.weight", "4.weight"]
    sizes = [36, 1024, 48]
    assert list(pruner.masks) == names
    assert pruner.sparsity == 0.0
    for step in range(14):
        train_step(model, optimizer, step)
        if pruner.history:
            assert_dead(model, optimizer, pruner)  # by the hook alone
        before = {name: mask.clone() for name, mask in pruner.masks.items()}
        report = pruner.step()
        assert_dead(model, optimizer, pruner)
        assert (report is not None) == (step in UPDATES)
        if report is None:
            assert pruner.masks == before
            continue
        assert pruner.history[-1] is report
        assert (report.step, report.target_sparsity) == (step, RAMP.sparsity_at(step))
        counts = [layer.num_pruned for layer in report.layers]
        if scope == "layer":
            assert counts == [round(report.target_sparsity * n) for n in sizes]
        assert sum(counts) == sum(round(report.target_sparsity * n) for n in (sizes if scope == "layer" else [1108]))
        for layer, n in zip(report.layers, sizes, strict=True):
            mask = pruner.masks[layer.name]
            assert layer.num_weights == n
            assert layer.num_pruned == n - mask.num_kept
            assert layer.num_newly_pruned == before[layer.name].num_kept - mask.num_kept
            assert not (mask.to_bool() & ~before[layer.name].to_bool()).any()
        assert report.sparsity == sum(counts) / 1108
        assert pruner.sparsity == pytest.approx(report.sparsity)
    assert [report.step for report in pruner.history] == UPDATES
    assert pruner.step_count == 14
    assert pruner.layer_sparsities() == {name: mask.sparsity for name, mask in pruner.masks.items()}
    assert model[1].weight.all() and model[3].bias.all()


@settings(max_examples=25, deadline=None)
@given(
    sparsities=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=5).map(sorted),
    distribution=st.sampled_from(["uniform", "erk"]),
    seed=st.integers(0, 1000),
)
def test_any_rising_schedule_is_met_exactly(sparsities, distribution, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(7, 9), nn.Linear(9, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = schedules.MultiStep(dict(enumerate(sparsities)))
    pruner = GMPScheduler(model, optimizer, schedule, distribution=distribution, count="calls")
    for sparsity in sparsities:
        counts = [layer.num_pruned for layer in pruner.step().layers]
        if distribution == "erk":
            assert sum(counts) == round(sparsity * 81)
        else:
            assert counts == [round(sparsity * 63), round(sparsity * 18)]


def test_thresholds_ties_and_flips_are_reported():
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    model[0].weight.data = torch.tensor([[3.0, -1.0, 1.0, 4.0], [1.0, 0.5, 5.0, 6.0]])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruner = GMPScheduler(model, optimizer, schedules.MultiStep({0: 0.375, 1: 0.375, 2: 0.5}), count="calls")
    first, same, last = (pruner.step().layers[0] for _ in range(3))
    assert (first.threshold, first.num_ties, first.num_pruned, first.num_newly_pruned) == (1.0, 3, 3, 3)
    assert (same.threshold, same.num_ties, same.num_pruned, same.num_newly_pruned) == (0.0, 0, 3, 0)
    assert (last.threshold, last.num_ties, last.num_pruned, last.num_newly_pruned) == (1.0, 1, 4, 1)
    assert last.sparsity == 0.5
    assert model[0].weight.tolist() == [[3.0, 0.0, 0.0, 4.0], [0.0, 0.0, 5.0, 6.0]]


def test_erk_keeps_small_layers_denser():
    _, _, pruner = make(schedules.OneShot(0.8), distribution="erk")
    # 222 of 1108 kept, in proportion to 4+1+3+3, 16+64 and 3+16: 22.2, 161.5 and 38.3.
    assert [layer.num_pruned for layer in pruner.step().layers] == [36 - 22, 1024 - 162, 48 - 38]


def test_overrides_first_match_wins():
    late = schedules.OneShot(0.5, step=3)
    _, _, pruner = make(
        schedules.MultiStep({0: 0.4, 2: 0.8}),
        overrides={"0": 0.0, nn.Conv2d: 0.9, "4*": late},
        distribution="erk",
        count="calls",
    )
    assert repr(pruner).splitlines()[0].endswith("scope='layer') and 2 layers by overrides")
    reports = [pruner.step() for _ in range(4)]
    reached = [None if r is None else {layer.name: layer.num_pruned for layer in r.layers} for r in reports]
    assert reached == [
        {"0.weight": 0, "3.weight": round(0.4 * 1024)},
        None,
        {"0.weight": 0, "3.weight": round(0.8 * 1024)},
        {"4.weight": 24},
    ]


def test_override_number_keeps_the_steps_of_the_schedule():
    model, optimizer, pruner = make(overrides={"*": 0.5})
    run(model, optimizer, pruner, range(11))
    assert [report.step for report in pruner.history] == UPDATES
    assert [layer.num_pruned for layer in pruner.history[-1].layers] == [18, 512, 24]


def test_tied_parameter_is_pruned_once():
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
    model[1].weight = model[0].weight
    pruner = GMPScheduler(model, torch.optim.SGD(model.parameters(), lr=0.1), schedules.OneShot(0.5), targets="1")
    assert [(layer.name, layer.num_pruned) for layer in pruner.step().layers] == [("0.weight", 12)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float16])
def test_other_dtypes(dtype):
    model = nn.Linear(8, 8).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    pruner = GMPScheduler(model, optimizer, schedules.OneShot(0.5))
    for _ in range(3):
        model(torch.ones(2, 8, dtype=dtype)).sum().backward()
        optimizer.step()
        pruner.step()
        assert_dead(model, optimizer, pruner)
    assert pruner.sparsity == 0.5


def test_state_of_other_strides_is_masked_too():
    model = nn.Linear(4, 6, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = GMPScheduler(model, optimizer, schedules.OneShot(0.5))
    for _ in range(2):
        model.weight.grad = torch.ones(4, 6).t()
        optimizer.step()
        pruner.step()
        assert not optimizer.state[model.weight]["momentum_buffer"].is_contiguous()
        assert_dead(model, optimizer, pruner)


def test_parameters_without_gradient_and_param_groups():
    model = make_model()
    groups = [{"params": model[:2].parameters(), "lr": 0.5}, {"params": model[3:].parameters(), "weight_decay": 0.1}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    pruner = GMPScheduler(model, optimizer, schedules.Constant(0.5))
    model[3].weight.grad = torch.ones_like(model[3].weight)
    for _ in range(2):
        optimizer.step()
        pruner.step()
    assert list(optimizer.state) == [model[3].weight]
    assert_dead(model, optimizer, pruner)


def test_counters_of_a_scalar_parameter_are_left_alone():
    model = nn.Module()
    model.gain = nn.Parameter(torch.tensor(0.5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    pruner = GMPScheduler(model, optimizer, schedules.OneShot(1.0), targets="gain")
    for _ in range(3):
        model.gain.grad = torch.tensor(1.0)
        optimizer.step()
        pruner.step()
    assert model.gain.item() == 0.0
    assert optimizer.state[model.gain]["step"].item() == 3.0


def test_compiled_model_trains_and_shares_checkpoints_with_the_plain_one():
    plain = make()
    model = make_model()
    compiled = torch.compile(model, backend="eager")
    optimizer = OPTIMIZERS["momentum"](compiled.parameters())
    pruner = GMPScheduler(compiled, optimizer, RAMP)
    run(*plain, range(8))
    run(compiled, optimizer, pruner, range(8))
    assert pruner.masks == plain[2].masks
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain[0].parameters(), strict=True))
    pruner.load_state_dict(plain[2].state_dict())


def test_model_and_optimizer_can_still_be_copied_and_saved():
    model, optimizer, pruner = make(schedules.Constant(0.5))
    run(model, optimizer, pruner, range(2))
    twin_model, twin = copy.deepcopy((model, optimizer))
    train_step(twin_model, twin, 3)
    buffer = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict(), optimizer), buffer)
    assert buffer.tell() > 0
    assert_dead(model, optimizer, pruner)


def test_masks_are_held_as_long_as_the_optimizer_lives():
    model, optimizer, pruner = make(schedules.Constant(0.5))
    run(model, optimizer, pruner, range(1))
    del pruner
    train_step(model, optimizer, 1)
    assert int((model[3].weight == 0).sum()) == 512


def test_reports_are_plain_data():
    model, optimizer, pruner = make()
    run(model, optimizer, pruner, range(3))
    data = json.loads(json.dumps(pruner.history[0].to_dict()))
    assert data["step"] == 2 and data["seconds"] >= 0.0
    assert [layer["num_pruned"] for layer in data["layers"]] == [round(0.05 * n) for n in (36, 1024, 48)]


def test_masks_are_bit_masks_of_ones_before_the_first_update():
    _, _, pruner = make()
    assert pruner.masks["3.weight"] == BitMask.ones((16, 64))
    assert pruner.step() is None
    assert pruner.layer_sparsities() == {"0.weight": 0.0, "3.weight": 0.0, "4.weight": 0.0}
