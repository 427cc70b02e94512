"""The GPU's speed table: its cases run, here on the CPU with few weights and the same kernels, and do what they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import needs_simt
from typer.testing import CliRunner

from gmp_kernels.errors import DeviceError
from gmp_kernels.tools.bench import gpu as bench_gpu
from gmp_kernels.tools.bench import measurement
from gmp_kernels.tools.bench.gpu import gpu_cases, llama_8b_sizes, resnet50_sizes
from gmp_kernels.tools.bench.measurement import Case, Pair, Result, Spread, Timed, measure
from gmp_kernels.tools.bench.record import Machine
from gmp_kernels.tools.cli import bench as command
from gmp_kernels.tools.cli import main as cli
from gmp_kernels.tools.presets import resnet50_layers

CPU = torch.device("cpu")
SHRINK = 1 << 16
CASES = gpu_cases(CPU, "simt", "simt")
TIMED = [case for case in CASES if case.unit == "s"]
PRUNE = [case for case in TIMED if case.name.startswith("prune step") and "torch" not in case.baseline]


def named(case: Case) -> str:
    return f"{case.name} / {case.baseline}"


def of(*words: str) -> Case:
    (case,) = (case for case in CASES if all(word in named(case) for word in words))
    return case


def ran(side: Timed) -> object:
    side.prepare()
    return side.run()


@needs_simt
@pytest.mark.parametrize("case", TIMED, ids=named)
def test_every_timed_row_runs_twice(case: Case) -> None:
    for side in case.build(SHRINK):
        for _ in range(2):
            ran(side)


@needs_simt
@pytest.mark.parametrize("case", PRUNE, ids=named)
def test_every_round_prunes_the_same(case: Case) -> None:
    ours, _ = case.build(SHRINK)
    first, second = ran(ours), ran(ours)
    assert first.num_newly_pruned == second.num_newly_pruned
    assert sum(first.num_newly_pruned) > 0
    share = 0.88 if "0.88" in case.name else 0.0
    sizes = [mask.numel for mask in first.masks]
    assert first.num_newly_pruned == [round(0.9 * n) - round(share * n) for n in sizes]


@needs_simt
@pytest.mark.parametrize("case", [case for case in PRUNE if "in one tensor" in case.baseline], ids=named)
def test_layers_and_the_one_tensor_start_from_the_same(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    sides = case.build(SHRINK)
    starts: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    def prune_(weights: Any, *, masks: Any, **_: object) -> None:
        kept = masks and torch.cat([mask.to_bool() for mask in masks])
        starts.append((torch.cat(list(weights)), kept))

    for side in sides:
        ran(side)
        with monkeypatch.context() as patch:
            patch.setattr(bench_gpu, "prune_", prune_)
            ran(side)
    (weights, kept), (whole, kept_of_whole) = starts
    assert torch.equal(weights, whole) and case.wall == ("with the host" in case.name)
    if "0.88" in case.name:
        assert torch.equal(kept, kept_of_whole) and torch.equal(kept, whole != 0)
    else:
        assert kept is None and kept_of_whole is None and whole.ne(0).all()


@needs_simt
@pytest.mark.parametrize("case", [case for case in TIMED if "torch." in case.baseline], ids=named)
def test_the_others_keep_as_many_weights(case: Case) -> None:
    ours, baseline = case.build(SHRINK // 4)
    num_pruned = ran(ours).num_pruned
    found: list[torch.Tensor] = []
    baseline.prepare()
    mul_ = torch.Tensor.mul_
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "mul_", lambda self, other: found.append(mul_(self, other)))
        baseline.run()
    assert [int((weight == 0).sum()) for weight in found] == num_pruned


def test_the_others_go_through_a_model_layer_by_layer() -> None:
    for rival in ("topk + scatter", "sort + mul_", "kthvalue + mul_"):
        by_layer = of("prune step fp32, ResNet-50, 0.88 to 0.9, with the host", f"torch.{rival}, per layer")
        with_host = of("4096 x 4096, 0.9, with the host", f"torch.{rival}")
        assert by_layer.wall and with_host.wall and not of("4096 x 4096, 0.9 /", f"torch.{rival}").wall
        assert (by_layer.must, by_layer.aim) == (with_host.must, with_host.aim) == (1 / 10, 1 / 30)
    large = [case.baseline for case in CASES if "1e9" in case.name and "torch" in case.baseline]
    assert large == ["torch.topk + scatter", "torch.sort + mul_"]


def test_a_copy_moves_the_bytes_it_is_said_to() -> None:
    case = of("threshold fp32, 1e9")
    _, copy = case.build(SHRINK)
    assert ran(copy).nbytes == pytest.approx(case.min_bytes / SHRINK / 2, rel=1e-3)
    _, copy = of("1e9, 0 to 0.9").build(SHRINK)
    assert ran(copy).nbytes == pytest.approx((3 * 4 + 1 / 8) * 1e9 / SHRINK / 2, rel=1e-3)


def test_models_have_their_parameters() -> None:
    assert len(resnet50_sizes()) == 161 and sum(resnet50_sizes()) == 25_557_032
    assert len(llama_8b_sizes()) == 291 and sum(llama_8b_sizes()) == 8_030_261_248
    assert len(resnet50_layers()) == 54


@needs_simt
def test_launches_are_the_kernels_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        def __init__(self, name: str, device_type: object) -> None:
            self.name, self.device_type = name, device_type

    class Trace:
        def __init__(self, **_: object) -> None: ...
        def __enter__(self) -> Trace:
            return self

        def __exit__(self, *_: object) -> None: ...
        def events(self) -> list[Event]:
            on_device = [Event(name, bench_gpu.DeviceType.CUDA) for name in ("count", "Memcpy HtoD", "apply", "Memset")]
            return [*on_device, Event("aten::empty", bench_gpu.DeviceType.CPU)]

    monkeypatch.setattr(bench_gpu, "profile", Trace)
    assert of("prune step, resnet50", "12 launches").build(SHRINK) == Pair(2.0, 12.0)


@needs_simt
def test_the_real_profiler_sees_no_kernels_on_a_cpu() -> None:
    assert of("prune step, resnet50", "12 launches").build(SHRINK) == Pair(0.0, 12.0)


@needs_simt
def test_memory_is_the_growth_of_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1700)
    ours, limit = of("peak extra memory, 1e9").build(SHRINK)
    assert (ours, limit) == (700.0, 0.05 * 4 * (10**9 // SHRINK) + 4e6)


def test_every_row_is_there_once() -> None:
    assert len({named(case) for case in CASES}) == len(CASES)
    assert all(case.aim is None or case.aim < case.must for case in CASES)


def test_a_rate_is_the_bytes_that_must_move_over_the_median() -> None:
    case = Case("a", "b", 1.0, None, lambda _: Pair(1.0, 1.0), min_bytes=64e9)
    result = Result(case, ((Spread(0.5, 0.5, 0.5, 0), Spread(1, 1, 1, 0)),), shrink=16)
    assert result.bytes_per_second == result.to_dict()["bytes_per_second"] == 8e9
    assert measure(case, shrink=4).bytes_per_second == 16e9


def test_a_gpu_times_by_its_own_events(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        milliseconds = 0.0

        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = Event.milliseconds

        def synchronize(self) -> None:
            assert hasattr(self, "at")

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    def run() -> None:
        Event.milliseconds += 7.0

    class Gpu:
        type = "cuda"

    monkeypatch.setattr(torch.cuda, "Event", Event)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda n, device: ones(n // 1024))
    case = Case("a", "b", 1.0, None, lambda _: Pair(Timed(run), 1.0))
    result = measure(case, seconds=0, device=Gpu())
    assert result.ours == pytest.approx((0.007, 0.007, 0.007, measurement.MIN_ROUNDS))


def test_the_host_is_ahead_of_a_gpu_that_times_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read of the buffer takes a GPU 60 us. 300 us of launching is not what the 80 us of kernels take."""
    host, device = 0.0, 0.0  # what their clocks show; the device works off what it was given

    def launch(on_host: float, on_device: float) -> float:
        nonlocal host, device
        host += on_host
        device = max(device, host) + on_device
        return device

    class Event:
        def __init__(self, *, enable_timing: bool) -> None: ...

        def record(self) -> None:
            self.at = launch(2e-6, 0.0)

        def synchronize(self) -> None:
            nonlocal host
            host = max(host, self.at)

        def elapsed_time(self, end: Event) -> float:
            return 1e3 * (end.at - self.at)

    class Gpu:
        type = "cuda"

    class Buffer:
        def sum(self) -> None:
            launch(8e-6, 60e-6)

    def run() -> None:
        for _ in range(8):
            launch(300e-6 / 8, 10e-6)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "ones", lambda n, device: Buffer())
    case = Case("a", "b", 1.0, None, lambda _: Pair(Timed(run, lambda: launch(1e-3, 5e-6)), 1.0))
    assert measure(case, seconds=0, device=Gpu()).ours.median == pytest.approx(80e-6)


