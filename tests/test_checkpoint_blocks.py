"""Outputs written past the page cache have the bytes of any others, wherever their tensors begin, and on any disk."""

from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path

import pytest
import torch
from checkpoint_cases import assert_pruned, refuse_direct_writes

from gmp_kernels.checkpoints import PruneJob
from gmp_kernels.checkpoints.blocks import BLOCK, BlockFile

SMALL = 1 << 20  # of memory makes pieces of eight blocks


def is_direct(descriptor: int) -> bool:
    flags = Path(f"/proc/self/fdinfo/{descriptor}").read_text().split("flags:")[1].split()[0]
    return bool(int(flags, 8) & os.O_DIRECT)


class Disk:
    """``os.pwrite`` to a disk of some kind; counts the bytes that pass by the page cache."""

    def __init__(self, kind: str) -> None:
        self.kind, self.real, self.num_direct = kind, os.pwrite, 0

    def __call__(self, descriptor: int, data: bytes | memoryview, offset: int) -> int:
        if is_direct(descriptor):
            if self.kind == "large blocks":
                raise OSError(errno.EINVAL, "Invalid argument")
            data = data[: len(data) // 2 // BLOCK * BLOCK or BLOCK] if self.kind == "parts" else data
            self.num_direct += len(data)
        return self.real(descriptor, data, offset)


@pytest.fixture
def disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Disk:
    """A disk that takes blocks as a whole, in parts, not these, or none."""
    disk = Disk(request.param)
    monkeypatch.setattr(os, "pwrite", disk)
    if disk.kind == "none":
        refuse_direct_writes(monkeypatch)
    return disk


DISKS = ["whole", "parts", "large blocks", "none"]


def takes_blocks(folder: Path) -> bool:
    with (folder / "probe").open("wb") as probe:
        file = BlockFile(probe.fileno())
        found = file.is_direct
        file.close()
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("disk", DISKS[:3], indirect=True)
def test_any_pieces_in_any_order(disk: Disk, tmp_path: Path, seed: int) -> None:
    if not takes_blocks(tmp_path):
        pytest.skip("the file system has only the page cache")
    draw = random.Random(seed)
    sizes = [draw.choice([1, 40, BLOCK - 8, BLOCK, 3 * BLOCK, draw.randrange(1, 5 * BLOCK)]) for _ in range(30)]
    places = [draw.randrange(2 * BLOCK)]
    for size in sizes:
        places.append(places[-1] + size + draw.choice([0, 0, 0, 24]))  # most follow each other without a gap
    expected = bytearray(places[-1])
    order = [*range(len(sizes))]
    if seed % 2:
        draw.shuffle(order)
    memory = torch.empty(7 * BLOCK, dtype=torch.uint8)
    view = memory.numpy().data[-memory.data_ptr() % BLOCK :]
    with (tmp_path / "out").open("wb") as out:
        os.truncate(out.fileno(), len(expected))
        file = BlockFile(out.fileno())
        for i in order:
            data, shift = draw.randbytes(sizes[i]), places[i] % BLOCK
            expected[places[i] : places[i] + sizes[i]] = data
            view[shift : shift + sizes[i]] = data
            writes = file.writes(view[: shift + sizes[i]], places[i])
            draw.shuffle(writes)
            for write in writes:
                write()
        file.finish()
        file.close()
    assert (tmp_path / "out").read_bytes() == expected


def write_at(path: Path, weights: dict[str, torch.Tensor], begin: int) -> None:
    """Write a checkpoint whose tensors follow each other from byte ``begin`` of the file on."""
    entries, end = {}, 0
    for name, weight in weights.items():
        offsets = [end, end := end + weight.nbytes]
        dtype = {torch.int64: "I64", torch.bfloat16: "BF16"}[weight.dtype]
        entries[name] = {"dtype": dtype, "shape": list(weight.shape), "data_offsets": offsets}
    header = json.dumps(entries).encode().ljust(begin - 8)
    data = [weight.view(torch.uint8).numpy().tobytes() for weight in weights.values()]
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"".join(data))


@pytest.mark.parametrize("begin", [4096, 4093, 600, 1023])
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("disk", DISKS, indirect=True)
def test_tensors_at_any_place_of_a_block(disk: Disk, tmp_path: Path, scope: str, begin: int) -> None:
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    generator = torch.Generator().manual_seed(0)
    sizes = [(100, 700), (3, 5), (64, 2048), (129, 1001)]
    weights = {f"{i}.weight": torch.randn(size, generator=generator).bfloat16() for i, size in enumerate(sizes)}
    write_at(source, weights | {"steps": torch.arange(5000)}, begin)
    PruneJob(source, target, sparsity=0.7, scope=scope).run(max_memory=SMALL)
    assert_pruned(source, target, list(weights), sparsity=0.7, scope=scope)
    num_bytes = sum(weight.nbytes for weight in weights.values())
    if disk.kind in ("whole", "parts") and begin % 2 == 0 and takes_blocks(tmp_path):
        assert disk.num_direct > 0.4 * num_bytes
    else:
        assert disk.num_direct == 0
