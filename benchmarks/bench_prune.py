"""The full prune step: threshold, zeros and bitmask."""

import pytest
from conftest import RunSide

from gmp_kernels.bench import prune_cases
from gmp_kernels.measurement import Case


@pytest.mark.parametrize("side", ["ours", "baseline"])
@pytest.mark.parametrize("case", prune_cases(), ids=lambda case: f"{case.name} / {case.baseline}")
def bench_prune(run_side: RunSide, case: Case, side: str) -> None:
    run_side(case, side)
