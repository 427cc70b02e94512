"""Train a transformer with 1 nonzero weight in 20: every step projects onto the largest weights of each matrix."""

import sys

import torch
from torch import nn

import gmp_kernels as gmp

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 250
SEED = int(sys.argv[2]) if len(sys.argv) > 2 else 0
DENSITY, LENGTH, SYMBOLS, WIDTH = 1 / 20, 8, 8, 64


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(SYMBOLS, WIDTH)
        self.place = nn.Parameter(torch.randn(2 * LENGTH, WIDTH) * 0.02)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, SYMBOLS)

    def forward(self, x):
        n = x.shape[1]
        causal = nn.Transformer.generate_square_subsequent_mask(n)
        return self.head(self.blocks(self.embed(x) + self.place[:n], mask=causal, is_causal=True))


def batch(generator):
    """Return sequences whose second half repeats the first, all but the last symbol to predict the next ones."""
    half = torch.randint(SYMBOLS, (32, LENGTH), generator=generator)
    return torch.cat((half, half), 1)


def train(density):
    torch.manual_seed(SEED)
    model, generator = Transformer(), torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.2e-2, total_steps=STEPS, pct_start=0.1)
    # From dense to `density` in the first half; held, though not the same weights, in the second.
    schedule = gmp.schedules.Cubic(0.0, 1 - density, begin_step=0, end_step=max(1, STEPS // 2), frequency=1)
    pruner = gmp.GMPScheduler(model, optimizer, schedule, regrow=True, min_kept_per_row=2, ignore="place")
    for _ in range(STEPS):
        x = batch(generator)
        logits = model(x[:, :-1])[:, LENGTH - 1 :]  # of the repetition, which can be known
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), x[:, LENGTH:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        pruner.step()
    x = batch(torch.Generator().manual_seed(SEED + 1000))
    with torch.no_grad():
        right = model(x[:, :-1])[:, LENGTH - 1 :].argmax(-1) == x[:, LENGTH:]
    return right.float().mean().item(), pruner


dense, _ = train(1.0)
sparse, pruner = train(DENSITY)
fewest = min(int(mask.to_bool().sum(1).min()) for mask in pruner.masks.values())
zeros = pruner.verify()  # counted from the weights
print(f"dense {dense:.3f}, sparsity {pruner.sparsity:.4f}: {sparse:.3f}; fewest weights of a neuron: {fewest}")
assert sum(zeros.values()) >= sum(mask.numel - mask.num_kept for mask in pruner.masks.values())
