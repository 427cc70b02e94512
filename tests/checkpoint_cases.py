"""Checkpoints to prune and to break, and what pruning them must give."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gmp_kernels import BitMask, prune_
from gmp_kernels.tools.testing import adversarial_cases, assert_bitwise_equal

INDEX = "model.safetensors.index.json"
TINY = 4096  # bytes of memory that make even small tensors come in pieces


def adversarial_tensors(dtype: torch.dtype, rows: int = 24, columns: int = 43) -> dict[str, torch.Tensor]:
    cases = adversarial_cases(rows * columns, dtype)
    return {f"{name}.weight": case.view(rows, columns) for name, case in cases.items() if name != "any_bits"}


def model_tensors(dtype: torch.dtype = torch.float32) -> list[dict[str, torch.Tensor]]:
    """Three shards: weights, and everything that is not to be pruned."""
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    shards = [{f"layers.{i}.{name}.weight": weight(20 + i, 30) for name in ("q", "k")} for i in range(3)]
    shards[0] |= {"embed_tokens.weight": weight(50, 8), "layers.0.q.bias": weight(20)}
    shards[1] |= {"layers.1.norm.weight": torch.full((30,), -0.0), "steps": torch.tensor([1, 0, -3])}
    shards[2] |= {"lm_head.weight": weight(50, 8), "packed.weight": weight(4, 4).to(torch.float8_e4m3fn)}
    return shards


def write_folder(folder: Path, shards: Sequence[dict[str, torch.Tensor]] | None = None) -> Path:
    """Write shards as Hugging Face has them, with an index, a config, and a file in a folder below."""
    shards = model_tensors() if shards is None else shards
    (folder / "assets").mkdir(parents=True)
    weight_map = {}
    for i, tensors in enumerate(shards):
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    total = sum(tensor.nbytes for tensors in shards for tensor in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    (folder / "config.json").write_text('{"torch_dtype": "float32"}')
    (folder / "assets" / "merges.txt").write_bytes(b"a b\n")
    return folder


def shard_files(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]


def load(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in shard_files(path) for name, tensor in load_file(file).items()}


def contents(path: Path) -> dict[str, bytes]:
    """{relative path: bytes} of every file at or below ``path``."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


def assert_pruned(source: Path, target: Path, names: Sequence[str], **request: Any) -> list[BitMask]:
    """Compare with the oracle on the loaded tensors, down to the bit; return the masks."""
    before, after = load(source), load(target)
    result = prune_([before[name] for name in names], backend="reference", names=names, **request)
    assert list(after) == list(before)
    for name, tensor in before.items():
        # As bytes, because float8 does not compare.
        assert_bitwise_equal(after[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8), name)
        assert (after[name].dtype, after[name].shape) == (tensor.dtype, tensor.shape)
    return result.masks


def assert_masks(path: Path, masks: dict[str, BitMask]) -> None:
    """Compare the packed masks of one file, and what it says about them."""
    assert {name: mask.packed.tolist() for name, mask in masks.items()} == {
        name.removesuffix(".mask"): packed.tolist() for name, packed in load_file(path).items()
    }
    with safe_open(path, "pt") as file:
        description = json.loads(file.metadata()["masks"])
    assert description["shapes"] == {name: list(mask.shape) for name, mask in masks.items()}


def refuse_direct_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be a file system that always writes to the page cache."""
    opens = os.open

    def refuse(path: Any, flags: int, *arguments: Any, **named: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opens(path, flags, *arguments, **named)

    monkeypatch.setattr(os, "open", refuse)
