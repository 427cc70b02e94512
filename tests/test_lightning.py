"""Pruning in the Trainer of Lightning, the real one, on tiny models."""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compared_runs import OPTIMIZERS, assert_same_bits, bits, make_optimizer
from lightning_trainers import BATCHES, EPOCHS, STEPS, Manual, Module, fit
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import gmp_kernels as gmp
from gmp_kernels.errors import GMPWarning, ScheduleError, StateError, TargetError
from gmp_kernels.integrations.lightning import GMPCallback

THOROUGH = pytest.mark.thorough


class Adversaries(Module):
    """Two networks, each with an optimizer of its own, which step in turns."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.critic = nn.Linear(8, 8)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            loss = self.loss(batch_idx) + self.critic(torch.ones(8)).square().mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return make_optimizer("torch", self.net.parameters()), make_optimizer("gmp", self.critic.parameters())


def num_zeros(module: Module) -> list[int]:
    return [int((module.net[i].weight == 0).sum()) for i in (0, 2)]


def expected_zeros(sparsity: float) -> list[int]:
    return [round(sparsity * n) for n in (512, 256)]


def bits_of(trainer: Trainer, callback: GMPCallback, optimizer: int = 0) -> dict[str, Any]:
    return bits(trainer.lightning_module, trainer.optimizers[optimizer], callback.run)


# -- a whole run ---------------------------------------------------------------------------------------------------


class Clipping(Module):
    """Clips by itself, since Lightning's mixed precision clips for no optimizer that can take a GradScaler's scale."""

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any, gradient_clip_algorithm: Any) -> None:
        gmp.optim.clip_grad_norm_(self.parameters(), gradient_clip_val)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("precision", "kind"), [("32", Module), ("bf16-mixed", Clipping)])
def test_a_run_ends_with_the_sparsity_asked_for(tmp_path, optimizer, precision, kind):
    callback, module = GMPCallback(0.9), kind(optimizer)
    fit(tmp_path, callback, module, precision=precision, gradient_clip_val=0.5)
    assert callback.run.finished and callback.run.step_count == STEPS
    assert num_zeros(module) == expected_zeros(0.9)


def test_accumulation_counts_optimizer_steps(tmp_path):
    # 5 batches are 3 steps of up to 2, so 4 epochs are 12.
    callback = GMPCallback(0.8, stabilization=1 / 6, pruning=1 / 2, frequency=3)
    fit(tmp_path, callback, Module(), accumulate_grad_batches=2)
    assert callback.run.step_count == 12
    assert [report.step for report in callback.run.pruner.history] == [2, 5, 8]


def test_manual_optimization_counts_the_steps_of_the_module(tmp_path):
    callback, module = GMPCallback(0.8, frequency=3, pruning=0.5), Manual("gmp")
    fit(tmp_path, callback, module)
    assert callback.run.step_count == 12
    assert [report.step for report in callback.run.pruner.history] == [0, 3, 6, 9, 10]
    assert num_zeros(module) == expected_zeros(0.8)


def test_max_steps_gives_the_length_as_well(tmp_path):
    callback = GMPCallback(0.9, frequency=3)
    fit(tmp_path, callback, Module(), max_epochs=-1, max_steps=12)
    assert callback.run.step_count == 12 and callback.run.pruner.schedule.end_step == 7


@pytest.mark.parametrize("removes", [True, False])
def test_weight_decay_ends_with_the_pruning_stage(tmp_path, removes):
    seen = []

    class Look(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen.append(optimizer.param_groups[0]["weight_decay"])

    fit(tmp_path, [GMPCallback(0.9, remove_weight_decay=removes), Look()], Module())
    assert seen == [0.1] * 12 + [0.0 if removes else 0.1] * (STEPS - 12)


class Overflowing(Module):
    """Meets an overflow in the last batch of every epoch."""

    def on_after_backward(self) -> None:
        if self.trainer.is_last_batch:
            next(self.parameters()).grad[0, 0] = float("inf")


@pytest.mark.parametrize("optimizer", ["torch", "gmp"])  # skipped by the scaler, and by the optimizer itself
def test_steps_that_are_skipped_do_not_count(tmp_path, optimizer):
    callback, module = GMPCallback(0.9, frequency=3), Overflowing(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    fit(tmp_path, callback, module, plugins=MixedPrecision("16-mixed", "cpu", scaler))
    assert callback.run.step_count == STEPS - EPOCHS
    assert [report.step for report in callback.run.pruner.history] == [0, 3, 6, 9, 12]
    assert num_zeros(module) == expected_zeros(0.9)


def test_a_run_that_ends_early_says_so(tmp_path):
    callback = GMPCallback(0.9, pruning=0.9)
    with pytest.warns(GMPWarning, match=r"after 12 optimizer steps, before the last update at step 18"):
        fit(tmp_path, callback, Manual())


def test_a_run_whose_length_is_unknown_is_refused(tmp_path):
    with pytest.raises(ScheduleError, match="set max_steps"):
        fit(tmp_path, GMPCallback(0.9), Endless(), max_epochs=1)


class Endless(Module):
    class Numbers(IterableDataset):
        def __iter__(self):
            return iter(range(BATCHES))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.Numbers())


# -- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "accumulation"), [(Module, 1), (Module, 2), (Manual, 1)])
@pytest.mark.parametrize("optimizer", [*(pytest.param(kind, marks=THOROUGH) for kind in ("torch", "gmp")), "compact"])
@pytest.mark.parametrize("step", [5, 7])  # for a Module that accumulates nothing: at the end of an epoch and within one
def test_a_resumed_run_has_the_bits_of_one_that_was_not_interrupted(tmp_path, kind, accumulation, optimizer, step):
    arguments = {"accumulate_grad_batches": accumulation}
    whole = GMPCallback(0.9, pruning=0.5)
    keeper = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=step, save_top_k=-1)
    first = fit(tmp_path, [keeper, whole], kind(optimizer), enable_checkpointing=True, **arguments)
    rest = GMPCallback(0.9, pruning=0.5)
    arguments |= {"ckpt_path": tmp_path / f"step={step}.ckpt", "weights_only": True}
    second = fit(tmp_path, rest, kind(optimizer), **arguments)
    assert second.global_step == first.global_step and 0 < rest.run.step_count == whole.run.step_count
    assert_same_bits(bits_of(second, rest), bits_of(first, whole))


class SaveBefore(Callback):
    """Saves a checkpoint after an optimizer step, before the callbacks that follow hear of it."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("optimizer", ["torch", "compact"])
