"""Corrupt inputs, outputs that must not be, disks that fail: a clear error, the input untouched, no half outputs."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import INDEX, TINY, contents, load, model_tensors, refuse_direct_writes, shard_files, write_folder
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from gmp_kernels.checkpoints import PruneJob, inspect_checkpoint, outputs, staging, stream
from gmp_kernels.checkpoints.blocks import BLOCK
from gmp_kernels.checkpoints.files import open_checkpoint
from gmp_kernels.errors import CheckpointError, NonFiniteError, OutputError, SparsityError, StateError

SHARD = "model-00002-of-00003.safetensors"


def with_header(entries: object, data: bytes = bytes(8)) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def entry(begin: int, end: int, dtype: str = "F32", shape: tuple[int, ...] = (1,)) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


CORRUPT = {
    "empty": b"",
    "half_a_length": b"\x40\x00",
    "length_beyond_the_file": (1 << 20).to_bytes(8, "little") + b"{}",
    "length_beyond_all_memory": bytes([255] * 8) + b"{}",
    "no_json": with_header(b'{"a":'),
    "no_text": with_header(b"\xff\xfe\xfd\xfc"),
    "no_object": with_header([1, 2]),
    "no_offsets": with_header({"a": {"dtype": "F32", "shape": [2]}}),
    "unknown_dtype": with_header({"a": entry(0, 8, "F31", (2,))}),
    "negative_shape": with_header({"a": entry(0, 8, "F32", (-2,))}),
    "shape_too_large": with_header({"a": entry(0, 8, "F32", (3,))}),
    "offsets_beyond_the_file": with_header({"a": entry(0, 16, "F32", (4,))}),
    "offsets_reversed": with_header({"a": entry(8, 0, "F32", (2,))}),
    "overlap": with_header({"a": entry(0, 4), "b": entry(2, 6), "c": entry(6, 8, "F16")}),
    "hole": with_header({"a": entry(0, 2, "F16"), "b": entry(4, 8)}),
    "data_left_over": with_header({"a": entry(0, 4)}),
    "metadata_that_is_no_text": with_header({"__metadata__": {"x": 1}, "a": entry(0, 8, "F32", (2,))}),
    "a_name_twice": with_header(b'{"a":%(e)s,"a":%(e)s}' % {b"e": json.dumps(entry(0, 8, "F32", (2,))).encode()}),
    "another_format": b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("raw", CORRUPT.values(), ids=CORRUPT.keys())
def test_a_corrupt_file(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "in.safetensors"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"in\.safetensors: expected a whole \.safetensors file, got .*restore"):
        PruneJob(path, tmp_path / "out.safetensors", sparsity=0.5)
    with pytest.raises(CheckpointError):
        inspect_checkpoint(path)
    assert path.read_bytes() == raw
    assert names_in(tmp_path) == ["in.safetensors"]


@given(cut=st.integers(0, 400), flips=st.lists(st.tuples(st.integers(0, 399), st.integers(1, 255)), max_size=3))
def test_a_damaged_file_is_refused_whenever_its_own_library_refuses_it(
    tmp_path_factory: pytest.TempPathFactory, cut: int, flips: list[tuple[int, int]]
) -> None:
    raw = bytearray(save({"a.weight": torch.ones(5, 5), "b": torch.ones(3).half()}, {"format": "pt"}))
    for position, bits in flips:
        raw[position % len(raw)] ^= bits
    path = tmp_path_factory.mktemp("damaged") / "in.safetensors"
    path.write_bytes(raw[: len(raw) - cut if cut < 300 else len(raw)])
    try:
        with safe_open(path, "pt") as file:
            theirs = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError:
        with pytest.raises(CheckpointError):
            open_checkpoint(path)
        return
    try:
        assert {tensor.name: list(tensor.shape) for tensor in open_checkpoint(path).tensors} == theirs
    except CheckpointError as error:
        assert "twice" in str(error)


def test_there_is_no_input(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected a \.safetensors file or a folder of them, got nothing"):
        open_checkpoint(tmp_path / "in.safetensors")
    with pytest.raises(CheckpointError, match=r"expected a folder with \.safetensors files, got none"):
        open_checkpoint(tmp_path)


def drop_shard(folder: Path) -> None:
    (folder / SHARD).unlink()


def truncate_shard(folder: Path) -> None:
    os.truncate(folder / SHARD, (folder / SHARD).stat().st_size - 1)


def swap_shards(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["layers.0.q.weight"] = SHARD
    (folder / INDEX).write_text(json.dumps(index))


def invent_tensor(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["layers.9.q.weight"] = SHARD
    (folder / INDEX).write_text(json.dumps(index))


def forget_tensor(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"]["layers.1.k.weight"]
    (folder / INDEX).write_text(json.dumps(index))


def cut_index(folder: Path) -> None:
    (folder / INDEX).write_text((folder / INDEX).read_text()[:-9])


def empty_index(folder: Path) -> None:
    (folder / INDEX).write_text("[]")


def second_index(folder: Path) -> None:
    for name in ("one", "other"):
        (folder / f"{name}.{INDEX}").write_text((folder / INDEX).read_text())
    (folder / INDEX).unlink()


def same_name_twice(folder: Path) -> None:
    (folder / INDEX).unlink()
    for i, file in enumerate(shard_files(folder)):
        file.rename(folder / f"part{i}.safetensors")
    save_file({"layers.0.q.weight": torch.ones(2, 2)}, folder / "part9.safetensors")


def broken_link(folder: Path) -> None:
    (folder / "vocab.json").symlink_to(folder / "nowhere")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_shard, f"shards, got none called '{SHARD}'; download it"),
        (truncate_shard, f"{SHARD}: expected a whole .safetensors file"),
        (swap_shards, f"'layers.0.q.weight' in {SHARD}, but it is in model-00001-of-00003"),
        (invent_tensor, "'layers.9.q.weight' in .*, but it is nowhere"),
        (forget_tensor, "the index lacks 'layers.1.k.weight'"),
        (cut_index, "expected an index with a weight_map, got JSONDecodeError"),
        (empty_index, "expected an index with a weight_map, got TypeError"),
        (second_index, "expected one index, got"),
        (same_name_twice, "'layers.0.q.weight' in part0.safetensors and part9.safetensors"),
        (broken_link, "vocab.json: expected a file, got a broken link"),
    ],
)
def test_a_folder_that_contradicts_itself(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    folder = write_folder(tmp_path / "in")
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        PruneJob(folder, tmp_path / "out", sparsity=0.5)
    assert names_in(tmp_path) == ["in"]


def test_links_that_lead_back_up_end(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in")
    (folder / "assets" / "up").symlink_to(folder, target_is_directory=True)
    assert set(open_checkpoint(folder).others) == {INDEX, "config.json", "assets/merges.txt"}


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, float("nan"), 90])
def test_a_sparsity_that_is_none(tmp_path: Path, sparsity: float) -> None:
    with pytest.raises(SparsityError, match=r"prune: expected a sparsity in \[0, 1\]"):
        PruneJob(write_folder(tmp_path / "in"), tmp_path / "out", sparsity=sparsity)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("target", ["in", "in/out", "in/assets/out", "link", "."])
def test_the_output_must_lie_apart_from_the_input(tmp_path: Path, target: str, force: bool) -> None:
    folder = write_folder(tmp_path / "models" / "in")
    (tmp_path / "models" / "link").symlink_to(folder, target_is_directory=True)
    with pytest.raises(OutputError, match="expected an output apart from the input"):
        PruneJob(folder, tmp_path / "models" / target, sparsity=0.5, force=force)


def test_the_output_must_not_hold_what_the_input_links_to(tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    write_folder(blobs)
    folder = tmp_path / "in"
    folder.mkdir()
    for file in shard_files(blobs):
        (folder / file.name).symlink_to(file)
    with pytest.raises(OutputError, match="in or above it"):
        PruneJob(folder, blobs, sparsity=0.5, force=True)


def test_an_output_that_is_there_is_replaced_only_by_force(tmp_path: Path) -> None:
    for source, target in [
        (write_folder(tmp_path / "in"), tmp_path / "out"),
        (tmp_path / "in" / SHARD, tmp_path / "out.safetensors"),
    ]:
        PruneJob(source, target, sparsity=0.5, masks=True).run()
        before = contents(target)
        with pytest.raises(OutputError, match="expected a new output, got one that is there; replace it with --force"):
            PruneJob(source, target, sparsity=0.9)
        assert contents(target) == before
        PruneJob(source, target, sparsity=0.9, masks=True, force=True).run()
        assert contents(target) != before
        PruneJob(source, target, sparsity=0.5, masks=True, force=True).run()
        assert contents(target) == before
    assert names_in(tmp_path) == ["in", "out", "out.masks.safetensors", "out.safetensors"]


def test_force_replaces_nothing_but_checkpoints(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    (tmp_path / "file").write_text("dear")
    with pytest.raises(OutputError, match="expected a checkpoint to replace, got a folder without any"):
        PruneJob(folder, tmp_path / "home", sparsity=0.5, force=True)
    with pytest.raises(OutputError, match="expected a folder to replace, like the input"):
        PruneJob(folder, tmp_path / "file", sparsity=0.5, force=True)
    with pytest.raises(OutputError, match="expected a file to replace, like the input"):
        PruneJob(folder / SHARD, tmp_path / "home", sparsity=0.5, force=True)
    with pytest.raises(OutputError, match="expected its folder to be there"):
        PruneJob(folder, tmp_path / "no" / "where", sparsity=0.5)
    (tmp_path / "empty").mkdir()
    PruneJob(folder, tmp_path / "empty", sparsity=0.5, force=True).run()
    assert (tmp_path / "home" / "letter.txt").read_text() == (tmp_path / "file").read_text() == "dear"


def test_where_two_folders_cannot_be_swapped_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "_rename", lambda *_: False)
    folder = write_folder(tmp_path / "in")
    PruneJob(folder, tmp_path / "out", sparsity=0.5).run()
    PruneJob(folder, tmp_path / "other", sparsity=0.9).run()
    PruneJob(folder, tmp_path / "out", sparsity=0.9, force=True).run()
    assert contents(tmp_path / "out") == contents(tmp_path / "other")
    assert names_in(tmp_path) == ["in", "other", "out"]
    (tmp_path / ".out.replaced").mkdir()
    with pytest.raises(OutputError, match=r"out: cannot be written: \.out\.replaced beside it is in the way"):
        PruneJob(folder, tmp_path / "out", sparsity=0.1, force=True).run()
    assert contents(tmp_path / "out") == contents(tmp_path / "other")


@pytest.mark.parametrize("removed", ["nothing", "half"])
def test_the_output_replaced_stays_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removed: str) -> None:
    """A run that ends while it clears away the old output does not put it back when it is resumed."""
    source, target = write_folder(tmp_path / "in", model_tensors()), tmp_path / "out"
    PruneJob(source, target, sparsity=0.9).run()
    job = PruneJob(source, target, sparsity=0.5, force=True)
    remove = shutil.rmtree

    def stop(name: str, **_: object) -> None:
        if removed == "half":
            next((tmp_path / ".out.partial" / name).glob("*")).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", stop)
    with pytest.raises(KeyboardInterrupt):
        job.run()
    monkeypatch.setattr(shutil, "rmtree", remove)
    expected = contents(target)
    assert expected != {} and names_in(tmp_path) == [".out.partial", "in", "out"]
    PruneJob(source, target, sparsity=0.5, force=True).run(resume=True)
    assert contents(target) == expected and names_in(tmp_path) == ["in", "out"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in") / SHARD
    with pytest.raises(OutputError, match=r"^/proc/out\.safetensors: cannot be written: .*the input is as it was"):
        PruneJob(source, Path("/proc/out.safetensors"), sparsity=0.5).run()


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("limit", [0, 100, 3000])
def test_a_disk_that_takes_no_more(tmp_path: Path, scope: str, limit: int) -> None:
    """A limit on the size of files stands in for it: the system refuses to write on in the middle of a file."""
    folder = write_folder(tmp_path / "in")
    before = contents(folder)
    job = PruneJob(folder, tmp_path / "out", sparsity=0.5, scope=scope)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OutputError, match="cannot be written: File too large"):
            job.run(max_memory=TINY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(folder) == before
    assert names_in(tmp_path) == ["in"]


def test_a_disk_that_fails_when_told_to_begin_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    refuse_direct_writes(monkeypatch)
    monkeypatch.setattr(os, "fdatasync", fail)
    monkeypatch.setattr(stream, "SYNC_BYTES", 1)
    with pytest.raises(OutputError, match="cannot be written: Input/output error"):
        PruneJob(write_folder(tmp_path / "in"), tmp_path / "out", sparsity=0.5).run()
    assert names_in(tmp_path) == ["in"]


def test_nothing_is_written_to_a_file_that_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, wrote = os.pwrite, []

    def slow(descriptor: int, *arguments: Any) -> int:
        time.sleep(0.1)
        os.fstat(descriptor)
        wrote.append(write(descriptor, *arguments))
        return wrote[-1]

    monkeypatch.setattr(os, "pwrite", slow)
    tensors = {"a.weight": torch.ones(64, 64), "b.weight": torch.full((64, 64), torch.nan)}
    save_file(tensors, tmp_path / "in.safetensors")
    with pytest.raises(NonFiniteError):
        PruneJob(tmp_path / "in.safetensors", tmp_path / "out.safetensors", sparsity=0.5).run()
    assert sum(wrote) > 64 * 64 * 4 - BLOCK


def test_torch_has_its_threads_back(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    PruneJob(write_folder(tmp_path / "in"), tmp_path / "out", sparsity=0.5).run()
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("call", ["pwrite", "fsync", "copy_file_range"])
def test_finished_shards_survive_an_error_and_are_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    folder = write_folder(tmp_path / "in")
    PruneJob(folder, tmp_path / "whole", sparsity=0.5, masks=True).run()
    real, third = getattr(os, call), f"/.out.partial/files/{shard_files(folder)[2].name}"

    def fails(*arguments: int) -> int:
        written = arguments[1] if call == "copy_file_range" else arguments[0]
        if str(Path(f"/proc/self/fd/{written}").readlink()).endswith(third):
            raise OSError(errno.ENOSPC, "No space left on device")
        return int(real(*arguments) or 0)

    job = PruneJob(folder, tmp_path / "out", sparsity=0.5, masks=True)
    with monkeypatch.context() as patch, pytest.raises(OutputError, match="No space left on device"):
        patch.setattr(stream.os, call, fails)
        job.run()
    assert job.is_begun() and not (tmp_path / "out").exists()
    kept = tmp_path / ".out.partial" / "files" / SHARD
    inode = kept.stat().st_ino
    job.run(resume=True)
    assert (tmp_path / "out" / SHARD).stat().st_ino == inode
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert names_in(tmp_path) == ["in", "out", "whole"]


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose pruning in global scope was interrupted by Ctrl-C after its first shard."""
    folder = write_folder(tmp_path / "in")

    def press(done: int, total: int) -> None:
        if (tmp_path / ".out.partial" / "finished" / "00000.json").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        PruneJob(folder, tmp_path / "out", sparsity=0.5, scope="global").run(progress=press)
    assert not (tmp_path / "out").exists()
    return folder


