"""Pruned weights stay zero, whatever happens around the pruner; what had to be repaired is said once."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from held_runs import EVERY_OPTIMIZER, Run, assert_held, start, train
from torch import nn

from gmp_kernels import GMPScheduler, optim, schedules
from gmp_kernels.errors import GMPWarning, StateError, TargetError
from gmp_kernels.pruner import enforcement, updates
from gmp_kernels.pruner.watch import Watch
from gmp_kernels.reports import LayerReport


def by_torch_save(run: Run) -> Run:
    buffer = io.BytesIO()
    torch.save(run, buffer)
    buffer.seek(0)
    loaded: Run = torch.load(buffer, weights_only=False)
    return loaded


AGAIN: dict[str, Callable[[Run], Run]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda run: pickle.loads(pickle.dumps(run)),
    "torch.save": by_torch_save,
    "pruner_alone": lambda run: (lambda pruner: (pruner.model, pruner.optimizer, pruner))(copy.deepcopy(run[2])),
    "pruner_first": lambda run: tuple(reversed(copy.deepcopy(tuple(reversed(run))))),  # type: ignore[return-value]
}


@EVERY_OPTIMIZER
@pytest.mark.parametrize("again", AGAIN)
def test_copies_hold_their_own_weights(case: str, again: str) -> None:
    run = start(case)
    train(run)
    twin = AGAIN[again](run)
    before = twin[0][0].weight.detach().clone()
    train(run, 3)
    assert torch.equal(twin[0][0].weight, before)
    train(twin, 3)
    for held in (run, twin):
        assert_held(held)
        assert held[2].step_count == 4
    assert torch.equal(run[0][0].weight, twin[0][0].weight)


@EVERY_OPTIMIZER
def test_weights_loaded_back_are_pruned_again_and_that_is_said_once(case: str) -> None:
    run = start(case)
    dense = copy.deepcopy(run[0].state_dict())
    train(run)
    run[0].load_state_dict(dense)
    with pytest.warns(GMPWarning, match=r"1620 pruned weights of '0\.weight' and 1 other layer were not zero"):
        train(run)
    assert_held(run)
    for _ in range(2):
        run[0].load_state_dict(dense)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run[2].step()
        assert_held(run)


@EVERY_OPTIMIZER
def test_loading_the_same_zeros_is_no_news(case: str) -> None:
    run = start(case)
    train(run)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run[0].load_state_dict(copy.deepcopy(run[0].state_dict()))
        train(run, 2)
    assert_held(run)


@EVERY_OPTIMIZER
def test_writes_that_versions_do_not_show_are_found(case: str) -> None:
    run = start(case)
    train(run)
    for layer in (run[0][0], run[0][2]):
        layer.weight.data.fill_(0.5)
    with pytest.warns(GMPWarning, match="were not zero any more"):
        run[2].step()
    assert_held(run)


def test_a_write_to_one_layer_is_found_when_its_turn_comes() -> None:
    run = start("torch_momentum")
    train(run)
    run[0][2].weight.data.fill_(0.5)
    with pytest.warns(GMPWarning, match=r"'2\.weight' were not zero any more"):
        for _ in range(2):
            run[2].step()
    assert_held(run)


@EVERY_OPTIMIZER
def test_a_new_optimizer_is_repaired_after_until_it_is_assigned(case: str) -> None:
    run = start(case)
    train(run)
    new = torch.optim.Adam(run[0].parameters(), lr=0.01)
    with pytest.warns(GMPWarning, match=r"set pruner\.optimizer = new_optimizer"):
        train(run, 1, new)
    assert_held(run)
    assert run[2].step_count == 1
    run[2].optimizer = new
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(run, 3, new)
    assert_held(run)
    assert run[2].step_count == 4
    assert run[2].optimizer is new


@EVERY_OPTIMIZER
def test_an_optimizer_of_ours_can_take_over(case: str) -> None:
    run = start(case)
    train(run)
    new = optim.AdamW(run[0].parameters(), lr=0.01, compact_state=True)
    run[2].optimizer = new
    train(run, 2, new)
    assert_held(run)
    assert new.state[run[0][0].weight]["exp_avg"].numel() == 120


def test_an_optimizer_that_was_taken_over_from_holds_nothing() -> None:
    """Its compact state is laid out by bits that are written in place from then on."""
    model, first, pruner = run = start("gmp_adamw_compact", 0.5)
    train(run)
    second = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner.optimizer = second
    train(run, 2, second)
    copy.deepcopy(first)
    assert first.state_dict()["state"][0]["exp_avg"].shape == (30, 40)
    pruner.optimizer = first
    train(run, 2)
    assert_held(run, 0.5)
    pruner.optimizer = second
    pruner.remove()
    first.zero_grad()
    model(torch.randn(8, 40)).square().mean().backward()
    first.step()
    assert model[0].weight.count_nonzero() > 700


def test_an_optimizer_that_cannot_take_the_masks_changes_nothing() -> None:
    run = start("gmp_adamw_compact")
    train(run, 2)
    unfit = optim.AdamW(run[0].parameters(), lr=0.01)
    unfit.state[run[0][0].weight] = {"step": torch.tensor(1.0), "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}
    with pytest.raises(StateError, match="exp_avg"):
        run[2].optimizer = unfit
    assert run[2].optimizer is run[1]
    train(run, 2)
    assert_held(run)
    assert run[2].step_count == 4


def test_an_optimizer_of_other_parameters_cannot_take_over() -> None:
    run = start("torch_momentum")
    with pytest.raises(TargetError, match=r"'0\.weight'"):
        run[2].optimizer = torch.optim.SGD(run[0][2].parameters(), lr=0.1)
    train(run, 2)
    assert_held(run)


@EVERY_OPTIMIZER
def test_a_second_pruner_replaces_the_first(case: str) -> None:
    run = start(case)
    initial = copy.deepcopy(run[0].state_dict())
    train(run, 2)
    run[0].load_state_dict(initial)
    second = GMPScheduler(run[0], run[1], schedules.OneShot(0.5))
    with pytest.raises(StateError, match="parameters a newer one holds"):
        run[2].step()
    train((run[0], run[1], second), 3)
    assert_held((run[0], run[1], second), 0.5)


def test_a_pruner_of_some_of_the_layers_does_not_replace_one_of_all() -> None:
    run = start("torch_momentum")
    with pytest.raises(TargetError, match=r"'2\.weight', which this one leaves out; call remove\(\)"):
        GMPScheduler(run[0], run[1], schedules.OneShot(0.5), targets="0")
    train(run, 2)
    assert_held(run)
    run[2].remove()
    half = GMPScheduler(run[0], run[1], schedules.Constant(None), targets="0", start="zeros")
    train((run[0], run[1], half), 2)
    assert half.sparsity == pytest.approx(0.9)
    assert run[0][2].weight.count_nonzero() > 500


@EVERY_OPTIMIZER
def test_removed_pruners_hold_nothing(case: str) -> None:
    run = start(case)
    train(run, 2)
    run[2].remove()
    assert int((run[0][0].weight == 0).sum()) == 1080
    run[2].remove()
    for call in (run[2].step, lambda: run[2].load_state_dict(run[2].state_dict())):
        with pytest.raises(StateError, match="were let go by remove"):
            call()
    run[1].zero_grad()
    run[0](torch.randn(8, 40)).square().mean().backward()
    run[1].step()
    assert run[0][0].weight.count_nonzero() > 600


def test_a_pruner_that_is_gone_leaves_no_trace_but_its_masks() -> None:
    run = start("torch_momentum")
    train(run)
    gone = weakref.ref(run[2])
    model, optimizer = run[:2]
    del run
    assert gone() is None
    model(torch.randn(8, 40)).square().mean().backward()
    optimizer.step()
    assert int((model[0].weight == 0).sum()) == 1080


def test_pruners_that_are_gone_are_in_nobodys_way() -> None:
    run = start("gmp_momentum")
    train(run)
    model, optimizer = run[:2]
    del run
    half = GMPScheduler(model, optimizer, schedules.Constant(None), targets="0", start="zeros")
    train((model, optimizer, half), 3)
    # Nobody could let go of the other layer, so it is held as before.
    assert [int((layer.weight == 0).sum()) for layer in (model[0], model[2])] == [1080, 540]
    assert half.verify() == {"0.weight": 1080}


def test_master_weights_follow_weights_that_are_loaded() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 20)).bfloat16()
    optimizer = optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, master_weights=True)
    pruner = GMPScheduler(model, optimizer, schedules.OneShot(0.5))
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.full_like(p, 1e-3)
        optimizer.step()
        pruner.step()
    before = {p: optimizer.state[p]["master_weight"].clone() for p in model.parameters()}
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    pruner.step()
    # What rounds to the weights that were loaded is what they were rounded from.
    assert all(torch.equal(optimizer.state[p]["master_weight"], master) for p, master in before.items())
    model.load_state_dict({name: torch.full_like(value, 0.25) for name, value in model.state_dict().items()})
    with pytest.warns(GMPWarning, match="were not zero any more"):
        pruner.step()
    for layer in (model[0], model[2]):
        master = optimizer.state[layer.weight]["master_weight"]
        assert torch.equal(master, layer.weight.float())
        assert sorted(set(master.flatten().tolist())) == [0.0, 0.25]


def test_verify_names_the_layer() -> None:
    run = start("torch_momentum")
    train(run)
    run[0][2].weight.data.fill_(1.0)
    with pytest.raises(StateError, match=r"540 zeros in '2\.weight'.*got 540 that are not zero"):
        run[2].verify()


@EVERY_OPTIMIZER
@pytest.mark.parametrize("again", ["deepcopy", "pickle"])
def test_a_model_that_holds_its_pruner_can_be_copied(case: str, again: str) -> None:
    model, _, pruner = run = start(case)
    model.pruner = pruner
    train(run)
    twin: Any = copy.deepcopy(model) if again == "deepcopy" else pickle.loads(pickle.dumps(model))
    del model.pruner, run
    own = twin.pruner
    assert own.model is twin and own.optimizer.param_groups[0]["params"][0] is twin[0].weight
    train((twin, own.optimizer, own), 2)
    assert_held((twin, own.optimizer, own))


def test_parameters_can_be_swapped() -> None:
    """torch refuses that for tensors with weak references to them."""
    run = start("torch_momentum")
    train(run)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        run[0].to(torch.float64)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    run[2].verify()


@pytest.mark.parametrize("moment", [1, 2])
def test_an_interrupt_while_layers_are_reported(moment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def interrupted(*args: Any) -> LayerReport:
        made.append(args)
        if len(made) == moment:
            raise KeyboardInterrupt
        return LayerReport(*args)

    run = start("torch_momentum")
    monkeypatch.setattr(updates, "LayerReport", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run[2].step()
    assert [layer.num_pruned for layer in run[2].history[0].layers] == [1080, 540]
    assert run[2].step() is None
    train(run)
    assert_held(run)


def test_masks_that_memory_ran_out_under_are_applied_by_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    run = start("torch_momentum")
    train(run)
    state = run[2].state_dict()
    again = start("torch_momentum")

    def fail(*_: object, **__: object) -> list[int]:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(enforcement, "zero_with_state_", fail)
        with pytest.raises(MemoryError):
            again[2].load_state_dict(state)
    assert again[0][0].weight.all()
    monkeypatch.setattr(Watch, "sees_life", lambda *_: False)
    with pytest.warns(GMPWarning, match="were not zero any more"):
        again[2].step()
    assert_held(again)


def test_calls_without_steps_are_said_once() -> None:
    run = start("torch_momentum")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(99):
            run[2].step()
    with pytest.warns(GMPWarning, match=r"100 times in a row without a step of SGD.*count='calls'"):
        run[2].step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(200):
            run[2].step()
    assert (run[2].step_count, len(run[2].history)) == (0, 1)
