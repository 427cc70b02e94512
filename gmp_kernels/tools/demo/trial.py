"""One comparison: a dense network, and three ways to prune it under the same conditions."""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from gmp_kernels import BitMask, GMPScheduler, Stages, StepReport, optim, prune_, schedules
from gmp_kernels.tools.demo.data import Digits, load, steps_per_epoch
from gmp_kernels.tools.demo.model import ResidualCNN
from gmp_kernels.tools.demo.training import Pruning, Training, evaluate, train

__all__ = [
    "DENSE_LR",
    "METHODS",
    "MOMENTUM",
    "OPTIMIZERS",
    "PRUNING_LR",
    "WEIGHT_DECAY",
    "Result",
    "Trial",
    "compare",
    "num_epochs",
    "seconds_after_backward",
    "stages_of",
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
DENSE_LR = 0.1
PRUNING_LR = 0.05
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4


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
    num_test_images : int
    learning_rates : list of float
        Learning rate of each optimizer step of the gradual run.
    history : list of StepReport
        Updates of the gradual run.
    model : ResidualCNN
        The gradually pruned network.
    masks : dict of str to BitMask
        Its masks, by parameter name.
    """

    seed: int
    results: dict[str, Result]
    num_test_images: int
    learning_rates: list[float]
    history: list[StepReport]
    model: ResidualCNN
    masks: dict[str, BitMask]


def stages_of(epochs: int, num_steps: int) -> Stages:
    """Divide ``epochs`` of ``num_steps`` steps in the proportion 1 : 34 : 25."""
    return Stages(epochs / 60, epochs * 34 / 60, epochs * 25 / 60, steps_per_epoch=num_steps)


def num_epochs(stages: Stages) -> int:
    """Return the number of epochs of all training in one comparison."""
    return _dense_epochs(stages) + 2 * round(stages.epochs)


def compare(
    stages: Stages, gradual: schedules.Ramp, seed: int, optimizer: str, after_epoch: Callable[[str], None]
) -> Trial:
    """Train a dense network and prune it gradually, in one shot, and in one shot with retraining.

    Parameters
    ----------
    stages : Stages
        Stages of both runs that prune and train. The dense network is trained before, for half as many epochs.
    gradual : Ramp
        Sparsity of the gradual run. One-shot pruning goes to its final sparsity at once.
    seed : int
        Determines the test images, the initial weights and the order of the training images.
    optimizer : str
        A key of ``OPTIMIZERS``, for all training.
    after_epoch : callable
        Called with the method, a key of ``METHODS``, after each epoch.
    """
    digits = load(seed)
    # The scheduler prunes after the optimizer's first step, so the retrained network differs from the other one-shot
    # network by a single step.
    at_once = schedules.OneShot(gradual.final_sparsity)
    make_optimizer = OPTIMIZERS[optimizer]
    dense, dense_training = _train_dense(
        digits, _dense_epochs(stages), seed, make_optimizer, partial(after_epoch, "dense")
    )
    gmp, gmp_pruner, gmp_training = _prune_and_train(
        dense, gradual, stages, digits, seed, make_optimizer, partial(after_epoch, "gmp")
    )
    oneshot = _prune_at_once(dense, gradual.final_sparsity, digits)
    _, retrained_pruner, retraining = _prune_and_train(
        dense, at_once, stages, digits, seed, make_optimizer, partial(after_epoch, "oneshot_retrained")
    )
    before = dense_training.accuracies[-1]
    return Trial(
        seed=seed,
        results={
            "dense": Result(before, [before], 0.0, dense_training.seconds, dense_training.update_seconds, 0.0),
            "gmp": _result(before, gmp_training, gmp_pruner),
            "oneshot": oneshot,
            "oneshot_retrained": _result(oneshot.accuracy, retraining, retrained_pruner),
        },
        num_test_images=len(digits.test_labels),
        learning_rates=gmp_training.learning_rates,
        history=list(gmp_pruner.history),
        model=gmp,
        masks=dict(gmp_pruner.masks),
    )


def seconds_after_backward(optimizer: str | None, epochs: int) -> float:
    """Return the time of optimizer steps and pruning in one run, in seconds.

    Parameters
    ----------
    optimizer : str or None
        A key of ``OPTIMIZERS``, for a run with gradual pruning to 90 %; None for torch's fused SGD without pruning.
    epochs : int
        At least 3.
    """
    digits = load(0)
    if optimizer is None:
        return _train_dense(digits, epochs, 0, partial(torch.optim.SGD, fused=True), lambda: None)[1].update_seconds
    torch.manual_seed(0)
    stages = stages_of(epochs, steps_per_epoch(digits))
    schedule = stages.schedule(final_sparsity=0.9)
    network = ResidualCNN()
    return _prune_and_train(network, schedule, stages, digits, 0, OPTIMIZERS[optimizer], lambda: None)[2].update_seconds


def _dense_epochs(stages: Stages) -> int:
    return max(1, round(stages.epochs / 2))


def _train_dense(
    digits: Digits,
    epochs: int,
    seed: int,
    make_optimizer: Callable[..., Optimizer],
    after_epoch: Callable[[], None],
) -> tuple[ResidualCNN, Training]:
    torch.manual_seed(seed)
    model = ResidualCNN()
    optimizer = make_optimizer(model.parameters(), lr=DENSE_LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    lr_scheduler = CosineAnnealingLR(optimizer, T_max=epochs * steps_per_epoch(digits))
    training = train(model, digits, optimizer, lr_scheduler, epochs=epochs, seed=seed, after_epoch=after_epoch)
    return model, training


def _prune_and_train(
    dense: ResidualCNN,
    schedule: schedules.Schedule,
    stages: Stages,
    digits: Digits,
    seed: int,
    make_optimizer: Callable[..., Optimizer],
    after_epoch: Callable[[], None],
) -> tuple[ResidualCNN, GMPScheduler, Training]:
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


def _prune_at_once(dense: ResidualCNN, sparsity: float, digits: Digits) -> Result:
    model = deepcopy(dense)
    weights = [module.weight for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
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
