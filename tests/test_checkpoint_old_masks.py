"""Masks beside a file belong to it: they go when it is replaced, and nothing else goes."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from checkpoint_cases import contents
from safetensors.torch import save_file

from gmp_kernels.checkpoints import PruneJob, staging
from gmp_kernels.errors import OutputError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    weight = torch.randn(30, 40, generator=torch.Generator().manual_seed(0))
    save_file({"a.weight": weight}, tmp_path / "in.safetensors")
    return tmp_path / "in.safetensors"


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"in.safetensors"}


def test_masks_of_the_output_that_is_replaced_go_with_it(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    PruneJob(source, out, sparsity=0.9, masks=True).run()
    job = PruneJob(source, out, sparsity=0.1, force=True)
    job.run()
    assert names_in(tmp_path) == {"out"} and job.kept_beside() is None
    PruneJob(source, tmp_path / "once", sparsity=0.1).run()
    assert contents(out) == contents(tmp_path / "once")


@pytest.mark.parametrize("step", ["before", "after"])
def test_old_masks_never_lie_beside_the_new_output(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """A run that is stopped there is resumed."""
    out, masks = tmp_path / "out", tmp_path / "out.masks.safetensors"
    PruneJob(source, out, sparsity=0.9, masks=True).run()
    before, rename = out.read_bytes(), staging.rename_over

    def stop(source: Path, target: Path) -> None:
        assert not masks.exists()
        if step == "after":
            rename(source, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(staging, "rename_over", stop)
        PruneJob(source, out, sparsity=0.1, force=True).run()
    assert (out.read_bytes() == before) is (step == "before")
    PruneJob(source, out, sparsity=0.1, force=True).run(resume=True)
    assert names_in(tmp_path) == {"out"} and out.read_bytes() != before


def test_old_masks_stay_with_the_old_output(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PruneJob(source, tmp_path / "out", sparsity=0.9, masks=True).run()
    before = contents(tmp_path)

    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(staging, "rename_over", refuse)
    with pytest.raises(OutputError, match="cannot be written: Operation not permitted"):
        PruneJob(source, tmp_path / "out", sparsity=0.1, force=True).run()
    assert contents(tmp_path).items() >= before.items()


@pytest.mark.parametrize("beside", ["letter", "model", "folder", "broken_link", "input", "masks_without_force"])
def test_what_is_no_masks_of_the_old_output_is_kept(source: Path, tmp_path: Path, beside: str) -> None:
    out, masks = tmp_path / "out", tmp_path / "out.masks.safetensors"
    PruneJob(source, out, sparsity=0.9, masks=True).run()
    if beside == "masks_without_force":
        out.unlink()
    elif beside == "input":
        save_file({"a.mask": torch.ones(4, 4)}, source, {"masks": '{"shapes": {"a": [128]}}'})
        masks.unlink()
        masks.hardlink_to(source)
    else:
        masks.unlink()
        if beside == "letter":
            masks.write_text("dear")
        elif beside == "model":
            save_file({"a.mask": torch.ones(2), "a": torch.ones(9)}, masks, {"masks": '{"shapes": {"a": [9]}}'})
        elif beside == "folder":
            masks.mkdir()
        else:
            masks.symlink_to(tmp_path / "nowhere")
    before = masks.lstat()
    targets = ["a.mask"] if beside == "input" else None
    job = PruneJob(source, out, sparsity=0.5, force=beside != "masks_without_force", targets=targets)
    job.run()
    assert job.kept_beside() == masks and masks.lstat().st_ino == before.st_ino
    assert names_in(tmp_path) == {"out", "out.masks.safetensors"}
