"""Masks as ``gmp-kernels prune --masks`` writes them."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path

from safetensors import SafetensorError, safe_open

from gmp_kernels.checkpoints.files import MASK_SUFFIX
from gmp_kernels.checkpoints.folders import SUFFIX
from gmp_kernels.errors import CheckpointError
from gmp_kernels.masks import BitMask

__all__ = ["is_file_of_masks", "read_masks"]


def is_file_of_masks(path: Path) -> bool:
    """Whether a file holds such masks and nothing besides, going by its header."""
    try:
        with safe_open(path, "numpy") as stored:
            shapes = json.loads((stored.metadata() or {})["masks"])["shapes"]
            return {f"{name}{MASK_SUFFIX}" for name in shapes} == set(stored.keys())
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
                shapes = json.loads((stored.metadata() or {})["masks"])["shapes"]
                for name, shape in shapes.items():
                    masks[name] = BitMask(stored.get_tensor(f"{name}{MASK_SUFFIX}"), shape)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{file}: expected masks that 'gmp-kernels prune --masks' wrote, got something else ({error!r}); give "
                "the path of its masks, or of the folder that holds them"
            ) from None
    return masks
