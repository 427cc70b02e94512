"""Safetensors checkpoints on disk: which files belong to one, and where in them every tensor lies.

The safetensors library checks each header against the file: bounds, overlaps, holes, shapes, dtypes. It does not tell
where a tensor lies, so the offsets are read from the same header once it has passed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from gmp_kernels.errors import CheckpointError

__all__ = [
    "DTYPES",
    "MASK_SUFFIX",
    "Checkpoint",
    "Shard",
    "TensorInfo",
    "header_of",
    "mask_metadata",
    "open_checkpoint",
]

# The dtypes whose magnitudes have an order here, by their names in the format.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INDEX_SUFFIX = ".safetensors.index.json"
SUFFIX = ".safetensors"
MASK_SUFFIX = ".mask"
LENGTH_BYTES = 8  # of the header's length, in front of it


class TensorInfo(NamedTuple):
    """One tensor of a file; ``begin`` and ``nbytes`` say where its bytes lie, from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Shard:
    """One safetensors file.

    Attributes
    ----------
    path : Path
    name : str
        Relative to the checkpoint's folder.
    tensors : tuple of TensorInfo
        In the order of their bytes, which they fill without holes.
    metadata : dict of str to str or None
    data_begin : int
        Bytes of the header, its length included.
    identity : dict
        Size, time of the last change and hash of the header: what tells that the file is still the same.
    """

    path: Path
    name: str
    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str] | None
    data_begin: int
    identity: dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """One safetensors file, or a folder of them with all that lies beside.

    Attributes
    ----------
    root : Path
        The file or the folder.
    shards : tuple of Shard
        In the order of their names.
    others : dict of str to Path
        {path relative to the folder: file} of everything else there, symbolic links resolved.
    index : str or None
        The one among ``others`` that maps tensors to shards.
    """

    root: Path
    shards: tuple[Shard, ...]
    others: dict[str, Path]
    index: str | None

    @property
    def tensors(self) -> list[TensorInfo]:
        """All tensors, in the order of the shards and of their bytes: the order of global scope."""
        return [tensor for shard in self.shards for tensor in shard.tensors]

    def identity(self) -> dict[str, Any]:
        """Return what tells that no file of the checkpoint has changed."""
        others = {name: _stat(path) for name, path in self.others.items()}
        return {"shards": {shard.name: shard.identity for shard in self.shards}, "others": others}

    def check_unchanged(self) -> None:
        """Raise CheckpointError if a file is not what it was when the checkpoint was opened."""
        for shard in self.shards:
            now = _stat(shard.path)
            if any(shard.identity[key] != now[key] for key in now):
                raise CheckpointError(
                    f"{shard.path}: expected the file that was opened, got another size or time of change; "
                    "run again when nothing writes to it"
                )


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the headers of a checkpoint, and its index if it has one, and check them against each other.

    Parameters
    ----------
    path : Path
        A ``.safetensors`` file, or a folder that holds some: those its ``*.safetensors.index.json`` names, or all at
        its top level if it has no index.

    Raises
    ------
    CheckpointError
        A file is missing, truncated or corrupt, the index contradicts the files, or two tensors have one name.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: expected a {SUFFIX} file or a folder of them, got nothing; check the path")
    if not path.is_dir():
        return Checkpoint(path, (_read_shard(path, path.name),), {}, None)
    files = _walk(path)
    names = sorted(name for name in files if "/" not in name and name.endswith(SUFFIX))
    indices = [name for name in files if "/" not in name and name.endswith(INDEX_SUFFIX)]
    if len(indices) > 1:
        raise CheckpointError(f"{path}: expected one index, got {sorted(indices)}; name the folder of one model")
    weight_map = None
    if indices:
        weight_map = _read_index(path / indices[0])
        names = sorted(set(weight_map.values()))
    if not names:
        raise CheckpointError(f"{path}: expected a folder with {SUFFIX} files, got none; convert other formats first")
    for name in names:
        if name not in files:
            raise CheckpointError(f"{path / indices[0]}: names the shard {name!r}, which is not there; download it")
    shards = tuple(_read_shard(files[name], name) for name in names)
    _check_names(path, shards, weight_map)
    others = {name: file for name, file in files.items() if name not in names}
    return Checkpoint(path, shards, others, indices[0] if indices else None)


