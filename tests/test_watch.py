"""Zeros that a model has and masks do not know of, and what tells that weights were written without reading them."""

from __future__ import annotations

import copy
import warnings
from contextlib import suppress

import pytest
import torch
from faults import interrupted
from held_runs import EVERY_OPTIMIZER, OPTIMIZERS, assert_held, start, train
from torch import nn

from gmp_kernels import GMPScheduler, schedules
from gmp_kernels.errors import GMPWarning
from gmp_kernels.masks import BitMask
from gmp_kernels.pruner import watch
from gmp_kernels.pruner.watch import Watch, _sample_of, compare, zeros_in
from gmp_kernels.pruner.zeroing import SLICE


@EVERY_OPTIMIZER
def test_zeros_that_nobody_told_of_are_held_and_said_once(case: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 20))
    with torch.no_grad():
        model[0].weight[:, ::2] = 0.0
    optimizer = OPTIMIZERS[case](model.parameters())
    pruner = GMPScheduler(model, optimizer, schedules.OneShot(0.9, step=3))
    with pytest.warns(GMPWarning, match=r"33\.3% of the weights to be pruned are zero already and are held"):
        train((model, optimizer, pruner), 2)
    assert pruner.layer_sparsities() == {"0.weight": 0.5, "2.weight": 0.0}
    assert int((model[0].weight == 0).sum()) == 600
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train((model, optimizer, pruner), 3)
    assert_held((model, optimizer, pruner))


@pytest.mark.filterwarnings("ignore::gmp_kernels.errors.GMPWarning")
def test_an_interrupt_leaves_zeros_that_nobody_told_of_held_or_still_to_be_found() -> None:
    for after in range(0, 3000, 40):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 20))
        with torch.no_grad():
            model[0].weight[:, ::2] = 0.0
            model[2].weight[::2] = 0.0
        pruner = GMPScheduler(model, torch.optim.SGD(model.parameters(), lr=0.1), schedules.OneShot(0.9, step=3))
        with suppress(KeyboardInterrupt), interrupted(after):
            pruner.step()
        torch.set_grad_enabled(True)
        in_masks = {name: mask.sparsity for name, mask in pruner.masks.items()}
        assert pruner.layer_sparsities() == in_masks
        assert set(in_masks.values()) in ({0.0}, {0.5}), after
        pruner.step()
        assert set(pruner.layer_sparsities().values()) == {0.5}


def test_zeros_can_be_let_train() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 20))
    with torch.no_grad():
        model[0].weight[:, ::2] = 0.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train((model, optimizer, GMPScheduler(model, optimizer, schedules.OneShot(0.9, step=3), start={})), 2)
    assert model[0].weight.count_nonzero() > 1100


