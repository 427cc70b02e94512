"""A small network in a training loop, by any torch optimizer, for tests of the scheduler."""

import io

import torch
from torch import nn

from gmp_kernels import GMPScheduler, schedules

RAMP = schedules.Cubic(0.05, 0.9, begin_step=2, end_step=10, frequency=4)
UPDATES = [2, 6, 10]

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "momentum_foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "adam_amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=2),
}


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 16), nn.Linear(16, 3))


def train_step(model, optimizer, step):
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(8, 1, 6, 6, generator=generator), torch.randint(3, (8,), generator=generator)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)


def make(schedule=RAMP, optimizer="momentum", **options):
    model = make_model()
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    return model, optimizer, GMPScheduler(model, optimizer, schedule, **options)


def run(model, optimizer, pruner, steps):
    for step in steps:
        train_step(model, optimizer, step)
        pruner.step()


def snapshot(model, optimizer, pruner) -> bytes:
    """Everything a refused call must leave alone, byte by byte."""
    buffer = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), pruner.state_dict()], buffer)
    return buffer.getvalue()


def state_tensors(optimizer, parameter):
    return [v for v in optimizer.state[parameter].values() if torch.is_tensor(v) and v.shape == parameter.shape]


def assert_dead(model, optimizer, pruner):
    """Pruned weights and their optimizer state are +0.0 (sign bit included)."""
    for name, mask in pruner.masks.items():
        parameter = model.get_parameter(name)
        for tensor in [parameter.detach(), *state_tensors(optimizer, parameter)]:
            pruned = tensor[~mask.to_bool()]
            assert not pruned.any() and not pruned.signbit().any()
