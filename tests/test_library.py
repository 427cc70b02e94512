"""The operations in compiled graphs: schemas and fake kernels that hold, the same bits, and no compiling again."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from optim_cases import masked, parameters, random_gradients, random_masks
from torch import nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from gmp_kernels import BitMask, GMPScheduler, apply_masks_, magnitude_threshold, optim, prune_, schedules
from gmp_kernels.errors import NonFiniteError, ShapeError, TargetError
from gmp_kernels.pruner.watch import Watch
from gmp_kernels.tools.testing import assert_bitwise_equal, device_of

OPS = torch.ops.gmp_kernels
SHAPES = [(9, 5), (40,), (3, 2, 2)]
RAMP = schedules.Cubic(0.05, 0.9, begin_step=2, end_step=10, frequency=2)
STEPS = range(14)
FULL = {"fullgraph": True}


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def num_graphs() -> int:
    return counters["stats"]["unique_graphs"]


def parameters_of(backend: str, seed: int = 0) -> list[nn.Parameter]:
    return parameters(SHAPES, seed=seed, device=device_of(backend))


def weights(backend: str) -> list[torch.Tensor]:
    return [p.detach() for p in parameters_of(backend)]


def bits(backend: str) -> list[torch.Tensor]:
    return [mask.packed for mask in random_masks(weights(backend), 0.4).values()]


# Every operation, called on fresh arguments.
CALLS: dict[str, Callable[[str], tuple[Any, tuple[Any, ...], dict[str, Any]]]] = {
    "magnitude_threshold": lambda backend: (
        OPS.magnitude_threshold,
        (weights(backend)[0], 20, bits(backend)[0]),
        {"backend": backend},
    ),
    "prune_": lambda backend: (OPS.prune_, (parameters_of(backend), bits(backend), [20, 30, 5]), {"backend": backend}),
    "prune_global": lambda backend: (
        OPS.prune_,
        (weights(backend), bits(backend), [60]),
        {"scope": "global", "nonfinite": "keep", "backend": backend},
    ),
    "apply_masks_": lambda backend: (OPS.apply_masks_, (parameters_of(backend), bits(backend)), {"backend": backend}),
    "ema_update_": lambda backend: (
        OPS.ema_update_,
        (weights(backend), parameters_of(backend, 1), 0.9, [None, *bits(backend)[1:]]),
        {"backend": backend},
    ),
    "clip_gradients_": lambda backend: (
        OPS.clip_gradients_,
        (weights(backend), 0.5, [*bits(backend)[:2], None]),
        {"backend": backend},
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_schemas_and_fake_kernels_hold(backend: str, call: str) -> None:
    torch.library.opcheck(*CALLS[call](backend))


@pytest.mark.parametrize("default_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_fake_results_are_where_the_real_ones_are(device: str, default_dtype: torch.dtype) -> None:
    """On a GPU, too, for which the fake tensors need none: a graph would go on on the wrong device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(default_dtype)
    try:
        with FakeTensorMode():
            weight, empty = (torch.empty(n, dtype=torch.bfloat16, device=device) for n in (40, 0))
            norm = OPS.clip_gradients_([empty, weight], 0.5, [None, None])
            norm_of_nothing = OPS.clip_gradients_([empty], 0.5, [None])
            value, counts = OPS.magnitude_threshold(weight, 20)
    finally:
        torch.set_default_dtype(before)
    assert (norm.device, norm.dtype, norm.shape) == (torch.device(device), torch.float32, ())
    assert (norm_of_nothing.device, norm_of_nothing.dtype) == (torch.device("cpu"), torch.float32)
    assert (value.device, value.dtype, value.shape) == (torch.device(device), torch.bfloat16, ())
    assert (counts.device, counts.dtype, counts.shape) == (torch.device(device), torch.int64, (3,))


@pytest.mark.parametrize("case", ["sgd", "nesterov", "amsgrad", "adamw"])
def test_schema_and_fake_kernel_of_the_step_hold(backend: str, case: str) -> None:
    params = parameters_of(backend)
    optimizer = masked(case, params, backend=backend)
    torch.library.opcheck(
        OPS.optimizer_step_, (optimizer.handle, [2, 0], [params[2], params[0]], random_gradients(params, 0)[::-2])
    )


def test_every_operation_is_checked() -> None:
    defined = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if "gmp_kernels::" in name}
    assert defined == {call("cpu")[0].__name__ for call in CALLS.values()} | {"optimizer_step_"}


def test_operations_do_what_the_functions_do(backend: str) -> None:
    (ours, mask), (theirs, packed) = [(weights(backend)[0], BitMask(bits(backend)[0], SHAPES[0])) for _ in range(2)]
    expected = magnitude_threshold(ours, 30, mask=mask, backend=backend)
    value, counts = OPS.magnitude_threshold(theirs, 30, packed.packed, backend=backend)
    assert (value.dtype, value.item(), *counts.tolist()) == (ours.dtype, *expected)
    prune_(ours, num_prune=30, masks=mask, backend=backend)
    OPS.prune_([theirs], [packed.packed], [30], backend=backend)
    assert_bitwise_equal(ours, theirs)
    assert mask == packed


