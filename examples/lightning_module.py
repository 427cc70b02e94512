"""Prune in the Trainer of Lightning, from 5 % to 90 % sparsity."""

import tempfile

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gmp_kernels as gmp
from gmp_kernels.integrations.lightning import GMPCallback


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 4))

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        loss = nn.functional.cross_entropy(self.net(inputs), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return gmp.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.01)  # or any optimizer of torch


torch.manual_seed(0)
inputs = torch.randn(640, 32)
labels = (inputs @ torch.randn(32, 4)).argmax(1)
data = DataLoader(TensorDataset(inputs, labels), batch_size=64, shuffle=True)
module = Classifier()
callback = GMPCallback(0.9)

with tempfile.TemporaryDirectory() as folder:
    trainer = Trainer(
        max_epochs=10,
        callbacks=[callback],  # the only line to change
        accelerator="cpu",
        logger=False,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)

print(callback.run.pruner)  # what is pruned, what is left out, and why
zeros = callback.run.pruner.verify()  # counted from the weights
accuracy = (module.net(inputs).argmax(1) == labels).float().mean().item()
print(f"sparsity {callback.run.sparsity:.4f}, {sum(zeros.values())} zeros, accuracy {accuracy:.3f}")
