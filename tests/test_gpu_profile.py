"""Counts and times of stage ``profile`` of ``make gpu-check``, told by a device that pretends."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from subprocesses import ROOT

sys.path.append(str(ROOT / "benchmarks"))
from gpu_stages import profile


def test_the_profile_counts_kernels_and_copies_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """And watches the device alone, where there is one."""
    kinds = profile.DeviceType

    def event(name: str, kind: Any, start: float, end: float, annotation: bool = False) -> Any:
        span = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(name=name, device_type=kind, is_user_annotation=annotation, time_range=span)

    class Trace:
        def __init__(self, *, activities: list[Any]) -> None:
            assert activities == [profile.ProfilerActivity.CUDA]

        def __enter__(self) -> Trace:
            return self

        def __exit__(self, *_: object) -> None: ...
        def events(self) -> list[Any]:
            return [
                event("update", kinds.CUDA, 10.0, 15.0),
                event("update", kinds.CUDA, 20.0, 26.0),
                event("Memcpy HtoD", kinds.CUDA, 1.0, 2.0),
                event("Optimizer.step#AdamW.step", kinds.CUDA, 1.0, 26.0, True),
                event("aten::empty", kinds.CPU, 0.0, 1.0),
            ]

    monkeypatch.setattr(profile, "profile", Trace)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    found = profile.on_the_device(profile.Timed(lambda: None), torch.device("cuda"))
    assert found == {"update": [5.0, 6.0], "Memcpy HtoD": [1.0]}


def test_a_call_is_timed_until_it_returns_and_until_the_device_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    now, pending = 0.0, 0.0

    def launch(host: float, device: float) -> None:
        nonlocal now, pending
        now, pending = now + host, pending + device

    def synchronize(device: torch.device) -> None:
        nonlocal now, pending
        now, pending = now + pending, 0.0

    monkeypatch.setattr(profile.time, "perf_counter", lambda: now)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    work = profile.Timed(lambda: launch(0.5, 2.0), lambda: launch(3.0, 7.0))
    assert profile.on_the_host(work, torch.device("cuda")) == pytest.approx((0.5e6, 2.5e6))


def test_kernels_are_told_by_their_short_names() -> None:
    mangled = "void gmp::cuda::kernels::count<unsigned int>(gmp::cuda::LayerRow*, long)"
    assert profile.short(mangled) == "count<unsigned int>"
    assert profile.short("void (anonymous namespace)::softmax<float>(int)") == "softmax<float>"
