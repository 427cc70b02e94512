"""The rows on checkpoints measure what they say."""

from __future__ import annotations

import pytest

from gmp_kernels.checkpoints import inspect_checkpoint
from gmp_kernels.tools.bench.checkpoints import checkpoint_cases
from gmp_kernels.tools.bench.measurement import Case, Timed
from gmp_kernels.tools.bench.run import all_cases

SHRINK = 4096


@pytest.mark.parametrize("case", checkpoint_cases()[:2], ids=lambda case: case.name)
def test_both_sides_write_the_whole_checkpoint_every_time(case: Case) -> None:
    ours, baseline = case.build(SHRINK)
    assert isinstance(ours, Timed) and isinstance(baseline, Timed)
    folder = ours.prepare.__self__  # type: ignore[attr-defined]
    for _ in range(2):
        for side, sparsity in ((ours, 0.9), (baseline, 0.0)):
            side.prepare()
            assert not folder.target.exists()
            side.run()
            assert folder.target.stat().st_size == folder.source.stat().st_size
            found = inspect_checkpoint(folder.target)
            zeros = sum(t.num_zeros for t in found) / sum(t.numel for t in found)
            assert zeros == pytest.approx(sparsity, abs=0.01)


def test_peak_memory_is_that_of_a_process_of_its_own() -> None:
    peak, limit = checkpoint_cases()[2].build(SHRINK)
    assert 5e7 < peak < limit


def test_the_rows_are_in_the_table() -> None:
    assert {case.name for case in checkpoint_cases()} <= {case.name for case in all_cases()}