def test_a_run_resumed_from_a_checkpoint_saved_before_the_update_of_its_step_makes_it(tmp_path, optimizer):
    whole, rest = GMPCallback(0.9), GMPCallback(0.9)
    first = fit(tmp_path, [SaveBefore(tmp_path / "early.ckpt", 7), whole], Module(optimizer))
    second = fit(tmp_path, rest, Module(optimizer), ckpt_path=tmp_path / "early.ckpt")
    assert rest.run.step_count == whole.run.step_count == STEPS
    assert_same_bits(bits_of(second, rest), bits_of(first, whole))


def test_a_damaged_state_is_refused(tmp_path):
    fit(tmp_path, GMPCallback(0.9), Module(), max_epochs=2).save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt")
    checkpoint["callbacks"]["GMPCallback"] = {"step": 3}
    torch.save(checkpoint, tmp_path / "last.ckpt")
    with pytest.raises(StateError, match=r"has saved in the checkpoint, got \['step'\]"):
        fit(tmp_path, GMPCallback(0.9), Module(), ckpt_path=tmp_path / "last.ckpt")


@pytest.mark.parametrize("is_first", [True, False])
def test_an_average_that_lightning_writes_to_the_model_is_as_sparse(tmp_path, is_first):
    callback, module = GMPCallback(0.9), Module()
    averaging = EMAWeightAveraging(decay=0.9)
    keeper = ModelCheckpoint(tmp_path, "last")
    callbacks = [averaging, callback] if is_first else [callback, averaging]
    trainer = fit(tmp_path, [*callbacks, keeper], module, enable_checkpointing=True)
    assert num_zeros(module) == expected_zeros(0.9)
    weights = torch.load(tmp_path / "last.ckpt")["state_dict"]
    assert [int((weights[f"net.{i}.weight"] == 0).sum()) for i in (0, 2)] == expected_zeros(0.9)
    average = trainer.callbacks[callbacks.index(averaging)]._average_model.module
    assert_same_bits(dict(module.named_parameters()), dict(average.named_parameters()))


def test_weights_that_are_averaged_at_the_end_are_pruned_again(tmp_path):
    module = Module()
    with pytest.warns(GMPWarning, match="have been set to zero again"):
        fit(tmp_path, [GMPCallback(0.9), StochasticWeightAveraging(0.01, swa_epoch_start=1)], module)
    assert num_zeros(module) == expected_zeros(0.9)


def test_a_longer_run_keeps_the_schedule_it_began_with(tmp_path):
    keeper = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1)
    fit(tmp_path, [keeper, GMPCallback(0.9)], Module(), enable_checkpointing=True)
    callback = GMPCallback(0.9)
    fit(tmp_path, callback, Module(), ckpt_path=tmp_path / "step=5.ckpt", max_epochs=EPOCHS + 2)
    assert callback.run.step_count == STEPS + 2 * BATCHES and callback.run.pruner.schedule.end_step == 12


