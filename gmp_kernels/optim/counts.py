"""Step counts as torch's state has them, one 0-d tensor per parameter; read and raised together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from gmp_kernels.optim.compact import STEP

__all__ = ["StepCounts"]


class StepCounts:
    """The step counts in some parameters' states.

    On the host they are made views of one tensor, so that a step is one addition, whatever their number. On a device
    they stay where they are, because a CUDA graph may hold them.

    Parameters
    ----------
    states : sequence of dict
        Not empty, each with a count. The counts are replaced where they have to be joined or moved.
    """

    def __init__(self, states: Sequence[dict[str, Any]]) -> None:
        self._states = states
        self._whole: torch.Tensor | None = None
        cpu = torch.device("cpu")
        others = {count.device for count in self._each()} - {cpu}
        if not others:
            self.join_on(cpu)
        elif any(count.device == cpu for count in self._each()):
            self.join_on(others.pop())

    @property
    def device(self) -> torch.device:
        """The device that holds all of them."""
        return self._each()[0].device

    def join_on(self, device: torch.device) -> None:
        """Make them views of one tensor there."""
        self._whole = torch.stack([count.to(device) for count in self._each()])
        for i, state in enumerate(self._states):
            state[STEP] = self._whole[i]

    def numbers(self, *, is_lazy: bool) -> list[int] | torch.Tensor:
        """Return the numbers of the steps about to be taken: a float64 tensor where the host does not look at them."""
        counts = torch.stack(self._each()) if self._whole is None else self._whole
        return counts.double() + 1 if is_lazy or counts.device.type != "cpu" else [int(n) + 1 for n in counts.tolist()]

    def adding(self, amount: int | torch.Tensor) -> Callable[[], object]:
        """Return a C function that raises all of them."""
        if self._whole is None:
            return partial(torch._foreach_add_, self._each(), amount)
        return partial(self._whole.add_, amount)

    def _each(self) -> list[torch.Tensor]:
        return [state[STEP] for state in self._states]