def header_of(tensors: Sequence[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str] | None) -> bytes:
    """Return a header, its length included, for tensors given as (name, dtype, shape, bytes) in the order of bytes."""
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    begin = 0
    for name, dtype, shape, nbytes in tensors:
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, begin + nbytes]}
        begin += nbytes
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    # Spaces, so that the data begins at a multiple of 8, as the format wants it.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def mask_metadata(shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Describe masks stored as uint8 tensors ``<name>.mask`` beside or apart from the weights of these shapes."""
    description = {
        "suffix": MASK_SUFFIX,
        "packing": "1 bit per weight, little bit order, 1 = kept",
        "shapes": {name: list(shape) for name, shape in shapes.items()},
    }
    # A single entry: the safetensors library writes several in an order that changes from run to run.
    return {"masks": json.dumps(description)}


def _stat(path: Path) -> dict[str, int]:
    found = path.stat()
    return {"size": found.st_size, "mtime_ns": found.st_mtime_ns}


def _walk(root: Path) -> dict[str, Path]:
    """Every file below ``root`` by its relative path, through symbolic links."""
    files, seen = {}, set()
    for folder, folders, names in os.walk(root, followlinks=True):
        # A link to a folder above would never end.
        seen.add(os.path.realpath(folder))
        folders[:] = sorted(name for name in folders if os.path.realpath(Path(folder, name)) not in seen)
        for name in sorted(names):
            file = Path(folder, name)
            if not file.is_file():
                raise CheckpointError(f"{file}: expected a file, got a broken link or a device; complete the download")
            files[file.relative_to(root).as_posix()] = file
    return files


def _read_index(path: Path) -> dict[str, str]:
    try:
        document = json.loads(path.read_bytes())
        weight_map = document["weight_map"]
        if not all(isinstance(entry, str) for pair in weight_map.items() for entry in pair):
            raise TypeError("its weight_map maps something other than names")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: expected an index with a weight_map, got {error!r}; restore it") from None
    return dict(weight_map)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name occurs twice in its header")
    return entries


def _read_shard(path: Path, name: str) -> Shard:
    try:
        with safe_open(path, "numpy"):  # checks the header
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            text = file.read(length)
        header = json.loads(text, object_pairs_hook=_unique)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: expected a whole {SUFFIX} file, got one that cannot be read ({error}); restore or download it, "
            "or convert it if it has another format"
        ) from None
    data_begin = LENGTH_BYTES + length
    metadata = header.pop("__metadata__", None)
    tensors = [
        TensorInfo(key, entry["dtype"], tuple(entry["shape"]), data_begin + begin, end - begin)
        for key, entry in header.items()
        for begin, end in [entry["data_offsets"]]
    ]
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.nbytes))
    identity = _stat(path) | {"header": hashlib.sha256(text).hexdigest()}
    return Shard(path, name, tuple(tensors), metadata, data_begin, identity)


def _check_names(root: Path, shards: Sequence[Shard], weight_map: Mapping[str, str] | None) -> None:
    found: dict[str, str] = {}
    for shard in shards:
        for tensor in shard.tensors:
            if tensor.name in found:
                raise CheckpointError(
                    f"{root}: expected each tensor once, got '{tensor.name}' in {found[tensor.name]} and {shard.name}; "
                    "remove the file that does not belong"
                )
            found[tensor.name] = shard.name
    if weight_map is None or weight_map == found:
        return
    for name, shard_name in weight_map.items():
        if found.get(name) != shard_name:
            where = f"it is in {found[name]}" if name in found else "it is nowhere"
            raise CheckpointError(f"{root}: the index has '{name}' in {shard_name}, but {where}; restore the index")
    missing = next(name for name in found if name not in weight_map)
    raise CheckpointError(f"{root}: the index lacks '{missing}' of {found[missing]}; restore the index")
