"""The C++ under AddressSanitizer and UndefinedBehaviorSanitizer, through tests of selection, masks and optimizers."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from building import build_wheel, library
from subprocesses import run_python
from test_determinism import ISA_NEEDS, cpu_flags

pytestmark = pytest.mark.thorough

TESTS = [f"tests/test_{name}.py" for name in ("select", "apply", "prune", "optim_training")]
# Every loop and every way through a selection, without the sizes that only add time.
CHOSEN = (
    "(small_sizes or large_sizes) and (random or any_bits) or any_request or never_change or more_candidates"
    " or too_small_to_sample or unaligned or every_size or many_layers_of_any or nothing_is_written_outside"
    " or dense_equals_compact"
)


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to import the package from, its extension built with both sanitizers."""
    scratch = tmp_path_factory.mktemp("sanitized")
    wheel = build_wheel(scratch, GMP_KERNELS_SANITIZE="address,undefined", GMP_KERNELS_BUILD_SIMT="1")
    zipfile.ZipFile(wheel).extractall(scratch / "package")
    return scratch / "package"


RUNS = [("cpu", isa) for isa, needs in ISA_NEEDS.items() if cpu_flags() >= needs] + [("simt", "portable")]


@pytest.mark.parametrize(("backend", "isa"), RUNS)
def test_no_error_in_memory_and_no_undefined_behaviour(sanitized: Path, backend: str, isa: str) -> None:
    done = run_python(
        "-P",  # or else the package beside the tests would be imported
        *("-m", "pytest", "-v", "-x", "-p", "no:cacheprovider", *TESTS, "-k", f"({CHOSEN}) and not reference"),
        PYTHONPATH=str(sanitized),
        GMP_KERNELS_ISA=isa,
        GMP_KERNELS_TEST_BACKENDS=f"reference,{backend}",
        # The interpreter is not built with them, so they must be there before it; libstdc++ for its exceptions.
        LD_PRELOAD=":".join(map(library, ["libasan.so", "libubsan.so", "libstdc++.so"])),
        ASAN_OPTIONS="detect_leaks=0",
        UBSAN_OPTIONS="print_stacktrace=1",
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert f"extension: {sanitized}/gmp_kernels/_C" in done.stdout
