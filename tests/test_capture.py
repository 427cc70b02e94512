"""Steps in CUDA graphs: what a replay repeats, across prune updates and captures; and what a graph cannot hold.

There need be no GPU: graphs are as the host sees them, launches that are noted instead of made.
"""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from conftest import simt_extension
from optim_cases import assert_same_run, clones, masked, parameters, random_gradients, random_masks, set_gradients
from subprocesses import run_python
from torch import nn

from gmp_kernels import BitMask, CaptureError, GMPScheduler, prune_, schedules
from gmp_kernels.backends import choose, cuda, devices
from gmp_kernels.optim import SGD, clip_grad_norm_
from gmp_kernels.tools.testing import assert_bitwise_equal

_simt = simt_extension()
SHAPES = [(24, 33), (7,), (65, 9), (16384 + 5,)]
RAMP = schedules.Cubic(0.2, 0.9, begin_step=1, end_step=7, frequency=2)
Graph = list[Callable[[], object]]


class Runtime:
    """The kernels on the host, and what captures do to them."""

    def __init__(self) -> None:
        self.graph: Graph | None = None
        self.memory: list[torch.Tensor] = []  # that graphs own

    def __getattr__(self, name: str) -> Any:
        found = getattr(_simt, name)
        return partial(self._launch, found) if name in ("store", "update") else found

    def _launch(self, function: Callable[..., object], *args: object) -> None:
        if self.graph is None:
            function(*args)
        else:
            # A launch has its arguments from the time at which it was captured.
            self.graph.append(partial(function, *(copy.copy(a) if isinstance(a, np.ndarray) else a for a in args)))

    @contextmanager
    def capture(self) -> Iterator[Graph]:
        self.graph = graph = []
        try:
            yield graph
        finally:
            self.graph = None


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    """A runtime whose graphs own the memory of the tables that are made while they are captured."""
    runtime, uploaded = Runtime(), cuda.Launches._uploaded

    def owned(*args: Any) -> torch.Tensor:
        table = uploaded(*args)
        if runtime.graph is not None:
            runtime.memory.append(table)
        return table

    monkeypatch.setattr(choose("simt", torch.device("cpu")), "_module", runtime)
    monkeypatch.setattr(devices, "is_capturing", lambda device: runtime.graph is not None)
    monkeypatch.setattr(cuda.Launches, "_uploaded", owned)
    return runtime


def replay(graph: Graph) -> None:
    gc.collect()  # what only a graph knows is not kept by it
    for launch in graph:
        launch()


def hand_out(params: list[Any], step: int) -> None:
    """New gradients in the memory of the old ones."""
    for p, gradient in zip(params, random_gradients(params, step), strict=True):
        p.grad.copy_(gradient)


def started(case: str = "momentum", dtype: torch.dtype = torch.float32, **options: Any) -> tuple[list[Any], Any]:
    """Parameters and their optimizer, one step on: a graph finds state and memory."""
    params = parameters(SHAPES, dtype)
    optimizer = masked(case, params, backend="simt", **options)
    set_gradients(params, random_gradients(params, 0), {})
    optimizer.step()
    return params, optimizer


def as_model(params: list[Any]) -> nn.Module:
    model = nn.Module()
    model.weights = nn.ParameterList(params)
    return model


@pytest.mark.thorough
@pytest.mark.parametrize("master", [False, True], ids=["plain", "master"])
@pytest.mark.parametrize("before_the_scheduler", [0, 3], ids=["no state", "state"])
def test_a_captured_step_stays_right_across_prune_updates(
    runtime: Runtime, before_the_scheduler: int, master: bool
) -> None:
    runs = []
    for _ in range(2):
        params = parameters(SHAPES, torch.bfloat16 if master else torch.float32)
        optimizer = masked("nesterov", params, backend="simt", master_weights=master)
        set_gradients(params, random_gradients(params, 0), {})
        for _ in range(before_the_scheduler):
            optimizer.step()
        pruner = GMPScheduler(as_model(params), optimizer, RAMP, targets="*", count="calls", backend="simt")
        optimizer.step()
        runs.append((params, optimizer, pruner))
    (params, optimizer, pruner), (eager_params, eager, eager_pruner) = runs
    with runtime.capture() as graph:
        optimizer.step()
    for step in range(10):
        for group in (params, eager_params):
            hand_out(group, step)
        replay(graph)
        eager.step()
        assert (pruner.step() is None) == (eager_pruner.step() is None) == (step not in (1, 3, 5, 7))
        assert pruner.masks == eager_pruner.masks
        assert_same_run(params, optimizer, eager_params, eager)
    assert pruner.sparsity == pytest.approx(0.9, abs=1e-3)
    for name, mask in pruner.masks.items():
        p = params[int(name.rpartition(".")[2])]
        assert not p.detach()[~mask.to_bool()].any()
        assert not optimizer.state[p]["momentum_buffer"][~mask.to_bool()].any()


