"""Work for the stages ``profile`` and ``ncu``: one call each, on a large tensor or on all tensors of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from gmp_kernels import BitMask, optim, prune_
from gmp_kernels.tools.bench.gpu import llama_8b_sizes, resnet50_sizes
from gmp_kernels.tools.bench.measurement import Timed

LARGE = 1 << 28
FEWER = 256  # divides the weights of Llama 8B, because only the number of its tensors matters here


class Work:
    """Calls to profile, on one device and by one backend; ``shrink`` divides the number of weights."""

    def __init__(self, device: torch.device, backend: str, shrink: int = 1) -> None:
        self._device, self._backend, self._shrink = device, backend, shrink
        large = [LARGE]
        self.large: dict[str, Callable[[], Timed]] = {
            "prune fp32": partial(self._prune, large),
            "prune bf16": partial(self._prune, large, torch.bfloat16),
            "prune fp32, 0.88 to 0.9": partial(self._prune, large, before=0.88),
            "prune bf16, 0.88 to 0.9": partial(self._prune, large, torch.bfloat16, before=0.88),
            "AdamW 0": partial(self._adamw, large, 0.0),
            "AdamW 0.9": partial(self._adamw, large, 0.9),
            "AdamW compact 0.9": partial(self._adamw, large, 0.9, True),
        }
        resnet50, llama_8b = resnet50_sizes(), [max(1, n // FEWER) for n in llama_8b_sizes()]
        self.models: dict[str, Callable[[], Timed]] = {
            "prune, 161 tensors": partial(self._prune, resnet50),
            "prune, 291 tensors": partial(self._prune, llama_8b),
            "AdamW, 161 tensors": partial(self._adamw, resnet50, 0.0),
            "AdamW, 291 tensors": partial(self._adamw, llama_8b, 0.0),
        }

    def all(self) -> dict[str, Callable[[], Timed]]:
        """Functions that allocate and return each call, by name."""
        return self.large | self.models

    def _weights(self, sizes: Sequence[int], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        return [torch.randn(max(1, n // self._shrink), device=self._device).to(dtype) for n in sizes]

    def _prune(self, sizes: Sequence[int], dtype: torch.dtype = torch.float32, before: float = 0.0) -> Timed:
        weights = self._weights(sizes, dtype)
        masks = prune_(weights, sparsity=before, backend=self._backend).masks if before else None
        tensors = [*weights, *(mask.packed for mask in masks or [])]
        saved = [tensor.clone() for tensor in tensors]

        def restore() -> None:
            for tensor, old in zip(tensors, saved, strict=True):
                tensor.copy_(old)

        return Timed(partial(prune_, weights, sparsity=0.9, masks=masks, backend=self._backend), restore)

    def _adamw(self, sizes: Sequence[int], sparsity: float, compact: bool = False) -> Timed:
        params = [nn.Parameter(weight) for weight in self._weights(sizes)]
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer = optim.AdamW(params, compact_state=compact, backend=self._backend)
        if sparsity:
            optimizer.set_masks({p: BitMask.from_bool(torch.rand_like(p) >= sparsity) for p in params})
        return Timed(optimizer.step)
