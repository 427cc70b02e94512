"""Masks as ``gmp-kernels prune --masks`` writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

from safetensors import SafetensorError, safe_open

from gmp_kernels.checkpoints.folders import SUFFIX
from gmp_kernels.errors import CheckpointError
from gmp_kernels.masks import BitMask

__all__ = ["MASK_SUFFIX", "is_file_of_masks", "mask_metadata", "masks_in", "read_masks"]

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


def masks_in(metadata: Mapping[str, str] | None) -> dict[str, tuple[int, ...]] | None:
    """Return {name of a packed mask: shape of its weight}; None if ``mask_metadata`` did not write this metadata."""
    try:
        shapes = json.loads((metadata or {})["masks"])["shapes"]
        masks = {name + MASK_SUFFIX: tuple(shape) for name, shape in shapes.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    are_sizes = all(type(size) is int and size >= 0 for shape in masks.values() for size in shape)
    return masks if are_sizes else None


def is_file_of_masks(path: Path) -> bool:
    """Whether a file, by its header, holds such masks and nothing else."""
    try:
        with safe_open(path, "numpy") as stored:
            masks = masks_in(stored.metadata())
            return masks is not None and masks.keys() == set(stored.keys())
    except (SafetensorError, OSError):
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
                if (found := masks_in(stored.metadata())) is None:
                    raise ValueError("it describes no masks")
                for name, shape in found.items():
                    masks[name.removesuffix(MASK_SUFFIX)] = BitMask(stored.get_tensor(name), shape)
        except (SafetensorError, OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{file}: expected masks that 'gmp-kernels prune --masks' wrote, got something else ({error!r}); give "
                "the path of its masks, or of the folder that holds them"
            ) from None
    return masks
