"""The pruned network as one safetensors file: every tensor of its state_dict, and the masks beside their weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import torch as safetensors
from torch import nn

from gmp_kernels import BitMask
from gmp_kernels.checkpoints import MASK_SUFFIX, mask_metadata

__all__ = ["save"]


def save(path: Path, model: nn.Module, masks: Mapping[str, BitMask]) -> None:
    """Write ``model`` and ``masks``, {parameter name: mask}, to ``path``.

    The mask of ``<name>`` is the uint8 tensor ``<name>.mask``: one bit per weight, bit i of byte j belonging to flat
    element 8 j + i, 1 = kept. The metadata says so, and gives the shapes.
    """
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    tensors |= {name + MASK_SUFFIX: mask.packed for name, mask in masks.items()}
    shapes = {name: mask.shape for name, mask in masks.items()}
    path.write_bytes(safetensors.save(tensors, mask_metadata(shapes)))
