"""Prune in a loop of Accelerate, with gradient accumulation; stop in the middle and resume with the same bits."""

import tempfile

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gmp_kernels as gmp

BATCHES, ACCUMULATION, STOP = 200, 2, 100

torch.manual_seed(0)
inputs = torch.randn(32 * BATCHES, 32)
data = TensorDataset(inputs, (inputs @ torch.randn(32, 4)).argmax(1))


def train(folder, begin, end):
    torch.manual_seed(1)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATION)
    model = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=32))
    run = gmp.Stages.from_steps(BATCHES // ACCUMULATION).attach(model, optimizer, 0.9)
    accelerator.register_for_checkpointing(run)
    if begin:
        accelerator.load_state(folder)
    for batch, (x, y) in enumerate(loader):
        if begin <= batch < end:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(x), y))
                optimizer.step()
                run.step()  # counts optimizer steps, not micro-batches
                optimizer.zero_grad()
    accelerator.save_state(folder)
    return model, run


with tempfile.TemporaryDirectory() as folder:
    whole, _ = train(folder, 0, BATCHES)
    train(folder, 0, STOP)
    resumed, run = train(folder, STOP, BATCHES)

print(run.pruner)  # what is pruned, what is left out, and why
same = all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
print(f"sparsity {run.sparsity:.4f} after {run.step_count} steps; the same bits as without a stop: {same}")
assert same
