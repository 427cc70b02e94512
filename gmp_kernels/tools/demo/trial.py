"""One comparison: a dense network, and three ways to prune it under the same conditions."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from gmp_kernels import BitMask, GMPScheduler, Stages, StepReport, optim, prune_, schedules
from gmp_kernels.tools.demo.data import Digits, load, steps_per_epoch
from gmp_kernels.tools.demo.model import DigitMLP
from gmp_kernels.tools.demo.training import Pruning, Training, evaluate, train

__all__ = [
    "DENSE_LR",
    "METHODS",
    "MOMENTUM",
    "OPTIMIZERS",
    "PRUNING_LR",
    "SWEPT",
    "WEIGHT_DECAY",
    "Result",
    "Trial",
    "compare",
    "num_epochs",
    "prune_and_train",
    "stages_of",
    "sweep_of",
    "train_dense",
]

METHODS = {
    "dense": "dense",
    "gmp": "gradual (GMP)",
    "oneshot": "one-shot",
    "oneshot_retrained": "one-shot, retrained",
}
# "gmp" applies the mask inside the step and stores momentum for the kept weights only. With "torch" a hook of the
# scheduler sets pruned weights and their momentum back to zero after each step.
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "gmp": partial(optim.SGD, compact_state=True),
    "torch": torch.optim.SGD,
}
# Methods compared at more than one sparsity, and those sparsities.
SWEPT = ("gmp", "oneshot_retrained")
SWEEP = (0.8, 0.9, 0.95, 0.97, 0.98)
DENSE_LR = 0.1
PRUNING_LR = 0.05
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4

Network = TypeVar("Network", bound=nn.Module)


class Result(NamedTuple):
    """Results of one method.

    Attributes
    ----------
    accuracy : float
        Accuracy on the test images at the end.
    curve : list of float
        Accuracy before training and after each epoch; a single value if there was no training.
    sparsity : float
        Sparsity over all prunable weights.
    training_seconds : float
        Time of the training steps, pruning included.
    update_seconds : float
        Part of ``training_seconds`` after the backward passes: optimizer and pruning.
    pruning_seconds : float
        Time of the pruning steps.
    """

    accuracy: float
    curve: list[float]
    sparsity: float
    training_seconds: float
    update_seconds: float
    pruning_seconds: float


class Trial(NamedTuple):
    """One comparison.

    Attributes
    ----------
    seed : int
    results : dict of str to Result
        Result of each method, by key of ``METHODS``.
    sweep : dict of str to dict of float to float
        Final accuracy of each method of ``SWEPT`` at each sparsity.
    num_test_images : int
    learning_rates : list of float
        Learning rate of each optimizer step of the gradual run.
    history : list of StepReport
        Updates of the gradual run.
    model : DigitMLP
        The gradually pruned network.
    masks : dict of str to BitMask
        Its masks, by parameter name.
    """

    seed: int
    results: dict[str, Result]
    sweep: dict[str, dict[float, float]]
    num_test_images: int
    learning_rates: list[float]
    history: list[StepReport]
    model: DigitMLP
    masks: dict[str, BitMask]


def stages_of(epochs: int, num_steps: int) -> Stages:
    """Divide ``epochs`` of ``num_steps`` steps in the proportion 1 : 34 : 25."""
    return Stages(epochs / 60, epochs * 34 / 60, epochs * 25 / 60, steps_per_epoch=num_steps)


def sweep_of(sparsity: float) -> list[float]:
    """Return the sparsities of the comparison, ascending: those of ``SWEEP``, and ``sparsity``."""
    return sorted({*SWEEP, sparsity})


def num_epochs(stages: Stages, sweep: Sequence[float]) -> int:
    """Return the number of epochs of all training in one comparison at the sparsities of ``sweep``."""
    return _dense_epochs(stages) + len(SWEPT) * len(sweep) * round(stages.epochs)


def compare(
    stages: Stages,
    gradual: schedules.Ramp,
    sweep: Sequence[float],
    seed: int,
    optimizer: str,
    after_epoch: Callable[[str], None],
) -> Trial:
    """Train a dense network and prune it gradually, in one shot, and in one shot with retraining.

    Parameters
    ----------
    stages : Stages
        Stages of both runs that prune and train. The dense network is trained before, for half as many epochs.
    gradual : Ramp
        Sparsity of the gradual run. One-shot pruning goes to its final sparsity at once.
    sweep : sequence of float
        Final sparsities at which the methods of ``SWEPT`` are compared, that of ``gradual`` among them.
    seed : int
        Determines the test images, the initial weights and the order of the training images.
    optimizer : str
        A key of ``OPTIMIZERS``, for all training.
    after_epoch : callable
        Called with the method, a key of ``METHODS``, after each epoch.
    """
    digits = load(seed)
    make_optimizer = OPTIMIZERS[optimizer]
    dense, dense_training = train_dense(
        DigitMLP, digits, _dense_epochs(stages), seed, make_optimizer, partial(after_epoch, "dense")
    )

    def pruned(method: str, sparsity: float) -> tuple[DigitMLP, GMPScheduler, Training]:
        # The scheduler prunes after the optimizer's first step, so the retrained network differs from the other
        # one-shot network by a single step.
        at_once = schedules.OneShot(sparsity)
        schedule = gradual.with_final_sparsity(sparsity) if method == "gmp" else at_once
        return prune_and_train(dense, schedule, stages, digits, seed, make_optimizer, partial(after_epoch, method))

    runs = {(method, sparsity): pruned(method, sparsity) for sparsity in sweep for method in SWEPT}
    gmp, gmp_pruner, gmp_training = runs["gmp", gradual.final_sparsity]
    _, retrained_pruner, retraining = runs["oneshot_retrained", gradual.final_sparsity]
    oneshot = _prune_at_once(dense, gradual.final_sparsity, digits)
    before = dense_training.accuracies[-1]
    return Trial(
        seed=seed,
        results={
            "dense": Result(before, [before], 0.0, dense_training.seconds, dense_training.update_seconds, 0.0),
            "gmp": _result(before, gmp_training, gmp_pruner),
            "oneshot": oneshot,
            "oneshot_retrained": _result(oneshot.accuracy, retraining, retrained_pruner),
        },
        sweep={method: {sparsity: runs[method, sparsity][2].accuracies[-1] for sparsity in sweep} for method in SWEPT},
        num_test_images=len(digits.test_labels),
        learning_rates=gmp_training.learning_rates,
        history=list(gmp_pruner.history),
        model=gmp,
        masks=dict(gmp_pruner.masks),
    )


def _dense_epochs(stages: Stages) -> int:
    return max(1, round(stages.epochs / 2))


def train_dense(
    network: Callable[[], Network],
    digits: Digits,
    epochs: int,
    seed: int,
    make_optimizer: Callable[..., Optimizer],
    after_epoch: Callable[[], None],
) -> tuple[Network, Training]:
    """Return ``network()``, with initial weights from ``seed``, after ``epochs`` of training, and the record of it."""
    torch.manual_seed(seed)
    model = network()
    optimizer = make_optimizer(model.parameters(), lr=DENSE_LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    lr_scheduler = CosineAnnealingLR(optimizer, T_max=epochs * steps_per_epoch(digits))
    training = train(model, digits, optimizer, lr_scheduler, epochs=epochs, seed=seed, after_epoch=after_epoch)
    return model, training


def prune_and_train(
    dense: Network,
    schedule: schedules.Schedule,
    stages: Stages,
    digits: Digits,
    seed: int,
    make_optimizer: Callable[..., Optimizer],
    after_epoch: Callable[[], None],
) -> tuple[Network, GMPScheduler, Training]:
    """Return a copy of ``dense`` that was pruned by ``schedule`` while it was trained, its pruner, and the record."""
    model = deepcopy(dense)
    optimizer = make_optimizer(model.parameters(), lr=PRUNING_LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    pruner = GMPScheduler(model, optimizer, schedule)
    training = train(
        model,
        digits,
        optimizer,
        stages.lr_scheduler(optimizer),
        epochs=round(stages.epochs),
        seed=seed,
        after_epoch=after_epoch,
        pruning=Pruning(pruner, stages),
    )
    return model, pruner, training


def _prune_at_once(dense: DigitMLP, sparsity: float, digits: Digits) -> Result:
    model = deepcopy(dense)
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    started = time.perf_counter()
    pruned = prune_(weights, sparsity=sparsity)
    seconds = time.perf_counter() - started
    accuracy = evaluate(model, digits)
    reached = sum(pruned.num_pruned) / sum(weight.numel() for weight in weights)
    return Result(accuracy, [accuracy], reached, 0.0, 0.0, seconds)


def _result(before: float, training: Training, pruner: GMPScheduler) -> Result:
    return Result(
        accuracy=training.accuracies[-1],
        curve=[before, *training.accuracies],
        sparsity=pruner.sparsity,
        training_seconds=training.seconds,
        update_seconds=training.update_seconds,
        pruning_seconds=sum(report.seconds for report in pruner.history),
    )
