"""The rows on checkpoints measure what they say."""

from __future__ import annotations

from pathlib import Path

import pytest

from gmp_kernels.checkpoints import inspect_checkpoint
from gmp_kernels.tools.bench.checkpoints import checkpoint_cases
from gmp_kernels.tools.bench.measurement import Timed

SHRINK = 4096


@pytest.mark.parametrize("row", [0, 1])
def test_both_sides_write_the_whole_checkpoint(row: int, tmp_path: Path) -> None:
    ours, baseline = checkpoint_cases(tmp_path)[row].build(SHRINK)
    assert isinstance(ours, Timed) and isinstance(baseline, Timed)
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    for side, sparsity in ((baseline, 0.0), (ours, 0.9)):
        side.prepare()
        assert not target.exists()
        side.run()
        assert target.stat().st_size == source.stat().st_size
        found = inspect_checkpoint(target)
        zeros = sum(t.num_zeros for t in found) / sum(t.numel for t in found)
        assert zeros == pytest.approx(sparsity, abs=0.01)
    # Global scope prunes the layers of small weights more than the others.
    shares = [t.num_zeros / t.numel for t in found]
    assert (max(shares) - min(shares) > 0.05) == (row == 1)


def test_rows_share_one_checkpoint(tmp_path: Path) -> None:
    checkpoint_cases(tmp_path)[0].build(SHRINK)
    written = (tmp_path / "in.safetensors").stat().st_mtime_ns
    checkpoint_cases(tmp_path)[1].build(SHRINK)
    assert (tmp_path / "in.safetensors").stat().st_mtime_ns == written


def test_peak_memory_is_that_of_a_process_of_its_own(tmp_path: Path) -> None:
    peak, limit = checkpoint_cases(tmp_path)[2].build(SHRINK)
    assert 5e7 < peak < limit
