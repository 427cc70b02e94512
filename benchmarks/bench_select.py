"""Benchmarks of the exact threshold, of one read of the weights, and of other selections."""

import pytest
from conftest import RunSide

from gmp_kernels.tools.bench.measurement import Case
from gmp_kernels.tools.bench.run import select_cases


@pytest.mark.parametrize("side", ["ours", "baseline"])
@pytest.mark.parametrize("case", select_cases(), ids=lambda case: f"{case.name} / {case.baseline}")
def bench_select(run_side: RunSide, case: Case, side: str) -> None:
    run_side(case, side)
