"""The training loop of every method, and the test accuracy."""

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
    """Objects that a pruning run adds to the loop."""

    scheduler: GMPScheduler
    stages: Stages


class Training(NamedTuple):
    """Record of a run of ``train``.

    Attributes
    ----------
    accuracies : list of float
        Accuracy on the test images after each epoch.
    learning_rates : list of float
        Learning rate of each optimizer step.
    seconds : float
        Time of the training steps, with pruning and without evaluation.
    update_seconds : float
        Time after the backward passes: optimizer steps and pruning.
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
    """Train ``model`` in place. The order of the images depends on ``seed`` only."""
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
    """Return the fraction of test images classified right, and leave ``model`` in training mode."""
    model.eval()
    right = model(digits.test_images).argmax(1) == digits.test_labels
    model.train()
    return int(right.sum()) / len(right)
