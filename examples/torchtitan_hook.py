"""Prune in torchtitan: a function for its ``post_optimizer_build_fn``, run here on stand-ins of torchtitan's shape.

In torchtitan itself, set ``post_optimizer_build_fn=partial(prune_gradually, total_steps=steps)`` in the model's
``ModelSpec``. To have the masks in its checkpoints, set ``trainer.checkpointer.states["pruning"] =
trainer.optimizers.run`` before ``trainer.train()``.
"""

import torch
from torch import nn

import gmp_kernels as gmp


def prune_gradually(optimizers, model_parts, parallel_dims, *, total_steps, final_sparsity=0.9):
    """Attach to the optimizers of the model's parts, of which torchtitan's container steps one per part."""
    stages = gmp.Stages.from_steps(total_steps)
    pruners = [
        gmp.GMPScheduler(part, optimizer, stages.schedule(0.05, final_sparsity))
        for part, optimizer in zip(model_parts, optimizers.optimizers, strict=True)
    ]

    def end_weight_decay(step):
        for optimizer in optimizers.optimizers:
            stages.end_weight_decay(optimizer, step)

    optimizers.run = run = gmp.Run(pruners, set_options=end_weight_decay)
    optimizers.register_step_post_hook(lambda *_: run.step())


class Container(torch.optim.Optimizer):
    """As torchtitan's OptimizersContainer: an optimizer of all parameters that steps one optimizer per part."""

    def __init__(self, model_parts, optimizer_cls, optimizer_kwargs):
        self.optimizers = [optimizer_cls(part.parameters(), **optimizer_kwargs) for part in model_parts]
        super().__init__([p for part in model_parts for p in part.parameters()], optimizer_kwargs)

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()


if __name__ == "__main__":
    STEPS = 120
    torch.manual_seed(0)
    inputs = torch.randn(64, 32)
    labels = (inputs @ torch.randn(32, 4)).argmax(1)
    layers = [nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 4)]
    parts = [nn.Sequential(*layers[:2]), nn.Sequential(*layers[2:])]
    container = Container(parts, torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1})
    prune_gradually(container, parts, None, total_steps=STEPS)
    for _ in range(STEPS):
        loss = nn.functional.cross_entropy(parts[1](parts[0](inputs)), labels)
        container.zero_grad()
        loss.backward()
        container.step()  # torchtitan's own loop; the hook prunes
    zeros = sum(sum(pruner.verify().values()) for pruner in container.run.pruners)
    decay = {group["weight_decay"] for optimizer in container.optimizers for group in optimizer.param_groups}
    run = container.run
    print(f"sparsity {run.sparsity:.4f} after {run.step_count} steps, weight decay {decay}, {zeros} zeros")
