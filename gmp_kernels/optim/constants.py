"""The constants of a step as kernels take them: numbers on the host, tensors where they must not leave the GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import count, repeat
from typing import Any, NamedTuple

import torch

from gmp_kernels.backends.layouts import has_settings
from gmp_kernels.backends.types import Constants

__all__ = ["Settings", "constants_of", "is_on_gpu", "scalar"]

NUMBERS = {float, int}
UNCHANGEABLE = {float, int, bool, str, type(None)}


class Settings(NamedTuple):
    """Values that a step takes from parameter groups, besides their parameters.

    Attributes
    ----------
    values : list of dict or None
        Per group, what was read; None if a value may change without being replaced, as tensors do.
    lazy : list of bool
        Per group, whether its step counts are on the device of its parameters, where the host must not read them.
    keys : list of tuple of str
        Per group, the state entries that the rule reads and writes.
    """

    values: list[dict[str, Any]] | None
    lazy: list[bool]
    keys: list[tuple[str, ...]]

    @classmethod
    def of(cls, groups: Iterable[dict[str, Any]], keys_of: Callable[[dict[str, Any]], tuple[str, ...]]) -> Settings:
        """Read the settings of these groups."""
        values = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        parts = [part for own in values for v in own.values() for part in (v if isinstance(v, tuple) else (v,))]
        stays = UNCHANGEABLE.issuperset(map(type, parts))
        lazy = [bool(group.get("capturable")) or is_on_gpu(group["lr"]) for group in groups]
        return cls(values if stays else None, lazy, list(map(keys_of, groups)))

    def hold(self, groups: list[dict[str, Any]]) -> bool:
        """Whether they are those of these groups; learning rates may be other numbers."""
        return self.values is not None and has_settings(groups, self.values)


def is_on_gpu(value: object) -> bool:
    """Whether reading a value would wait for a GPU."""
    return isinstance(value, torch.Tensor) and value.device.type != "cpu"


def scalar(value: Any) -> Any:
    """Return a number as a float, or as a float64 tensor without dimensions if it is on a GPU."""
    if not isinstance(value, torch.Tensor) or value.device.type == "cpu":
        return float(value)
    number = value.detach().double()
    return number if number.ndim == 0 else number.reshape(())


def constants_of(
    rule: Callable[[dict[str, Any], Any], dict[str, Any]],
    steps: Iterable[tuple[dict[str, Any], list[int] | torch.Tensor]],
    grad_scale: torch.Tensor | None,
    found_inf: torch.Tensor | None,
    takes_step: Sequence[bool] | None = None,
) -> tuple[Constants, list[int]]:
    """Return the constants of a step, computed once per group and number, and the row of each parameter.

    Parameters
    ----------
    rule : callable
        Maps (parameter group, number of the step) to constants; the number may be a float64 tensor of several.
    steps : iterable of (dict, list of int or torch.Tensor)
        Per group, the number of the step that each of its parameters takes, 1 being the first; a float64 tensor if the
        host must not read it.
    grad_scale, found_inf : torch.Tensor, optional
        Attributes that a GradScaler sets. A step with ``found_inf`` not 0 writes nothing.
    takes_step : sequence of bool, optional
        Per parameter, whether anything of it is written. By default all are.
    """
    factor = 1.0 if grad_scale is None else 1.0 / scalar(grad_scale)
    skip = {} if found_inf is None else {"skip": scalar(found_inf)}
    constants = Constants([], [])
    rows: list[int] = []
    end = 0
    for group, numbers in steps:
        blocks: Iterable[tuple[Any, int]]
        if isinstance(numbers, torch.Tensor):
            rows.extend(range(end, end + len(numbers)))
            blocks = [(numbers, len(numbers))]
        else:
            row_of = dict(zip(dict.fromkeys(numbers), count(end)))
            rows.extend(map(row_of.__getitem__, numbers))
            blocks = zip(row_of, repeat(1))
        for number, size in blocks:
            values = rule(group, number) | {"grad_factor": -factor if group["maximize"] else factor} | skip
            first, end = end, end + size
            if not NUMBERS.issuperset(map(type, values.values())):
                on_device = [name for name, value in values.items() if isinstance(value, torch.Tensor)]
                constants.on_device.extend((name, first, end, values.pop(name)) for name in on_device)
            constants.blocks.append((values, size))
    if takes_step is not None:
        constants.blocks.append(({"skip": 1.0}, 1))
        rows = [row if takes else end for row, takes in zip(rows, takes_step, strict=True)]
    return constants, rows
