"""Thresholds found along with the optimizer step before a prune update: the same as without, or not used."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import thinned
from optim_cases import masked, random_masks
from torch import nn

from gmp_kernels import GMPScheduler, schedules
from gmp_kernels.backends import Gradient, Layer, Tally, UpdateTensor, choose
from gmp_kernels.errors import NonFiniteError, StateError
from gmp_kernels.masks import BitMask
from gmp_kernels.testing import DTYPES, adversarial_cases, assert_bitwise_equal, device_of

CPU = torch.device("cpu")
SCHEDULE = schedules.Linear(0.5, 0.9, begin_step=3, end_step=12, frequency=3)


def still(layers):
    """A step that leaves every weight as it is."""
    tensors = [UpdateTensor(weight, mask=mask) for weight, mask in layers]
    return "sgd", tensors, [Gradient(torch.zeros_like(layer.weight), 0) for layer in layers], [{"lr": 0.0}]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_global", [False, True], ids=["layer", "global"])
def test_what_a_step_finds_is_what_a_selection_would(kernels, dtype, is_global, num_threads):
    device = device_of(kernels)
    implementation, oracle = choose(kernels, device), choose("reference", CPU)
    found_any = 0
    for name in thinned(kernels, adversarial_cases(1, dtype), DTYPES.index(dtype) + 4 * is_global):
        weights = [adversarial_cases(n, dtype)[name].to(device, copy=True) for n in (1, 1000, 16384, 3 * 16384 + 77)]
        bits = [random_masks([w], 0.3)[w] if i % 2 else None for i, w in enumerate(weights)]
        for w, mask in zip(weights, bits, strict=True):
            if mask is not None:
                w[~mask.to_bool()] = 0.0
        layers = [Layer(w, None if m is None else m.packed) for w, m in zip(weights, bits, strict=True)]
        sizes = [w.numel() for w in weights]
        num_prune = [round(0.6 * n) for n in ([sum(sizes)] if is_global else sizes)]
        tally = Tally(tuple(layers), tuple(range(len(layers))), tuple(num_prune))
        found = implementation.update(*still(layers), tally)
        on_host = [Layer(w.cpu(), None if m is None else m.packed.cpu()) for w, m in zip(weights, bits, strict=True)]
        none = [None] * len(num_prune)
        expected, truth = implementation.select(layers, num_prune, none), oracle.select(on_host, num_prune, none)
        for selection, wanted, true in zip(found, expected, truth, strict=True):
            if selection is not None:
                found_any += 1
                np.testing.assert_equal(selection, wanted)
                np.testing.assert_equal(selection.threshold, true.threshold)
    if kernels in ("cpu", "simt"):
        assert found_any >= len(adversarial_cases(1, dtype)) // 2


def model_of(case="adamw", dtype=torch.float32, scope="layer", schedule=SCHEDULE, **options):
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(150, 120), nn.ReLU(), nn.Linear(120, 40)).to(dtype)
    optimizer = masked(case, model.parameters(), **options)
    return model, optimizer, GMPScheduler(model, optimizer, schedule, scope=scope)


def take_step(model, optimizer, step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 150, generator=generator).to(model[0].weight.dtype)
    optimizer.zero_grad()
    (model(x).float() ** 2).mean().backward()
    optimizer.step()


class Selections:
    """Counts how many groups had to be selected by a read of the weights."""

    def __init__(self, monkeypatch, kernels="cpu"):
        self.count = 0
        implementation = choose(kernels, CPU)
        select = implementation.select

        def counting(layers, num_prune, hints):
            self.count += sum(k > 0 for k in num_prune)
            return select(layers, num_prune, hints)

        monkeypatch.setattr(implementation, "select", counting)


@pytest.mark.parametrize("compact", [False, True], ids=["dense", "compact"])
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize(
    ("dtype", "master"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)], ids=str
)
def test_a_run_prunes_the_same_without_reading_the_weights_twice(monkeypatch, dtype, master, scope, compact):
    runs = [model_of(dtype=dtype, scope=scope, compact_state=compact, master_weights=master) for _ in range(2)]
    monkeypatch.setattr(runs[1][1], "expect_prune", lambda *_: None)
    runs[1][1]._expected = None
    selections = Selections(monkeypatch)
    counts = [0, 0]
    for step in range(15):
        for i, (model, optimizer, pruner) in enumerate(runs):
            before = selections.count
            take_step(model, optimizer, step)
            pruner.step()
            counts[i] += selections.count - before
        for (name, mask), other in zip(runs[0][2].masks.items(), runs[1][2].masks.values(), strict=True):
            assert_bitwise_equal(mask.packed, other.packed, name)
    assert [report.layers for report in runs[0][2].history] == [report.layers for report in runs[1][2].history]
    num_groups = 1 if scope == "global" else 2
    assert counts == [0, 4 * num_groups]


def before_the_first_update(monkeypatch, **options):
    model, optimizer, pruner = model_of(**options)
    for step in range(3):
        take_step(model, optimizer, step)
        pruner.step()
    take_step(model, optimizer, 3)
    return model[0].weight, pruner, Selections(monkeypatch)


def assert_pruned_as_selected_anew(weight, pruner):
    pristine = weight.detach().clone()
    pruner.step()
    mask = pruner.masks["0.weight"]
    assert mask.numel - mask.num_kept == round(0.5 * mask.numel)
    order = np.lexsort((-np.arange(mask.numel), pristine.abs().view(-1).double().numpy()))
    expected = np.ones(mask.numel, dtype=bool)
    expected[order[: round(0.5 * mask.numel)]] = False
    assert np.array_equal(mask.to_bool().view(-1).numpy(), expected)


def scale(weight):
    weight.mul_(0.9)


def scale_data(weight):
    weight.data.mul_(0.9)


def replace_data(weight):
    weight.data = weight.data * 0.9


@pytest.mark.parametrize("change", [scale, scale_data, replace_data], ids=lambda f: f.__name__)
def test_weights_changed_in_between_are_read_again(monkeypatch, change):
    weight, pruner, selections = before_the_first_update(monkeypatch)
    with torch.no_grad():
        change(weight)
    assert_pruned_as_selected_anew(weight, pruner)
    assert selections.count == 2


def test_a_mask_changed_in_between_is_counted_again(monkeypatch):
    weight, pruner, selections = before_the_first_update(monkeypatch)
    bits = torch.ones(weight.shape, dtype=torch.bool)
    bits[0] = False
    pruner.masks["0.weight"].packed.copy_(BitMask.from_bool(bits).packed)
    pruner.step()
    mask = pruner.masks["0.weight"]
    assert mask.numel - mask.num_kept == round(0.5 * mask.numel)
    assert not mask.to_bool()[0].any()
    assert selections.count == 2


def few_places(weight):
    """Places that the sample does not see: the hash stays the same when they change."""
    implementation = choose("cpu", CPU)
    flat = weight.detach().view(-1)
    before = implementation.fingerprints([Layer(weight.detach(), None)])
    for start in range(0, flat.numel() - 16, 16):
        kept = flat[start : start + 16].clone()
        flat.data[start : start + 16] = 5.0
        unseen = implementation.fingerprints([Layer(weight.detach(), None)]) == before
        flat.data[start : start + 16] = kept
        if unseen:
            return flat.data[start : start + 16]
    raise AssertionError("the sample sees everything")


def test_too_few_are_made_up_for(monkeypatch):
    weight, pruner, selections = before_the_first_update(monkeypatch)
    few_places(weight)[:] = 5.0  # weights below the threshold are gone
    assert_pruned_as_selected_anew(weight, pruner)
    assert selections.count == 2


def test_too_many_are_an_error_that_names_the_cause(monkeypatch):
    weight, pruner, _ = before_the_first_update(monkeypatch)
    few_places(weight)[:] = 1e-6
    with pytest.raises(StateError, match=r"not through \.data"):
        pruner.step()


def test_nan_is_found_along_the_way_and_changes_nothing(monkeypatch):
    model, optimizer, pruner = model_of()
    for step in range(3):
        take_step(model, optimizer, step)
        pruner.step()
    for p in model.parameters():
        p.grad.zero_()
    model[0].weight.grad[7, 3] = float("nan")
    optimizer.step()
    before = model[0].weight.detach().clone()
    with pytest.raises(NonFiniteError, match=r"'0\.weight' at flat index 1053"):
        pruner.step()
    assert_bitwise_equal(model[0].weight.detach(), before, "weights")


def test_a_skipped_step_and_a_second_one_before_the_update(monkeypatch):
    model, optimizer, pruner = model_of()
    for step in range(3):
        take_step(model, optimizer, step)
        pruner.step()
    optimizer.found_inf = torch.tensor(1.0)
    take_step(model, optimizer, 3)
    optimizer.found_inf = None
    take_step(model, optimizer, 4)
    take_step(model, optimizer, 5)
    selections = Selections(monkeypatch)
    assert_pruned_as_selected_anew(model[0].weight, pruner)
    assert selections.count == 0


def test_a_parameter_without_gradient_is_selected_as_ever(monkeypatch):
    model, optimizer, pruner = model_of()
    for step in range(3):
        take_step(model, optimizer, step)
        pruner.step()
    model[2].weight.grad = None
    optimizer.step()
    selections = Selections(monkeypatch)
    assert_pruned_as_selected_anew(model[0].weight, pruner)
    assert selections.count == 2
