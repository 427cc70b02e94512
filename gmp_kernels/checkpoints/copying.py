"""Copies of what lies beside the weights of a checkpoint: configs, tokenizers, and whatever else was asked for."""

from __future__ import annotations

import json
from collections.abc import Container
from pathlib import Path

import torch

from gmp_kernels.checkpoints.files import Checkpoint
from gmp_kernels.checkpoints.folders import read_index
from gmp_kernels.checkpoints.stream import Source, Stream, write_whole
from gmp_kernels.checkpoints.writing import size_of

__all__ = ["copy_others"]


def copy_others(
    checkpoint: Checkpoint, stream: Stream, folder: Path, dtype: torch.dtype | None, *, apart_from: Container[str]
) -> None:
    """Copy to ``folder`` all that belongs to a checkpoint but its shards, and what ``apart_from`` names.

    Where ``dtype`` changes the sizes of the tensors, the index is told.

    Raises
    ------
    CheckpointError, OSError
    """
    for name, path in checkpoint.others.items():
        if name in apart_from:
            continue
        with Source(path) as source, stream.created(folder / name, source.stat) as descriptor:
            if name == checkpoint.index and dtype is not None:
                write_whole(descriptor, _index_with_sizes(checkpoint, path, dtype), 0)
            else:
                stream.copy(source, 0, source.stat.st_size, descriptor, 0)


def _index_with_sizes(checkpoint: Checkpoint, path: Path, dtype: torch.dtype) -> bytes:
    """Return the index with the size that the tensors have in the output."""
    document = read_index(path)
    metadata = document.get("metadata")
    if isinstance(metadata, dict) and "total_size" in metadata:
        metadata["total_size"] = sum(size_of(tensor, dtype) for tensor in checkpoint.tensors)
    return json.dumps(document, indent=2).encode()
