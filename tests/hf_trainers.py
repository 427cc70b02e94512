"""Trainers of Hugging Face Transformers for tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from compared_runs import OPTIMIZERS
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

STEPS = 20  # with the default stages, pruning begins at step 0 and ends at step 12


def tokens(seed: int = 0, size: int = 4 * STEPS) -> list[dict[str, torch.Tensor]]:
    rows = torch.randint(0, 32, (size, 8), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in rows]


def make_model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=8, vocab_size=32, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)  # with dropout, so that a resumed run needs its random numbers too


def make_trainer(
    folder: Path,
    *callbacks: TrainerCallback,
    optimizer: str = "torch",
    kind: type[Trainer] = Trainer,
    **arguments: Any,
) -> Trainer:
    arguments = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "save_steps": 5,
        "logging_steps": 4,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        **arguments,
    }
    return kind(
        model=make_model(),
        args=TrainingArguments(output_dir=str(folder), **arguments),
        train_dataset=tokens(),
        eval_dataset=tokens(1, 8),
        callbacks=list(callbacks),
        optimizer_cls_and_kwargs=OPTIMIZERS[optimizer],
    )


class Stop(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step
