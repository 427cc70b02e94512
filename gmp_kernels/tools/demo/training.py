"""The training loop, the same for every method, and the test accuracy."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gmp_kernels import GMPScheduler, Stages
from gmp_kernels.tools.demo.data import Digits, batches

__all__ = ["Pruning", "Training", "evaluate", "train"]


class Pruning(NamedTuple):
    """Parts that a pruning run adds to the loop."""

    scheduler: GMPScheduler
    stages: Stages


class Training(NamedTuple):
    """Course of a run of ``train``.

    Attributes
    ----------
    accuracies : list of float
        On the test images, after each epoch.
    learning_rates : list of float
        Of each optimizer step.
    seconds : float
        In the training steps, pruning included, evaluation not.
    update_seconds : float
        In what follows the backward pass: the optimizer, pruning included.
    """

    accuracies: list[float]
    learning_rates: list[float]
    seconds: float
    update_seconds: float


def train(
    model: nn.Module,
    digits: Digits,
    optimizer: Optimizer,
    lr_scheduler: LRScheduler,
    *,
    epochs: int,
    seed: int,
    after_epoch: Callable[[], None],
    pruning: Pruning | None = None,
) -> Training:
    """Train ``model`` in place; ``seed`` alone decides the order of the images."""
    order = torch.Generator().manual_seed(seed)
    accuracies: list[float] = []
    learning_rates: list[float] = []
    seconds = update_seconds = 0.0
    for _ in range(epochs):
        started = time.perf_counter()
        for images, labels in batches(digits, order):
            if pruning is not None:
                pruning.stages.end_weight_decay(optimizer, len(learning_rates))
            learning_rates.append(optimizer.param_groups[0]["lr"])
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
            update_started = time.perf_counter()
            optimizer.step()
            if pruning is not None:
                pruning.scheduler.step()
            update_seconds += time.perf_counter() - update_started
            lr_scheduler.step()
        seconds += time.perf_counter() - started
        accuracies.append(evaluate(model, digits))
        after_epoch()
    return Training(accuracies, learning_rates, seconds, update_seconds)


@torch.no_grad()
def evaluate(model: nn.Module, digits: Digits) -> float:
    """Return the fraction of test images classified right; leaves ``model`` in training mode."""
    model.eval()
    right = model(digits.test_images).argmax(1) == digits.test_labels
    model.train()
    return int(right.sum()) / len(right)
