"""Masks that may grow back: each update ranks all weights anew, and the optimizer steps all of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from gmp_kernels import GMPScheduler, NonFiniteError, StateError, optim, prune_, schedules
from gmp_kernels.patterns import NM, Unstructured
from gmp_kernels.tools.testing import assert_bitwise_equal

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "torch.AdamW": lambda params: torch.optim.AdamW(params, lr=0.05),
    "torch.SGD": lambda params: torch.optim.SGD(params, lr=0.2, momentum=0.9),
    "AdamW": lambda params: optim.AdamW(params, lr=0.05),
    "AdamW, compact": lambda params: optim.AdamW(params, lr=0.05, compact_state=True),
    "SGD": lambda params: optim.SGD(params, lr=0.2, momentum=0.9),
}


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    x = torch.randn(10, 12, generator=torch.Generator().manual_seed(step))
    optimizer.zero_grad()
    (model(x) - x[:, :8]).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_every_step_equals_a_projection_written_by_hand(make: Any, scope: Any) -> None:
    model, twin = network(), network()
    optimizer = make(model.parameters())
    plain = make(twin.parameters())
    schedule = schedules.Linear(0.2, 0.6, begin_step=0, end_step=4, frequency=1)
    pruner = GMPScheduler(model, optimizer, schedule, scope=scope, regrow=True, backend="cpu")
    regrown = 0
    for step in range(30):
        train(model, optimizer, step)
        train(twin, plain, step)
        before = {name: mask.to_bool() for name, mask in pruner.masks.items()}
        report = pruner.step()
        assert report is not None
        weights = [twin[0].weight.detach(), twin[2].weight.detach()]
        result = prune_(weights, sparsity=schedule.sparsity_at(step + 1), scope=scope, backend="reference")
        for name, mask in zip(pruner.masks, result.masks, strict=True):
            assert pruner.masks[name] == mask
            regrown += int((mask.to_bool() & ~before[name]).sum())
        for own, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert_bitwise_equal(own.detach(), other.detach())
        assert report.sparsity == pytest.approx(schedule.sparsity_at(step + 1), abs=0.01)
        assert pruner.sparsity == pytest.approx(report.sparsity)
    assert regrown > 0
    assert pruner.finished
    assert pruner.verify() == {name: mask.numel - mask.num_kept for name, mask in pruner.masks.items()}


def test_the_state_of_pruned_weights_lives_on() -> None:
    model = network()
    optimizer = optim.AdamW(model.parameters(), lr=0.01)
    pruner = GMPScheduler(model, optimizer, schedules.Constant(0.9), regrow=True)
    for step in range(3):
        train(model, optimizer, step)
        pruner.step()
    pruned = ~pruner.masks["0.weight"].to_bool()
    assert optimizer.state[model[0].weight]["exp_avg"][pruned].count_nonzero() > 0


def test_between_updates_weights_are_dense() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = schedules.Linear(0.5, 0.5, begin_step=0, end_step=4, frequency=4)
    pruner = GMPScheduler(model, optimizer, schedule, targets="0", regrow=True)
    made = []
    for step in range(13):
        train(model, optimizer, step)
        if pruner.step() is not None:
            made.append(pruner.step_count)
            assert (model[0].weight == 0).sum() == 96
        elif step > 2:
            assert (model[0].weight == 0).sum() < 96
            assert pruner.verify()["0.weight"] < 96
    assert made == [1, 4, 8, 12]


def test_master_weights_and_weights_have_the_same_zeros() -> None:
    model = network().bfloat16()
    optimizer = optim.AdamW(model.parameters(), lr=0.05, master_weights=True)
    pruner = GMPScheduler(model, optimizer, schedules.Constant(0.75), regrow=True)
    for step in range(4):
        optimizer.zero_grad()
        x = torch.randn(10, 12, generator=torch.Generator().manual_seed(step)).bfloat16()
        (model(x) - x[:, :8]).square().mean().backward()
        optimizer.step()
        pruner.step()
        for name in ("0", "2"):
            parameter = model.get_submodule(name).weight
            master = optimizer.master_weight(parameter)
            assert master is not None
            pruned = ~pruner.masks[f"{name}.weight"].to_bool()
            assert parameter[pruned].count_nonzero() == 0
            assert master[pruned].count_nonzero() == 0


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_resumes_bit_by_bit(make: Any) -> None:
    def run() -> tuple[nn.Module, torch.optim.Optimizer, GMPScheduler]:
        model = network()
        optimizer = make(model.parameters())
        schedule = schedules.Cubic(0.1, 0.7, begin_step=0, end_step=8, frequency=2)
        return model, optimizer, GMPScheduler(model, optimizer, schedule, regrow=True)

    model, optimizer, pruner = run()
    for step in range(5):
        train(model, optimizer, step)
        pruner.step()
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), pruner.state_dict()))
    resumed, resumed_optimizer, resumed_pruner = run()
    resumed.load_state_dict(saved[0])
    resumed_optimizer.load_state_dict(saved[1])
    resumed_pruner.load_state_dict(saved[2])
    for step in range(5, 12):
        train(model, optimizer, step)
        train(resumed, resumed_optimizer, step)
        first, second = pruner.step(), resumed_pruner.step()
        assert (first is None) == (second is None)
    for own, other in zip(model.parameters(), resumed.parameters(), strict=True):
        assert_bitwise_equal(own.detach(), other.detach())
    assert pruner.masks == resumed_pruner.masks


def test_a_state_is_refused_where_masks_only_shrink() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = GMPScheduler(model, optimizer, schedules.Constant(0.5), regrow=True)
    state = pruner.state_dict()
    pruner.remove()
    other = GMPScheduler(model, optimizer, schedules.Constant(0.5))
    with pytest.raises(StateError, match="regrow"):
        other.load_state_dict(state)


def test_nan_changes_nothing() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = GMPScheduler(model, optimizer, schedules.Constant(0.5), regrow=True)
    train(model, optimizer, 0)
    pruner.step()
    train(model, optimizer, 1)
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NonFiniteError, match=r"2\.weight"):
        pruner.step()
    for name, value in model.state_dict().items():
        assert_bitwise_equal(value, before[name], name)
    with torch.no_grad():
        model[2].weight[0, 0] = 0.0
    assert pruner.step() is not None


def test_keeps_some_weights_of_every_row() -> None:
    model = network()
    with torch.no_grad():
        model[0].weight[3] *= 1e-3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruner = GMPScheduler(model, optimizer, schedules.Constant(0.8), min_kept_per_row=2, regrow=True)
    report = pruner.step()
    assert report is not None
    assert [layer.num_pruned for layer in report.layers] == [round(0.8 * 192), round(0.8 * 128)]
    for mask in pruner.masks.values():
        assert mask.to_bool().sum(1).min() >= 2
    assert "min" in repr(pruner) or "kept per row" in repr(pruner)


def test_ends_in_two_of_four() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    schedule = schedules.Linear(0.1, 0.5, begin_step=0, end_step=4, frequency=1)
    pruner = GMPScheduler(model, optimizer, schedule, pattern=NM(2, 4), regrow=True)
    for step in range(8):
        train(model, optimizer, step)
        pruner.step()
    for mask in pruner.masks.values():
        assert (mask.to_bool().view(-1, 4).sum(1) == 2).all()


def test_a_longer_run_keeps_a_bounded_history(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gmp_kernels.pruner.updates.MOST_ANEW", 5)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = GMPScheduler(model, optimizer, schedules.Constant(0.5), regrow=True)
    for step in range(12):
        train(model, optimizer, step)
        pruner.step()
    assert [report.step for report in pruner.history] == [8, 9, 10, 11, 12]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"start": "zeros"}, "start=None with regrow=True"),
        ({"min_kept_per_row": 2, "pattern": NM(2, 4)}, "got both"),
        ({"min_kept_per_row": -1}, "0 or more"),
    ],
)
def test_refuses_what_contradicts_it(options: dict[str, Any], words: str) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=words):
        GMPScheduler(model, optimizer, schedules.Constant(0.5), regrow=True, **options)


def test_min_kept_per_row_is_a_pattern() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    own = GMPScheduler(model, optimizer, schedules.Constant(0.8), min_kept_per_row=2)
    settings = own.state_dict()["settings"]
    own.remove()
    same = GMPScheduler(model, optimizer, schedules.Constant(0.8), pattern=Unstructured(2))
    assert same.state_dict()["settings"] == settings
