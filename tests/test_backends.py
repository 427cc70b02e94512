"""The registry: who runs a call, what is said when somebody cannot, and life without the compiled extension."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
import torch
from subprocesses import run_python
from test_determinism import ISA_NEEDS

from gmp_kernels import BackendUnavailableError, backends, prune_
from gmp_kernels.backends import Backend, choose, registry
from gmp_kernels.backends.cpu import Cpu
from gmp_kernels.backends.reference import Reference

CPU = torch.device("cpu")


def forget_what_was_probed() -> None:
    for cached in (registry.available, registry._choose, registry._say_once):
        cached.cache_clear()


@pytest.fixture
def add(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Register a backend of highest priority, as one more file in the folder would, for one test."""
    backends.available()
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    monkeypatch.delenv("GMP_KERNELS_BACKEND", raising=False)

    def add(*, name: str = "fast", why_not: str | None = None, device: str = "cpu") -> None:
        backends.register(
            Backend(
                name,
                priority=100,
                probe=lambda: why_not,
                supports=lambda d: None if d.type == device else f"it takes {device} tensors, got {d}",
                load=Reference,
            )
        )
        forget_what_was_probed()

    yield add
    forget_what_was_probed()


def test_registered_backends_in_order_of_priority() -> None:
    names = [backend.name for backend in backends.available()]
    assert names.index("cpu") < names.index("reference")
    assert isinstance(choose(None, CPU), Cpu)


def test_highest_priority_that_can_run_is_chosen(add: Callable[..., None]) -> None:
    add()
    assert isinstance(choose(None, CPU), Reference)


def test_argument_beats_environment_beats_priority(add: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    add()
    monkeypatch.setenv("GMP_KERNELS_BACKEND", "cpu")
    assert isinstance(choose(None, CPU), Cpu)
    assert isinstance(choose("reference", CPU), Reference)
    monkeypatch.setenv("GMP_KERNELS_BACKEND", "")
    assert isinstance(choose(None, CPU), Reference)


def test_named_and_unusable_raises_with_the_reason(add: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    add(why_not="its driver is too old; update it")
    with pytest.raises(BackendUnavailableError, match=r"backend 'fast' cannot run: its driver is too old; update it"):
        prune_(torch.ones(3), sparsity=0.5, backend="fast")
    monkeypatch.setenv("GMP_KERNELS_BACKEND", "fast")
    with pytest.raises(BackendUnavailableError, match="its driver is too old"):
        prune_(torch.ones(3), sparsity=0.5)


def test_named_for_tensors_it_cannot_take_raises(add: Callable[..., None]) -> None:
    add(device="cuda")
    with pytest.raises(BackendUnavailableError, match="'fast' cannot run: it takes cuda tensors, got cpu"):
        choose("fast", CPU)


def test_unknown_name_in_the_environment_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GMP_KERNELS_BACKEND", "turbo")
    with pytest.raises(BackendUnavailableError, match=r"expected one of .* got 'turbo'"):
        prune_(torch.ones(3), sparsity=0.5)


def test_automatic_fallback_is_said_once(add: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    add(why_not="its driver is too old")
    with caplog.at_level(logging.WARNING, "gmp_kernels"):
        for _ in range(3):
            assert isinstance(choose(None, CPU), Cpu)
    assert caplog.messages == ["using backend 'cpu': 'fast' cannot run (its driver is too old)"]


def test_a_backend_for_other_devices_is_not_worth_a_word(
    add: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    add(why_not="no GPU here", device="cuda")
    with caplog.at_level(logging.WARNING, "gmp_kernels"):
        assert isinstance(choose(None, CPU), Cpu)
    assert caplog.messages == []


WITHOUT_EXTENSION = """
import sys
sys.modules["gmp_kernels._C"] = None  # import then fails as if the file were not there
import torch, gmp_kernels
weight = torch.arange(1.0, 9.0)
for sparsity in (0.25, 0.5):
    gmp_kernels.prune_(weight, sparsity=sparsity)
print(weight.tolist())
try:
    gmp_kernels.prune_(weight, sparsity=0.5, backend="cpu")
except gmp_kernels.BackendUnavailableError as error:
    print(error)
"""


def test_without_the_extension_the_reference_serves_and_says_so_once() -> None:
    done = run_python("-c", WITHOUT_EXTENSION)
    assert done.returncode == 0, done.stderr
    weights, error = done.stdout.splitlines()
    assert weights == "[0.0, 0.0, 0.0, 0.0, 5.0, 6.0, 7.0, 8.0]"
    assert error.startswith("backend 'cpu' cannot run: its extension was not built (")
    assert "; install a C++ compiler and run pip install again. Python has imported the sources in" in error
    assert done.stderr.count("using backend 'reference': 'cpu' cannot run") == 1


def test_an_unknown_instruction_set_is_named() -> None:
    program = "import torch, gmp_kernels; gmp_kernels.prune_(torch.ones(3), sparsity=0.5, backend='cpu')"
    done = run_python("-c", program, GMP_KERNELS_ISA="sse9")
    assert done.returncode != 0
    assert (
        "BackendUnavailableError: backend 'cpu' cannot run: GMP_KERNELS_ISA: expected one of "
        f"{', '.join(reversed(ISA_NEEDS))}, got 'sse9'"
    ) in done.stderr
