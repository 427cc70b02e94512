"""Trainers and modules of Lightning, tiny ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from compared_runs import make_optimizer
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

EPOCHS, BATCHES = 4, 5
STEPS = EPOCHS * BATCHES  # with the default stages, pruning begins at step 0 and ends at step 12


class Module(LightningModule):
    """Learns batches that depend on their number only, because Lightning does not restore a data loader."""

    def __init__(self, optimizer: str = "torch") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
        self.kind_of_optimizer = optimizer

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
        return make_optimizer(self.kind_of_optimizer, self.net.parameters())


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
