"""Pruning in the Trainer of Lightning, whichever of its two names it is installed under."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from gmp_kernels.errors import ScheduleError, TargetError
from gmp_kernels.integrations.callbacks import PruningCallback
from gmp_kernels.integrations.ema import keep_masked
from gmp_kernels.model.targets import ParameterIndex

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError:
    try:
        from pytorch_lightning import Callback, LightningModule, Trainer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"gmp_kernels.integrations.lightning needs {error.name}; pip install 'gmp-kernels[lightning]'",
            name=error.name,
        ) from error

__all__ = ["GMPCallback"]


class GMPCallback(PruningCallback, Callback):
    """Prunes gradually in a Lightning ``Trainer``: pass ``callbacks=[GMPCallback(0.9)]``.

    Prunes after batches in which the optimizer has stepped, under automatic and manual optimization. Of several
    optimizers it follows the one that steps the targets. Checkpoints hold its state, from which a resumed run continues
    bit for bit; a checkpoint of training without it starts a new run, as long as the steps that are left. Every update
    logs ``sparsity/global`` and ``sparsity/<layer>`` to the trainer's loggers and ``callback_metrics``. Averages of the
    weights that Lightning's own callbacks keep are as sparse as the weights.

    Arguments, errors and warnings are those of ``PruningCallback``. When training starts, it also raises ScheduleError
    if the trainer knows no number of steps, and TargetError if no optimizer steps all targets.
    """

    _loaded: dict[str, Any] | None = None
    _seen = 0  # optimizer steps at the latest call of run.step()

    @property
    def state_key(self) -> str:
        """The name of this callback's state in checkpoints, another one for other targets."""
        targets = self._options.get("targets")
        return "GMPCallback" if targets is None else f"GMPCallback of {targets}"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._loaded = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict

    def state_dict(self) -> dict[str, Any]:
        return {} if self._run is None else self._state()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        steps = trainer.estimated_stepping_batches
        if not 0 < steps < math.inf:
            raise ScheduleError(
                "GMPCallback: expected a Trainer that knows its number of optimizer steps, got one that does not; set "
                "max_steps, or max_epochs with a data set that has a length"
            )
        optimizer = _optimizer_of_targets(trainer.optimizers, pl_module, self._options)
        self._begin(trainer.model, optimizer, max(1, int(steps) - trainer.global_step), self._loaded)
        self._seen = trainer.global_step
        for callback in trainer.callbacks:
            average = getattr(callback, "_average_model", None)
            if isinstance(average, AveragedModel):
                keep_masked(average, self.run)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._seen:
            return  # a micro-batch
        self._seen = trainer.global_step
        if self.run.step():
            figures = self._figures()
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in figures.items()})
            for logger in trainer.loggers:
                logger.log_metrics(figures, step=trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Callbacks that average weights have written the average to the model by now.
        if self._run is not None and not self._run.pruner._held.is_released:
            self._run.pruner._held.check()


def _optimizer_of_targets(
    optimizers: list[torch.optim.Optimizer], model: nn.Module, options: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """Return the optimizer that steps all targets, as far as any does."""
    if len(optimizers) == 1:
        return optimizers[0]
    targets, _ = ParameterIndex(model).select(options.get("targets"), options.get("ignore"))
    held = [{p for group in optimizer.param_groups for p in group["params"]} for optimizer in optimizers]
    stepped = {name: [i for i, owned in enumerate(held) if p in owned] for name, p in targets.items()}
    owners = {i: name for name, found in stepped.items() for i in found}
    if len(owners) != 1:
        shown = ", ".join(f"'{name}' in number {i}" for i, name in sorted(owners.items())) or "none in any"
        raise TargetError(
            f"GMPCallback: expected one of the {len(optimizers)} optimizers to step all targets, got {shown}; restrict "
            "targets= to the parameters of one optimizer, such as the name of a module"
        )
    return optimizers[next(iter(owners))]