def test_a_row_on_the_hosts_clock_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launches of ours take 2 s of the device and 0.5 s of the host; what went before it is not ours."""
    now, pending = 0.0, 0.0

    def synchronize() -> None:
        nonlocal now, pending
        now, pending = now + pending, 0.0

    def launch(host: float, device: float) -> None:
        nonlocal now, pending
        now, pending = now + host, pending + device

    class Gpu:
        type = "cuda"

    class Buffer:
        def sum(self) -> None:
            launch(0.0, 7.0)

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(measurement.time, "perf_counter", lambda: now)
    monkeypatch.setattr(torch, "ones", lambda n, device: Buffer())
    case = Case("a", "b", 1.0, None, lambda _: Pair(Timed(lambda: launch(0.5, 2.0)), 1.0), wall=True)
    assert measure(case, seconds=0, device=Gpu()).ours.median == pytest.approx(2.5)


def test_without_a_gpu_the_command_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(cli.app, ["bench", "--device", "cuda"])
    assert isinstance(result.exception, DeviceError)
    assert "expected a GPU that torch can use, got none" in str(result.exception)


def test_a_gpu_gives_the_results_their_name() -> None:
    machine = Machine("Some CPU", 8, 4, 0.0, "", "", "", "", gpu="NVIDIA H100 80GB HBM3")
    assert machine.slug == "nvidia-h100-80gb-hbm3"


def test_the_command_measures_on_the_device_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    case = Case("prune", "copy", 1.5, None, lambda _: Pair(2.0, 4.0), min_bytes=64e9)
    monkeypatch.setattr(command, "gpu_cases", lambda device: [case])
    monkeypatch.setattr(measurement, "measure", lambda case, **given: seen.append(given) or measure(case))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(Machine, "here", lambda device: Machine("CPU", 8, 4, 0.0, "", "", "", "", gpu="GPU"))
    result = CliRunner(env={"COLUMNS": "140"}).invoke(cli.app, ["bench", "--device", "cuda"])
    assert result.exit_code == 0, result.output
    assert seen == [{"shrink": 1, "seconds": 1.5, "device": torch.device("cuda")}]
    assert result.output.startswith("GPU, CPU, 8 cores")
    rows = [line.split() for line in result.output.splitlines()]
    assert ["prune", "2000.00", "ms", "copy", "4000.00", "ms", "0.50", "1.50", "must", "32"] in rows
