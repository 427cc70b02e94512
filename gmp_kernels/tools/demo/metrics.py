"""The numbers of a demo run as plain data, for metrics.json and for the report."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch

import gmp_kernels
from gmp_kernels import Stages
from gmp_kernels.tools.demo.data import BATCH_SIZE
from gmp_kernels.tools.demo.trial import DENSE_LR, METHODS, MOMENTUM, PRUNING_LR, SWEPT, WEIGHT_DECAY, Trial

__all__ = ["collect"]


def collect(trials: Sequence[Trial], stages: Stages, sparsity: float, optimizer: str) -> dict[str, Any]:
    """Return the metrics of ``trials``, which differ only in their seed.

    Accuracies and sparsities are fractions. Times are means over the seeds, in seconds. Layers and the final learning
    rate are those of the first seed, whose network is saved; every seed prunes the same counts.
    """
    first = trials[0]
    return {
        "test_accuracy": {method: _spread([trial.results[method].accuracy for trial in trials]) for method in METHODS},
        "sweep": {
            "sparsities": list(first.sweep["gmp"]),
            "test_accuracy": {
                method: [
                    _spread([trial.sweep[method][sparsity] for trial in trials]) for sparsity in first.sweep[method]
                ]
                for method in SWEPT
            },
        },
        "num_test_images": first.num_test_images,
        "sparsity": {method: first.results[method].sparsity for method in METHODS},
        "layers": {
            name: {
                "num_weights": mask.numel,
                "num_pruned": mask.numel - mask.num_kept,
                "sparsity": mask.sparsity,
            }
            for name, mask in first.masks.items()
        },
        "num_updates": len(first.history),
        "seconds": {
            method: {
                "training": statistics.fmean(trial.results[method].training_seconds for trial in trials),
                "updates": statistics.fmean(trial.results[method].update_seconds for trial in trials),
                "pruning": statistics.fmean(trial.results[method].pruning_seconds for trial in trials),
            }
            for method in METHODS
        },
        "curves": {method: [trial.results[method].curve for trial in trials] for method in METHODS},
        "config": {
            "sparsity": sparsity,
            "optimizer": optimizer,
            "epochs": round(stages.epochs),
            "seeds": [trial.seed for trial in trials],
            "stages": {
                "stabilization": stages.stabilization,
                "pruning": stages.pruning,
                "finetuning": stages.finetuning,
                "steps_per_epoch": stages.steps_per_epoch,
            },
            "batch_size": BATCH_SIZE,
            "dense_learning_rate": DENSE_LR,
            "pruning_learning_rate": PRUNING_LR,
            "final_learning_rate": first.learning_rates[-1],
            "momentum": MOMENTUM,
            "weight_decay": WEIGHT_DECAY,
            "threads": torch.get_num_threads(),
        },
        "versions": {
            "gmp-kernels": gmp_kernels.__version__,
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "numpy", "scikit-learn")},
        },
    }


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "min": min(values),
        "max": max(values),
        "per_seed": list(values),
    }
