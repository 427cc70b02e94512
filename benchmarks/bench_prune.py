"""Benchmarks of the full prune step: threshold, zeros and bitmask."""

import pytest
from conftest import RunSide

from gmp_kernels.tools.bench.measurement import Case
from gmp_kernels.tools.bench.run import prune_cases


@pytest.mark.parametrize("side", ["ours", "baseline"])
@pytest.mark.parametrize("case", prune_cases(), ids=lambda case: f"{case.name} / {case.baseline}")
def bench_prune(run_side: RunSide, case: Case, side: str) -> None:
    run_side(case, side)
