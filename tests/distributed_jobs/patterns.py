"""On 4 ranks: patterns, caps and scores of sharded layers against one process, and what all ranks refuse."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launch import run
from masks import LAYOUTS, assert_same, channels_last, model_of, shard
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

import gmp_kernels as gmp
from gmp_kernels.patterns import NM, Block, Unstructured

# Up to all that 2:4 allows, and once more.
SCHEDULE = gmp.schedules.MultiStep({0: 0.1, 1: 0.3, 2: 0.5, 3: 0.5})
# Rows and columns of which each rank holds whole groups; the last one lies on two ranks only, if its rows are divided.
SHAPES = {"rows": (16, 32), "conv": (8, 16, 3, 3), "cols": (32, 16), "few": (2, 64)}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("layer", {"pattern": NM(2, 4)}),
    ("global", {"pattern": NM(2, 4)}),
    ("global", {"pattern": {"rows": NM(1, 4), "conv": NM(1, 2, dim=0), "*": Unstructured()}}),
    ("layer", {"pattern": {"few": Block(1, 4), "conv": Block(2, 9), "*": Block(4, 4)}}),
    ("global", {"pattern": Block(2, 4), "ignore": "few"}),
    ("global", {"max_sparsity": 0.6}),
    ("global", {"max_sparsity": 0.55, "pattern": NM(1, 4)}),
    ("global", {"max_sparsity": 0.55, "pattern": Block(2, 4), "ignore": "few"}),
    ("layer", {"regrow": True}),
    ("global", {"regrow": True, "pattern": NM(2, 4)}),
    ("global", {"regrow": True, "max_sparsity": 0.6}),
]
WHOLE_ROWS: list[tuple[str, dict[str, Any]]] = [
    ("layer", {"pattern": Unstructured(min_kept_per_row=5)}),
    ("global", {"pattern": Unstructured(min_kept_per_row=5), "max_sparsity": 0.7}),
]


def weights_of(kind: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    found = {}
    for scale, (name, shape) in zip((1.0, 4.0, 0.25, 1.0), SHAPES.items(), strict=True):
        weight = torch.randn(shape, generator=generator)
        weight = weight.sign() * (1 + (weight > 1).float()) if kind == "ties" else weight
        found[name] = (weight * scale).to(dtype)
    if kind == "not finite":
        found["rows"].view(-1)[[3, 200]] = float("nan")
        found["cols"].view(-1)[77] = float("-inf")
    return found


def by_state(name: str, parameter: torch.Tensor, state: Mapping[str, Any]) -> torch.Tensor:
    return parameter.abs() * state["exp_avg_sq"].sqrt()


def of_local_part(name: str, parameter: torch.Tensor, state: Mapping[str, Any]) -> torch.Tensor:
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return local.double().square() + len(name)


def pruner_of(weights: dict[str, torch.Tensor], scope: str, options: dict[str, Any], backend: str) -> gmp.GMPScheduler:
    model = model_of(weights)
    # Only masks that may grow back are told anything by weights that change.
    optimizer = torch.optim.Adam(model.parameters(), lr=0.5 if options.get("regrow") else 0.0)
    chosen = {"targets": list(weights), "count": "calls", "nonfinite": "keep", **options}
    return gmp.GMPScheduler(model, optimizer, SCHEDULE, scope=scope, backend=backend, **chosen)


def take_step(pruner: gmp.GMPScheduler, gradients: dict[str, torch.Tensor]) -> None:
    for name, p in pruner.model.named_parameters():
        whole = gradients[name]
        p.grad = shard(whole, p.device_mesh, p.placements) if isinstance(p, DTensor) else whole.clone()
    pruner.optimizer.step()
    pruner.optimizer.zero_grad()


def compare(layout: str, kind: str, scope: str, options: dict[str, Any], backend: str, dtype: torch.dtype) -> None:
    mesh_shape, placements = LAYOUTS[layout]
    mesh = init_device_mesh("cpu", mesh_shape)
    weights = weights_of(kind, dtype)
    whole = pruner_of({name: w.clone() for name, w in weights.items()}, scope, options, "reference")
    shards = {name: shard(w, mesh, placements) for name, w in weights.items()}
    shards |= {name: channels_last(own) for name, own in shards.items() if own.ndim == 4}
    sharded = pruner_of(shards, scope, options, backend)
    gradients = weights_of("random", dtype)
    for _ in range(4):
        for pruner in (whole, sharded):
            take_step(pruner, gradients)
            pruner.step()
    what = f"{layout} {kind} {scope} {options} {backend}"
    assert_same(sharded, whole, what)
    assert repr(sharded).splitlines()[0] == repr(whole).splitlines()[0]
    sharded.load_state_dict(whole.state_dict())
    assert_same(sharded, whole, f"{what}, loaded")


def refused(layout: str, pattern: object, shape: tuple[int, ...], match: str) -> None:
    """The first step raises the same on every rank, and changes nothing."""
    mesh_shape, placements = LAYOUTS[layout]
    mesh = init_device_mesh("cpu", mesh_shape)
    model = model_of({"layer": shard(torch.randn(shape), mesh, placements)})
    pruner = gmp.GMPScheduler(model, torch.optim.SGD(model.parameters()), SCHEDULE, targets="layer", pattern=pattern)
    before = model["layer"].to_local().clone()
    with pytest.raises(gmp.LayoutError, match=match) as caught:
        pruner.step()
    messages: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(messages, str(caught.value))
    assert len(set(messages)) == 1, messages
    assert torch.equal(before, model["layer"].to_local()) and not pruner.history


def nan_where_weights_are_protected(layout: str) -> None:
    mesh_shape, placements = LAYOUTS[layout]
    mesh = init_device_mesh("cpu", mesh_shape)
    weight = torch.ones(16, 16)
    weight[9, 6] = float("nan")  # the last in the order of its group
    for options in ({"pattern": NM(1, 4)}, {"pattern": Block(4, 4)}, {"max_sparsity": 0.9, "scope": "global"}):
        model = model_of({"layer": shard(weight, mesh, placements)})
        optimizer = torch.optim.SGD(model.parameters())
        pruner = gmp.GMPScheduler(model, optimizer, gmp.schedules.OneShot(0.25), targets="layer", **options)
        with pytest.raises(gmp.NonFiniteError, match=f"'layer' at flat index {9 * 16 + 6};"):
            pruner.step()
        assert not pruner.history and all(mask.sparsity == 0 for mask in pruner.masks.values())


def scores_that_fail_on_one_rank() -> None:
    mesh = init_device_mesh("cpu", (4,))
    model = model_of({"layer": shard(torch.randn(16, 16), mesh, LAYOUTS["rows"][1])})

    def scores(name: str, parameter: torch.Tensor, state: Mapping[str, Any]) -> torch.Tensor:
        if dist.get_rank() == 2:
            raise RuntimeError("no scores today")
        return parameter.abs()

    pruner = gmp.GMPScheduler(model, torch.optim.SGD(model.parameters()), SCHEDULE, targets="layer", scores=scores)
    kind = RuntimeError if dist.get_rank() == 2 else gmp.DistributedError
    with pytest.raises(kind, match="no scores today"):
        pruner.step()
    assert not pruner.history and pruner.step_count == 0


def masks_that_break_it_on_one_rank() -> None:
    mesh = init_device_mesh("cpu", (4,))
    weight = torch.ones(16, 16)
    weight[13, :3] = 0.0
    model = model_of({"layer": shard(weight, mesh, LAYOUTS["rows"][1])})
    given = {"targets": "layer", "pattern": NM(2, 4)}
    with pytest.raises(gmp.SparsityError, match="'layer' \\(2:4\\), got 1 groups"):
        gmp.GMPScheduler(model, torch.optim.SGD(model.parameters()), SCHEDULE, start="zeros", **given)
    without = gmp.GMPScheduler(model, torch.optim.SGD(model.parameters()), SCHEDULE, targets="layer", start="zeros")
    state = without.state_dict()
    without.remove()
    pruner = gmp.GMPScheduler(model, torch.optim.SGD(model.parameters()), SCHEDULE, start={}, **given)
    with pytest.raises(gmp.StateError, match="'layer' \\(2:4\\), got 1 groups"):
        pruner.load_state_dict(state, masks_only=True)
    assert all(mask.sparsity == 0 for mask in pruner.masks.values())


def job(layouts: list[str]) -> None:
    for number, layout in enumerate(layouts):
        placements = LAYOUTS[layout][1]
        holds_rows = not any(getattr(placement, "dim", 0) for placement in placements)
        for case, (scope, options) in enumerate(CASES + WHOLE_ROWS * holds_rows):
            kinds = [("random", torch.float32), ("ties", torch.bfloat16), ("not finite", torch.float32)]
            for kind, dtype in kinds if layout != "rows" else kinds[case % 3 :: 2]:
                compare(layout, kind, scope, options, "cpu", dtype)
        compare(layout, "random", "global", {"scores": by_state, "max_sparsity": 0.6}, "cpu", torch.float32)
        compare(layout, "ties", "layer", {"scores": of_local_part, "pattern": NM(2, 4)}, "cpu", torch.bfloat16)
        for backend in ("reference", "simt") if number == 0 else ():
            for scope, options in CASES[1::3]:
                compare(layout, "ties", scope, options, backend, torch.float32)
        if not all(isinstance(placement, Replicate) for placement in placements):
            nan_where_weights_are_protected(layout)
    refused(
        "columns", NM(2, 4), (8, 24), "'layer' \\(2:4\\), got a part of shape \\(8, 6\\) on rank 0.*cuts groups of 4"
    )
    refused("rows", NM(2, 4, dim=0), (24, 8), "along dim 0, which cuts groups")
    refused("rows", Block(4, 4), (8, 8), "rows 0 to 2 and columns 0 to 8, which cuts blocks")
    refused("columns", Block(2, 4), (8, 12, 1, 2), "columns 0 to 6, which cuts blocks")
    refused("columns", Unstructured(min_kept_per_row=1), (8, 24), "its rows are divided: it has 6 of 24 along dim 1")
    scores_that_fail_on_one_rank()
    masks_that_break_it_on_one_rank()


if __name__ == "__main__":
    run(4, job, sys.argv[1:] or list(LAYOUTS))
