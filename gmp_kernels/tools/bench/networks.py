"""Small networks for 8x8 images: a residual one and a transformer."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

__all__ = ["ResidualCNN", "Transformer"]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut, which is a 1x1 convolution where the shape changes.

    K. He et al., "Deep residual learning for image recognition", 2015, arXiv:1512.03385.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (n, in_channels, h, w) to (n, out_channels, h / stride, w / stride)."""
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResidualCNN(nn.Module):
    """A stem, three residual blocks at 8x8, 4x4 and 2x2 pixels, and a linear head: ten prunable layers."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.block1 = ResidualBlock(16, 16, stride=1)
        self.block2 = ResidualBlock(16, 32, stride=2)
        self.block3 = ResidualBlock(32, 64, stride=2)
        self.head = nn.Linear(64, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images (n, 1, 8, 8) to logits (n, num_classes)."""
        x = torch.relu(self.norm(self.stem(images)))
        x = self.block3(self.block2(self.block1(x)))
        logits: torch.Tensor = self.head(x.mean((2, 3)))
        return logits


class Transformer(nn.Module):
    """Two pre-norm encoder blocks of width 64 over the eight rows of an image, and a linear head."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 64)
        self.positions = nn.Parameter(torch.randn(8, 64).mul_(0.02))
        layer = partial(nn.TransformerEncoderLayer, dim_feedforward=256, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.Sequential(*(layer(d_model=64, nhead=4) for _ in range(2)))
        self.head = nn.Linear(64, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images (n, 1, 8, 8) to logits (n, num_classes)."""
        x = self.blocks(self.embed(images.squeeze(1)) + self.positions)
        logits: torch.Tensor = self.head(x.mean(1))
        return logits
