"""The scheduler's overhead on the host; the other side is a limit, not a rival."""

import pytest
from conftest import RunSide

from gmp_kernels.tools.bench.measurement import Case
from gmp_kernels.tools.bench.run import scheduler_cases


@pytest.mark.parametrize("case", scheduler_cases(), ids=lambda case: case.name)
def bench_scheduler(run_side: RunSide, case: Case) -> None:
    run_side(case, "ours")
