"""Weights that a module computes from parameters: what is pruned in their place, and what torch has pruned already."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from tree_building import bare, schedule, tensors_of

from gmp_kernels import BitMask, GMPScheduler, optim, schedules
from gmp_kernels.checkpoints.targets import TensorIndex
from gmp_kernels.errors import TargetError
from gmp_kernels.model.targets import ParameterIndex

PARAMETRIZED = {
    "weight_norm": (parametrizations.weight_norm, "0.parametrizations.weight.original1"),
    "spectral_norm": (parametrizations.spectral_norm, "0.parametrizations.weight.original"),
    "old weight_norm": (nn.utils.weight_norm, "0.weight_v"),
    "old spectral_norm": (nn.utils.spectral_norm, "0.weight_orig"),
    "torch prune": (lambda layer: prune.random_unstructured(layer, "weight", 0.1), "0.weight_orig"),
    "torch prune twice": (
        lambda layer: prune.identity(prune.random_unstructured(layer, "weight", 0.1), "weight"),
        "0.weight_orig",
    ),
    "both": (
        lambda layer: parametrizations.spectral_norm(parametrizations.weight_norm(layer)),
        "0.parametrizations.weight.original1",
    ),
}


def parametrized(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(PARAMETRIZED[kind][0](nn.Linear(64, 16)), nn.ReLU(), nn.Linear(16, 4))


@pytest.mark.parametrize("kind", PARAMETRIZED)
def test_zeros_of_what_a_weight_is_computed_from_are_zeros_of_the_weight(kind):
    model, name = parametrized(kind), PARAMETRIZED[kind][1]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    pruner = GMPScheduler(model, optimizer, schedules.Linear(0.2, 0.5, 1, 3))
    assert list(pruner.masks) == [name, "2.weight"]
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(8, 64)).square().sum().backward()
        optimizer.step()
        pruner.step()
        pruned = ~pruner.masks[name].to_bool()
        # Before the next forward pass as well as after it.
        assert not model[0].weight[pruned].any() and model[0].weight.isfinite().all()
    assert int(pruned.sum()) == 512
    model(torch.randn(8, 64))
    assert not model[0].weight[pruned].any()
    restored = parametrized(kind)
    other = GMPScheduler(restored, torch.optim.Adam(restored.parameters()), schedules.Linear(0.2, 0.5, 1, 3))
    restored.load_state_dict(model.state_dict())
    other.load_state_dict(pruner.state_dict())
    assert not restored[0].weight[pruned].any()


@pytest.mark.parametrize("kind", PARAMETRIZED)
@pytest.mark.parametrize("targets", ["0.weight", "0", nn.Linear, "*.weight", "re:0", ["0.weight", "2"]])
def test_a_computed_weight_can_be_meant_by_its_own_name(kind, targets):
    names = list(ParameterIndex(parametrized(kind)).select(targets, None)[0])
    assert names[0] == PARAMETRIZED[kind][1] and len(names) == (1 if targets in ("0.weight", "0", "re:0") else 2)


@pytest.mark.parametrize("kind", PARAMETRIZED)
def test_a_checkpoint_with_computed_weights_has_the_targets_of_its_model(kind):
    model = parametrized(kind)
    chosen = set(TensorIndex(tensors_of(model)).choose(None, None)[0])
    assert chosen == set(ParameterIndex(model).select(None, None)[0])
    assert TensorIndex(tensors_of(model)).choose(["0.weight"], None)[0] == [PARAMETRIZED[kind][1]]


class Symmetric(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.triu() + weight.triu(1).T


class LowRank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = bare(1, 8), bare(8, 1)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.up @ self.down


@pytest.mark.parametrize(
    ("wrap", "kind"),
    [
        (parametrizations.orthogonal, "Orthogonal"),
        (lambda layer: parametrize.register_parametrization(layer, "weight", Symmetric()), "Symmetric"),
        (lambda layer: parametrize.register_parametrization(layer, "weight", LowRank()), "LowRank"),
        (
            lambda layer: parametrize.register_parametrization(
                parametrizations.spectral_norm(layer), "weight", Symmetric()
            ),
            "Symmetric",
        ),
    ],
)
def test_other_parametrizations_are_left_out_and_refused_by_name(wrap, kind):
    model = nn.Sequential(wrap(nn.Linear(8, 8)), nn.Linear(8, 4))
    names, coverage = ParameterIndex(model).select(None, None)
    assert list(names) == ["1.weight"]
    matrices = [tensor for tensor in coverage.left_out if len(tensor.shape) == 2]
    assert matrices and {tensor.reason for tensor in matrices} == {f"parametrized by {kind}"}
    for name in ("0.weight", "0.parametrizations.weight.original"):
        with pytest.raises(TargetError, match=f"which is parametrized by {kind}; leave it out, or remove"):
            ParameterIndex(model).select(name, None)
    with pytest.raises(TargetError, match=f"is parametrized by {kind}"):
        ParameterIndex(model).select("0", None)
    assert list(ParameterIndex(model).select("*", None)[0]) == ["1.weight"]
    if kind == "Orthogonal":
        assert TensorIndex(tensors_of(model)).choose(None, None)[0] == ["1.weight"]
        for name in ("0.weight", "0.parametrizations.weight.original"):
            with pytest.raises(TargetError, match="which is part of a parametrization; leave it out, or remove"):
                TensorIndex(tensors_of(model)).choose([name], None)


@pytest.mark.parametrize("kind", ["weight_norm", "old weight_norm"])
def test_lengths_of_weight_norm_are_no_targets(kind):
    model = parametrized(kind)
    lengths = PARAMETRIZED[kind][1].replace("original1", "original0").replace("_v", "_g")
    assert lengths not in ParameterIndex(model).select("*", None)[0]
    with pytest.raises(TargetError, match="a length that weight_norm keeps apart"):
        ParameterIndex(model).select(lengths, None)


@pytest.mark.parametrize("kind", ["weight_norm", "old weight_norm"])
def test_a_row_of_weight_norm_that_loses_every_weight_is_named(kind):
    model, name = parametrized(kind), PARAMETRIZED[kind][1]
    with torch.no_grad():
        model.get_parameter(name)[3] *= 1e-3
        model.get_parameter(name)[5] *= 1e-3
    pruner = schedule(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=f"got 2 without one in '{name}'.*remove the weight_norm before pruning"):
            pruner.step()
    # As an error, it comes when everything else is done.
    assert len(pruner.history) == 1 and pruner.masks[name].sparsity == 0.5


def test_the_power_iteration_of_spectral_norm_is_left_alone():
    model = parametrized("old spectral_norm")
    before = model[0].weight_u.clone()
    schedule(model).step()
    assert torch.equal(model[0].weight_u, before)


def test_recurrent_layers_under_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.utils.weight_norm(nn.LSTM(8, 6), "weight_hh_l0")
    pruner = schedule(model)
    assert list(pruner.masks) == ["weight_ih_l0", "weight_hh_l0_v"]
    pruner.step()
    assert (model.weight_hh_l0 == 0).float().mean() == 0.5


def masked_by_torch() -> nn.Sequential:
    """Two layers of which torch's own pruning masks half of the first one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4))
    prune.random_unstructured(model[0], "weight", 0.5)
    return model


