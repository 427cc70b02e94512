"""Settings of the tests: backends, numbers of threads, hypothesis examples, and the share of cases on slow backends."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

import pytest
import torch
from hypothesis import settings

from gmp_kernels.backends import choose, cpu
from gmp_kernels.tools.testing import device_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

if not torch.cuda.is_available():
    # Set before anything imports triton, for this process and those that tests start: its kernels then run on the host.
    os.environ["TRITON_INTERPRET"] = "1"

T = TypeVar("T")

ORACLE = "reference"
BACKENDS = os.environ.get("GMP_KERNELS_TEST_BACKENDS", "reference,cpu,simt,triton").split(",")
KERNELS = [name for name in BACKENDS if name != ORACLE]
HOST_BACKENDS = [name for name in BACKENDS if device_of(name).type == "cpu"]

settings.register_profile("gmp_kernels", deadline=None, max_examples=60, derandomize=os.environ.get("CI") == "true")
settings.load_profile("gmp_kernels")


# The backend simt, which runs the CUDA kernels on the host. Tests that need it are skipped only if the variable
# GMP_KERNELS_TEST_BACKENDS leaves it out, as on machines with a GPU, which do not build it. By default it is required:
# tests that cannot import it fail.
WITHOUT_SIMT = "simt" not in BACKENDS
NEEDS_SIMT = "needs the backend simt, which GMP_KERNELS_TEST_BACKENDS leaves out"
needs_simt = pytest.mark.skipif(WITHOUT_SIMT, reason=NEEDS_SIMT)


def simt_extension() -> ModuleType:
    """Return the extension of the backend simt; if simt is left out, skip the test module that calls this on import."""
    if WITHOUT_SIMT:
        pytest.skip(NEEDS_SIMT, allow_module_level=True)
    from gmp_kernels import _simt

    return _simt


# Triton's interpreter takes milliseconds where a kernel takes microseconds, and it runs on one thread only. So under it
# loops over many cases take every seventh case, hypothesis tries fewer examples, and tests run with one number of
# threads.
SLOW = {"triton"} if device_of("triton").type == "cpu" else set()
SLOW_EXAMPLES = 6
SLOW_SHARE = 7  # a prime, so that it coincides with few patterns in the order of cases


def thinned(backend: str, cases: Iterable[T], start: int) -> list[T]:
    """Return all cases; for a slow backend every seventh case, where ``start`` decides the first one."""
    every = list(cases)
    return every[start % SLOW_SHARE % len(every) :: SLOW_SHARE] if backend in SLOW else every


def is_slow(item: pytest.Item) -> bool:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return not SLOW.isdisjoint((parameters.get("backend"), parameters.get("kernels")))


# `make test` runs one in so many cases of these slow backends, and `make test-all` the others. The argument of the
# marker ``sampled`` does the same for single tests.
THOROUGH = {"simt": 4, "triton": 3}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if not (is_slow(item) and item.callspec.params.get("num_threads", 1) > 1)]
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        share = max(THOROUGH.get(str(parameters.get(name)), 1) for name in ("backend", "kernels", "host_backend"))
        share *= next((marker.args[0] for marker in item.iter_markers("sampled")), 1)
        # The choice depends only on the test's name, because all workers must make the same one.
        if zlib.crc32(item.nodeid.encode()) % share:
            item.add_marker(pytest.mark.thorough)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    function = getattr(item, "obj", None)
    if not (is_slow(item) and getattr(function, "is_hypothesis_test", False)):
        return (yield)
    given = function._hypothesis_internal_use_settings
    function._hypothesis_internal_use_settings = settings(given, max_examples=SLOW_EXAMPLES)
    try:
        return (yield)
    finally:
        function._hypothesis_internal_use_settings = given


def pytest_report_header() -> str:
    return f"backends: {', '.join(BACKENDS)}; extension: {getattr(cpu._C, '__file__', 'not built')}"


def usable(name: str) -> str:
    """Return the name of a backend that can run; raise if it cannot, because a skip would hide that it is untested."""
    choose(name, device_of(name))
    return name


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Return the name of a backend; a test runs for each of them."""
    return usable(request.param)


@pytest.fixture(scope="session", params=KERNELS)
def kernels(request: pytest.FixtureRequest) -> str:
    """Return the name of a backend other than the oracle, with which it is compared."""
    return usable(request.param)


@pytest.fixture(scope="session", params=HOST_BACKENDS)
def host_backend(request: pytest.FixtureRequest) -> str:
    """Return the name of a backend that takes numpy arrays, which are never on a GPU."""
    return usable(request.param)


@pytest.fixture(scope="session")
def device(backend: str) -> torch.device:
    """Return the device that holds the tensors of ``backend``."""
    return device_of(backend)


@pytest.fixture(params=[1, 2, 3])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Set torch's number of threads for the test, and return it."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures that the test has written, to look at what is on them."""
    from picture_cases import keep_figures  # imports matplotlib, which few tests need

    return keep_figures(monkeypatch)
