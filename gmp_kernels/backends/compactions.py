"""Layouts of compact state, from the number of weights that each chunk keeps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from gmp_kernels.backends.types import Compaction
from gmp_kernels.backends.uploads import upload

__all__ = ["compactions_of"]


def compactions_of(masks: Sequence[tuple[torch.Tensor, int]], counts: torch.Tensor, chunk: int) -> list[Compaction]:
    """Return a layout for each of these packed bits and their numbers of weights. Waits for the device once.

    ``counts`` has the kept weights of every chunk of ``chunk`` weights, of one mask after the other.
    """
    ends = np.cumsum([-(-numel // chunk) for _, numel in masks])
    before = [np.append(0, own.cumsum()) for own in np.split(counts.cpu().numpy(), ends[:-1])]
    offsets = torch.split(upload(np.concatenate(before), torch.int64, counts.device), list(map(len, before)))
    return [Compaction(mask, o, int(own[-1])) for (mask, _), o, own in zip(masks, offsets, before, strict=True)]
