"""The numbers of a step as the kernel takes them: on the host as ever, on the GPU where they must not leave it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

__all__ = ["Group", "constants_of", "is_on_gpu", "scalar"]

Group: TypeAlias = dict[str, Any]


def is_on_gpu(value: object) -> bool:
    """Whether looking at it would wait for a GPU."""
    return isinstance(value, torch.Tensor) and value.device.type != "cpu"


def scalar(value: Any) -> Any:
    """Return a hyperparameter as a float, or as a float64 tensor if it is on a GPU."""
    return value.double().reshape(()) if is_on_gpu(value) else float(value)


def constants_of(
    rule: Callable[[Group, Any], dict[str, Any]],
    ages: Sequence[tuple[Group, int | torch.Tensor]],
    grad_scale: torch.Tensor | None,
    found_inf: torch.Tensor | None,
) -> list[dict[str, float | torch.Tensor]]:
    """Return the kernel's constants for each of ``ages``.

    Parameters
    ----------
    rule : callable
        (parameter group, number of the step) to constants; the number may be a float64 tensor of several.
    ages : sequence of (parameter group, int or torch.Tensor)
        The number of the step, or a tensor on the parameter's device that holds the number of steps before it: what
        depends on that becomes a tensor as well.
    grad_scale, found_inf : torch.Tensor, optional
        Of a GradScaler. With ``found_inf``, neither is looked at on the host.
    """
    factor: float | torch.Tensor = 1.0
    if grad_scale is not None:
        factor = 1.0 / (float(grad_scale) if found_inf is None else grad_scale.double().reshape(()))
    skip = {} if found_inf is None else {"skip": found_inf.double().reshape(())}

    def completed(group: Group, found: dict[str, Any]) -> dict[str, Any]:
        return {**found, "grad_factor": -factor if group["maximize"] else factor, **skip}

    constants: list[dict[str, float | torch.Tensor]] = [
        {} if isinstance(step, torch.Tensor) else completed(group, rule(group, step)) for group, step in ages
    ]
    counted: dict[int, list[int]] = {}
    for i, (group, step) in enumerate(ages):
        if isinstance(step, torch.Tensor):
            counted.setdefault(id(group), []).append(i)
    # One computation per group, whatever the number of its parameters.
    for positions in counted.values():
        group, n = ages[positions[0]][0], len(positions)
        counts = [step for i in positions if isinstance(step := ages[i][1], torch.Tensor)]
        found = rule(group, torch.stack(counts).double() + 1)
        columns = [v.expand(n).unbind() if isinstance(v, torch.Tensor) else [v] * n for v in found.values()]
        for i, *values in zip(positions, *columns, strict=True):
            constants[i] = completed(group, dict(zip(found, values, strict=True)))
    return constants
