"""Step counts as torch's state has them, one 0-d tensor per parameter; read and raised together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from gmp_kernels.optim.entries import STEP

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
        self._whole = self._common_base()
        devices = {count.device for count in self._each()}
        if len(devices) > 1:
            self.move_to(next(device for device in devices if device.type != "cpu"))
        elif self._whole is None and self.device.type == "cpu":
            self._replace(torch.stack(self._each()))

    @property
    def device(self) -> torch.device:
        """The device that holds all of them."""
        found: torch.device = self._states[0][STEP].device
        return found

    def move_to(self, device: torch.device) -> None:
        """Move them to ``device``."""
        if self._whole is not None:
            self._replace(self._whole.to(device))
        else:
            for state in self._states:
                state[STEP] = state[STEP].to(device)

    def numbers(self, *, is_lazy: bool) -> list[int] | torch.Tensor:
        """Return the numbers of the steps about to be taken: a float64 tensor where the host does not look at them."""
        counts = torch.stack(self._each()) if self._whole is None else self._whole
        return counts.double() + 1 if is_lazy or self.device.type != "cpu" else [int(n) + 1 for n in counts.tolist()]

    def adding(self, amount: int | torch.Tensor) -> Callable[[], object]:
        """Return a C function that raises all of them."""
        if self._whole is not None:
            return partial(self._whole.add_, amount)
        return partial(torch._foreach_add_, self._each(), amount)

    def _each(self) -> list[torch.Tensor]:
        return [state[STEP] for state in self._states]

    def _common_base(self) -> torch.Tensor | None:
        """Return the tensor whose elements they are in this order, all of them, if there is one."""
        counts = self._each()
        base = counts[0]._base
        if base is None or base.shape != (len(counts),):
            return None
        step = base.element_size()
        places = range(base.data_ptr(), base.data_ptr() + step * len(counts), step)
        lie_in_it = all(
            count._base is base and count.data_ptr() == place for count, place in zip(counts, places, strict=True)
        )
        return base if lie_in_it else None

    def _replace(self, whole: torch.Tensor) -> None:
        for i, state in enumerate(self._states):
            state[STEP] = whole[i]
        self._whole = whole
