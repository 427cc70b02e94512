"""CUDA graphs: a captured step holds addresses, which must stay right for as long as the graph does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import usable
from on_gpu import GPU, ON_GPU, hand_out, started
from optim_cases import assert_zeros_exact, clones, prune_more
from subprocesses import run_python

from gmp_kernels import errors
from gmp_kernels.tools.testing import assert_bitwise_equal

# Triton's tables are uploaded from memory that a graph cannot hold.
CAPTURING = [name for name in ON_GPU if name != "triton"]
REFUSING = [(name, {}) for name in ON_GPU if name == "triton"]
REFUSING += [(name, {"compact_state": True}) for name in CAPTURING]
CASES = ["momentum", "adamw"]


@pytest.fixture(params=CAPTURING)
def gpu(request: pytest.FixtureRequest) -> str:
    """Name of every backend whose steps can be captured."""
    return usable(request.param)


def options_of(case: str) -> dict[str, Any]:
    return {"capturable": True} if case == "adamw" else {}


def captured(take_step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        take_step()
    return graph


def poison(num_tensors: int = 200) -> None:
    """Fill what was freed with NaN: a graph that still reads it gives itself away."""
    for n in (7, 99, 585, 792, 16384, 49157, 1 << 18):
        kept = [torch.full((n,), float("nan"), device=GPU) for _ in range(num_tensors)]
        del kept
    torch.cuda.synchronize()


def assert_same_weights(params, mirror) -> None:
    for i, (p, q) in enumerate(zip(params, mirror, strict=True)):
        assert_bitwise_equal(p.detach(), q.detach(), f"params[{i}]")


@pytest.mark.parametrize("case", CASES)
def test_a_captured_step_is_the_step(gpu: str, case: str) -> None:
    params, optimizer, _ = started(gpu, case, **options_of(case))
    mirror, other, _ = started(gpu, case, **options_of(case))
    graph = captured(optimizer.step)
    for step in range(4, 8):
        hand_out(params, step)
        graph.replay()
        hand_out(mirror, step)
        other.step()
    assert_same_weights(params, mirror)


@pytest.mark.parametrize("case", CASES)
def test_a_captured_step_knows_the_masks_of_every_update(gpu: str, case: str) -> None:
    runs = [started(gpu, case, **options_of(case)) for _ in range(2)]
    (params, optimizer, masks), (mirror, other, other_masks) = runs
    graph = captured(optimizer.step)
    for step in range(4, 12):
        if step % 2:
            prune_more(optimizer, params, masks, 0.7 + step / 50)
            poison()
            prune_more(other, mirror, other_masks, 0.7 + step / 50)
        hand_out(params, step)
        graph.replay()
        hand_out(mirror, step)
        other.step()
        assert_same_weights(params, mirror)
    assert_zeros_exact([p.cpu() for p in params], {p.detach().cpu(): masks[p].to("cpu") for p in params})


@pytest.mark.parametrize("keep_first", [True, False], ids=["both", "the second alone"])
@pytest.mark.parametrize("case", CASES)
def test_a_second_capture_needs_no_step_between(gpu: str, case: str, keep_first: bool) -> None:
    """The second graph must hold what it needs itself; the first may be gone."""
    params, optimizer, masks = started(gpu, case, **options_of(case))
    mirror, other, other_masks = started(gpu, case, **options_of(case))
    graphs = [captured(optimizer.step) for _ in range(2)]
    if not keep_first:
        del graphs[0]
        torch.cuda.empty_cache()
        poison()
    for step in range(4, 10):
        if step == 7:
            prune_more(optimizer, params, masks, 0.9)
            prune_more(other, mirror, other_masks, 0.9)
        hand_out(params, step)
        graphs[step % len(graphs)].replay()
        hand_out(mirror, step)
        other.step()
        assert_same_weights(params, mirror)


@pytest.mark.parametrize("case", CASES)
def test_steps_outside_the_graph_stay_the_steps(gpu: str, case: str) -> None:
    params, optimizer, _ = started(gpu, case, **options_of(case))
    mirror, other, _ = started(gpu, case, **options_of(case))
    graph = captured(optimizer.step)
    for step in range(4, 10):
        hand_out(params, step)
        (optimizer.step if step % 3 else graph.replay)()
        hand_out(mirror, step)
        other.step()
    assert_same_weights(params, mirror)


@pytest.mark.parametrize(
    ("gpu", "options"), REFUSING, ids=[f"{name}-{'compact' if options else 'dense'}" for name, options in REFUSING]
)
@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_captured_is_refused_and_changes_nothing(gpu: str, options: dict[str, Any], case: str) -> None:
    params, optimizer, _ = started(usable(gpu), case, **options_of(case), **options)
    before = clones(params)
    words = "compact_state=False" if options else "triton"
    with pytest.raises(errors.CaptureError, match=words):
        captured(optimizer.step)
    torch.cuda.synchronize()
    assert_same_weights(params, before)
    mirror, other, _ = started(gpu, case, **options_of(case), **options)
    for p, o in ((params, optimizer), (mirror, other)):
        hand_out(p, 4)
        o.step()
    assert_same_weights(params, mirror)


# State that was loaded, so that the capture is the first step of the process.
WITHOUT_WARM_UP = """
import sys, torch
from gmp_kernels import BitMask, errors, optim
def made():
    generator = torch.Generator().manual_seed(0)
    weight, gradient, kept = (torch.randn(70_000, generator=generator) for _ in range(3))
    p = torch.nn.Parameter(weight.cuda())
    p.grad = gradient.cuda()
    optimizer = optim.AdamW([p], lr=0.01, capturable=True, backend=sys.argv[1])
    optimizer.set_masks({p: BitMask.from_bool((kept > 0).cuda())})
    state = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(70_000), "exp_avg_sq": torch.ones(70_000)}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: state}})
    return p, optimizer
def first_use_in_capture(optimizer):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph
p, optimizer = made()
torch.cuda.synchronize()
try:
    graph = first_use_in_capture(optimizer)
except errors.CaptureError as error:
    sys.exit(print("refused:", error))
q, other = made()
for _ in range(3):
    graph.replay()
    other.step()
print("same" if torch.equal(p, q) else f"{int((p != q).sum())} weights differ")
"""


def test_a_capture_without_any_step_before_is_right_or_refused(gpu: str) -> None:
    done = run_python("-c", WITHOUT_WARM_UP, gpu)
    assert done.stdout.startswith(("same\n", "refused:")), done.stdout + done.stderr
