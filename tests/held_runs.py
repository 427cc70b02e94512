"""A small pruned network under optimizers of torch's and of ours, and a look at its real zeros."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from gmp_kernels import GMPScheduler, optim, schedules

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "torch_momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "torch_adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
    "gmp_momentum": lambda params: optim.SGD(params, lr=0.1, momentum=0.9),
    "gmp_adamw_compact": lambda params: optim.AdamW(params, lr=0.01, compact_state=True),
}
EVERY_OPTIMIZER = pytest.mark.parametrize("case", OPTIMIZERS)

Run = tuple[nn.Module, Any, GMPScheduler]


def start(case: str, sparsity: float = 0.9, **options: Any) -> Run:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 20))
    optimizer = OPTIMIZERS[case](model.parameters())
    return model, optimizer, GMPScheduler(model, optimizer, schedules.OneShot(sparsity), **options)


def train(run: Run, steps: int = 1, optimizer: Any = None) -> None:
    model, own, pruner = run
    optimizer = own if optimizer is None else optimizer
    for step in range(steps):
        x = torch.randn(8, 40, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        pruner.step()


def assert_held(run: Run, sparsity: float = 0.9) -> None:
    """Real zeros, not what the pruner says."""
    model, _, pruner = run
    zeros = [int((layer.weight == 0).sum()) for layer in (model[0], model[2])]
    assert zeros == [round(sparsity * 1200), round(sparsity * 600)]
    assert pruner.verify() == dict(zip(["0.weight", "2.weight"], zeros, strict=True))
    assert pruner.sparsity == pytest.approx(sparsity, abs=1e-3)
