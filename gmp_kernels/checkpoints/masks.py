"""Masks as ``gmp-kernels prune --masks`` writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from gmp_kernels.checkpoints.folders import SUFFIX
from gmp_kernels.errors import CheckpointError
from gmp_kernels.masks import BitMask

__all__ = ["MASK_SUFFIX", "is_file_of_masks", "mask_metadata", "read_masks", "shapes_in"]

MASK_SUFFIX = ".mask"


def mask_metadata(shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Describe masks of weights of these shapes, stored as uint8 tensors ``<name>.mask``."""
    description = {
        "suffix": MASK_SUFFIX,
        "packing": "1 bit per weight, little bit order, 1 = kept",
        "shapes": {name: list(shape) for name, shape in shapes.items()},
    }
    # A single entry, because the safetensors library writes several in an order that changes from run to run.
    return {"masks": json.dumps(description)}


def shapes_in(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """Return {name of the weight: its shape, unchecked} as ``mask_metadata`` wrote it.

    Raises
    ------
    ValueError, KeyError, TypeError, RecursionError
        ``mask_metadata`` did not write this metadata.
    """
    shapes = json.loads((metadata or {})["masks"])["shapes"]
    if not isinstance(shapes, dict):
        raise TypeError("its masks have no shapes by name")
    return shapes


def is_file_of_masks(path: Path) -> bool:
    """Whether a file, by its header, holds such masks and nothing else."""
    try:
        with safe_open(path, "numpy") as stored:
            return {f"{name}{MASK_SUFFIX}" for name in shapes_in(stored.metadata())} == set(stored.keys())
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def read_masks(path: str | PathLike[str]) -> dict[str, BitMask]:
    """Read {name of the weight: mask}, on the CPU.

    Parameters
    ----------
    path : str or path
        A file of masks, a folder of such files, or a pruned folder that has them in ``masks``.

    Raises
    ------
    CheckpointError
        There is nothing there, or something else.
    """
    root = Path(path)
    folder = root / "masks" if (root / "masks").is_dir() else root
    files = sorted(folder.glob(f"*{SUFFIX}")) if folder.is_dir() else [root]
    if not files or not all(file.is_file() for file in files):
        raise CheckpointError(
            f"{path}: expected masks that 'gmp-kernels prune --masks' wrote, got nothing there; check the path, or "
            "write 'zeros' for the zeros of the model"
        )
    masks: dict[str, BitMask] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as stored:
                for name, shape in shapes_in(stored.metadata()).items():
                    masks[name] = BitMask(stored.get_tensor(f"{name}{MASK_SUFFIX}"), shape)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"{file}: expected masks that 'gmp-kernels prune --masks' wrote, got something else ({error!r}); give "
                "the path of its masks, or of the folder that holds them"
            ) from None
    return masks
