"""Stop, start again in a new process, continue: the same bits as the run that was never stopped.

Run as a script this file is that new process: ``python test_resume.py CASE CHECKPOINT OUT``.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import gmp_kernels
from gmp_kernels import GMPScheduler, schedules

STEPS = 24
SCHEDULE = schedules.Cubic(0.1, 0.9, begin_step=3, end_step=18, frequency=3)

CASES = {
    "momentum": (
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
        {"distribution": "erk", "overrides": {"4": 0.5}},
        ("model", "optimizer", "pruner"),
    ),
    "adamw": (
        lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
        {"scope": "global"},
        ("pruner", "optimizer", "model"),
    ),
}


def build(case):
    make_optimizer, options, order = CASES[case]
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 32), nn.Linear(32, 4))
    optimizer = make_optimizer(model.parameters())
    return {
        "model": model,
        "optimizer": optimizer,
        "pruner": GMPScheduler(model, optimizer, SCHEDULE, **options),
    }, order


def train(parts, steps):
    # One thread in both processes: the bits of a convolution may depend on how it was split.
    torch.set_num_threads(1)
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(16, 1, 6, 6, generator=generator), torch.randint(4, (16,), generator=generator)
        parts["optimizer"].zero_grad()
        nn.functional.cross_entropy(parts["model"](x), y).backward()
        parts["optimizer"].step()
        parts["pruner"].step()


def save(parts, path):
    torch.save({name: part.state_dict() for name, part in parts.items()}, path)


def flatten(value, path=""):
    if isinstance(value, torch.Tensor):
        yield path, (value.dtype, tuple(value.shape), value.contiguous().view(-1).view(torch.uint8).tolist())
    elif isinstance(value, dict):
        for key, inner in value.items():
            # The only thing that is measured rather than computed.
            if key != "seconds":
                yield from flatten(inner, f"{path}/{key}")
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from flatten(inner, f"{path}/{i}")
    else:
        yield path, value


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("stop", [2, 10])
@pytest.mark.parametrize("case", CASES)
def test_resume_in_a_new_process_equals_the_uninterrupted_run(case, stop, tmp_path, one_thread):
    parts, _ = build(case)
    train(parts, range(stop))
    save(parts, tmp_path / "checkpoint.pt")
    train(parts, range(stop, STEPS))
    save(parts, tmp_path / "uninterrupted.pt")
    subprocess.run(
        [sys.executable, __file__, case, tmp_path / "checkpoint.pt", tmp_path / "resumed.pt"],
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(gmp_kernels.__file__).parents[1])},
    )
    expected, resumed = (
        dict(flatten(torch.load(tmp_path / f"{name}.pt", weights_only=True))) for name in ("uninterrupted", "resumed")
    )
    assert resumed == expected
    assert expected["/pruner/step_count"] == STEPS and len(expected) > 100


def main(case: str, checkpoint: str, out: str) -> None:
    parts, order = build(case)
    state = torch.load(checkpoint, weights_only=True)
    for name in order:
        parts[name].load_state_dict(state[name])
    train(parts, range(parts["pruner"].step_count, STEPS))
    save(parts, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
