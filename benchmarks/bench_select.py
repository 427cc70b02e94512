"""The exact threshold, beside one read of the weights and other selections."""

import pytest
from conftest import RunSide

from gmp_kernels.bench import select_cases
from gmp_kernels.measurement import Case


@pytest.mark.parametrize("side", ["ours", "baseline"])
@pytest.mark.parametrize("case", select_cases(), ids=lambda case: f"{case.name} / {case.baseline}")
def bench_select(run_side: RunSide, case: Case, side: str) -> None:
    run_side(case, side)
