"""On 4 ranks: schedulers of sharded layers against the oracle on whole ones. Arguments: names of LAYOUTS."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
from launch import run
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from gmp_kernels import BitMask, GMPScheduler, schedules
from gmp_kernels.formats import format_of
from gmp_kernels.tools.testing import DTYPES, adversarial_cases, assert_bitwise_equal

BACKENDS = ("reference", "simt")

# name: (shape of the mesh, placements)
LAYOUTS = {
    "rows": ((4,), [Shard(0)]),
    "columns": ((4,), [Shard(1)]),
    "rows_and_columns": ((2, 2), [Shard(0), Shard(1)]),
    "columns_and_rows": ((2, 2), [Shard(1), Shard(0)]),
    "rows_twice": ((2, 2), [Shard(0), Shard(0)]),
    "copies_of_rows": ((2, 2), [Replicate(), Shard(0)]),
    "columns_and_copies": ((2, 2), [Shard(1), Replicate()]),
    "copies": ((4,), [Replicate()]),
}
# Rows and columns that 4 does not divide; fewer of them than ranks.
SHAPES = [(13, 37), (3, 50), (50, 1)]
# Convolutions: fewer channels than ranks, and filters on both sides of a chunk.
CONVOLUTIONS = [(13, 3, 3, 3), (6, 50, 5, 3), (40, 400, 3, 3)]
# Large enough for weights to be remembered from the first round, and for ties on both sides of a chunk.
LARGE = (401, 1024)
# Up to 1, past it nothing more is left; the same again; and a step back, which prunes nothing.
SPARSITIES = {0: 0.0, 1: 0.3, 2: 0.5, 3: 0.5, 4: 0.93, 5: 1.0}


def shard(whole: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """Every rank has the whole and keeps its part."""
    return distribute_tensor(whole.clone(), mesh, placements, src_data_rank=None)


def model_of(weights: dict[str, torch.Tensor]) -> nn.ParameterDict:
    return nn.ParameterDict({name: nn.Parameter(weight) for name, weight in weights.items()})


def scheduler(model: nn.Module, scope: str, backend: str) -> GMPScheduler:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = schedules.MultiStep(SPARSITIES)
    return GMPScheduler(
        model,
        optimizer,
        schedule,
        targets=[name for name, _ in model.named_parameters()],
        scope=scope,
        count="calls",
        nonfinite="keep",
        backend=backend,
    )


def assert_same(sharded: GMPScheduler, whole: GMPScheduler, what: str) -> None:
    parameters, whole_parameters = (dict(pruner.model.named_parameters()) for pruner in (sharded, whole))
    for name in whole.masks:
        like, expected = parameters[name], whole_parameters[name]
        for kind, here, there in (
            ("mask", sharded.masks[name].to_bool(), whole.masks[name].to_bool()),
            ("weight", like.to_local(), expected.detach()),
        ):
            piece = shard(there, like.device_mesh, like.placements).to_local()
            assert_bitwise_equal(here, piece, f"{kind} of {what} {name}")
    for ours, theirs in zip(sharded.history, whole.history, strict=True):
        # Of reports from before a resume only the last has its layers.
        layers = theirs.layers if ours.layers else ()
        # In words, in which NaN is NaN.
        assert repr(replace(ours, seconds=0.0)) == repr(replace(theirs, seconds=0.0, layers=layers)), what
    assert sharded.layer_sparsities() == whole.layer_sparsities()
    assert sharded.sparsity == whole.sparsity


def channels_last(sharded: DTensor) -> DTensor:
    """The same shards in another memory format."""
    local = sharded.to_local().contiguous(memory_format=torch.channels_last)
    placed = sharded.device_mesh, sharded.placements
    return DTensor.from_local(local, *placed, run_check=False, shape=sharded.shape, stride=sharded.stride())


def compare(layout: str, weights: dict[str, torch.Tensor], scope: str, backend: str = "cpu") -> None:
    """Prune them whole and in shards; those of four dimensions are contiguous there, and in channels_last here."""
    mesh_shape, placements = LAYOUTS[layout]
    mesh = init_device_mesh("cpu", mesh_shape)
    whole = scheduler(model_of({name: weight.clone() for name, weight in weights.items()}), scope, "reference")
    shards = {name: shard(weight, mesh, placements) for name, weight in weights.items()}
    shards |= {name: channels_last(own) for name, own in shards.items() if own.ndim == 4}
    sharded = scheduler(model_of(shards), scope, backend)
    for _ in SPARSITIES:
        whole.step()
        sharded.step()
    for name, mask in sharded.masks.items():
        assert mask.memory_format is format_of(sharded.model[name].to_local()), name
    assert_same(sharded, whole, f"{layout} {scope} {backend}")
    # What one process has saved, shards can load.
    for mask in sharded.masks.values():
        mask.packed.copy_(BitMask.ones(mask.shape).packed)
    sharded.load_state_dict(whole.state_dict())
    assert_same(sharded, whole, f"{layout} {scope} {backend}, loaded")


def cases(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        f"{name} {shape}": weight.view(shape) for name, weight in adversarial_cases(math.prod(shape), dtype).items()
    }


def job(layouts: list[str]) -> None:
    for layout in layouts:
        # The ways through the search differ by 16 bits or more; one layout stands for the other dtypes.
        for dtype in DTYPES if layout == "rows_and_columns" else (torch.float32, torch.bfloat16):
            weights = {name: weight for shape in SHAPES for name, weight in cases(shape, dtype).items()}
            for scope in ("layer", "global"):
                compare(layout, weights, scope)
        large = cases(LARGE, torch.float32)
        chosen = {name: large[f"{name} {LARGE}"] for name in ("random", "constant", "sorted", "bfloat16_ties")}
        compare(layout, chosen, "layer")
        kinds = ("random", "constant", "any_bits")
        weights = {name: w for shape in CONVOLUTIONS for name, w in cases(shape, torch.bfloat16).items()}
        for scope in ("layer", "global"):
            compare(layout, {name: w for name, w in weights.items() if name.startswith(kinds)}, scope)
        # Ties where they are expected, where they are not, and in several layers of a group.
        ties = {name: chosen[name].to(torch.bfloat16) for name in ("random", "sorted")}
        compare(layout, ties, "layer")
        compare(layout, ties, "global")
    for backend in BACKENDS:
        compare(layouts[0], cases(SHAPES[0], torch.float32), "layer", backend)


if __name__ == "__main__":
    run(4, job, sys.argv[1:] or list(LAYOUTS))
