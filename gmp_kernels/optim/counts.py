"""Step counts as torch's state has them, one 0-d tensor per parameter; read and raised together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

__all__ = ["StepCounts"]


class StepCounts:
    """The entries ``step`` of some parameters' states.

    On the host they are made views of one tensor, so that a step is one addition, whatever their number. On a device
    they stay where they are, because a CUDA graph may hold them.

    Parameters
    ----------
    states : sequence of dict
        Not empty. Their entries are replaced where they have to be joined or moved.
    """

    def __init__(self, states: Sequence[dict[str, Any]]) -> None:
        self._states = states
        devices = {count.device for count in self.each()}
        others = devices - {torch.device("cpu")}
        if others and len(devices) > 1:
            self._move_each(others.pop())
        self._whole = self._common_base()
        if self._whole is None and not others and self._can_join():
            self._replace(torch.stack(self.each()))

    def each(self) -> list[torch.Tensor]:
        """Return the entries one by one."""
        return [state["step"] for state in self._states]

    @property
    def device(self) -> torch.device:
        """The device that holds all of them."""
        found: torch.device = self._states[0]["step"].device
        return found

    def move_to(self, device: torch.device) -> bool:
        """Move them to ``device``; return whether they were elsewhere."""
        if self.device == device:
            return False
        if self._whole is not None:
            self._replace(self._whole.to(device))
        else:
            self._move_each(device)
        return True

    def tolist(self) -> list[int]:
        """Return them as numbers."""
        values = self._whole.tolist() if self._whole is not None else [count.item() for count in self.each()]
        return [int(value) for value in values]

    def tensor(self) -> torch.Tensor:
        """Return them as one tensor."""
        return self._whole if self._whole is not None else torch.stack(self.each())

    def adding(self, amount: int | torch.Tensor) -> Callable[[], object]:
        """Return a C function that raises all of them."""
        if self._whole is not None:
            return partial(self._whole.add_, amount)
        return partial(torch._foreach_add_, self.each(), amount)

    def _common_base(self) -> torch.Tensor | None:
        """Return the tensor whose elements they are in this order, all of them, if there is one."""
        counts = self.each()
        base = counts[0]._base
        if base is None or base.shape != (len(counts),):
            return None
        step = base.element_size()
        places = range(base.data_ptr(), base.data_ptr() + step * len(counts), step)
        lie_in_it = all(
            count._base is base and count.data_ptr() == place for count, place in zip(counts, places, strict=True)
        )
        return base if lie_in_it else None

    def _can_join(self) -> bool:
        return len({(count.shape, count.dtype) for count in self.each()}) == 1 and self.each()[0].ndim == 0

    def _replace(self, whole: torch.Tensor) -> None:
        for i, state in enumerate(self._states):
            state["step"] = whole[i]
        self._whole = whole

    def _move_each(self, device: torch.device) -> None:
        for state in self._states:
            state["step"] = state["step"].to(device)
