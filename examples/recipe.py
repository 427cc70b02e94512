"""Run a SparseML recipe, recipe.yaml: sparsity, learning rate and weight decay are all in it."""

from pathlib import Path

import torch
from torch import nn

import gmp_kernels as gmp
from gmp_kernels import recipes

STEPS_PER_EPOCH = 10

torch.manual_seed(0)
inputs = torch.randn(640, 32)
labels = (inputs @ torch.randn(32, 4)).argmax(1)
model = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 4))
optimizer = gmp.optim.AdamW(model.parameters(), weight_decay=0.01)

recipe = recipes.load(Path(__file__).with_name("recipe.yaml"), {"final_sparsity": 0.85})
run = recipe.attach(model, optimizer, STEPS_PER_EPOCH)

for epoch in range(recipe.epochs):
    for batch in torch.arange(640).split(640 // STEPS_PER_EPOCH):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        run.step()  # after optimizer.step()
    (rate,) = run.lr_scheduler.get_last_lr()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}, sparsity {run.sparsity:.4f}, learning rate {rate:.2g}")

accuracy = (model(inputs).argmax(1) == labels).float().mean().item()
print(f"sparsity {run.sparsity:.4f} as the recipe says, accuracy {accuracy:.3f}")
