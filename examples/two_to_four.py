"""Prune a trained network gradually to 2:4, which sparse tensor cores take, and compare it with dense networks."""

import copy
import statistics
import sys

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.sparse import _semi_structured_conversions as conversions
from torch.sparse import to_sparse_semi_structured

import gmp_kernels as gmp
from gmp_kernels.patterns import NM

SEEDS = int(sys.argv[1]) if len(sys.argv) > 1 else 10
BATCH, STEPS_PER_EPOCH, EPOCHS = 64, 14, 20  # for the dense network, and as many again for each that goes on from it


def load(seed):
    """Return images of handwritten digits and their labels, half of them to train with and half to test."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images / 16, labels, test_size=0.5, stratify=labels, random_state=seed)
    train_x, test_x, train_y, test_y = map(torch.from_numpy, split)
    return train_x.float(), train_y, test_x.float(), test_y


def train(model, x, y, schedule=None):
    """Train, and prune meanwhile if there is a schedule; return the pruner."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * STEPS_PER_EPOCH)
    pruner = None
    if schedule is not None:
        # The last layer stays dense: its ten rows are too few for the sparse format.
        pruner = gmp.GMPScheduler(model, optimizer, schedule, pattern=NM(2, 4), ignore="4")
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(x))[: STEPS_PER_EPOCH * BATCH].view(-1, BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            rate.step()
            if pruner is not None:
                pruner.step()
    return pruner


def accuracy(model, x, y):
    with torch.no_grad():
        return 100 * (model(x).argmax(1) == y).float().mean().item()


def check(weight):
    """Convert a weight to torch's 2:4 format and back, which loses what is not 2:4."""
    weight = weight.detach().half()
    rows, columns = weight.shape
    if torch.cuda.is_available():
        sparse = to_sparse_semi_structured(weight.cuda())
        dense = sparse.to_dense().cpu()
        assert sparse.shape == weight.shape
    else:
        packed, meta = conversions.sparse_semi_structured_from_dense_cutlass(weight)
        dense = conversions.sparse_semi_structured_to_dense_cutlass(packed, meta)
        assert packed.shape == (rows, columns // 2) and meta.shape == (rows, columns // 16)
    assert torch.equal(dense, weight)
    return f"{rows} x {columns}"


results = {"dense": [], "dense, trained on": [], "2:4": []}
for seed in range(SEEDS):
    torch.manual_seed(seed)
    train_x, train_y, test_x, test_y = load(seed)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    train(model, train_x, train_y)
    results["dense"].append(accuracy(model, test_x, test_y))

    longer = copy.deepcopy(model)
    train(longer, train_x, train_y)
    results["dense, trained on"].append(accuracy(longer, test_x, test_y))

    # In the first half of the epochs the sparsity rises to 0.5. On the way up too, each group of 4 keeps 2 or more.
    begin_to_end = {"begin_step": 0, "end_step": EPOCHS // 2 * STEPS_PER_EPOCH, "frequency": STEPS_PER_EPOCH // 2}
    pruner = train(model, train_x, train_y, gmp.schedules.Cubic(0.05, 0.5, **begin_to_end))
    results["2:4"].append(accuracy(model, test_x, test_y))
    taken = [check(model.get_parameter(name)) for name in pruner.masks]
    print(f"seed {seed}:", ", ".join(f"{name} {values[-1]:.2f} %" for name, values in results.items()))

print(f"sparsity {pruner.sparsity:.4f}; torch takes {' and '.join(taken)} as 2:4")
for name, values in results.items():
    print(f"{name}: accuracy {statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} %")
