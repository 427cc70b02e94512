"""Contents of a checkpoint's folder: the files of the model, those that belong to it, and those that do not.

A pruned model must not come with a dense copy of it in another format or under another name, nor with optimizer state
or masks that do not fit it any more. So files that, by their names, may hold weights but are not the model are left
out.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gmp_kernels.errors import CheckpointError
from gmp_kernels.model.coverage import shown_names

__all__ = ["SUFFIX", "TIED", "look_into", "read_index", "unique_names"]

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
PIPELINE = "model_index.json"
MAIN = ("model", "diffusion_pytorch_model")  # names that the libraries give the model that they load
NUMBERED = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<total>\d{5})\.safetensors")

FORMATS = (
    "safetensors|bin|pth?|pt2|ptl|pte|ckpt|distcp|pkl|pickle|joblib|msgpack|h5|hdf5|keras|npz|gguf|ggml|onnx|onnx_data|tflite|"
    "pb|ot|pdparams|pdopt|nemo|engine|mlmodel"
)
# Kinds of files that are not the model; the first that fits a name in lower case counts.
KINDS = {
    kind: re.compile(pattern)
    for kind, pattern in {
        "hidden folders": r"(.*/)?\.[^/]*/.*",
        "states of a trainer or optimizer": r"(.*/)?(global_step\d+/.*|trainer_state\.json|(optimizer|scheduler|scaler|"
        r"rng_state|random_states|training_args|sampler|dataloader|gradscaler)[^/]*\.(pth?|bin|pkl|safetensors|distcp))",
        "masks written by prune": r"masks/.*\.safetensors|(.*/)?[^/]*\.masks\.safetensors",
        "adapters": r"(.*/)?(adapter_(model|config)|pytorch_lora_weights)\.[^/]*",
        "other weights": rf".*\.({FORMATS})(\.(index(\.[^/]*)?(\.json)?|data[^/]*|meta))?|.*\.data-\d+-of-\d+",
    }.items()
}
SIDECARS = KINDS.keys() - {"other weights"}
# Names of tensors that are often tied to another one. Only one of such a pair is stored, but some indices name both.
TIED = re.compile(
    r"(.*\.)?(lm_head|embed_out|embed_tokens|word_embeddings|output_embeddings|wte|shared|decoder)\.(weight|bias)"
)


def look_into(root: Path, *, everything: bool) -> tuple[dict[str, Path], dict[str, Path], str | None, dict[str, str]]:
    """Sort the files of a folder; with ``everything``, all files that are not the model belong to it.

    Returns
    -------
    shards, others : dict of str to Path
        The files of the model, and those that belong to it, by their paths relative to the folder.
    index : str or None
        The one among ``others`` that maps tensors to shards.
    left_out : dict of str to str
        {file, or hidden folder: kind} of everything else.

    Raises
    ------
    CheckpointError
        There is no model, or more than one; a file is missing, is not a regular file, or cannot be reached.
    """
    files = _walk(root)
    top = [name for name in files if "/" not in name]
    if PIPELINE in top:
        parts = sorted({name.split("/")[0] for name in files if "/" in name and name.endswith(SUFFIX)})
        raise CheckpointError(
            f"{root}: expected the folder of one model, got a pipeline of {shown_names(parts) or 'none here'} "
            f"({PIPELINE} tells); name one of its folders, such as {root / (parts or ['unet'])[0]}"
        )
    index = _choose_index(root, top)
    if index is not None:
        names = sorted(set(read_index(root / index)["weight_map"].values()))
    else:
        names = _choose_shards(root, top)
    if not names:
        raise CheckpointError(_without_weights(root, files))
    missing = next((name for name in names if name not in files), None)
    if missing is not None:
        raise CheckpointError(f"{root}: expected {len(names)} shards, got none called {missing!r}; download it")
    shards, others, left_out = {name: files[name] for name in names}, {}, {}
    for name, path in files.items():
        if name in shards:
            continue
        kind = _kind_of(name, names)
        if kind is None or everything or name == index:
            others[name] = path
        else:
            hidden = re.match(r"(.*/)?\.[^/]*/", name) if kind == "hidden folders" else None
            left_out[hidden.group() if hidden else name] = kind
    for path in (*shards.values(), *others.values()):
        if not path.is_file():
            raise CheckpointError(f"{path}: expected a file, got a broken link or a device; complete the download")
    return shards, others, index, left_out


def read_index(path: Path) -> dict[str, Any]:
    """Read an index; its ``weight_map`` maps names to names.

    Raises
    ------
    CheckpointError
    """
    try:
        document = json.loads(path.read_bytes(), object_pairs_hook=unique_names)
        weight_map = document["weight_map"]
        if not all(isinstance(entry, str) for pair in weight_map.items() for entry in pair):
            raise TypeError("its weight_map maps something other than names")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected an index with a weight_map, got {error!r}; restore it") from None
    return dict(document)


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict; raise ValueError if a name occurs twice."""
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name occurs twice in it")
    return entries


