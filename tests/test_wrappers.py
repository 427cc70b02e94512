"""Optimizers around optimizers: masks hold under them, or the pruner says why not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from gmp_kernels import GMPScheduler, optim, schedules
from gmp_kernels.errors import GMPWarning, LayoutError, TargetError
from gmp_kernels.model.wrappers import optimizer_chain

INNER: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "torch": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "gmp": lambda params: optim.SGD(params, lr=0.1, momentum=0.9),
}
EVERY_INNER = pytest.mark.parametrize("inner", INNER)


class Facade(torch.optim.Optimizer):
    """A subclass that never calls the constructor of its base, as trainers' wrappers do."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        return self.optimizer.state

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)


class Handle:
    """No subclass at all: what it wraps is behind a property."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._held = [optimizer]

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._held[0]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_held"][0], name)


class TwoSteps(torch.optim.Optimizer):
    """Sharpness-aware: climbs along the gradient, and takes the step of the optimizer inside from where it was."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__([p for group in optimizer.param_groups for p in group["params"]], {})
        self.base_optimizer = optimizer

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        before = [p.clone() for p in params]
        for p in params:
            p.add_(p.grad, alpha=0.05)
        with torch.enable_grad():
            closure()
        for p, old in zip(params, before, strict=True):
            p.data = old
        self.base_optimizer.step()


class Lookahead(torch.optim.Optimizer):
    """Pulls the weights back to slow ones every other step, behind the back of versions."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__([p for group in optimizer.param_groups for p in group["params"]], {})
        self.optimizer = optimizer
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]
        self.num_steps = 0

    def step(self, closure: Any = None) -> None:
        self.optimizer.step()
        self.num_steps += 1
        if self.num_steps % 2 == 0:
            for slow, p in zip(self.slow, self.param_groups[0]["params"], strict=True):
                slow.add_(p.data - slow, alpha=0.5)
                p.data.copy_(slow)


class Masters(torch.optim.Optimizer):
    """Steps float32 copies and copies them back: the optimizer inside never sees the model's parameters."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        self.params = params
        self.masters = [nn.Parameter(p.detach().float()) for p in params]
        self.optimizer = torch.optim.SGD(self.masters, lr=0.1)
        self.param_groups = [{"params": params}]

    def step(self, closure: Any = None) -> None:
        for p, master in zip(self.params, self.masters, strict=True):
            master.grad = p.grad.float()
        self.optimizer.step()
        with torch.no_grad():
            for p, master in zip(self.params, self.masters, strict=True):
                p.copy_(master)


def train(wrap: Callable[[Any], Any], inner: str, steps: int = 5) -> tuple[nn.Module, Any, GMPScheduler]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))
    optimizer = wrap(INNER[inner](model.parameters()))
    pruner = GMPScheduler(model, optimizer, schedules.OneShot(0.9))
    go(model, optimizer, pruner, steps)
    return model, optimizer, pruner


def go(model: nn.Module, optimizer: Any, pruner: GMPScheduler, steps: int) -> None:
    x = torch.randn(8, 40, generator=torch.Generator().manual_seed(1))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    for _ in range(steps):
        closure()
        optimizer.step(closure) if isinstance(optimizer, TwoSteps) else optimizer.step()
        pruner.step()
        assert [int((layer.weight == 0).sum()) for layer in model] == [1080, 540]


@EVERY_INNER
@pytest.mark.parametrize("wrap", [Facade, Handle, TwoSteps, lambda o: Facade(Facade(o))])
def test_masks_hold_under_a_wrapper(wrap: Callable[[Any], Any], inner: str) -> None:
    model, optimizer, pruner = train(wrap, inner)
    assert pruner.step_count == 5
    assert pruner.optimizer is optimizer
    innermost = optimizer_chain(optimizer)[-1]
    momentum = innermost.state[model[0].weight]["momentum_buffer"]
    assert int((momentum == 0).sum()) >= 1080


@EVERY_INNER
def test_wrapped_runs_are_those_without_a_wrapper(inner: str) -> None:
    plain, wrapped = train(lambda optimizer: optimizer, inner), train(Facade, inner)
    for p, q in zip(plain[0].parameters(), wrapped[0].parameters(), strict=True):
        assert torch.equal(p, q)
    assert plain[2].masks == wrapped[2].masks


@EVERY_INNER
def test_a_wrapper_may_write_weights_after_the_step_inside(inner: str) -> None:
    model, optimizer, pruner = train(Lookahead, inner, 6)
    assert pruner.step_count == 6
    model(torch.randn(4, 40)).square().mean().backward()
    for _ in range(2):
        optimizer.step()
        assert [int((layer.weight == 0).sum()) for layer in model] == [1080, 540]  # before the pruner looks


