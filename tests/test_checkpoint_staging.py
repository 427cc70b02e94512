"""Pruning touches only what it made: the folder in which an output grows, and the name that the output gets."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoint_cases import contents, write_folder
from safetensors.torch import save_file

from gmp_kernels.checkpoints import PruneJob, outputs, staging
from gmp_kernels.errors import NonFiniteError, OutputError, StateError

LOCK = "gmp_kernels.lock"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_file(
        {"a.weight": torch.randn(30, 40, generator=torch.Generator().manual_seed(0))}, tmp_path / "in.safetensors"
    )
    return tmp_path / "in.safetensors"


@pytest.fixture(params=["file", "folder"])
def job(request: pytest.FixtureRequest, source: Path, tmp_path: Path) -> Callable[..., PruneJob]:
    """Jobs whose output is called ``out``, with masks beside it or in it."""
    if request.param == "folder":
        source = write_folder(tmp_path / "in")
    return lambda **settings: PruneJob(source, tmp_path / "out", sparsity=0.5, masks=True, **settings)


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"in", "in.safetensors"}


def outputs_in(folder: Path) -> set[str]:
    return {"out"} if (folder / "out").is_dir() else {"out", "out.masks.safetensors"}


@pytest.mark.parametrize("made", ["by_somebody", "with_our_lock", "with_our_names", "file", "link", "broken_link"])
def test_a_staging_folder_of_somebody_else_is_refused_and_kept(source: Path, tmp_path: Path, made: str) -> None:
    folder, letters = tmp_path / ".out.partial", tmp_path / "letters"
    letters.mkdir()
    (letters / "letter").write_text("dear")
    if made == "file":
        folder.write_text("dear")
    elif made.endswith("link"):
        folder.symlink_to(letters if made == "link" else tmp_path / "nowhere")
    else:
        folder.mkdir()
        name = "run.json" if made == "with_our_names" else "letter"
        (folder / name).write_text("dear")
        if made == "with_our_lock":
            (folder / LOCK).touch()
    before = contents(tmp_path), folder.lstat()
    for force in (False, True):
        with pytest.raises(
            OutputError, match=r"expected \.out\.partial beside it.* Move it away, or name another output"
        ):
            PruneJob(source, tmp_path / "out", sparsity=0.5, force=force)
    after = contents(tmp_path), folder.lstat()
    assert after[0] == before[0] and after[1].st_mtime_ns == before[1].st_mtime_ns


@pytest.mark.parametrize("appears", ["link", "folder"])
def test_one_that_appears_after_the_check_is_refused_too(source: Path, tmp_path: Path, appears: str) -> None:
    job = PruneJob(source, tmp_path / "out", sparsity=0.5)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "files").mkdir()
    (tmp_path / "letters" / "letter").write_text("dear")
    if appears == "link":
        (tmp_path / ".out.partial").symlink_to(tmp_path / "letters")
    else:
        (tmp_path / "letters").rename(tmp_path / ".out.partial")
    before = contents(tmp_path)
    with pytest.raises(OutputError, match="nothing was touched"):
        job.run()
    assert contents(tmp_path) == before and not job.is_begun()


def test_a_folder_of_another_user_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = PruneJob(source, tmp_path / "out", sparsity=0.5)
    real = os.fstat
    folder = tmp_path / ".out.partial"
    folder.mkdir()

    def of_another(descriptor: int) -> os.stat_result:
        found = list(real(descriptor))
        if os.path.samestat(real(descriptor), folder.stat()):
            found[4] += 1
        return os.stat_result(found)

    monkeypatch.setattr(staging.os, "fstat", of_another)
    with pytest.raises(OutputError, match=r"got a folder of the user \d+ that no run has made"):
        job.run()
    assert list(folder.iterdir()) == []


def test_where_the_network_gives_all_files_to_one_user(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging.os, "geteuid", lambda: 12345)
    PruneJob(source, tmp_path / "out", sparsity=0.5).run()
    assert names_in(tmp_path) == {"out"}


@pytest.mark.parametrize("left", [[], [LOCK], [LOCK, "run.json.new"], [LOCK, "run.json", "files", "finished"]])
@pytest.mark.parametrize("resume", [False, True])
def test_whatever_a_killed_run_left_the_next_one_takes_over(
    job: Callable[..., PruneJob], tmp_path: Path, left: list[str], resume: bool
) -> None:
    folder = tmp_path / ".out.partial"
    folder.mkdir(mode=0o755)
    for name in left:
        if "." in name:
            (folder / name).write_text("{" if name.endswith(".new") else "")
        else:
            (folder / name).mkdir()
            (folder / name / "rest").mkdir()
    if resume and "run.json" in left:
        with pytest.raises(StateError, match=r"run\.json of the run to resume, got one that cannot be read"):
            job().run(resume=True)
    else:
        modes = set()
        job().run(resume=resume, progress=lambda *_: modes.add(folder.stat().st_mode & 0o777))
        assert modes == {0o700} and names_in(tmp_path) == outputs_in(tmp_path)
    assert not folder.exists()


def test_what_somebody_puts_into_our_folder_stays_there(source: Path, tmp_path: Path) -> None:
    def put(done: int, total: int) -> None:
        (tmp_path / ".out.partial" / "letter").write_text("dear")

    PruneJob(source, tmp_path / "out", sparsity=0.5).run(progress=put)
    assert contents(tmp_path / ".out.partial") == {"letter": b"dear"}
    assert (tmp_path / "out").exists()


def test_another_folder_in_the_place_of_ours_gets_nothing(source: Path, tmp_path: Path) -> None:
    """Once it is known for ours, the folder is what was opened, whatever has its name."""
    (tmp_path / "letters" / "files").mkdir(parents=True)

    def swap(done: int, total: int) -> None:
        if not (tmp_path / "aside").exists():
            (tmp_path / ".out.partial").rename(tmp_path / "aside")
            (tmp_path / ".out.partial").symlink_to(tmp_path / "letters")

    PruneJob(source, tmp_path / "out", sparsity=0.5, masks=True).run(progress=swap)
    assert contents(tmp_path / "letters") == {}
    assert names_in(tmp_path) >= {"out", "out.masks.safetensors", "letters"}


def test_the_folder_by_its_name_where_the_system_shows_no_descriptors(
    job: Callable[..., PruneJob], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: not str(path).startswith("/proc/self/fd/") and exists(path))
    job().run()
    assert names_in(tmp_path) == outputs_in(tmp_path)


def test_a_lock_that_an_ending_run_takes_away_is_no_lock(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, taken = fcntl.flock, []

    def late(descriptor: int, operation: int) -> None:
        lock(descriptor, operation)
        if len(taken) < 2:
            # As if the one who held it had removed the folder, or the lock alone, meanwhile.
            taken.append(descriptor)
            (tmp_path / ".out.partial" / LOCK).unlink()
            if len(taken) == 1:
                (tmp_path / ".out.partial").rmdir()

    monkeypatch.setattr(staging.fcntl, "flock", late)
    PruneJob(source, tmp_path / "out", sparsity=0.5).run()
    assert len(taken) == 2 and names_in(tmp_path) == {"out"}


def test_a_folder_that_is_taken_away_before_it_is_locked(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check, calls = staging.Staging._check_owner, []

    def late(self: staging.Staging, descriptor: int) -> None:
        check(self, descriptor)
        calls.append(descriptor)
        if len(calls) == 1:
            (tmp_path / ".out.partial").rmdir()

    monkeypatch.setattr(staging.Staging, "_check_owner", late)
    PruneJob(source, tmp_path / "out", sparsity=0.5).run()
    assert len(calls) == 2 and names_in(tmp_path) == {"out"}


def test_a_folder_that_cannot_be_locked_does_not_stay(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its lock the next run would take it for somebody else's once there is anything in it."""
    real = os.open

    def refuse(path: str, *arguments: int, **settings: int) -> int:
        if path == LOCK:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        return real(path, *arguments, **settings)

    monkeypatch.setattr(staging.os, "open", refuse)
    with pytest.raises(OutputError, match="out: cannot be written: Disk quota exceeded"):
        PruneJob(source, tmp_path / "out", sparsity=0.5).run()
    assert names_in(tmp_path) == set()


