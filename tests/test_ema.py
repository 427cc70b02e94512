"""Averages of a model that gets sparser: those of torch and of timm, the real ones."""

from __future__ import annotations

import copy
import importlib.util
import pickle
from importlib.metadata import distribution
from typing import Any

import pytest
import torch
from compared_runs import assert_same_bits
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import gmp_kernels as gmp
from gmp_kernels.errors import TargetError
from gmp_kernels.integrations.ema import keep_masked
from gmp_kernels.tools.testing import assert_bitwise_equal


def timm_ema() -> Any:
    """One file of timm: the whole of it needs torchvision, whose usual build fits only a torch for CUDA."""
    path = distribution("timm").locate_file("timm/utils/model_ema.py")
    spec = importlib.util.spec_from_file_location("timm_model_ema", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ModelEmaV3


ModelEmaV3 = timm_ema()
AVERAGES = {
    "torch": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    "torch_buffers": lambda model: AveragedModel(model, avg_fn=lambda a, w, _: 0.9 * a + 0.1 * w, use_buffers=True),
    "torch_equal_weights": AveragedModel,
    "timm": lambda model: ModelEmaV3(model, decay=0.9),
    "timm_loop": lambda model: ModelEmaV3(model, decay=0.9, foreach=False, use_warmup=True),
    "timm_bfloat16": lambda model: ModelEmaV3(model, decay=0.9, dtype=torch.bfloat16),
    "timm_no_buffers": lambda model: ModelEmaV3(model, decay=0.9, exclude_buffers=True),
}
STEPS = 30


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 16), nn.Linear(16, 4))


def update(average: nn.Module, model: nn.Module, step: int) -> None:
    if isinstance(average, AveragedModel):
        average.update_parameters(model)
    else:
        average.update(model, step=step)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, run: Any, step: int) -> None:
    torch.manual_seed(step)
    optimizer.zero_grad()
    model(torch.randn(4, 2, 8, 8)).square().mean().backward()
    optimizer.step()
    run.step()


@pytest.mark.parametrize("kind", AVERAGES)
@pytest.mark.parametrize("wraps", [False, pytest.param(True, marks=pytest.mark.thorough)])
@pytest.mark.sampled(2)
def test_the_average_has_the_zeros_of_the_model_at_every_update(kind, wraps):
    model = make_model()
    trained = torch.compile(model, backend="eager") if wraps else model
    optimizer = gmp.optim.AdamW(model.parameters(), lr=0.01)
    run = gmp.Stages.from_steps(STEPS).attach(model, optimizer, 0.9)
    average = keep_masked(AVERAGES[kind](trained), run)
    plain = AVERAGES[kind](trained)
    sparsities = set()
    for step in range(1, STEPS + 1):
        train(model, optimizer, run, step)
        update(average, trained, step)
        update(plain, trained, step)
        sparsities.add(run.sparsity)
        for name, mask in run.pruner.masks.items():
            copies = (dict(m.module.named_parameters()) for m in (average, plain))
            masked, unmasked = (found.get(name, found.get(f"_orig_mod.{name}")) for found in copies)
            assert torch.equal(masked == 0, ~mask.to_bool())
            # Nothing else about the average has changed.
            assert_bitwise_equal(masked, torch.where(mask.to_bool(), unmasked, 0.0))
    assert len(sparsities) > 10 and max(sparsities) > 0.89
    assert any((p == 0).sum() < 0.5 * p.numel() for p in plain.module.parameters() if p.ndim > 1)  # the test can fail


def test_several_pruners_and_a_pruner_alone():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    stages = gmp.Stages.from_steps(STEPS)
    pruners = [
        gmp.GMPScheduler(model, optimizer, stages.schedule(0.1, final), targets=target)
        for target, final in (("0", 0.5), ("3", 0.8))
    ]
    both = keep_masked(AVERAGES["torch"](model), gmp.Run(pruners))
    added = keep_masked(keep_masked(AVERAGES["torch"](model), pruners[0]), pruners[1])
    one = keep_masked(AVERAGES["torch"](model), pruners[0])
    for step in range(STEPS):
        train(model, optimizer, gmp.Run(pruners), step)
        update(both, model, step)
        update(added, model, step)
        update(one, model, step)
    masks = pruners[0].masks | pruners[1].masks
    parameters = dict(both.module.named_parameters())
    assert all(torch.equal(parameters[name] == 0, ~mask.to_bool()) for name, mask in masks.items())
    assert_same_bits(dict(added.named_parameters()), dict(both.named_parameters()))
    alone = dict(one.module.named_parameters())
    assert torch.equal(alone["0.weight"] == 0, ~masks["0.weight"].to_bool())
    assert (alone["3.weight"] == 0).sum() < 0.8 * alone["3.weight"].numel()


def test_a_copy_of_the_average_is_kept_masked_too():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = gmp.Stages.from_steps(STEPS).attach(model, optimizer, 0.9)
    average = keep_masked(AVERAGES["timm"](model), run)
    copied = copy.deepcopy(average)
    for step in range(STEPS):
        train(model, optimizer, run, step)
        copied.update(model)
    assert torch.equal(average.module[3].weight, make_model()[3].weight)  # the copy updates itself
    assert torch.equal(copied.module[3].weight == 0, ~run.pruner.masks["3.weight"].to_bool())


def test_a_new_run_of_the_model_takes_over():
    model = make_model()
    average = AVERAGES["torch"](model)
    for final in (0.9, 0.5):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run = gmp.Stages.from_steps(STEPS).attach(model, optimizer, final, start={})
        keep_masked(average, run)
        for step in range(STEPS):
            train(model, optimizer, run, step)
            update(average, model, step)
        zeros = average.module.get_parameter("3.weight") == 0
        assert torch.equal(zeros, ~run.pruner.masks["3.weight"].to_bool())


def test_a_pickled_average_can_be_loaded():
    model = make_model()
    run = gmp.Stages.from_steps(STEPS).attach(model, torch.optim.SGD(model.parameters(), lr=0.1), 0.9)
    average = keep_masked(AveragedModel(model), run)
    loaded = pickle.loads(pickle.dumps(average))
    loaded.update_parameters(model)
    assert_same_bits(dict(loaded.named_parameters()), dict(average.named_parameters()))


def test_what_is_no_average_of_the_model_is_refused():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = gmp.Stages.from_steps(STEPS).attach(model, optimizer, 0.9)
    with pytest.raises(TypeError, match="AveragedModel"):
        keep_masked(model, run)
    with pytest.raises(TargetError, match=r"'0\.weight'"):
        keep_masked(AveragedModel(nn.Linear(2, 2)), run)
    with pytest.raises(TargetError, match=r"one without '0\.weight' of shape \(8, 2, 3, 3\)"):
        keep_masked(AveragedModel(nn.Sequential(nn.Linear(2, 2))), run)
    with pytest.raises(TypeError, match="expected a Run or GMPScheduler, got a Sequential"):
        keep_masked(AveragedModel(model), model)
