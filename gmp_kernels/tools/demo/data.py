"""The handwritten digits of scikit-learn: 1797 grey images of 8x8 pixels in ten classes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

__all__ = ["Digits", "batches", "load", "steps_per_epoch"]

TEST_FRACTION = 0.5
BATCH_SIZE = 64


class Digits(NamedTuple):
    """Images, float32 of shape (n, 1, 8, 8), and labels, int64 of shape (n,), for training and testing."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


def load(seed: int) -> Digits:
    """Return the digits. Half of each class, which depends on ``seed`` only, is held out for testing.

    Pixels are shifted and scaled so that the training images have mean 0 and standard deviation 1.
    """
    images, labels = load_digits(return_X_y=True)
    train_images, test_images, train_labels, test_labels = train_test_split(
        torch.from_numpy(images).float().view(-1, 1, 8, 8),
        torch.from_numpy(labels),
        test_size=TEST_FRACTION,
        stratify=labels,
        random_state=seed,
    )
    mean, std = train_images.mean(), train_images.std()
    return Digits((train_images - mean) / std, train_labels, (test_images - mean) / std, test_labels)


def steps_per_epoch(digits: Digits) -> int:
    """Return the number of batches in an epoch, without a smaller last one."""
    return len(digits.train_images) // BATCH_SIZE


def batches(digits: Digits, order: torch.Generator) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the training images and labels of one epoch, in an order drawn from ``order``."""
    shuffled = torch.randperm(len(digits.train_images), generator=order)
    for batch in shuffled[: steps_per_epoch(digits) * BATCH_SIZE].view(-1, BATCH_SIZE):
        yield digits.train_images[batch], digits.train_labels[batch]
