"""Trainers and modules of Lightning, tiny ones, and all bits of their runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

import gmp_kernels as gmp
from gmp_kernels.integrations.lightning import GMPCallback

EPOCHS, BATCHES = 4, 5
STEPS = EPOCHS * BATCHES  # of which the default stages begin to prune at step 0 and end at step 12
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "torch": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "gmp": lambda p: gmp.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "gmp_compact": lambda p: gmp.optim.AdamW(p, lr=0.01, weight_decay=0.1, compact_state=True),
}


class Module(LightningModule):
    """Learns batches that depend on their number only, because Lightning does not restore a data loader."""

    def __init__(self, optimizer: str = "torch") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
        self.make_optimizer = OPTIMIZERS[optimizer]

    def loss(self, batch_idx: int) -> torch.Tensor:
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(batch_idx))
        return self.net(x).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.loss(batch_idx)
        self.log("loss", loss)
        return loss

    def train_dataloader(self) -> DataLoader:
        return DataLoader(range(BATCHES))

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.net.parameters())


class Manual(Module):
    """Accumulates two batches by itself."""

    def __init__(self, optimizer: str = "torch") -> None:
        super().__init__(optimizer)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(self.loss(batch_idx))
        if batch_idx % 2 or self.trainer.is_last_batch:
            self.clip_gradients(self.optimizers(), 0.5)
            self.optimizers().step()
            self.optimizers().zero_grad()


def fit(folder: Path, callback: Callback | list[Callback], module: LightningModule, **arguments: Any) -> Trainer:
    how = {name: arguments.pop(name) for name in ("ckpt_path", "weights_only") if name in arguments}
    arguments = {"max_epochs": EPOCHS, "logger": False, "enable_checkpointing": False, **arguments}
    trainer = Trainer(
        default_root_dir=folder,
        callbacks=callback,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **arguments,
    )
    trainer.fit(module, **how)
    return trainer


def bits(trainer: Trainer, callback: GMPCallback) -> list[torch.Tensor]:
    """Weights, state of the optimizer, and masks."""
    state = trainer.optimizers[0].state_dict()["state"]
    found = [value for entry in state.values() for value in entry.values() if isinstance(value, torch.Tensor)]
    masks = [mask.packed for mask in callback.run.pruner.masks.values()]
    return [p.detach() for p in trainer.lightning_module.parameters()] + found + masks
