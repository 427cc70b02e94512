"""AdamW in three forms for runs of trainers, all bits of such a run, and comparisons of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

import gmp_kernels as gmp
from gmp_kernels.distributed.placement import local
from gmp_kernels.tools.testing import assert_bitwise_equal

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "torch": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "gmp": (gmp.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "compact": (gmp.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1, "compact_state": True}),
}


def make_optimizer(kind: str, parameters: Any, **options: Any) -> torch.optim.Optimizer:
    """Return one of ``OPTIMIZERS``, with options other than there if they are given."""
    make, usual = OPTIMIZERS[kind]
    return make(parameters, **(usual | options))


def bits(model: torch.nn.Module, optimizer: Any, run: gmp.Run) -> dict[str, Any]:
    """Return the weights, the optimizer's state and options, and the masks, by name; of shards, those of this rank."""
    saved = optimizer.state_dict()
    state = {f"{key} of {i}": value for i, entry in saved["state"].items() for key, value in entry.items()}
    masks = {f"mask of {name}": mask.packed for pruner in run.pruners for name, mask in pruner.masks.items()}
    named = {**dict(model.named_parameters()), **state, "param_groups": saved["param_groups"], **masks}
    return {name: local(value) if isinstance(value, torch.Tensor) else value for name, value in named.items()}


def assert_same_bits(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Compare names, tensors bit by bit, and all other values."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert_bitwise_equal(actual[name], value, name)
        else:
            assert actual[name] == value, name


def assert_same_on_all_ranks(values: Mapping[str, Any]) -> None:
    """Compare what every rank passes, which all of them have to do."""
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, values)
    for other in ranks:
        assert_same_bits(other, values)
