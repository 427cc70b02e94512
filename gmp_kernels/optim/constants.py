"""The numbers of a step as the kernel takes them: on the host as ever, on the GPU where they must not leave it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch

from gmp_kernels.backends import Constants

__all__ = ["Group", "Steps", "constants_of", "is_on_gpu", "scalar"]

Group: TypeAlias = dict[str, Any]


class Steps(NamedTuple):
    """Parameters of one group about to take a step.

    Attributes
    ----------
    group : dict
    numbers : list of int, or torch.Tensor
        The number of the step of each, 1 being the first; a float64 tensor where the host does not look at it.
    members : sequence of int
        Indices into ``numbers`` of those that need constants.
    """

    group: Group
    numbers: list[int] | torch.Tensor
    members: Sequence[int]


def is_on_gpu(value: object) -> bool:
    """Whether looking at it would wait for a GPU."""
    return isinstance(value, torch.Tensor) and value.device.type != "cpu"


def scalar(value: Any) -> Any:
    """Return a hyperparameter as a float, or as a float64 tensor if it is on a GPU."""
    return _number(value) if is_on_gpu(value) else float(value)


def _number(value: torch.Tensor) -> torch.Tensor:
    """Return a tensor of one element as a float64 tensor without dimensions, by as few operations as can be."""
    number = value.double()
    return number if number.ndim == 0 else number.reshape(())


def constants_of(
    rule: Callable[[Group, Any], dict[str, Any]],
    steps: Iterable[Steps],
    grad_scale: torch.Tensor | None,
    found_inf: torch.Tensor | None,
) -> tuple[Constants, list[int]]:
    """Return the constants of a step, computed once per group and number, and which row is each member's.

    Parameters
    ----------
    rule : callable
        (parameter group, number of the step) to constants; the number may be a float64 tensor of several.
    steps : iterable of Steps
    grad_scale, found_inf : torch.Tensor, optional
        Of a GradScaler. With ``found_inf``, neither is looked at on the host.
    """
    factor: float | torch.Tensor = 1.0
    if grad_scale is not None:
        factor = 1.0 / float(grad_scale) if found_inf is None else _number(grad_scale).reciprocal()
    skip = {} if found_inf is None else {"skip": _number(found_inf)}
    constants = Constants([], [])
    rows: list[int] = []
    num_rows = 0

    def add(group: Group, number: Any, count: int) -> None:
        nonlocal num_rows
        values = {**rule(group, number), "grad_factor": -factor if group["maximize"] else factor, **skip}
        host = {name: value for name, value in values.items() if not isinstance(value, torch.Tensor)}
        constants.blocks.append((host, count))
        end = num_rows + count
        constants.on_device.extend((k, num_rows, end, v) for k, v in values.items() if isinstance(v, torch.Tensor))
        num_rows = end

    for group, numbers, members in steps:
        start = num_rows
        if isinstance(numbers, torch.Tensor):
            add(group, numbers, len(numbers))
            rows.extend(start + member for member in members)
            continue
        row_of = {number: start + i for i, number in enumerate(dict.fromkeys(numbers))}
        for number in row_of:
            add(group, number, 1)
        rows.extend(row_of[numbers[member]] for member in members)
    return constants, rows
