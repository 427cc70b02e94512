"""The pruned network as one safetensors file: every tensor of its state_dict, and the masks beside their weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import torch as safetensors
from torch import nn

from gmp_kernels import BitMask

__all__ = ["MASK_SUFFIX", "save"]

MASK_SUFFIX = ".mask"


def save(path: Path, model: nn.Module, masks: Mapping[str, BitMask]) -> None:
    """Write ``model`` and ``masks``, {parameter name: mask}, to ``path``.

    The mask of ``<name>`` is the uint8 tensor ``<name>.mask``: one bit per weight, bit i of byte j belonging to flat
    element 8 j + i, 1 = kept. The metadata says so, and gives the shapes.
    """
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    tensors |= {name + MASK_SUFFIX: mask.packed for name, mask in masks.items()}
    description = {
        "suffix": MASK_SUFFIX,
        "packing": "1 bit per weight, little bit order, 1 = kept",
        "shapes": {name: list(mask.shape) for name, mask in masks.items()},
    }
    # A single entry: safetensors writes several in an order that changes from run to run.
    path.write_bytes(safetensors.save(tensors, {"masks": json.dumps(description)}))
