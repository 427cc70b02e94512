"""Rows of the speed table on whole trainings: all their work beside forward and backward passes.

Ours is gradual pruning to 90 % with compact state, on the demo's digits; the baseline is a training of as many steps
with torch's fused optimizer, without pruning. The time is that of optimizer steps and, in ours, of pruning. What both
sides do beside that, such as setting gradients to None, is in neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.optim import Optimizer

from gmp_kernels import optim
from gmp_kernels.tools.bench.measurement import Case, Pair
from gmp_kernels.tools.bench.networks import ResidualCNN, Transformer

__all__ = ["training_cases"]

EPOCHS = 8
FEWEST_EPOCHS = 3
SPARSITY = 0.9

MakeOptimizer: TypeAlias = Callable[..., Optimizer]


def training_cases() -> list[Case]:
    """Return a row for each network: the demo's perceptron, a ResNet and a transformer."""
    fused = "torch fused, no pruning"
    return [
        Case(f"GMP training outside the passes, {name}", fused, 1.0, 0.8, partial(_gmp_and_dense, *run))
        for name, *run in (
            ("perceptron, SGD", None, _sgd),
            ("small ResNet, SGD", ResidualCNN, _sgd),
            ("small transformer, AdamW", Transformer, _adamw),
        )
    ]


def _sgd(package: Any, **options: bool) -> MakeOptimizer:
    return partial(package.SGD, **options)


def _adamw(package: Any, **options: bool) -> MakeOptimizer:
    def make(parameters: Iterable[nn.Parameter], *, lr: float, momentum: float, weight_decay: float) -> Optimizer:
        # A hundredth of SGD's learning rate suits it.
        adamw: Optimizer = package.AdamW(parameters, lr=lr / 100, weight_decay=weight_decay, **options)
        return adamw

    return make


def _gmp_and_dense(
    make_network: Callable[[], nn.Module] | None, optimizer_of: Callable[..., MakeOptimizer], shrink: int
) -> Pair:
    """Train both; None stands for the demo's own network."""
    # Imported here, because only these rows need scikit-learn.
    from gmp_kernels.tools.demo.data import load, steps_per_epoch
    from gmp_kernels.tools.demo.model import DigitMLP
    from gmp_kernels.tools.demo.trial import prune_and_train, stages_of, train_dense

    digits = load(0)

    def gmp(network: Callable[[], nn.Module], epochs: int) -> float:
        torch.manual_seed(0)
        stages = stages_of(epochs, steps_per_epoch(digits))
        schedule, make_optimizer = stages.schedule(final_sparsity=SPARSITY), optimizer_of(optim, compact_state=True)
        return prune_and_train(network(), schedule, stages, digits, 0, make_optimizer, lambda: None)[2].update_seconds

    def dense(network: Callable[[], nn.Module], epochs: int) -> float:
        make_optimizer = optimizer_of(torch.optim, fused=True)
        return train_dense(network, digits, epochs, 0, make_optimizer, lambda: None)[1].update_seconds

    for run in (gmp, dense):
        run(DigitMLP, FEWEST_EPOCHS)  # loads and sets up, on either side, what a process needs once
    network, epochs = make_network or DigitMLP, max(FEWEST_EPOCHS, EPOCHS // shrink)
    return Pair(gmp(network, epochs), dense(network, epochs))