def test_an_interrupted_run_is_resumed_with_the_same_settings_only(interrupted: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(StateError, match=r"but it had sparsity=0\.5, now it is 0\.6; give the same, or begin anew"):
        PruneJob(interrupted, target, sparsity=0.6, scope="global").run(resume=True)
    with pytest.raises(StateError, match="but it had targets="):
        PruneJob(interrupted, target, sparsity=0.5, scope="global", ignore=["layers.1"]).run(resume=True)
    os.utime(interrupted / SHARD, (1, 1))
    with pytest.raises(StateError, match="but it had another input"):
        PruneJob(interrupted, target, sparsity=0.5, scope="global").run(resume=True)
    assert not target.exists()
    PruneJob(interrupted, target, sparsity=0.6, scope="global").run()
    PruneJob(interrupted, tmp_path / "whole", sparsity=0.6, scope="global").run()
    assert contents(target) == contents(tmp_path / "whole")


def test_a_resumed_run_does_not_count_again(interrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # It was killed, say, while it noted the next shard.
    (tmp_path / ".out.partial" / "finished" / "00001.json.new").write_text("{")
    PruneJob(interrupted, tmp_path / "whole", sparsity=0.5, scope="global").run()
    monkeypatch.delattr("gmp_kernels.checkpoints.prune.decide")
    PruneJob(interrupted, tmp_path / "out", sparsity=0.5, scope="global").run(resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_resuming_what_never_began_is_a_run(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in")
    PruneJob(folder, tmp_path / "out", sparsity=0.5).run(resume=True)
    assert len(load(tmp_path / "out")) == sum(len(tensors) for tensors in model_tensors())


def test_one_run_at_a_time(tmp_path: Path) -> None:
    job = PruneJob(write_folder(tmp_path / "in"), tmp_path / "out", sparsity=0.5)
    with staging.Staging(tmp_path / "out") as other:
        other.begin({}, resume=False)
        with pytest.raises(OutputError, match="another run is writing it"):
            job.run()
        assert (tmp_path / ".out.partial" / "run.json").exists()
    job.run()


@pytest.mark.parametrize("change", ["touch", "truncate"])
def test_an_input_that_changes_meanwhile(tmp_path: Path, change: str) -> None:
    folder = write_folder(tmp_path / "in")
    job = PruneJob(folder, tmp_path / "out", sparsity=0.5)
    if change == "touch":
        os.utime(folder / SHARD, (1, 1))
    else:
        truncate_shard(folder)
    with pytest.raises(CheckpointError, match=r"expected the file that was opened|more bytes at"):
        job.run()
    assert not (tmp_path / "out").exists()
