"""The scheduler in real training loops: what it prunes, what stays pruned, and what it refuses."""

import copy
import io
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gmp_kernels import BitMask, GMPScheduler, schedules
from gmp_kernels.errors import DTypeError, LayoutError, NonFiniteError, SparsityError, StateError, TargetError

RAMP = schedules.Cubic(0.05, 0.9, begin_step=2, end_step=10, frequency=4)
UPDATES = [2, 6, 10]

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "momentum_foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "adam_amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=2),
}


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 16), nn.Linear(16, 3))


def train_step(model, optimizer, step):
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(8, 1, 6, 6, generator=generator), torch.randint(3, (8,), generator=generator)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)


def make(schedule=RAMP, optimizer="momentum", **options):
    model = make_model()
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    return model, optimizer, GMPScheduler(model, optimizer, schedule, **options)


def run(model, optimizer, pruner, steps):
    for step in steps:
        train_step(model, optimizer, step)
        pruner.step()


def snapshot(model, optimizer, pruner) -> bytes:
    """Everything a refused call must leave alone, byte by byte."""
    buffer = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), pruner.state_dict()], buffer)
    return buffer.getvalue()


def state_tensors(optimizer, parameter):
    return [v for v in optimizer.state[parameter].values() if torch.is_tensor(v) and v.shape == parameter.shape]


def assert_dead(model, optimizer, pruner):
    """Pruned weights and their optimizer state are +0.0 (sign bit included)."""
    for name, mask in pruner.masks.items():
        parameter = model.get_parameter(name)
        for tensor in [parameter.detach(), *state_tensors(optimizer, parameter)]:
            pruned = tensor[~mask.to_bool()]
            assert not pruned.any() and not pruned.signbit().any()


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
    pruner = GMPScheduler(model, optimizer, schedule, distribution=distribution)
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
    pruner = GMPScheduler(model, optimizer, schedules.MultiStep({0: 0.375, 1: 0.375, 2: 0.5}))
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
        schedules.MultiStep({0: 0.4, 2: 0.8}), overrides={"0": 0.0, nn.Conv2d: 0.9, "4*": late}, distribution="erk"
    )
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
    pruner = GMPScheduler(model, torch.optim.SGD(model.parameters(), lr=0.1), schedules.OneShot(0.5))
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


# -- what it refuses


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
        ({"scope": "all"}, ValueError, "'layer', 'global'"),
        ({"nonfinite": "drop"}, ValueError, "'error', 'keep'"),
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
        GMPScheduler(model, optimizer, RAMP)
    assert list(GMPScheduler(model, optimizer, RAMP, ignore="0").masks) == ["3.weight", "4.weight"]


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda m: m.to(torch.float8_e4m3fn), DTypeError),
        (lambda m: m.to(memory_format=torch.channels_last), LayoutError),
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
    monkeypatch.setattr(pruner, "_batches", lambda names: [[name] for name in names])
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
        ({"schedule": schedules.Cubic(0.05, 0.8, 2, 10, 4)}, "schedule"),
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


def test_masks_are_bit_masks_of_ones_before_the_first_update():
    _, _, pruner = make()
    assert pruner.masks["3.weight"] == BitMask.ones((16, 64))
    assert pruner.step() is None
    assert pruner.layer_sparsities() == {"0.weight": 0.0, "3.weight": 0.0, "4.weight": 0.0}
