"""State stored for the kept weights only: its layouts, and its way from one to the next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from gmp_kernels.backends import Compaction, StateMove, choose
from gmp_kernels.errors import StateError
from gmp_kernels.masks import BitMask
from gmp_kernels.optim.ready import MASTER, is_per_weight, version_of
from gmp_kernels.sharding import local, sharded_like

__all__ = ["Layouts"]


class Layouts:
    """By which bits the state of which parameter is laid out.

    Nobody may write those bits meanwhile; if somebody has, their version tells.
    """

    def __init__(self, backend: str | None) -> None:
        self._backend = backend
        self._layouts: dict[torch.Tensor, Compaction] = {}
        self._versions: dict[torch.Tensor, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Copies of the bits count their versions from 0, so that a copy could not tell that they were written before.
        for p in self._layouts:
            self.check("copying an optimizer", p)
        return {**self.__dict__, "_versions": {}}

    def get(self, p: torch.Tensor) -> Compaction | None:
        """Return the layout of a parameter; None if its state is dense."""
        return self._layouts.get(p)

    def version(self, p: torch.Tensor) -> int:
        """Return the version of the bits by which its state was laid out; 0 if it is dense."""
        layout = self._layouts.get(p)
        return 0 if layout is None else self._versions.setdefault(p, version_of(layout.mask))

    def clear(self) -> None:
        """Forget all layouts: the state is dense again."""
        self._layouts.clear()
        self._versions.clear()

    def check(self, optimizer: str, p: torch.Tensor) -> None:
        """Refuse to walk state by bits that are not those it was laid out by, or that are not of this many weights.

        Raises
        ------
        StateError
        """
        layout = self._layouts.get(p)
        if layout is not None and self.version(p) != version_of(layout.mask):
            raise StateError(
                f"{optimizer}: expected the mask of a parameter of shape {tuple(p.shape)} as it was when its compact "
                "state was laid out, got one that was written in place; let the scheduler prune, or prune a clone of "
                "its mask and give that to set_masks"
            )
        if layout is not None and layout.mask.numel() != -(-local(p).numel() // 8):
            raise StateError(
                f"{optimizer}: expected a parameter of the size for which its compact state was laid out, got one of "
                f"shape {tuple(p.shape)}; make a new optimizer, or a new parameter group, for a layer that has grown"
            )

    def repack(self, states: Mapping[torch.Tensor, dict[str, Any]], masks: Mapping[torch.Tensor, BitMask]) -> None:
        """Store the state of these parameters for the weights these masks keep, whatever its layout was.

        Nothing has changed when memory runs out.
        """
        if not masks:
            return
        implementation = choose(self._backend, next(iter(masks)).device)
        sizes = [local(p).numel() for p in masks]
        bits = [(mask.packed, n) for mask, n in zip(masks.values(), sizes, strict=True)]
        layouts = dict(zip(masks, implementation.compactions(bits), strict=True))
        moves: list[StateMove] = []
        targets: list[tuple[dict[str, Any], str, torch.Tensor]] = []
        for (p, layout), numel in zip(layouts.items(), sizes, strict=True):
            state = states.get(p, {})
            for key, value in state.items():
                if key != MASTER and is_per_weight(key, value):
                    packed = torch.empty(layout.num_kept, dtype=value.dtype, device=value.device)
                    moves.append(StateMove(local(value), self._layouts.get(p), packed, layout, numel))
                    targets.append((state, key, packed))
        if moves:
            implementation.move_state(moves)
        for state, key, packed in targets:
            state[key] = packed
        self._layouts.update(layouts)
        self._versions.update((p, version_of(layout.mask)) for p, layout in layouts.items())

    def dense(self, p: torch.Tensor, state: dict[str, Any]) -> dict[str, Any]:
        """Return the state as torch has it; the layout stays."""
        layout = self._layouts.get(p)
        dense = dict(state)
        if layout is None:
            return dense
        moves = []
        for key, value in state.items():
            if key == MASTER or not is_per_weight(key, value):
                continue
            values = torch.empty(local(p).shape, dtype=value.dtype, device=value.device)
            moves.append(StateMove(value, layout, values, None, values.numel()))
            dense[key] = sharded_like(values, p)
        choose(self._backend, p.device).move_state(moves)
        return dense
