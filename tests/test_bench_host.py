"""The rows of host cost: everything but the kernels runs, on one thread, on tensors that stay the same."""

from __future__ import annotations

import pytest
import torch

from gmp_kernels.backends import cuda
from gmp_kernels.tools.bench import host as bench_host
from gmp_kernels.tools.bench import small
from gmp_kernels.tools.bench.measurement import Case, Timed
from gmp_kernels.tools.bench.small import small_parameters

CASES = bench_host.host_cases()
FEW = [
    case
    for case in CASES
    if " 1 tensor" in case.name or " 25 tensors" in case.name or case.baseline == "the plain step"
]


def built(case: Case) -> tuple[Timed, Timed]:
    ours, baseline = case.build(1)
    assert isinstance(ours, Timed) and isinstance(baseline, Timed)
    return ours, baseline


def test_every_backend_has_a_row_for_every_number_of_tensors() -> None:
    expected = [
        f"host time of {call}, {number}, {backend}"
        for backend in ("cuda", "triton")
        for number in ("1 tensor", "25 tensors", "161 tensors", "291 tensors")
        for call in ("prune_", "AdamW.step")
    ]
    expected += [f"host time of AdamW.step {how}, 161 tensors, cuda" for how in ("with capturable", "of a GradScaler")]
    assert [case.name for case in CASES] == expected


@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_both_sides_run_on_one_thread_and_leave_torch_as_it_was(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    set_to = []
    setting = torch.set_num_threads
    monkeypatch.setattr(torch, "set_num_threads", lambda number: (set_to.append(number), setting(number)))
    before = torch.get_num_threads()
    for side in built(case):
        for _ in range(2):
            side.run()
    assert set_to == [1, before] * 4


def test_without_kernels_all_but_their_writes_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = small_parameters(25)
    monkeypatch.setattr(small, "small_parameters", lambda _: weights)
    before = [weight.clone() for weight in weights]
    versions = [weight._version for weight in weights]
    launched = []
    monkeypatch.setattr(bench_host, "_nothing", lambda *args, **_: launched.append(len(args)))
    bench_host._prune_and_fused("cuda", 25, 1).ours.run()  # type: ignore[union-attr]
    assert launched == [2, 2]  # select and apply
    assert all(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))
    assert [weight._version for weight in weights] == [version + 1 for version in versions]


def test_a_build_without_cuda_kernels_has_no_row_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_modules", {})
    assert {case.name.rpartition(" ")[2] for case in bench_host.host_cases()} == {"triton"}
