"""The hook for torchtitan in a run that resumes as torchtitan does, on stand-ins of its shape."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from compared_runs import OPTIMIZERS, assert_same_bits, bits
from subprocesses import ROOT
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

STEPS = 20
HOOK = runpy.run_path(str(ROOT / "examples/torchtitan_hook.py"))


def begin() -> tuple[list[nn.Module], Any]:
    torch.manual_seed(0)
    parts = [nn.Sequential(nn.Linear(12, 24), nn.ReLU()), nn.Sequential(nn.Linear(24, 24), nn.ReLU())]
    container = HOOK["Container"](parts, *OPTIMIZERS["torch"])
    HOOK["prune_gradually"](container, parts, None, total_steps=STEPS)
    return parts, container


def train(parts: list[nn.Module], container: Any, steps: range) -> None:
    for step in steps:
        inputs = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
        container.zero_grad()
        parts[1](parts[0](inputs)).square().mean().backward()
        container.step()


def states(parts: list[nn.Module], container: Any) -> dict[str, Any]:
    """Return the ``states`` of its checkpointer: those of models and optimizers, and the run, which has methods."""
    found = {f"part {i}": get_state_dict(part, container.optimizers[i]) for i, part in enumerate(parts)}
    return {**found, "pruning": container.run}


def test_a_resumed_run_has_the_bits_of_one_that_was_not_interrupted(tmp_path: Path) -> None:
    whole, stopped, resumed = begin(), begin(), begin()
    train(*whole, range(STEPS))
    train(*stopped, range(7))
    dcp.save(states(*stopped), checkpoint_id=tmp_path)
    loaded = states(*resumed)  # which steps the optimizers to make their state, with learning rates of zero
    dcp.load(loaded, checkpoint_id=tmp_path)
    for i, part in enumerate(resumed[0]):
        model, optimizer = loaded[f"part {i}"]
        set_state_dict(part, resumed[1].optimizers[i], model_state_dict=model, optim_state_dict=optimizer)
    train(*resumed, range(7, STEPS))
    assert resumed[1].run.finished and resumed[1].run.step_count == STEPS
    for i in range(2):
        actual, expected = (bits(parts[i], c.optimizers[i], c.run) for parts, c in (resumed, whole))
        assert_same_bits(actual, expected)
