"""Benchmarks of an optimizer step with masks, and of torch's fused steps."""

import pytest
from conftest import RunSide

from gmp_kernels.tools.bench.measurement import Case
from gmp_kernels.tools.bench.optimizers import optimizer_cases

TIMED = [case for case in optimizer_cases() if case.unit == "s"]


@pytest.mark.parametrize("side", ["ours", "baseline"])
@pytest.mark.parametrize("case", TIMED, ids=lambda case: f"{case.name} / {case.baseline}")
def bench_optim(run_side: RunSide, case: Case, side: str) -> None:
    run_side(case, side)
