"""Constants of optimizer steps as the Triton kernels read them; those that are on the device do not leave it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from gmp_kernels.backends._triton_tables import Uploads

__all__ = ["ConstantTables"]

# In the order of _triton_update.py, with the values that change nothing.
CONSTANTS = {
    "grad_factor": 1.0,
    "decay": 1.0,
    "weight_decay": 0.0,
    "lr": 0.0,
    "momentum": 0.0,
    "one_minus_dampening": 1.0,
    "nesterov": 0.0,
    "first_step": 0.0,
    "one_minus_beta1": 0.0,
    "beta2": 0.0,
    "one_minus_beta2": 0.0,
    "bias_correction2_sqrt": 1.0,
    "eps": 0.0,
    "step_size": 0.0,
    "skip": 0.0,
}
_ABSENT = list(CONSTANTS.values())
_COLUMNS = {name: column for column, name in enumerate(CONSTANTS)}


class ConstantTables:
    """Tables of a step's constants, a row to each set of them."""

    def __init__(self, uploads: Uploads) -> None:
        self._uploads = uploads

    def at(self, constants: Sequence[Mapping[str, float | torch.Tensor]], device: torch.device) -> torch.Tensor:
        """Return the table. Tensors among the constants are copied on their device, each once, and not looked at."""
        numbers: list[float] = []
        places: list[int] = []
        sources: list[int] = []  # of the places, in ``tensors``
        tensors: list[torch.Tensor] = []
        numbering: dict[int, int] = {}
        for given in constants:
            row = _ABSENT.copy()
            for name, value in given.items():
                if isinstance(value, torch.Tensor):
                    source = numbering.setdefault(id(value), len(tensors))
                    if source == len(tensors):
                        tensors.append(value)
                    places.append(len(numbers) + _COLUMNS[name])
                    sources.append(source)
                else:
                    row[_COLUMNS[name]] = value
            numbers += row
        table = self._uploads.at(numbers, torch.float64, device)
        if not places:
            return table
        found = torch.stack(tensors)
        if sources != list(range(len(tensors))):
            found = found[self._uploads.at(sources, torch.int64, device)]
        return table.index_copy(0, self._uploads.at(places, torch.int64, device), found)
