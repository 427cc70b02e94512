"""Prune gradually in a training loop, from 5 % to 90 % sparsity."""

import torch
from torch import nn

import gmp_kernels as gmp

STEPS_PER_EPOCH = 10

torch.manual_seed(0)
inputs = torch.randn(640, 32)
labels = (inputs @ torch.randn(32, 4)).argmax(1)
model = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 4))

# One epoch without pruning, six in which the sparsity rises, three at the final sparsity.
stages = gmp.Stages(stabilization=1, pruning=6, finetuning=3, steps_per_epoch=STEPS_PER_EPOCH)
optimizer = gmp.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.01)  # or any optimizer of torch
run = stages.attach(model, optimizer, 0.90)
print(run)  # what is pruned, what is left out, and why

for step in range(stages.total_steps):
    batch = slice(step % STEPS_PER_EPOCH * 64, (step % STEPS_PER_EPOCH + 1) * 64)
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(inputs[batch]), labels[batch])
    loss.backward()
    optimizer.step()
    for report in run.step():  # after optimizer.step(); it sets sparsity, learning rate and weight decay
        print(f"loss {loss.item():.3f}, {report}")

zeros = run.pruner.verify()  # counted from the weights
accuracy = (model(inputs).argmax(1) == labels).float().mean().item()
print(f"sparsity {run.sparsity:.4f}, {sum(zeros.values())} zeros, accuracy {accuracy:.3f}")
