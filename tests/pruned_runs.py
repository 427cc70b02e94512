"""Small pruned networks to try things on: optimizers, wrappers of them, what a pruner must count, and all bits."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from gmp_kernels import GMPScheduler, optim, schedules
from gmp_kernels.model.wrappers import optimizer_chain
from gmp_kernels.schedules import Schedule

SCHEDULES = {
    "ramp": schedules.Cubic(0.2, 0.8, 1, 7, frequency=2),
    "at_once": schedules.OneShot(0.7),
    "stairs": schedules.MultiStep({0: 0.1, 1: 0.3, 4: 0.75}),
}

KINDS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "torch_sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "torch_adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "torch_adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "gmp_sgd": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "gmp_adamw": lambda p: optim.AdamW(p, lr=0.01),
    "gmp_adamw_compact": lambda p: optim.AdamW(p, lr=0.01, compact_state=True),
}

Trio = tuple[nn.Module, Any, GMPScheduler]


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(36, 8), nn.Linear(8, 4))


class Holder:
    """A wrapper that is no optimizer itself."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return self.optimizer.step(closure)


class Unconstructed(torch.optim.Optimizer):
    """A wrapper of the class Optimizer that does not call its constructor."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


class TwoSteps(torch.optim.Optimizer):
    """Climbs first, and has the optimizer inside it step from where the weights were, as SAM does."""

    def __init__(self, base_optimizer: torch.optim.Optimizer) -> None:
        super().__init__(base_optimizer.param_groups, {})
        self.base_optimizer = base_optimizer
        self.param_groups = base_optimizer.param_groups

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if "hooks" not in name}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        owned = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        before = [p.clone() for p in owned]
        for p in owned:
            p.add_(p.grad, alpha=0.05)
        for p, value in zip(owned, before, strict=True):
            p.copy_(value)
        return self.base_optimizer.step()


class Masters(Holder):
    """Keeps float32 copies that know nothing of masks, and writes them back after each step."""

    is_traced = True

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer)
        self.owned = [p for group in optimizer.param_groups for p in group["params"]]
        self.copies = [p.detach().float().clone() for p in self.owned]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        before = [p.clone() for p in self.owned]
        self.optimizer.step(closure)
        for p, old, master in zip(self.owned, before, self.copies, strict=True):
            master.add_((p - old).float())
            (p if self.is_traced else p.data).copy_(master)


class UntracedMasters(Masters):
    is_traced = False


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "none": lambda optimizer: optimizer,
    "holder": Holder,
    "unconstructed": Unconstructed,
    "two_steps": TwoSteps,
    "masters": Masters,
    "untraced_masters": UntracedMasters,
}


class Expected(NamedTuple):
    """Counts that a pruner must have: written down from the contract, without a look at the package.

    Attributes
    ----------
    count : int
        Steps of the pruner's optimizer.
    seen : int
        Those at the latest call of ``pruner.step()``.
    made : int
        The step up to which updates are made.
    updates : tuple of int
        The steps whose updates were made.
    """

    count: int = 0
    seen: int = 0
    made: int = -1
    updates: tuple[int, ...] = ()

    def stepped(self) -> Expected:
        return self._replace(count=self.count + 1)

    def called(self, schedule: Schedule) -> Expected:
        due = range(self.made + 1, self.count if self.count > self.seen else self.count + 1)
        latest = [step for step in due if schedule.is_update_step(step)][-1:]
        return Expected(self.count, self.count, max(self.made, due.stop - 1), (*self.updates, *latest))

    def saved(self) -> Expected:
        """Return what is left of it once the pruner was saved and loaded."""
        return self._replace(made=self.seen if self.made >= self.seen else self.seen - 1)


def innermost(optimizer: Any) -> torch.optim.Optimizer:
    return optimizer_chain(optimizer)[-1]  # type: ignore[no-any-return]


def set_gradients(model: nn.Module, seed: int, absent: Sequence[int] = ()) -> None:
    """Give every parameter a gradient, but for those at these positions."""
    generator = torch.Generator().manual_seed(seed)
    for i, p in enumerate(model.parameters()):
        grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        p.grad = None if i in absent else torch.empty_like(p).copy_(grad)


def train_step(trio: Trio, seed: int, absent: Sequence[int] = ()) -> None:
    model, optimizer, _ = trio
    set_gradients(model, seed, absent)
    optimizer.step()


def bits(value: object) -> object:
    """Return plain data that are equal where all bits are."""
    if isinstance(value, torch.Tensor):
        dense = value.detach().contiguous()
        return str(value.dtype), tuple(value.shape), dense.reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, Mapping):
        # Times are no result.
        return {key: bits(entry) for key, entry in value.items() if key != "seconds"}
    return tuple(map(bits, value)) if isinstance(value, (list, tuple)) else value


def digest_of_training(trio: Trio) -> object:
    return bits(trio[0].state_dict()), bits(innermost(trio[1]).state_dict())


def digest(trio: Trio) -> object:
    """Return all that a call may change."""
    return *digest_of_training(trio), bits(trio[2].state_dict())  # type: ignore[misc]


def digest_of_the_kept(trio: Trio) -> object:
    """Return the same, less what weights and optimizer state hold where weights are pruned."""
    model, optimizer, pruner = trio
    weights, saved = copy.deepcopy(model.state_dict()), copy.deepcopy(innermost(optimizer).state_dict())
    owned = [p for group in innermost(optimizer).param_groups for p in group["params"]]
    for name, mask in pruner.masks.items():
        pruned, parameter = ~mask.to_bool(), model.get_parameter(name)
        state = saved["state"].get(next(i for i, p in enumerate(owned) if p is parameter), {})
        for value in [weights[name], *state.values()]:
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                value[pruned] = 0
    return bits(weights), bits(saved), bits(pruner.state_dict())


def by_torch_save(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch.save": by_torch_save,
}