def _walk(root: Path) -> dict[str, Path]:
    """Return {relative path: file} of all files below ``root``; follow symbolic links."""

    def fail(error: OSError) -> None:
        raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror}") from None

    files, seen = {}, set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=fail):
        # A link to a folder above would be followed for ever.
        seen.add(os.path.realpath(folder))
        folders[:] = sorted(name for name in folders if os.path.realpath(Path(folder, name)) not in seen)
        for name in sorted(names):
            file = Path(folder, name)
            files[file.relative_to(root).as_posix()] = file
    return files


def _kind_of(name: str, chosen: Iterable[str]) -> str | None:
    """Return the kind of a file, one of ``KINDS``; None if it belongs to the model."""
    kind = next((kind for kind, pattern in KINDS.items() if pattern.fullmatch(name.lower())), None)
    # The config of an adapter belongs to it.
    return None if kind == "adapters" and any(_kind_of(other, ()) == kind for other in chosen) else kind


def _choose_index(root: Path, top: Iterable[str]) -> str | None:
    indices = sorted(name for name in top if name.endswith(INDEX_SUFFIX))
    main = [name for name in indices if name.removesuffix(INDEX_SUFFIX) in MAIN]
    chosen = main if len(main) == 1 else indices
    if len(chosen) > 1:
        raise CheckpointError(f"{root}: expected one index, got {shown_names(chosen)}; name the folder of one model")
    return chosen[0] if chosen else None


def _choose_shards(root: Path, top: Iterable[str]) -> list[str]:
    """Return the files of the model, by their names alone; some of a set may be missing."""
    found = sorted(name for name in top if name.endswith(SUFFIX))
    found = [name for name in found if _kind_of(name, ()) not in SIDECARS] or found
    main = [name for name in found if name.removesuffix(SUFFIX) in MAIN]
    if main:
        return main
    sets = {(match["stem"], int(match["total"])) for match in map(NUMBERED.fullmatch, found) if match}
    sets = {one for one in sets if one[0] in MAIN} or sets
    if len(sets) > 1:
        stems = [f"{stem}-*-of-{total:05}{SUFFIX}" for stem, total in sorted(sets)]
        raise CheckpointError(f"{root}: expected one set of shards, got {shown_names(stems)}; leave one in the folder")
    for stem, total in sets:
        return [f"{stem}-{number:05}-of-{total:05}{SUFFIX}" for number in range(1, total + 1)]
    # Copies of the model in another precision, such as weights.fp16.safetensors, or in the layout of another library.
    variants = {
        name for name in found for short in [f"{name.split('.')[0]}{SUFFIX}"] if short != name and short in found
    }
    originals = {name for name in found if name.startswith("consolidated")}
    rest = [name for name in found if name not in variants]
    return [name for name in rest if name not in originals] or rest


def _without_weights(root: Path, files: Iterable[str]) -> str:
    below = sorted({name.rpartition("/")[0] for name in files if name.endswith(SUFFIX)})
    if below:
        found = f"got some in {shown_names(below)} only"
        return f"{root}: expected {SUFFIX} files at its top level, {found}; name such a folder"
    others = sorted(name for name in files if _kind_of(name, ()) == "other weights")
    found = f"got only {shown_names(others)}" if others else "got none"
    return f"{root}: expected a folder with {SUFFIX} files, {found}; convert other formats first"
