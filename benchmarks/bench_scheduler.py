"""Benchmarks of the scheduler's overhead on the host. The baseline is a fixed limit, so only our side runs."""

import pytest
from conftest import RunSide

from gmp_kernels.tools.bench.measurement import Case
from gmp_kernels.tools.bench.run import scheduler_cases


@pytest.mark.parametrize("case", scheduler_cases(), ids=lambda case: case.name)
def bench_scheduler(run_side: RunSide, case: Case) -> None:
    run_side(case, "ours")
