"""Reports in a line or two, for those who print them."""

from __future__ import annotations

import torch

from gmp_kernels import prune_
from gmp_kernels.reports import LayerReport, StepReport

LAYER = LayerReport("conv.weight", threshold=0.0125, num_weights=1000, num_pruned=512, num_newly_pruned=12, num_ties=1)


def test_a_step_in_a_line() -> None:
    report = StepReport(1200, 1201, 0.512, 0.512, 0.00123, (LAYER, LAYER))
    assert str(report) == "step 1200: sparsity 0.5120 (target 0.5120), 2 layers, 1.2 ms"
    assert (
        str(StepReport(0, 1, 0.5, 0.25, 2.0, (LAYER,))) == "step 0: sparsity 0.2500 (target 0.5000), 1 layer, 2000.0 ms"
    )
    # What one looks into stays whole.
    assert repr(report).startswith("StepReport(step=1200, num_calls=1201, target_sparsity=0.512")


def test_a_layer_in_a_line() -> None:
    assert str(LAYER) == (
        "conv.weight: sparsity 0.5120, 512 of 1000 weights pruned, 12 of them newly, threshold 0.0125"
    )


def test_a_result_in_a_line() -> None:
    weights = [torch.arange(1.0, 11.0), torch.arange(1.0, 31.0)]
    masks = prune_(weights, sparsity=0.1).masks
    result = prune_(weights, sparsity=0.5, masks=masks)
    assert str(result) == "pruned 20 of 40 weights in 2 tensors, 16 of them newly: sparsity 0.5000"
    assert str(prune_([], sparsity=0.5)) == "pruned 0 of 0 weights in 0 tensors, 0 of them newly: sparsity 0.0000"
    assert repr(result).startswith("PruneResult(masks=[")