class Twin(torch.optim.SGD):
    """Has the attributes of what it wraps, hooks included, as Lightning's wrapper has."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.__dict__ = {**optimizer.__dict__, "_optimizer": optimizer}

    def step(self, closure: Any = None) -> Any:
        return self._optimizer.step(closure)


def test_hooks_that_a_wrapper_shares_run_once() -> None:
    _, optimizer, pruner = train(Twin, "torch")
    assert pruner.step_count == 5
    assert len(optimizer._optimizer._optimizer_step_post_hooks) == 1


@EVERY_INNER
def test_copies_of_wrapped_runs_hold_too(inner: str) -> None:
    run = train(Facade, inner)
    twin = copy.deepcopy(run)
    go(*twin, 3)
    assert (run[2].step_count, twin[2].step_count) == (5, 8)


class Share(torch.optim.Optimizer):
    """Has the optimizer inside step a part of the parameters, as where each rank steps its share."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})
        self.optim = torch.optim.SGD(self.param_groups[0]["params"][:1], lr=0.1, momentum=0.9)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.optim.step()
        for p in self.param_groups[0]["params"][1:]:
            p.add_(p.grad, alpha=-0.1)


class Pair(torch.optim.Optimizer):
    """One optimizer for matrices and one for the rest, in one object."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})
        params = self.param_groups[0]["params"]
        self.matrices = torch.optim.SGD([p for p in params if p.ndim > 1], lr=0.1, momentum=0.9)
        self.others = torch.optim.AdamW([p for p in params if p.ndim < 2], lr=0.1)

    def step(self, closure: Any = None) -> None:
        self.matrices.step()
        self.others.step()


@pytest.mark.parametrize("wrap", [Share, Pair])
def test_parts_inside_are_held_by_the_whole(wrap: Callable[[Any], Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))
    optimizer = wrap(model.parameters())
    pruner = GMPScheduler(model, optimizer, schedules.OneShot(0.9))
    go(model, optimizer, pruner, 4)
    assert pruner.step_count == 4
    inner = optimizer.optim if wrap is Share else optimizer.matrices
    assert int((inner.state[model[0].weight]["momentum_buffer"] == 0).sum()) == 1080


def test_copies_of_weights_that_others_step_are_refused() -> None:
    model = nn.Linear(8, 8)
    with pytest.raises(TargetError, match="hooks of steps"):
        GMPScheduler(model, Masters(list(model.parameters())), schedules.OneShot(0.9))  # type: ignore[arg-type]


def test_masters_copied_back_are_repaired_under_the_optimizer_that_knows_the_weights() -> None:
    """The pruner was given another optimizer than the one that steps."""
    model = nn.Linear(20, 20)
    masters = Masters(list(model.parameters()))
    pruner = GMPScheduler(model, torch.optim.SGD(model.parameters(), lr=0.1), schedules.OneShot(0.9))
    pruner.step()
    with pytest.warns(GMPWarning, match="a wrapper that writes the weights itself is repaired"):
        for _ in range(3):
            model(torch.randn(4, 20)).square().mean().backward()
            masters.step()
            pruner.step()
            assert int((model.weight == 0).sum()) == 360


def test_an_optimizer_without_hooks_is_refused() -> None:
    class Bare(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            self.param_groups = [{"params": list(params)}]

    model = nn.Linear(8, 8)
    with pytest.raises(TargetError, match=r"hooks of steps.*got Bare; pass the optimizer inside it"):
        GMPScheduler(model, Bare(model.parameters()), schedules.OneShot(0.9))


def test_a_learning_rate_scheduler_is_no_wrapper() -> None:
    model = nn.Linear(8, 8)
    scheduler = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(model.parameters(), lr=0.1), 1)
    with pytest.raises(TypeError, match=r"expected a torch\.optim\.Optimizer or a wrapper around one"):
        GMPScheduler(model, scheduler, schedules.OneShot(0.9))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["zero.stage_1_and_2.DeepSpeedZeroOptimizer", "engine.DeepSpeedEngine"])
@pytest.mark.parametrize("wraps", [False, True])
def test_deepspeed_is_refused_by_name(name, wraps):
    """Its optimizers and engines, and Accelerate's wrapper around them, by where their classes are defined."""
    model = nn.Linear(4, 4)
    module, _, kind = name.rpartition(".")
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in model.parameters()]))
    optimizer = type(kind, (Handle,), {"__module__": f"deepspeed.runtime.{module}"})(torch.optim.SGD([flat], lr=0.1))
    with pytest.raises(LayoutError, match=rf"DeepSpeed's {kind}, .*fully_shard"):
        GMPScheduler(model, Handle(optimizer) if wraps else optimizer, schedules.OneShot(0.5))
