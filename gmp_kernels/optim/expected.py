"""The prune update that follows the next optimizer step, selected along with that step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from gmp_kernels.backends import Implementation, Layer, Selection, Tally, UpdateTensor
from gmp_kernels.masks import BitMask

__all__ = ["ExpectedPrune"]


class ExpectedPrune:
    """What is going to be pruned, and the thresholds that the step before it found.

    They hold for the weights as that step left them. Changes in between show in the version counters of weights and
    masks; those made behind autograd's back, through ``.data``, in a small sample of every layer. Whoever uses the
    selections counts what they prune, which tells of what the sample missed.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], masks: Sequence[BitMask], num_prune: Sequence[int]) -> None:
        self._parameters = list(parameters)
        self._masks = list(masks)
        self._num_prune = tuple(num_prune)
        self._layers: tuple[Layer, ...] = ()
        self._selections: Sequence[Selection | None] | None = None
        self._evidence: object = None

    def tally(self, written: Mapping[torch.Tensor, UpdateTensor]) -> Tally | None:
        """Describe the selection to the step's kernel; None if the step does not write every parameter.

        ``written`` has the step's tensors by their parameters, in order.
        """
        if not all(p in written and p.is_contiguous() and not p.is_inference() for p in self._parameters):
            return None
        position = {p: i for i, p in enumerate(written)}
        ranked = [written[p].weight if written[p].master is None else written[p].master for p in self._parameters]
        self._layers = tuple(
            Layer(tensor, mask.packed) for tensor, mask in zip(ranked, self._masks, strict=True) if tensor is not None
        )
        return Tally(self._layers, tuple(position[p] for p in self._parameters), self._num_prune)

    def keep(self, selections: Sequence[Selection | None], implementation: Implementation) -> None:
        """Remember what the step found, and what the weights looked like then."""
        self._selections, self._evidence = selections, self._look(implementation)

    def selections(self, num_prune: Sequence[int], implementation: Implementation) -> Sequence[Selection | None] | None:
        """Return what was found, if it was for these counts and nothing has changed since; None entries: not found."""
        if self._selections is None or self._num_prune != tuple(num_prune):
            return None
        return self._selections if self._evidence == self._look(implementation) else None

    def _look(self, implementation: Implementation) -> object:
        tensors = [tensor for layer in self._layers for tensor in layer if tensor is not None]
        versions = [(tensor.data_ptr(), tensor._version) for tensor in (*tensors, *self._parameters)]
        return versions, implementation.fingerprints(self._layers)