def test_graphs_captured_one_after_another_have_tables_of_their_own(runtime: Runtime) -> None:
    params, optimizer = started()
    mirror, other = copy.deepcopy((params, optimizer))
    graphs, buffers = [], []
    for _ in range(2):
        for p in params:
            p.grad = torch.zeros_like(p)
        buffers.append([p.grad for p in params])
        with runtime.capture() as graph:
            optimizer.step()
        graphs.append(graph)
    # Whatever steps outside do in between, and to the same table.
    for step, which in enumerate((0, 1, None, 1, 0, None, 0)):
        gradients = random_gradients(params, step)
        if which is None:
            set_gradients(params, gradients, {})
            optimizer.step()
        else:
            torch._foreach_copy_(buffers[which], gradients)
            replay(graphs[which])
        set_gradients(mirror, gradients, {})
        other.step()
        assert_same_run(params, optimizer, mirror, other)


@pytest.mark.parametrize(("case", "options", "tables"), [("momentum", {}, 1), ("adamw", {"capturable": True}, 2)])
def test_a_graph_repeated_on_the_same_gradients_uploads_again(
    runtime: Runtime, case: str, options: dict[str, Any], tables: int
) -> None:
    """The uploads of an earlier step may be gone or changed when a graph is replayed: rows, and constants' columns."""
    _, optimizer = started(case, **options)
    for count in range(3):
        with runtime.capture() as graph:
            optimizer.step()
        assert len(graph) == tables + 1
        assert len({table.data_ptr() for table in runtime.memory}) == tables * (count + 1)


def assert_unchanged(params: list[Any], optimizer: Any, before: tuple[list[Any], dict[str, Any]]) -> None:
    buffers = [io.BytesIO(), io.BytesIO()]
    for buffer, found in zip(buffers, (([p.detach() for p in params], optimizer.state_dict()), before), strict=True):
        weights, state = found
        torch.save([[w.detach() for w in weights], {i: {**s} for i, s in state["state"].items()}], buffer)
    ours, theirs = (torch.load(io.BytesIO(buffer.getvalue())) for buffer in buffers)
    for p, q in zip(ours[0], theirs[0], strict=True):
        assert_bitwise_equal(p, q)
    assert ours[1].keys() == theirs[1].keys()
    for i, state in theirs[1].items():
        for key, value in state.items():
            assert_bitwise_equal(ours[1][i][key], value, key)


@pytest.mark.parametrize(
    ("case", "options", "message"),
    [
        ("momentum", {"compact_state": True}, "got compact state, .* compact_state=False, or take the step outside"),
        ("momentum", {"backend": "cpu"}, "got the backend cpu; build it with backend='cuda'"),
        ("adamw", {}, "got step counts on the host, .* capturable=True"),
    ],
)
def test_steps_that_a_graph_would_repeat_wrongly_are_refused(
    runtime: Runtime, case: str, options: dict[str, Any], message: str
) -> None:
    for steps_before in (0, 2):
        params = parameters(SHAPES)
        optimizer = masked(case, params, **{"backend": "simt", **options})
        set_gradients(params, random_gradients(params, 0), {})
        for _ in range(steps_before):
            optimizer.step()
        before = clones(params), copy.deepcopy(optimizer.state_dict())
        with runtime.capture() as graph, pytest.raises(CaptureError, match=message):
            optimizer.step()
        assert not graph
        assert_unchanged(params, optimizer, before)


@pytest.mark.parametrize("case", ["momentum", "adamw"])
def test_the_first_step_is_not_captured(runtime: Runtime, case: str) -> None:
    params = parameters(SHAPES)
    optimizer = masked(case, params, backend="simt")
    for group in optimizer.param_groups:
        group["capturable"] = True
    set_gradients(params, random_gradients(params, 0), {})
    with runtime.capture() as graph, pytest.raises(CaptureError, match="outside"):
        optimizer.step()
    assert not graph and not any(optimizer.state.values())
    optimizer.step()
    if case == "adamw":
        # As loaded ones are: on their way to the device the host would wait.
        counts = {p: optimizer.state[p]["step"] for p in params}
        for p in params:
            optimizer.state[p]["step"] = torch.tensor(1.0, device="meta")
        with runtime.capture() as graph, pytest.raises(CaptureError, match="outside"):
            optimizer.step()
        assert not graph and all(optimizer.state[p]["step"].is_meta for p in params)
        for p, count in counts.items():
            optimizer.state[p]["step"] = count
        optimizer.step()
    with runtime.capture() as graph:
        optimizer.step()
    assert graph


def test_a_mask_that_a_graph_does_not_read_is_refused(runtime: Runtime) -> None:
    params, optimizer = started()
    masks = random_masks(params[:2], 0.5)
    optimizer.set_masks({params[0]: masks[params[0]]})
    optimizer.step()
    with runtime.capture():
        optimizer.step()
    before = clones(params), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(CaptureError, match=r"shape \(7,\) had .* got one where it had none; set masks"):
        optimizer.set_masks(masks)
    with pytest.raises(CaptureError, match=r"shape \(24, 33\) had .* got another one"):
        optimizer.set_masks({params[0]: masks[params[0]].clone()})
    assert_unchanged(params, optimizer, before)
    prune_(params[0], sparsity=0.9, masks=masks[params[0]])
    optimizer.set_masks({params[0]: masks[params[0]]})
    assert int((optimizer.state[params[0]]["momentum_buffer"] == 0).sum()) == round(0.9 * 24 * 33)