def test_operations_validate(backend: str) -> None:
    weight = torch.tensor([1.0, float("nan"), 3.0], device=device_of(backend))
    mask = BitMask.ones(weight.shape, weight.device)
    with pytest.raises(NonFiniteError, match="flat index 1"):
        OPS.prune_([weight], [mask.packed], [1], backend=backend)
    with pytest.raises(ShapeError, match="expected 1 contiguous bytes"):
        OPS.apply_masks_([weight], [torch.ones(2, dtype=torch.uint8, device=weight.device)], backend=backend)
    assert mask.num_kept == 3 and weight[0] == 1.0


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 3))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 12, generator=generator), torch.randint(3, (8,), generator=generator)


def trained(
    compiled: Callable[[Any], Any], make_optimizer: Callable[[Any], torch.optim.Optimizer]
) -> tuple[nn.Sequential, GMPScheduler, list[int]]:
    """Train with forward pass and step compiled apart, as torch advises; also return the number of graphs over time."""
    model = make_model()
    optimizer = make_optimizer(model.parameters())
    pruner = GMPScheduler(model, optimizer, RAMP)
    forward, take_step = compiled(model), compiled(lambda: optimizer.step())
    graphs = []
    for step in STEPS:
        x, y = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(forward(x), y).backward()
        take_step()
        pruner.step()
        graphs.append(num_graphs())
    return model, pruner, graphs


def assert_same_training(
    ours: tuple[nn.Module, GMPScheduler, Any], theirs: tuple[nn.Module, GMPScheduler, Any]
) -> None:
    assert ours[1].masks == theirs[1].masks and ours[1].sparsity == pytest.approx(0.9)
    for p, q in zip(ours[0].parameters(), theirs[0].parameters(), strict=True):
        assert_bitwise_equal(p.detach(), q.detach())


@pytest.mark.parametrize("case, compact_state", [("momentum", False), ("adamw", True)])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_compiled_model_trains_as_the_plain_one_and_compiles_once(
    compiler: str, compact_state: bool, case: str
) -> None:
    def make_optimizer(params: Any) -> torch.optim.Optimizer:
        return masked(case, params, compact_state=compact_state)

    plain = trained(lambda function: function, make_optimizer)
    compiled = trained(lambda function: torch.compile(function, backend=compiler, fullgraph=True), make_optimizer)
    assert_same_training(compiled, plain)
    assert compiled[2] == [2] * len(STEPS)


def test_pruning_does_not_compile_a_torch_optimizer_again() -> None:
    """The scheduler's hook on the step stays out of the graph."""

    def make_optimizer(params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.1, momentum=0.9)

    plain = trained(lambda function: function, make_optimizer)
    compiled = trained(lambda function: torch.compile(function, backend="eager"), make_optimizer)
    assert_same_training(compiled, plain)
    # The first step makes the momentum, so that the second is compiled once more.
    assert len(set(compiled[2][1:])) == 1


def test_changing_learning_rates_compile_the_step_once_more() -> None:
    params = parameters(SHAPES)
    optimizer = masked("adamw", params)
    twin_params = parameters(SHAPES)
    twin = masked("adamw", twin_params)
    take_step = torch.compile(lambda: optimizer.step(), backend="eager", **FULL)
    for step in range(6):
        for owner, tensors, go in ((optimizer, params, take_step), (twin, twin_params, twin.step)):
            owner.param_groups[0]["lr"] = 0.1 / (1 + step)
            for p, gradient in zip(tensors, random_gradients(tensors, step), strict=True):
                p.grad = gradient
            go()
    assert num_graphs() <= 2
    for p, q in zip(params, twin_params, strict=True):
        assert_bitwise_equal(p.detach(), q.detach())


