"""Pruning in the Trainer of Hugging Face Transformers."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from gmp_kernels.errors import StateError
from gmp_kernels.integrations.callbacks import PruningCallback

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"gmp_kernels.integrations.transformers needs {error.name}; pip install 'gmp-kernels[transformers]'",
        name=error.name,
    ) from error

__all__ = ["GMPCallback"]


class GMPCallback(PruningCallback, TrainerCallback):
    """Prunes gradually in a Hugging Face ``Trainer``: pass ``callbacks=[GMPCallback(0.9)]``.

    Prunes after optimizer steps; those that are skipped, and micro-batches, do not count. Every checkpoint gets a file
    ``pruning.pt``, from which a resumed run continues bit for bit; each further callback of the same Trainer, for other
    targets, a file of its own. Every update logs ``sparsity/global`` to whatever
    ``report_to`` names; the last one, and those at logging steps, ``sparsity/<layer>`` as well. When the last update
    has been made, the best metric so far is forgotten, so that ``load_best_model_at_end`` chooses among models of the
    final sparsity.

    Arguments, attributes, errors and warnings are those of ``PruningCallback``. Also raises StateError when training
    resumes from a checkpoint that was saved without this callback.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer, checkpoint = _caller()
        saved = None
        if state.global_step:
            folder = checkpoint or Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            saved = self._read(Path(folder))
        self._begin(self._trainer.model_wrapped, kwargs["optimizer"], state.max_steps, saved)
        self._has_pruned = False

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        was_finished = self.run.finished
        self._has_pruned = bool(self.run.step())
        if self.run.finished and not was_finished:
            # A denser model is no rival of a sparser one.
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._has_pruned:
            should_log = control.should_log
            # The Trainer prints what it logs, and a large model has hundreds of layers.
            self._trainer.log(self._figures(of_layers=should_log or self.run.finished))
            control.should_log = should_log  # the call takes itself for the one that was due

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        saved = self._state()  # on every rank, as shards of masks are gathered
        if args.should_save and not state.is_hyper_param_search:
            torch.save(saved, Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / self._file)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._end()
        if args.load_best_model_at_end and state.best_model_checkpoint and not state.is_hyper_param_search:
            self.run.load_state_dict(self._read(Path(state.best_model_checkpoint))["run"])
        # The Trainer holds this callback, and a cycle would keep its process group until the interpreter exits.
        del self._trainer

    @property
    def _file(self) -> str:
        """Name of the file in every checkpoint, beside optimizer.pt. Of several callbacks each has its own."""
        callbacks = [one for one in self._trainer.callback_handler.callbacks if isinstance(one, GMPCallback)]
        number = callbacks.index(self)
        return f"pruning_{number}.pt" if number else "pruning.pt"

    def _read(self, folder: Path) -> dict[str, Any]:
        """Read what ``on_save`` has written."""
        path = folder / self._file
        if not path.exists():
            raise StateError(
                f"GMPCallback: expected '{path.name}' in '{folder}', got none: that checkpoint was saved without this "
                "callback. Resume from another one, or load its weights into the model and start anew, without "
                "resume_from_checkpoint"
            )
        try:
            saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever torch raises for damaged files
            raise StateError(
                f"GMPCallback: expected what this callback has saved in '{path}', got a file that cannot be read "
                f"({type(error).__name__}); resume from another checkpoint"
            ) from error
        return saved


def _caller() -> tuple[Trainer, str | None]:
    """Return the Trainer that calls, and the checkpoint it resumes from: callbacks are told of neither."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        trainer = frame.f_locals.get("self")
        if isinstance(trainer, Trainer):
            return trainer, frame.f_locals.get("resume_from_checkpoint")
        frame = frame.f_back
    raise TypeError("GMPCallback: expected a call by a transformers.Trainer, got one by something else; pass it to one")
