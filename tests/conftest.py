"""Which backends are tested, how many threads, and how much hypothesis tries."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from gmp_kernels.backends import choose, cpu
from gmp_kernels.testing import device_of

if not torch.cuda.is_available():
    # Before anything imports triton, here and in the processes that tests start: its kernels then run on the host.
    os.environ["TRITON_INTERPRET"] = "1"

ORACLE = "reference"
BACKENDS = os.environ.get("GMP_KERNELS_TEST_BACKENDS", "reference,cpu,simt,triton").split(",")
KERNELS = [name for name in BACKENDS if name != ORACLE]
HOST_BACKENDS = [name for name in BACKENDS if device_of(name).type == "cpu"]

settings.register_profile("gmp_kernels", deadline=None, max_examples=60, derandomize=os.environ.get("CI") == "true")
settings.load_profile("gmp_kernels")


def pytest_report_header() -> str:
    return f"backends: {', '.join(BACKENDS)}; extension: {getattr(cpu._C, '__file__', 'not built')}"


def usable(name: str) -> str:
    """A backend that was named but cannot run fails the suite; skipping it would hide that nothing was tested."""
    choose(name, device_of(name))
    return name


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Name of every backend."""
    return usable(request.param)


@pytest.fixture(scope="session", params=KERNELS)
def kernels(request: pytest.FixtureRequest) -> str:
    """Name of every backend but the oracle, which it is compared with."""
    return usable(request.param)


@pytest.fixture(scope="session", params=HOST_BACKENDS)
def host_backend(request: pytest.FixtureRequest) -> str:
    """Name of every backend that takes numpy arrays, which are never on a GPU."""
    return usable(request.param)


@pytest.fixture(scope="session")
def device(backend: str) -> torch.device:
    """Where the tensors of ``backend`` live."""
    return device_of(backend)


@pytest.fixture(params=[1, 2, 3])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """torch runs on so many threads while the test does."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