def whole_step(model: nn.Module, optimizer: optim.SGD | optim.Adam, average: list[torch.Tensor]) -> Callable[..., Any]:
    """A training step in one graph: gradients, clipping, the update and the running average."""
    params = dict(model.named_parameters())
    masks = [BitMask.from_bool(p.detach() > -0.05) for p in params.values()]

    def loss_of(params: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(torch.func.functional_call(model, params, (x,)), y)

    def take(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        gradients = torch.func.grad(loss_of)(params, x, y)
        for name, p in params.items():
            p.grad = gradients[name]
        norm = optim.clip_grad_norm_(list(params.values()), 0.5, masks=masks)
        # The graph changes weights before the step does: the step has to go on from there.
        apply_masks_([p.detach() for p in params.values()], masks)
        optimizer.step()
        optim.ema_update_(average, list(params.values()), 0.9, masks=masks)
        return norm

    return take


@pytest.mark.parametrize("compiler, case", [("eager", "momentum"), ("aot_eager", "adamw")])
def test_a_whole_training_step_is_one_graph(compiler: str, case: str) -> None:
    found = []
    for compile_it in (False, True):
        model = make_model()
        optimizer = masked(case, model.parameters())
        # The graph masks weights itself before the first step: those zeros are not the pruner's.
        pruner = GMPScheduler(model, optimizer, RAMP, start={})
        average = [torch.zeros_like(p) for p in model.parameters()]
        take = whole_step(model, optimizer, average)
        if compile_it:
            take = torch.compile(take, backend=compiler, **FULL)
        norms = []
        for step in STEPS:
            norms.append(take(*batch(step)))
            pruner.step()
        found.append([*(p.detach() for p in model.parameters()), *average, torch.stack(norms)])
        assert num_graphs() == int(compile_it)
    for plain, compiled in zip(*found, strict=True):
        assert_bitwise_equal(plain, compiled)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_a_compiled_step_is_the_plain_one_and_seen_by_autograd(compiler: str) -> None:
    params, twin_params = parameters(SHAPES), parameters(SHAPES)
    masks = random_masks(params, 0.6)
    optimizer, twin = masked("adamw", params), masked("adamw", twin_params)
    optimizer.set_masks(masks)
    twin.set_masks(dict(zip(twin_params, masks.values(), strict=True)))
    take_step = torch.compile(lambda: optimizer.step(), backend=compiler, **FULL)
    for step in range(3):
        versions = [p._version for p in params]
        for tensors, go in ((params, take_step), (twin_params, twin.step)):
            for p, gradient in zip(tensors, random_gradients(tensors, step), strict=True):
                p.grad = gradient
            go()
        assert all(p._version > version for p, version in zip(params, versions, strict=True))
    for p, q in zip(params, twin_params, strict=True):
        assert_bitwise_equal(p.detach(), q.detach())


def test_parameters_without_a_gradient_stay() -> None:
    params = parameters(SHAPES)
    before = [p.detach().clone() for p in params]
    optimizer = masked("sgd", params)
    take_step = torch.compile(lambda: optimizer.step(), backend="aot_eager", **FULL)
    take_step()
    params[1].grad = torch.ones_like(params[1])
    take_step()
    assert [torch.equal(p, b) for p, b in zip(params, before, strict=True)] == [True, False, True]


def test_copies_have_handles_of_their_own() -> None:
    optimizer = masked("sgd", parameters(SHAPES))
    twin = copy.deepcopy(optimizer)
    (p, *_), (q, *_) = (o.param_groups[0]["params"] for o in (optimizer, twin))
    before = p.detach().clone()
    q.grad = torch.ones_like(q)
    torch.compile(lambda: twin.step(), backend="eager", **FULL)()
    assert_bitwise_equal(p.detach(), before)
    assert not torch.equal(q, before)


def test_an_optimizer_that_is_gone_is_named() -> None:
    optimizer = masked("sgd", parameters(SHAPES))
    handle = optimizer.handle
    del optimizer
    gc.collect()
    with pytest.raises(TargetError, match=f"handle of a living optimizer, got {handle};"):
        OPS.optimizer_step_(handle, [0], [torch.ones(3)], [torch.ones(3)])


@pytest.mark.parametrize("weight, gradient", [((44,), (45,)), ((45,), (44,)), ((45, 1), (45, 1))])
def test_a_step_on_other_shapes_is_refused(weight: tuple[int, ...], gradient: tuple[int, ...]) -> None:
    params = parameters([(45,)])
    optimizer = masked("sgd", params)
    given = torch.ones(weight)
    with pytest.raises(ShapeError, match="of parameter 0"):
        OPS.optimizer_step_(optimizer.handle, [0], [given], [torch.ones(gradient)])
    assert given.eq(1).all()


def test_weights_loaded_before_a_compiled_step_are_pruned_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step gets a buffer, with the weights as they were loaded, that is copied to them when the graph is over."""
    monkeypatch.setattr(Watch, "sees_life", lambda *_: False)
    model = make_model()
    optimizer = masked("adamw", model.parameters())
    pruner = GMPScheduler(model, optimizer, schedules.OneShot(0.9))
    dense = copy.deepcopy(model.state_dict())

    def take(x: torch.Tensor, y: torch.Tensor) -> None:
        nn.functional.cross_entropy(model(x), y).backward()
        for p in model.parameters():
            p.detach().mul_(1.0)
        optimizer.step()

    take = torch.compile(take, backend="aot_eager")
    for step in STEPS:
        if step == 3:
            model.load_state_dict(dense)
        optimizer.zero_grad()
        take(*batch(step))
        pruner.step()
        pruner.verify()