def test_a_checkpoint_of_dense_training_begins_a_run_of_the_steps_that_are_left(tmp_path):
    fit(tmp_path, [], Module(), max_epochs=2).save_checkpoint(tmp_path / "dense.ckpt")
    callback, module = GMPCallback(0.9), Module()
    fit(tmp_path, callback, module, ckpt_path=tmp_path / "dense.ckpt")
    assert callback.run.step_count == STEPS - 2 * BATCHES and callback.run.pruner.schedule.end_step == 6
    assert num_zeros(module) == expected_zeros(0.9)


def test_a_second_call_of_fit_keeps_what_is_pruned(tmp_path):
    callback, module = GMPCallback(0.9), Module("gmp")
    trainer = fit(tmp_path, callback, module)
    before = [module.net[i].weight == 0 for i in (0, 2)]
    trainer.validate(Evaluated(), DataLoader(range(1)), verbose=False)
    trainer.fit_loop.max_epochs = 2 * EPOCHS
    trainer.fit(module)
    assert callback.run.step_count == STEPS and callback.run.finished
    assert all(torch.equal(was, module.net[i].weight == 0) for was, i in zip(before, (0, 2), strict=True))


class Evaluated(Module):
    def validation_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.loss(batch_idx)


# -- several optimizers, logs ----------------------------------------------------------------------------------------


def test_of_several_optimizers_it_follows_that_of_the_targets(tmp_path):
    for targets, number, sizes in (("net", 0, [512, 256]), ("critic", 1, [64])):
        callback = GMPCallback(0.5, targets=targets)
        trainer = fit(tmp_path, callback, Adversaries())
        assert callback.run.pruner.optimizer is trainer.optimizers[number]
        assert callback.run.step_count == STEPS
        assert list(callback.run.pruner.verify().values()) == [n // 2 for n in sizes]
    with pytest.raises(TargetError, match=r"'net.*' in number 0, 'critic.weight' in number 1; restrict"):
        fit(tmp_path, GMPCallback(0.5), Adversaries())


def test_every_optimizer_may_have_a_callback_of_its_own(tmp_path):
    def callbacks() -> list[Callback]:
        return [GMPCallback(0.5, targets="net"), GMPCallback(0.75, targets="critic")]

    whole, parts = callbacks(), callbacks()
    keeper = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=10, save_top_k=-1)
    first = fit(tmp_path, [keeper, *whole], Adversaries(), enable_checkpointing=True)
    second = fit(tmp_path, parts, Adversaries(), ckpt_path=tmp_path / "step=10.ckpt")
    assert [callback.run.sparsity for callback in parts] == [0.5, 0.75]
    for i, (before, after) in enumerate(zip(whole, parts, strict=True)):
        assert_same_bits(bits_of(second, after, i), bits_of(first, before, i))


def test_what_is_logged_reaches_every_logger(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = [CSVLogger(tmp_path, version=0), TensorBoardLogger(tmp_path, version=1)]
    counted = {}

    class Count(Callback):
        def on_train_batch_end(self, trainer, pl_module, *arguments):
            first, second = num_zeros(pl_module)
            shares = {"global": (first + second) / 768, "net.0.weight": first / 512, "net.2.weight": second / 256}
            counted[trainer.global_step] = {f"sparsity/{name}": share for name, share in shares.items()}

    trainer = fit(tmp_path, [GMPCallback(0.9, frequency=3), Count()], Module(), logger=loggers)
    events = EventAccumulator(loggers[1].log_dir)
    events.Reload()
    rows = list(csv.DictReader((Path(loggers[0].log_dir) / "metrics.csv").read_text().splitlines()))
    for name in counted[1]:
        expected = [(step, pytest.approx(counted[step][name])) for step in (1, 4, 7, 10, 13)]
        assert [(event.step, event.value) for event in events.Scalars(name)] == expected
        assert [(int(row["step"]), float(row[name])) for row in rows if row[name]] == expected
        assert trainer.callback_metrics[name].item() == expected[-1][1]
    assert len(events.Scalars("loss")) == sum(bool(row["loss"]) for row in rows) == STEPS


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, GMPCallback.__module__)
    monkeypatch.setitem(sys.modules, "lightning", None)
    module = importlib.import_module(GMPCallback.__module__)
    assert issubclass(module.GMPCallback, Callback)  # that of pytorch_lightning
    monkeypatch.delitem(sys.modules, GMPCallback.__module__)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'gmp-kernels\[lightning\]'"):
        importlib.import_module(GMPCallback.__module__)
