"""Prunes with the installed package on the backends reference and cpu: the same masks, of exact counts."""

import platform

import torch

import gmp_kernels as gmp

torch.manual_seed(0)
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    weight = torch.randn(257, 129).to(dtype)
    results = {name: gmp.prune_(weight.clone(), sparsity=0.9, backend=name) for name in ("reference", "cpu")}
    masks = [result.masks[0] for result in results.values()]
    assert masks[0] == masks[1], f"{dtype}: the backends differ"
    assert results["cpu"].num_pruned == [round(0.9 * weight.numel())], f"{dtype}: {results['cpu'].num_pruned}"
print(f"gmp_kernels {gmp.__version__}, torch {torch.__version__}, {platform.machine()}: reference and cpu agree")
