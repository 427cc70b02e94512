"""Stop a run in the middle and resume it: the result has the same bits as a run without a stop."""

import io

import torch
from torch import nn

import gmp_kernels as gmp

TOTAL, STOP = 40, 17


class Run:
    """Model, optimizer and pruner of one run."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
        self.optimizer = gmp.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9, compact_state=True)
        schedule = gmp.schedules.Cubic(0.05, 0.9, begin_step=5, end_step=35, frequency=5)
        self.pruner = gmp.GMPScheduler(self.model, self.optimizer, schedule)

    def train(self, begin: int, end: int) -> None:
        for step in range(begin, end):
            torch.manual_seed(step)
            self.optimizer.zero_grad()
            self.model(torch.randn(8, 16)).square().mean().backward()
            self.optimizer.step()
            self.pruner.step()


whole = Run()
whole.train(0, TOTAL)

stopped = Run()
stopped.train(0, STOP)
checkpoint = io.BytesIO()
parts = ("model", "optimizer", "pruner")
torch.save({name: getattr(stopped, name).state_dict() for name in parts}, checkpoint)

resumed = Run()
checkpoint.seek(0)
for name, state in torch.load(checkpoint, weights_only=True).items():  # in any order
    getattr(resumed, name).load_state_dict(state)
resumed.train(STOP, TOTAL)

same = all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))
print(f"sparsity {resumed.pruner.sparsity:.4f}; the same bits as without a stop: {same}")
assert same