STARTS = {
    "none": lambda model: None,
    "zeros": lambda model: "zeros",
    "empty": lambda model: {},
    "mask": lambda model: {"0.weight_orig": BitMask.from_bool((torch.arange(1024) % 3 > 0).view(16, 64))},
    "mask of another": lambda model: {"2.weight": BitMask.from_bool((torch.arange(64) % 3 > 0).view(4, 16))},
}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, lr=0.01),
        lambda p: optim.AdamW(p, lr=0.01),
        lambda p: optim.AdamW(p, lr=0.01, compact_state=True),
    ],
    ids=["torch", "ours", "compact"],
)
def test_what_torch_has_masked_is_pruned_from_the_start(start, make):
    model = masked_by_torch()
    given = STARTS[start](model)
    kept = model[0].weight_mask.bool()
    if start == "mask":
        kept &= given["0.weight_orig"].to_bool()
    optimizer = make(model.parameters())
    before = {name: mask.clone() for name, mask in given.items()} if isinstance(given, dict) else given
    pruner = GMPScheduler(model, optimizer, schedules.OneShot(0.8, step=2), start=given)
    assert given == before
    assert torch.equal(pruner.masks["0.weight_orig"].to_bool(), kept)
    for step in range(4):
        num_zero = {"0.weight_orig": int((model[0].weight == 0).sum()), "2.weight": int((model[2].weight == 0).sum())}
        assert pruner.verify() == num_zero
        assert pruner.sparsity == pytest.approx(sum(num_zero.values()) / 1088)
        assert num_zero["0.weight_orig"] == (round(0.8 * 1024) if step > 2 else 1024 - int(kept.sum()))
        optimizer.zero_grad()
        model(torch.randn(8, 64)).square().sum().backward()
        model[0].weight_orig.grad.fill_(1.0)  # torch's mask leaves zeros
        optimizer.step()
        assert not model[0].weight_orig[~pruner.masks["0.weight_orig"].to_bool()].any()
        pruner.step()
    (report,) = pruner.history
    assert report.layers[0].num_newly_pruned == round(0.8 * 1024) - (1024 - int(kept.sum()))


def test_only_what_torch_masks_in_every_module_that_shares_a_parameter_is_pruned():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    rows, columns = torch.ones(4, 4), torch.ones(4, 4)
    rows[:2], columns[:, 0] = 0, 0
    prune.custom_from_mask(model[0], "weight", rows)
    pruner = schedule(model)
    assert pruner.sparsity == 0.0
    pruner.remove()
    prune.custom_from_mask(model[1], "weight", columns)
    assert torch.equal(schedule(model).masks["0.weight_orig"].to_bool(), (rows + columns).bool())
