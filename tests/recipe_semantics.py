"""SparseML's semantics of recipes in plain Python, step by step, and small models with the names that recipes use.

Nothing here is shared with ``gmp_kernels.recipes``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable

import torch
from torch import nn

INTERPOLATIONS: dict[str, Callable[[float], float]] = {
    "linear": lambda p: p,
    "cubic": lambda p: 1 - (1 - p) ** 3,
    "inverse_cubic": lambda p: 1 - (1 - p) ** (1 / 3),
}


def sparsity_at(
    epoch: float, start: float, end: float, initial: float, final: float, inter_func: str = "cubic"
) -> float:
    """The sparsity that an update at this epoch sets."""
    if end == -1:
        return initial  # its progress, (epoch - start) / (-1 - start), is never positive
    if epoch >= end:
        return final
    part = INTERPOLATIONS[inter_func]((epoch - start) / (end - start))
    if part <= sys.float_info.epsilon:
        return initial
    if part >= 1 - sys.float_info.epsilon:
        return final
    return part * (final - initial) + initial


def updates(
    *,
    num_steps: int,
    steps_per_epoch: int,
    start: float,
    end: float,
    frequency: float,
    initial: float,
    final: float,
    inter_func: str = "cubic",
) -> dict[int, float]:
    """{step: sparsity} of every update of a gradual modifier, from a loop over the steps like that of a trainer."""
    found: dict[int, float] = {}
    started = ended = False
    last = -1.0
    for step in range(num_steps):
        epoch = step / steps_per_epoch
        starts = not started and (start == -1 or epoch >= start)
        is_due = started and not ended and (frequency == -1 or epoch >= last + frequency)
        ends = (started or starts) and not ended and end != -1 and epoch >= end
        if starts or is_due or ends:
            found[step] = sparsity_at(epoch, start, end, initial, final, inter_func)
            last = epoch
        started, ended = started or starts, ended or ends
    return found


def cosine(epoch: float, start: float, end: float, initial: float, final: float) -> float:
    """Half a cosine from ``initial`` at ``start`` to ``final`` at ``end``."""
    return final + (initial - final) / 2 * (1 + math.cos(math.pi * (epoch - start) / (end - start)))


def model_of(names: Iterable[str], make: Callable[[], nn.Module]) -> nn.Module:
    """A tree of modules whose weights have these names, each made by ``make``."""
    root = nn.Module()
    for name in names:
        *path, last = name.removesuffix(".weight").split(".")
        parent = root
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]  # type: ignore[assignment]
        parent.add_module(last, make())
    return root


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """A step with gradients that depend on the seed alone; parameters that do not train have none."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        gradient = torch.randn(parameter.shape, generator=generator)
        if parameter.requires_grad:
            parameter.grad = gradient
    optimizer.step()


def zeros_of(model: nn.Module) -> dict[str, int]:
    return {name: int((parameter == 0).sum()) for name, parameter in model.named_parameters()}