def test_a_layer_that_starts_as_zeros_is_let_train() -> None:
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 20))
    nn.init.zeros_(model[2].weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train((model, optimizer, GMPScheduler(model, optimizer, schedules.OneShot(0.9, step=3))), 2)
    assert model[2].weight.any()


@EVERY_OPTIMIZER
def test_loading_into_a_layer_that_starts_as_zeros_is_no_news(case: str) -> None:
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 20))
    nn.init.zeros_(model[2].weight)
    optimizer = OPTIMIZERS[case](model.parameters())
    pruner = GMPScheduler(model, optimizer, schedules.OneShot(0.9, step=3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            model.load_state_dict(copy.deepcopy(model.state_dict()))
            pruner.step()
    train((model, optimizer, pruner))


@EVERY_OPTIMIZER
def test_resuming_all_but_the_pruner_is_noticed(case: str) -> None:
    run = start(case)
    train(run, 2)
    saved = copy.deepcopy((run[0].state_dict(), run[1].state_dict()))
    again = start(case)
    again[0].load_state_dict(saved[0])
    again[1].load_state_dict(saved[1])
    with pytest.warns(GMPWarning, match=r"To resume a run, load the pruner's state_dict\(\) too"):
        train(again, 2)
    assert_held(again)


def test_later_weights_loaded_without_their_masks_are_noticed() -> None:
    run = start("torch_momentum", 0.5)
    train(run)
    sparser = copy.deepcopy(run[0].state_dict())
    sparser["0.weight"][:, :30] = 0.0
    run[0].load_state_dict(sparser)
    with pytest.warns(GMPWarning, match="have become zero although their masks keep them"):
        run[2].step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run[0].load_state_dict(sparser)
        run[2].step()


def test_zeros_that_loaded_masks_keep_are_let_train() -> None:
    model, _, pruner = start("torch_momentum", 0.5, start={})
    with torch.no_grad():
        model[0].weight[:, ::2] = 0.0
    again = start("torch_momentum", 0.5)
    again[0].load_state_dict(model.state_dict())
    again[2].load_state_dict(pruner.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again[1].step()
    assert again[2].sparsity == 0.0


def test_what_is_in_its_place_is_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    run = start("torch_momentum")
    train(run)
    monkeypatch.setattr(watch, "check_present", None)
    run[2].step()


def test_samples_are_spread_and_chosen_anew() -> None:
    n = 100_000
    weight = nn.Parameter(torch.ones(n))
    upper = BitMask.from_bool(torch.arange(n) < n // 2)
    model = nn.ParameterDict({"weight": weight})
    watch = Watch(model, {"weight": weight})
    assert watch.sees_life(["weight"], {"weight": upper})
    with torch.no_grad():
        weight[n // 2 :] = 0.0
    assert not watch.sees_life(["weight"], {"weight": upper})
    lower = BitMask.from_bool(torch.arange(n) >= n // 2)
    watch.forget_samples()
    assert watch.sees_life(["weight"], {"weight": lower})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_contradictions_are_counted_in_slices(dtype: torch.dtype) -> None:
    n = 2 * SLICE + 21
    weight = torch.ones(n, dtype=dtype)
    weight[::5] = 0.0
    mask = BitMask.from_bool(torch.arange(n) % 3 > 0)
    pruned = torch.arange(n) % 3 == 0
    expected = [int((pruned & (weight != 0)).sum()), int((~pruned & (weight == 0)).sum())]
    assert compare(weight, mask).tolist() == expected
    square = weight[: 1 << 20].view(1024, 1024).t()
    part = BitMask.from_bool(mask.to_bool()[: 1 << 20].view(1024, 1024))
    found = compare(square, part).tolist()
    assert found == [int((~part.to_bool() & (square != 0)).sum()), int((part.to_bool() & (square == 0)).sum())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_zeros_are_counted_in_parts(dtype: torch.dtype) -> None:
    weight = torch.ones(2 * SLICE + 21, dtype=dtype)
    weight[::5] = 0.0
    weight[1::7] = -0.0
    assert len(zeros_in(weight)) == 3
    image = weight[:3600].view(3, 8, 10, 15)
    for tensor in (weight, weight[:0], image, image.to(memory_format=torch.channels_last), image[:, 1:, ::2]):
        assert int(sum(zeros_in(tensor))) == int((tensor == 0).sum())


def test_weights_that_come_back_to_life_with_their_masks_are_not_looked_at_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, denser = start("torch_momentum", 0.9), start("torch_momentum", 0.1)
    train(run, 4)
    train(denser)
    run[2].load_state_dict(denser[2].state_dict(), masks_only=True)
    run[0].load_state_dict(denser[0].state_dict())
    run[2].step()
    monkeypatch.setattr(watch, "compare", None)
    for _ in range(4):
        run[2].step()


@pytest.mark.parametrize("numel", [1, 5, 64, 1000, 1024, 9001, 1 << 16])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.9, 1.0])
def test_samples_are_pruned_weights_of_many_places(numel: int, share: float) -> None:
    kept = torch.rand(numel, generator=torch.Generator().manual_seed(0)) >= share
    for offset in range(5):
        chosen = _sample_of(BitMask.from_bool(kept), offset)[0].tolist()
        assert not kept[chosen].any() and len(set(chosen)) == len(chosen)
        assert len(chosen) <= 64 and (share < 1.0 or len(chosen) >= min(16, numel))
        if numel >= 9001 and share == 0.9:
            assert len(chosen) >= 16 and max(chosen) - min(chosen) > numel / 2
            assert len({index % 64 for index in chosen}) > 8
