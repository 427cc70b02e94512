"""Outputs have the permissions of what they were made from: nobody may read a copy who may not read the original."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import write_folder
from safetensors.torch import save_file

from gmp_kernels.checkpoints import PruneJob, outputs, writing


def modes(path: Path) -> dict[str, int]:
    return {found.relative_to(path).as_posix(): found.stat().st_mode & 0o7777 for found in (path, *path.rglob("*"))}


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_outputs_have_the_permissions_of_the_source(tmp_path: Path, umask: int) -> None:
    source, single = write_folder(tmp_path / "in"), tmp_path / "single.safetensors"
    save_file({"a.weight": torch.ones(4, 4)}, single)
    single.chmod(0o640)
    (source / "assets").chmod(0o510)
    source.chmod(0o750)
    for i, file in enumerate(file for file in sorted(source.rglob("*")) if file.is_file()):
        file.chmod((0o600, 0o640, 0o444, 0o664)[i % 4])
    seen = set()
    before = os.umask(umask)
    try:

        def look(done: int, total: int) -> None:
            seen.add((tmp_path / ".out.partial").stat().st_mode & 0o777)

        PruneJob(source, tmp_path / "out", sparsity=0.5, masks=True).run(progress=look)
        PruneJob(single, tmp_path / "one", sparsity=0.5, masks=True).run()
    finally:
        os.umask(before)
    assert seen == {0o700}
    expected = modes(source) | {"assets": 0o710, "masks": 0o750}  # the owner may go on with folders
    expected |= {f"masks/{name}": mode for name, mode in expected.items() if name.endswith(".safetensors")}
    assert modes(tmp_path / "out") == expected
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in ("one", "one.masks.safetensors")} == {0o640}


@pytest.mark.parametrize(
    ("mode", "allowed", "expected"),
    # Where the group cannot be given, the new one may what everybody may.
    [(0o640, True, 0o640), (0o640, False, 0o600), (0o664, False, 0o644)],
)
def test_another_group_is_not_let_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, allowed: bool, expected: int
) -> None:
    source = tmp_path / "in.safetensors"
    save_file({"a.weight": torch.ones(4, 4)}, source)
    source.chmod(mode)
    real, groups = os.stat_result, []

    def give(descriptor: int, user: int, group: int) -> None:
        if not allowed:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        groups.append(group)

    monkeypatch.setattr(outputs.os, "fchown", give)
    keep = outputs.keep_permissions

    def of_another_group(descriptor: int, origin: Any, **settings: int) -> None:
        found = list(origin)
        found[5] += 1
        keep(descriptor, real(found), **settings)

    monkeypatch.setattr("gmp_kernels.checkpoints.stream.keep_permissions", of_another_group)
    PruneJob(source, tmp_path / "out", sparsity=0.5).run()
    assert (tmp_path / "out").stat().st_mode & 0o777 == expected
    assert groups == [source.stat().st_gid + 1] * allowed


SHARED_MEMORY = Path("/dev/shm")  # a file system of every Linux that reserves room without writing


@pytest.fixture
def descriptor() -> Iterator[int]:
    with tempfile.TemporaryFile(dir=SHARED_MEMORY) as file:
        yield file.fileno()


def test_room_is_reserved_before_anything_is_written(descriptor: int) -> None:
    outputs.reserve(descriptor, 1 << 20)
    found = os.fstat(descriptor)
    assert (found.st_size, found.st_blocks) == (1 << 20, (1 << 20) // 512)


def test_room_that_is_not_there_is_an_error_at_once(descriptor: int) -> None:
    with pytest.raises(OSError, match=r"space left|too large"):
        outputs.reserve(descriptor, 1 << 60)


def test_a_file_system_that_cannot_reserve_does_without() -> None:
    reading, writing = os.pipe()
    outputs.reserve(writing, 1 << 20)
    os.write(writing, b"still open")
    assert os.read(reading, 10) == b"still open"
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=["as it is", "converted"])
def test_outputs_are_as_long_as_what_is_reserved_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype | None
) -> None:
    reserved = {}

    def reserve(descriptor: int, num_bytes: int) -> None:
        reserved[os.fstat(descriptor).st_ino] = num_bytes

    monkeypatch.setattr(writing, "reserve", reserve)
    PruneJob(write_folder(tmp_path / "in"), tmp_path / "out", sparsity=0.5, dtype=dtype, masks=True).run()
    lengths = {path.stat().st_ino: path.stat().st_size for path in (tmp_path / "out").rglob("*.safetensors")}
    assert len(lengths) > 2 and reserved == lengths
