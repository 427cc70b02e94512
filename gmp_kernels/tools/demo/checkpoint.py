"""Saving the pruned network as one safetensors file: the tensors of its state_dict, and the masks of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import torch as safetensors
from torch import nn

from gmp_kernels import BitMask
from gmp_kernels.checkpoints import MASK_SUFFIX, mask_metadata
from gmp_kernels.formats import ROW_MAJOR

__all__ = ["save"]


def save(path: Path, model: nn.Module, masks: Mapping[str, BitMask]) -> None:
    """Write ``model`` and ``masks``, {parameter name: mask}, to ``path``.

    The mask of ``<name>`` is the uint8 tensor ``<name>.mask`` with one bit per weight: bit i of byte j belongs to flat
    element 8 j + i, 1 = kept. The metadata describes this layout and gives the shapes.
    """
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    tensors |= {name + MASK_SUFFIX: mask.to(memory_format=ROW_MAJOR).packed for name, mask in masks.items()}
    shapes = {name: mask.shape for name, mask in masks.items()}
    path.write_bytes(safetensors.save(tensors, mask_metadata(shapes)))
