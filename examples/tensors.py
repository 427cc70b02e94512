"""Prune tensors without a model or a loop."""

import torch

import gmp_kernels as gmp

torch.manual_seed(0)
weights = [torch.randn(256, 128), 0.1 * torch.randn(512, 256)]

# Prune each tensor by itself: exactly round(0.8 * n) weights of each.
per_layer = [weight.clone() for weight in weights]
print("per layer:", gmp.prune_(per_layer, sparsity=0.8))

# Prune both together: the second tensor has the smaller weights and loses more of them.
over_all = [weight.clone() for weight in weights]
result = gmp.prune_(over_all, sparsity=0.8, scope="global")
print("over all: ", result, [f"{mask.sparsity:.3f}" for mask in result.masks])

# Prune further from existing masks, which only shrink.
result = gmp.prune_(per_layer, sparsity=0.9, masks=[gmp.BitMask.from_zeros(weight) for weight in per_layer])
print("further:  ", result)

# Set pruned weights to zero again after something else has written to them.
for weight in per_layer:
    weight += 1
gmp.apply_masks_(per_layer, result.masks)
assert [gmp.BitMask.from_zeros(weight) for weight in per_layer] == result.masks

# Find only the threshold; this changes nothing.
threshold = gmp.magnitude_threshold(weights[0], num_prune=round(0.5 * weights[0].numel()))
print(f"half of the first tensor lies at or below {threshold.value:.4f}: {threshold}")
