"""Schedulers that rank scores instead of magnitudes: those of optimizer state and of the guide, and bad ones."""

from __future__ import annotations

import copy
import math
import re
from fractions import Fraction

import pytest
import torch
from subprocesses import ROOT
from test_scheduler_patterns import STEPS, by_state, model_of, scheduler, weights_of
from torch import nn

from gmp_kernels import optim, prune_, schedules
from gmp_kernels.errors import DTypeError, ShapeError, SparsityError
from gmp_kernels.patterns import NM, Block


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("pattern", [None, NM(2, 4), Block(2, 2)], ids=str)
@pytest.mark.parametrize(
    "make",
    [torch.optim.Adam, optim.Adam, lambda ps: optim.Adam(ps, compact_state=True)],
    ids=["torch", "ours", "compact"],
)
def test_scores_from_the_state_of_the_optimizer(make, pattern):
    model = model_of()
    optimizer = make(model.parameters())
    seen = []

    def scores(name, parameter, state):
        assert not torch.is_grad_enabled()
        assert state["exp_avg_sq"].shape == parameter.shape, "compact state is expanded"
        seen.append(name)
        found.append(by_state(name, parameter, state))
        return found[-1]

    found: list[torch.Tensor] = []
    pruner = scheduler(model, optimizer=optimizer, pattern=pattern, scores=scores)
    assert not seen
    for step, sparsity in STEPS.items():
        train(model, optimizer, step)
        found.clear()
        weights, masks = weights_of(pruner), {name: mask.clone() for name, mask in pruner.masks.items()}
        weights = {name: w * masks[name].to_bool() for name, w in weights.items()}
        pruner.step()
        assert seen[-3:] == list(masks)
        expected = list(map(torch.clone, weights.values()))
        unit = 1 if pattern is None else pattern.unit
        counts = [round(sparsity * (w.numel() // unit)) * unit for w in expected]
        given_ = {"pattern": pattern, "scores": found, "backend": "reference"}
        prune_(expected, num_prune=counts, masks=list(masks.values()), **given_)
        assert list(pruner.masks.values()) == list(masks.values())
        assert all(torch.equal(w, there) for w, there in zip(weights_of(pruner).values(), expected, strict=True))


def test_lamp_of_the_guide_is_that_of_the_paper():
    (block,) = re.findall(
        r"```python\n(def by_second_moment(?:.*\n)*?)adam = ", (ROOT / "docs/training.md").read_text()
    )
    names = {"torch": torch}
    exec(block, names)
    weight = torch.randn(5, 7)
    squares = weight.double().square()
    expected = torch.tensor([[own / squares[squares >= own].sum() for own in row] for row in squares.tolist()])
    assert torch.allclose(names["lamp"]("", weight, {}).float(), expected.float())
    assert (names["lamp"]("", torch.zeros(3, 3), {}) == 0).all()


def test_scores_may_come_before_any_state_and_rank_all_layers_together():
    model = model_of()

    def scores(name, parameter, state):
        assert state == {}
        return torch.full_like(parameter, 2.0 if name == "0.weight" else 1.0)

    pruner = scheduler(model, schedules.OneShot(0.4), scope="global", scores=scores, max_sparsity=0.6)
    pruner.step()
    n = [mask.numel for mask in pruner.masks.values()]
    lost = [mask.numel - mask.num_kept for mask in pruner.masks.values()]
    total = round(0.4 * sum(n))
    assert sum(lost) == total
    assert lost[1:] == [math.floor(Fraction(6, 10) * size) for size in n[1:]]


@pytest.mark.parametrize(
    ("answer", "error", "match"),
    [
        (lambda p: -p.abs(), SparsityError, "no negative number and no NaN in the scores of '0.weight'"),
        (lambda p: p.abs() * float("nan"), SparsityError, "no NaN in the scores of '0.weight'"),
        (lambda p: p.abs()[0], ShapeError, "the scores of '0.weight' of shape"),
        (lambda p: None, DTypeError, "scores to return a tensor for '0.weight', got NoneType"),
        (lambda p: p.abs().long(), DTypeError, "the scores of '0.weight', got torch.int64"),
        (lambda p: 1 / 0, ZeroDivisionError, "division"),
    ],
)
def test_bad_scores_change_nothing(answer, error, match):
    model = model_of()
    pruner = scheduler(model, scores=lambda name, parameter, state: answer(parameter))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=match):
        pruner.step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not pruner.history and pruner.sparsity == 0 and pruner.step_count == 0


# -- masks and states --------------------------------------------------------------------------------------------------
