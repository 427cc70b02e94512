"""Safetensors checkpoints on disk: the place of every tensor in their files, and checks that the files agree.

The safetensors library checks each header against its file: bounds, overlaps, holes, shapes, dtypes. It does not return
the place of a tensor, so the offsets are read from the same header once it has passed.
"""

from __future__ import annotations

import hashlib
import json
import math
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from gmp_kernels.backends import dtypes
from gmp_kernels.checkpoints.folders import SUFFIX, TIED, look_into, read_index, unique_names
from gmp_kernels.errors import CheckpointError

__all__ = ["DTYPES", "LENGTH_BYTES", "Checkpoint", "FileShard", "Span", "TensorInfo", "open_checkpoint"]

# The dtypes whose magnitudes have an order here, by their names in the format.
DTYPES = {name: dtype for dtype, name in dtypes.DTYPES.items()}
LENGTH_BYTES = 8  # of the header's length, in front of it


class Span(NamedTuple):
    """Range of a file.

    Attributes
    ----------
    begin, nbytes : int
    unit : int
        If it is read in pieces, each but the last has a multiple of so many bytes.
    """

    begin: int
    nbytes: int
    unit: int = 1


class TensorInfo(NamedTuple):
    """Tensor of the file ``path``; its ``nbytes`` bytes begin at byte ``begin`` of the file."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def span(self) -> Span:
        """Bytes of the file that the tensor takes."""
        return Span(self.begin, self.nbytes)


@dataclass(frozen=True)
class FileShard:
    """Safetensors file of a checkpoint.

    Attributes
    ----------
    path : Path
    name : str
        Relative to the checkpoint's folder.
    tensors : tuple of TensorInfo
        Tensors in the order of their bytes, without holes between them.
    metadata : dict of str to str or None
    data_begin : int
        Bytes of the header, including its length.
    identity : dict
        Size, time of the last change and hash of the header. While these stay, the file counts as unchanged.
    """

    path: Path
    name: str
    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str] | None
    data_begin: int
    identity: dict[str, Any]

    @property
    def num_bytes(self) -> int:
        """Bytes of the file."""
        return int(self.identity["size"])


@dataclass(frozen=True)
class Checkpoint:
    """Safetensors file, or a folder of such files with the other files in it.

    Attributes
    ----------
    root : Path
        The file or the folder.
    shards : tuple of FileShard
        In the order of their names.
    others : dict of str to Path
        {path relative to the folder: file} of the other files that belong to the model.
    index : str or None
        The one among ``others`` that maps tensors to shards.
    left_out : dict of str to str
        {path relative to the folder: kind of file} of the files that do not belong to the model.
    tied : tuple of str
        Names in the index of tensors that are stored under another name.
    """

    root: Path
    shards: tuple[FileShard, ...]
    others: dict[str, Path]
    index: str | None
    left_out: dict[str, str]
    tied: tuple[str, ...]

    @property
    def tensors(self) -> list[TensorInfo]:
        """All tensors, in the order of the shards and of their bytes: the order of global scope."""
        return [tensor for shard in self.shards for tensor in shard.tensors]

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.num_bytes for shard in self.shards)

    def identity(self) -> dict[str, Any]:
        """Return facts of all files that stay the same as long as no file changes."""
        others = {name: _size_and_time(path) for name, path in self.others.items()}
        return {"shards": {shard.name: shard.identity for shard in self.shards}, "others": others}

    def check_unchanged(self) -> None:
        """Raise CheckpointError if a shard has changed since the checkpoint was opened."""
        for shard in self.shards:
            if not _size_and_time(shard.path).items() <= shard.identity.items():
                raise CheckpointError(
                    f"{shard.path}: expected the file that was opened, got another size or time of change; "
                    "run again when nothing writes to it"
                )


def open_checkpoint(path: Path, *, copy_others: bool = False) -> Checkpoint:
    """Read the headers of a checkpoint, and its index if it has one, and check them against each other.

    Parameters
    ----------
    path : Path
        A ``.safetensors`` file, or a folder of them. From a folder come the files that its ``*.safetensors.index.json``
        names or, without an index, those at its top level that make up one model.
    copy_others : bool
        All other files in the folder belong to the checkpoint too, and ``left_out`` is empty.

    Raises
    ------
    CheckpointError
        A file is missing, truncated or corrupt, the index contradicts the files, or two tensors have one name.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{path}: expected a {SUFFIX} file or a folder of them, got nothing; check the path"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {getattr(error, 'strerror', error)}; check the path") from None
    if stat.S_ISREG(mode):
        return Checkpoint(path, (_read_shard(path, path.name),), {}, None, {}, ())
    if not stat.S_ISDIR(mode):
        raise CheckpointError(f"{path}: expected a {SUFFIX} file or a folder of them, got a device or a pipe")
    files, others, index, left_out = look_into(path, everything=copy_others)
    shards = tuple(_read_shard(file, name) for name, file in files.items())
    tied = _check_names(path, shards, None if index is None else read_index(path / index)["weight_map"])
    return Checkpoint(path, shards, others, index, left_out, tied)


def _size_and_time(path: Path) -> dict[str, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read any more: {error.strerror}") from None
    return {"size": found.st_size, "mtime_ns": found.st_mtime_ns}


def _read_shard(path: Path, name: str) -> FileShard:
    try:
        with safe_open(path, "numpy"):  # checks the header
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            text = file.read(length)
        header = json.loads(text, object_pairs_hook=unique_names)
        metadata = header.pop("__metadata__", None)
        data_begin = LENGTH_BYTES + length
        tensors = [
            TensorInfo(path, key, entry["dtype"], tuple(entry["shape"]), data_begin + begin, end - begin)
            for key, entry in header.items()
            for begin, end in [entry["data_offsets"]]
        ]
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: expected a whole {SUFFIX} file, got one that cannot be read ({error}); restore or download it, "
            "or convert it if it has another format"
        ) from None
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.nbytes))
    identity = _size_and_time(path) | {"header": hashlib.sha256(text).hexdigest()}
    return FileShard(path, name, tuple(tensors), metadata, data_begin, identity)


def _check_names(root: Path, shards: Sequence[FileShard], weight_map: Mapping[str, str] | None) -> tuple[str, ...]:
    """Compare the files, and an index with them; return its names of tensors that are stored under another name."""
    found: dict[str, str] = {}
    for shard in shards:
        for tensor in shard.tensors:
            if tensor.name in found:
                raise CheckpointError(
                    f"{root}: expected each tensor once, got '{tensor.name}' in {found[tensor.name]} and {shard.name}; "
                    "remove the file that does not belong"
                )
            found[tensor.name] = shard.name
    if weight_map is None:
        return ()
    tied = []
    for name, shard_name in weight_map.items():
        if name not in found and TIED.fullmatch(name):
            tied.append(name)
        elif found.get(name) != shard_name:
            where = f"it is in {found[name]}" if name in found else "it is nowhere"
            raise CheckpointError(f"{root}: the index has '{name}' in {shard_name}, but {where}; restore the index")
    missing = next((name for name in found if name not in weight_map), None)
    if missing is not None:
        raise CheckpointError(f"{root}: the index lacks '{missing}' of {found[missing]}; restore the index")
    return tuple(tied)