def test_another_process_of_the_run_joins_no_folder_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "letter").write_text("dear")
    with pytest.raises(OutputError, match="a folder with 'letter' in it"), staging.Staging(tmp_path / "out") as joined:
        joined.join()


def test_an_error_that_no_resuming_mends_leaves_nothing(tmp_path: Path) -> None:
    good, bad = ({f"{name}.weight": torch.ones(4, 4)} for name in "ab")
    bad["b.weight"][0, 0] = torch.nan
    source = write_folder(tmp_path / "in", [good, bad])
    with pytest.raises(NonFiniteError):
        PruneJob(source, tmp_path / "out", sparsity=0.5).run()
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize("appears", ["file", "folder", "empty_folder", "link"])
def test_an_output_that_appears_meanwhile_is_kept(job: Callable[..., PruneJob], tmp_path: Path, appears: str) -> None:
    out = tmp_path / "out"

    def put(done: int, total: int) -> None:
        if os.path.lexists(out):
            return
        if appears == "file":
            out.write_text("dear")
        elif appears == "link":
            out.symlink_to(tmp_path / "nowhere")
        else:
            out.mkdir()
            if appears == "folder":
                (out / "letter").write_text("dear")

    with pytest.raises(
        OutputError, match=r"out: expected a new output, got one that has appeared meanwhile; it was kept"
    ):
        job().run(progress=put)
    assert names_in(tmp_path) == {"out", ".out.partial"}  # no masks either
    assert (contents(out) if out.exists() else out.readlink()) in (
        {".": b"dear"},
        {"letter": b"dear"},
        {},
        tmp_path / "nowhere",
    )
    if out.is_dir():
        shutil.rmtree(out)
    else:
        out.unlink()
    job().run(resume=True)
    assert names_in(tmp_path) == outputs_in(tmp_path)


