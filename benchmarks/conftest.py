"""A fixture with which pytest-benchmark runs one side of a case of the speed table."""

from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from gmp_kernels.tools.bench.measurement import Case, time_once

# Divides the number of weights if benchmarks are disabled, where each case only has to run.
SMOKE = 4096
SECONDS = 1.0
ROUNDS = range(3, 101)

RunSide = Callable[[Case, str], None]


@pytest.fixture
def run_side(benchmark: BenchmarkFixture) -> RunSide:
    def run(case: Case, side: str) -> None:
        benchmark.group = f"{case.name} / {case.baseline}"
        timed = getattr(case.build(1 if benchmark.enabled else SMOKE), side)
        # This run is also the warm-up: it touches the pages and wakes the threads.
        fitting = int(SECONDS / time_once(timed))

        def setup() -> None:
            timed.prepare()

        benchmark.pedantic(timed.run, setup=setup, rounds=min(max(fitting, ROUNDS[0]), ROUNDS[-1]))

    return run