def test_a_scheduler_whose_masks_a_graph_does_not_read_changes_nothing(runtime: Runtime) -> None:
    params, optimizer = started()
    optimizer.set_masks(random_masks(params, 0.5))
    optimizer.step()
    with runtime.capture():
        optimizer.step()
    before = clones(params), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(CaptureError, match="got another one"):
        GMPScheduler(as_model(params), optimizer, schedules.Constant(0.9), targets="*")
    assert_unchanged(params, optimizer, before)
    assert not optimizer._watchers


@pytest.mark.parametrize("update", [0, 50], ids=["after an update", "before the first update"])
def test_masks_that_python_applies_are_not_left_out_of_a_graph(runtime: Runtime, update: int) -> None:
    params = parameters([(24, 33)])
    optimizer = torch.optim.SGD(params, lr=0.1)
    pruner = GMPScheduler(as_model(params), optimizer, schedules.Constant(0.5, begin_step=update), targets="*")
    set_gradients(params, random_gradients(params, 0), {})
    optimizer.step()
    pruner.step()
    count = pruner.step_count
    with runtime.capture(), pytest.raises(CaptureError, match=r"applied from Python; use gmp_kernels\.optim"):
        optimizer.step()
    with runtime.capture(), pytest.raises(CaptureError, match=r"GMPScheduler.step\(\); use it outside of the graph"):
        pruner.step()
    assert pruner.step_count == count


def test_what_uploads_numbers_of_its_own_is_refused_in_a_capture(runtime: Runtime) -> None:
    weight, mask = torch.randn(1000), BitMask.ones((1000,))
    before = weight.clone()
    with runtime.capture(), pytest.raises(CaptureError, match="outside of the capture"):
        prune_(weight, sparsity=0.5, masks=mask, backend="simt")
    assert_bitwise_equal(weight, before)
    assert mask.num_kept == 1000


def test_a_capture_error_is_a_runtime_error_as_torch_raises_them() -> None:
    assert issubclass(CaptureError, RuntimeError)


NO_TAG = """
import torch
kept = torch.Tag
class Tag:
    def __getattr__(self, name):
        if name == "cudagraph_unsafe":
            raise AttributeError(name)
        return getattr(kept, name)
torch.Tag = Tag()
import gmp_kernels
torch.Tag = kept
weight, mask = torch.ones(3), gmp_kernels.BitMask.from_bool(torch.tensor([True, False, True]))
torch.ops.gmp_kernels.apply_masks_([weight], [mask.packed])
print(weight.tolist(), torch.ops.gmp_kernels.apply_masks_.default.tags)
"""


def test_a_torch_that_lacks_the_tag_for_graphs_still_imports() -> None:
    done = run_python("-c", NO_TAG)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("]")[0] == "[1.0, 0.0, 1.0" and "cudagraph" not in done.stdout


def test_operations_are_kept_out_of_graphs_where_torch_knows_how() -> None:
    assert torch.Tag.cudagraph_unsafe in torch.ops.gmp_kernels.optimizer_step_.default.tags


def steps_of(backend: str) -> tuple[list[Any], Any]:
    params = parameters(SHAPES)
    optimizer = masked("adamw", params, backend=backend, capturable=True)
    for step in range(2):
        set_gradients(params, random_gradients(params, step), {})
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("backend", ["cpu", "simt"])
def test_the_default_device_does_not_matter(backend: str) -> None:
    """Whatever is made without saying where lands on it, which for most who set one is a GPU."""
    expected_params, expected = steps_of(backend)
    params = parameters(SHAPES)
    with torch.device("meta"):
        optimizer = masked("adamw", params, backend=backend, capturable=True)
    for step in range(2):
        set_gradients(params, random_gradients(params, step), {})
        with torch.device("meta"):
            optimizer.step()
    assert_same_run(params, optimizer, expected_params, expected)


@pytest.mark.parametrize("backend", ["cpu", "simt"])
def test_the_default_device_does_not_matter_to_clipping(backend: str) -> None:
    norms, found = [], []
    for device in ("cpu", "meta"):
        params = parameters(SHAPES)
        set_gradients(params, random_gradients(params, 0), {})
        with torch.device(device):
            norms.append(clip_grad_norm_(params, 1.0, backend=backend))
        found.append([p.grad for p in params])
    assert_bitwise_equal(norms[0], norms[1])
    for ours, theirs in zip(*found, strict=True):
        assert_bitwise_equal(ours, theirs)


def test_plain_sgd_has_nothing_to_wait_for(runtime: Runtime) -> None:
    """No state and no count: a graph can hold the very first step."""
    params = parameters(SHAPES)
    optimizer = SGD(params, lr=0.1, backend="simt")
    set_gradients(params, random_gradients(params, 0), {})
    expected = [p.detach() - 0.1 * p.grad for p in params]
    with runtime.capture() as graph:
        optimizer.step()
    replay(graph)
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), q)