@pytest.mark.parametrize("step", ["first", "last", "end"])
def test_a_run_that_is_stopped_while_it_gives_names_is_resumed(
    job: Callable[..., PruneJob], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    job().run()
    expected = contents(tmp_path / "out")
    for name in outputs_in(tmp_path):
        shutil.rmtree(tmp_path / name) if (tmp_path / name).is_dir() else (tmp_path / name).unlink()
    rename, renamed = staging.rename_new, []

    def stop(source: Path, target: Path) -> None:
        rename(source, target)
        renamed.append(target)
        # Of a file the masks come first.
        if step == "first" or (step == "last" and target.name == "out"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(staging, "rename_new", stop)
        patch.setattr(staging.Staging, "_remove", interrupt)
        with pytest.raises(KeyboardInterrupt):
            job().run()
    assert renamed
    with pytest.raises(OutputError, match="got one that is there"):
        job().run()
    job().run(resume=True)
    assert contents(tmp_path / "out") == expected
    assert names_in(tmp_path) == outputs_in(tmp_path)


def test_a_run_that_is_stopped_at_each_name_it_gives_is_resumed_each_time(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = staging.rename_new

    def stop(source: Path, target: Path) -> None:
        rename(source, target)
        raise KeyboardInterrupt

    for last in ("out.masks.safetensors", "out"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(staging, "rename_new", stop)
            PruneJob(source, tmp_path / "out", sparsity=0.5, masks=True).run(resume=True)
        assert (tmp_path / last).exists()
    PruneJob(source, tmp_path / "out", sparsity=0.5, masks=True).run(resume=True)
    assert names_in(tmp_path) == {"out", "out.masks.safetensors"}


def test_an_output_that_has_changed_since_it_got_its_name_is_not_that_of_the_run(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(staging.Staging, "_remove", interrupt)
        PruneJob(source, tmp_path / "out", sparsity=0.5).run()
    os.utime(tmp_path / "out", (1, 1))
    with pytest.raises(OutputError, match="got one that is there"):
        PruneJob(source, tmp_path / "out", sparsity=0.5)


def test_a_run_that_has_lost_its_settings_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it is resumed, neither what is finished nor the name that it has given."""
    source, out = write_folder(tmp_path / "in"), tmp_path / "out"
    PruneJob(source, out, sparsity=0.9).run()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        # Once the folders are swapped the old one lies where the new one grew.
        patch.setattr(staging.Staging, "_remove", interrupt)
        PruneJob(source, out, sparsity=0.5, force=True).run()
    expected = contents(out)
    with pytest.raises(OutputError, match="got one that is there"):
        PruneJob(source, out, sparsity=0.5)
    PruneJob(source, out, sparsity=0.5, force=True).run(resume=True)
    assert contents(out) == expected and names_in(tmp_path) == {"out"}


def test_settings_go_before_what_was_made_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = PruneJob(write_folder(tmp_path / "in"), tmp_path / "out", sparsity=0.5)
    with pytest.raises(KeyboardInterrupt):
        job.run(progress=lambda *_: interrupt() if list((tmp_path / ".out.partial" / "finished").iterdir()) else None)
    assert job.is_begun()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(staging.shutil, "rmtree", interrupt)
        job.run()
    assert not job.is_begun()


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.EPERM])
def test_a_kernel_or_file_system_without_such_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    (tmp_path / "a").write_text("dear")
    monkeypatch.setattr(outputs.ctypes, "CDLL", lambda *_, **__: SimpleNamespace(renameat2=lambda *_: -1))
    monkeypatch.setattr(outputs.ctypes, "get_errno", lambda: code)
    if code == errno.EPERM:
        with pytest.raises(PermissionError):
            outputs.rename_new(tmp_path / "a", tmp_path / "b")
    else:
        outputs.rename_new(tmp_path / "a", tmp_path / "b")
        assert contents(tmp_path) == {"b": b"dear"}


@pytest.mark.parametrize("taken", [False, True])
def test_a_new_name_without_the_help_of_the_kernel(
    job: Callable[..., PruneJob], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    """Some network file systems know no rename that replaces nothing."""
    monkeypatch.setattr(outputs, "_rename", lambda *_: False)

    def put(done: int, total: int) -> None:
        (tmp_path / "out").exists() or (tmp_path / "out").write_text("dear")

    if taken:
        with pytest.raises(OutputError, match="appeared meanwhile"):
            job().run(progress=put)
        assert (tmp_path / "out").read_text() == "dear"
    else:
        job().run()
        assert names_in(tmp_path) == outputs_in(tmp_path)


def test_force_replaces_no_file_but_a_checkpoint(source: Path, tmp_path: Path) -> None:
    """Neither one that was there nor one that has come meanwhile."""
    out = tmp_path / "out"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match="got neither file nor folder"):
        PruneJob(source, tmp_path / "pipe", sparsity=0.5, force=True)
    out.write_text("dear")
    with pytest.raises(OutputError, match="expected a checkpoint to replace, got another file; remove it yourself"):
        PruneJob(source, out, sparsity=0.5, force=True)
    out.unlink()
    with pytest.raises(OutputError, match="expected a checkpoint to replace, got another file"):
        PruneJob(source, out, sparsity=0.5, force=True).run(progress=lambda *_: out.write_text("dear"))
    assert out.read_text() == "dear"
    out.write_text("")
    PruneJob(source, out, sparsity=0.5, force=True).run()
    assert out.stat().st_size == source.stat().st_size


def test_a_file_system_without_permissions(
    job: Callable[..., PruneJob], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "fchmod", refuse)
    job().run()
    assert names_in(tmp_path) == outputs_in(tmp_path)


def test_a_read_only_file_of_a_stopped_run_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless root runs the tests, for whom nothing is read-only, opening it would fail."""
    source = write_folder(tmp_path / "in")
    for file in source.glob("*.safetensors"):
        file.chmod(0o444)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        finish = staging.Staging.finish
        patch.setattr(
            staging.Staging, "finish", lambda self, i, record: finish(self, i, record) if i == 0 else interrupt()
        )
        PruneJob(source, tmp_path / "out", sparsity=0.5).run()
    PruneJob(source, tmp_path / "out", sparsity=0.5).run(resume=True)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").glob("*.safetensors")} == {0o444}
