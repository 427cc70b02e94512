"""Pruning in the Trainer of Hugging Face Transformers, the real one, on tiny models."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compared_runs import OPTIMIZERS, assert_same_bits, bits
from hf_trainers import STEPS, Stop, make_model, make_trainer
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

import gmp_kernels as gmp
from gmp_kernels.errors import GMPWarning, SparsityError, StateError
from gmp_kernels.integrations.transformers import GMPCallback

TARGETS = ["transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn.c_proj.weight"] + [
    f"transformer.h.0.mlp.{name}.weight" for name in ("c_fc", "c_proj")
]


THOROUGH = pytest.mark.thorough


def zeros(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p == 0 for name, p in model.named_parameters() if name in TARGETS}


def expected_zeros(sparsity: float) -> list[int]:
    parameters = dict(make_model().named_parameters())
    return [round(sparsity * parameters[name].numel()) for name in TARGETS]


def bits_of(trainer: Trainer, callback: GMPCallback) -> dict[str, Any]:
    return bits(trainer.model, trainer.optimizer, callback.run)


# -- a whole run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.sampled(3)
def test_a_run_ends_with_the_sparsity_asked_for(tmp_path, optimizer):
    callback = GMPCallback(0.9)
    trainer = make_trainer(tmp_path, callback, optimizer=optimizer)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    assert callback.run.finished and callback.run.step_count == STEPS
    assert not hasattr(callback, "_trainer")  # which holds the callback, and so would outlive its last user
    saved = load_file(tmp_path / "final" / "model.safetensors")
    assert [int((saved[name] == 0).sum()) for name in TARGETS] == expected_zeros(0.9)
    assert list(callback.run.pruner.masks) == TARGETS


def test_the_stages_are_fractions_of_the_run(tmp_path):
    callback = GMPCallback(0.8, initial_sparsity=0.2, stabilization=0.25, pruning=0.5, frequency=5)
    make_trainer(tmp_path, callback).train()
    found = {report.step: report.target_sparsity for report in callback.run.pruner.history}
    schedule = gmp.schedules.Cubic(0.2, 0.8, 5, 15, frequency=5)
    assert found == {step: schedule.sparsity_at(step) for step in (5, 10, 15)}


def test_accumulation_counts_optimizer_steps_also_where_an_epoch_is_no_whole_number_of_them(tmp_path):
    # 80 rows in batches of 2 are 40 batches and 14 steps of 3, the last of one batch; 20 steps are 1.4 epochs.
    callback = GMPCallback(0.9, frequency=3)
    make_trainer(tmp_path, callback, gradient_accumulation_steps=3).train()
    assert callback.run.step_count == STEPS
    assert [report.step for report in callback.run.pruner.history] == [0, 3, 6, 9, 12]


@pytest.mark.thorough
def test_epochs_give_the_length_as_well(tmp_path):
    callback = GMPCallback(0.9, frequency=10)
    make_trainer(tmp_path, callback, max_steps=-1, num_train_epochs=1).train()  # 40 steps
    assert [report.step for report in callback.run.pruner.history][-1] == callback.run.pruner.schedule.end_step == 23


@pytest.mark.parametrize("removes", [True, False])
@pytest.mark.sampled(2)
def test_weight_decay_ends_with_the_pruning_stage(tmp_path, removes):
    seen = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            seen[state.global_step] = {group["weight_decay"] for group in optimizer.param_groups}

    make_trainer(tmp_path, GMPCallback(0.9, remove_weight_decay=removes), Look(), weight_decay=0.1).train()
    assert seen[11] == {0.1, 0.0}  # the Trainer lets biases and norms decay by 0
    assert seen[12] == seen[STEPS - 1] == ({0.0} if removes else {0.1, 0.0})


def test_autocast_to_bfloat16(tmp_path):
    callback = GMPCallback(0.9)
    trainer = make_trainer(tmp_path, callback, optimizer="gmp", bf16=True)
    trainer.train()
    assert [int(found.sum()) for found in zeros(trainer.model).values()] == expected_zeros(0.9)


class Overflowing(Trainer):
    """Scales the loss as for float16, and meets an overflow in the steps 3, 4 and 11."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def training_step(self, *arguments: Any) -> torch.Tensor:
        loss = super().training_step(*arguments)
        if self.state.global_step in (3, 4, 11):
            next(self.model.parameters()).grad[0, 0] = float("inf")
        return loss


def test_steps_that_are_skipped_do_not_count(tmp_path):
    callback = GMPCallback(0.9, frequency=3)
    make_trainer(tmp_path, callback, kind=Overflowing).train()
    assert callback.run.step_count == STEPS - 3
    assert [report.step for report in callback.run.pruner.history] == [0, 3, 6, 9, 12]


# -- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [*(pytest.param(kind, marks=THOROUGH) for kind in ("torch", "gmp")), "compact"])
@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=THOROUGH), 3])
def test_a_resumed_run_has_the_bits_of_one_that_was_not_interrupted(tmp_path, optimizer, accumulation):
    arguments = {"optimizer": optimizer, "gradient_accumulation_steps": accumulation}
    whole = GMPCallback(0.9)
    first = make_trainer(tmp_path / "whole", whole, **arguments)
    first.train()
    with pytest.warns(GMPWarning, match="before the last update"):
        make_trainer(tmp_path / "parts", GMPCallback(0.9), Stop(10), **arguments).train()
    rest = GMPCallback(0.9)
    second = make_trainer(tmp_path / "parts", rest, **arguments)
    second.train(resume_from_checkpoint=True)
    assert_same_bits(bits_of(second, rest), bits_of(first, whole))


@pytest.mark.parametrize("step", [5, 15])  # within and after the pruning stage
@pytest.mark.sampled(2)
def test_a_run_resumes_from_any_folder(tmp_path, step):
    whole = GMPCallback(0.9)
    first = make_trainer(tmp_path / "whole", whole)
    first.train()
    rest = GMPCallback(0.9)
    second = make_trainer(tmp_path / "elsewhere", rest)
    moved = (tmp_path / "whole" / f"checkpoint-{step}").rename(tmp_path / "moved")
    second.train(resume_from_checkpoint=str(moved))
    assert_same_bits(bits_of(second, rest), bits_of(first, whole))


@pytest.mark.thorough
def test_a_longer_run_keeps_the_schedule_it_began_with(tmp_path):
    make_trainer(tmp_path, GMPCallback(0.9), max_steps=STEPS).train()
    callback = GMPCallback(0.9)
    trainer = make_trainer(tmp_path, callback, max_steps=STEPS + 8)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert callback.run.step_count == STEPS + 8 and callback.run.pruner.schedule.end_step == 12
    assert [int(found.sum()) for found in zeros(trainer.model).values()] == expected_zeros(0.9)


@pytest.mark.thorough
def test_checkpoints_without_the_optimizer_resume_the_masks(tmp_path):
    make_trainer(tmp_path, GMPCallback(0.9), save_only_model=True).train()
    callback = GMPCallback(0.9)
    trainer = make_trainer(tmp_path, callback, save_only_model=True)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert callback.run.step_count == STEPS
    assert [int(found.sum()) for found in zeros(trainer.model).values()] == expected_zeros(0.9)


@pytest.mark.thorough
def test_the_masks_are_rotated_with_their_checkpoints(tmp_path):
    make_trainer(tmp_path, GMPCallback(0.9), save_total_limit=2).train()
    assert sorted(path.parent.name for path in tmp_path.rglob("pruning.pt")) == ["checkpoint-15", "checkpoint-20"]


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    make_trainer(tmp_path).train()
    with pytest.raises(StateError, match="saved without this callback"):
        make_trainer(tmp_path, GMPCallback(0.9)).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("damage", [b"PK", {"step": 3}])
def test_a_damaged_file_is_refused(tmp_path, damage):
    make_trainer(tmp_path, GMPCallback(0.9), max_steps=5).train()
    file = tmp_path / "checkpoint-5" / "pruning.pt"
    file.write_bytes(damage) if isinstance(damage, bytes) else torch.save(damage, file)
    with pytest.raises(StateError, match=r"this callback has saved in .*; resume from another checkpoint"):
        make_trainer(tmp_path, GMPCallback(0.9)).train(resume_from_checkpoint=True)


def test_callbacks_for_different_targets_resume_together(tmp_path):
    def callbacks() -> list[GMPCallback]:
        return [GMPCallback(0.9, targets="*.attn"), GMPCallback(0.5, targets="*.mlp")]

    whole, rest = callbacks(), callbacks()
    first = make_trainer(tmp_path / "whole", *whole)
    first.train()
    second = make_trainer(tmp_path / "rest", *rest)
    second.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-10"))
    for one, other in zip(whole, rest, strict=True):
        assert_same_bits(bits_of(second, other), bits_of(first, one))
    expected = [*expected_zeros(0.9)[:2], *expected_zeros(0.5)[2:]]
    assert [int(found.sum()) for found in zeros(second.model).values()] == expected


# -- the best model --------------------------------------------------------------------------------------------------


class Scored(Trainer):
    """Evaluates to the scores that it is given by step."""

    scores: dict[int, float]

    def evaluate(self, *arguments: Any, **others: Any) -> dict[str, float]:
        return super().evaluate(*arguments, **others) | {"eval_score": self.scores[self.state.global_step]}


def best_of(
    folder: Path,
    callback: GMPCallback,
    scores: dict[int, float],
    *others: TrainerCallback,
    save_strategy: str = "steps",
) -> Trainer:
    trainer = make_trainer(
        folder,
        callback,
        *others,
        kind=Scored,
        save_strategy=save_strategy,
        eval_strategy="steps",
        eval_steps=5,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    trainer.scores = scores
    trainer.train()
    return trainer


@pytest.mark.parametrize(("save_strategy", "saved_at"), [("steps", [5, 10, 15, 20]), ("best", [5, 15])])
def test_the_best_model_is_one_of_the_final_sparsity(tmp_path, save_strategy, saved_at):
    callback = GMPCallback(0.9)
    scores = {5: 0.99, 10: 0.98, 15: 0.7, 20: 0.6}
    trainer = best_of(tmp_path, callback, scores, save_strategy=save_strategy)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in saved_at}
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-15" and trainer.state.best_metric == 0.7
    saved = load_file(tmp_path / "checkpoint-15" / "model.safetensors")
    assert_same_bits(dict(trainer.model.named_parameters()), saved)
    assert list(callback.run.pruner.verify().values()) == expected_zeros(0.9)


@pytest.mark.thorough
def test_the_best_model_of_a_run_that_ends_early_has_its_own_masks(tmp_path):
    callback = GMPCallback(0.9)
    with pytest.warns(GMPWarning, match="before the last update"):
        trainer = best_of(tmp_path, callback, {5: 0.99, 10: 0.98}, Stop(10))
    sparsity = gmp.schedules.Cubic(0.05, 0.9, 0, 12, frequency=1).sparsity_at(4)
    assert list(callback.run.pruner.verify().values()) == expected_zeros(sparsity)
    saved = load_file(tmp_path / "checkpoint-5" / "model.safetensors")
    assert_same_bits(dict(trainer.model.named_parameters()), saved)


# -- several calls, other settings, logs -----------------------------------------------------------------------------


def test_a_second_call_of_train_keeps_what_is_pruned_and_decays_anew(tmp_path):
    decays = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            decays.append([group["weight_decay"] for group in optimizer.param_groups])

    callback = GMPCallback(0.9)
    trainer = make_trainer(tmp_path, callback, Look(), weight_decay=0.1)
    trainer.train()
    first, before = callback.run, zeros(trainer.model)
    trainer.train()
    assert callback.run is not first and callback.run.step_count == STEPS
    assert_same_bits(zeros(trainer.model), before)
    assert decays == [[0.1, 0.0]] * 12 + [[0.0, 0.0]] * 8 + [[0.1, 0.0]] * 12 + [[0.0, 0.0]] * 8


def test_what_is_logged_reaches_every_logger(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen, counted = [], {}

    class Record(TrainerCallback):
        def on_log(self, args, state, control, logs=None, model=None, **kwargs):
            seen.append({"step": state.global_step, **logs})
            pruned = zeros(model)
            shares = {f"sparsity/{name}": found.double().mean().item() for name, found in pruned.items()}
            whole = torch.cat([found.flatten() for found in pruned.values()]).double().mean().item()
            counted[state.global_step] = {"sparsity/global": whole, **shares}

    arguments = {"report_to": ["tensorboard"], "logging_steps": 2}
    trainer = make_trainer(tmp_path, Record(), GMPCallback(0.9, frequency=3), **arguments)
    trainer.train()
    (file,) = tmp_path.rglob("events.out.*")
    events = EventAccumulator(str(file))
    events.Reload()
    steps = {name: [4, 10, 13] for name in counted[1]}  # the last update, and those at steps that the Trainer logs
    steps["sparsity/global"] = [1, 4, 7, 10, 13]
    for name, updates in steps.items():
        expected = [(step, pytest.approx(counted[step][name])) for step in updates]
        for entries in (seen, trainer.state.log_history):
            assert [(entry["step"], entry[name]) for entry in entries if name in entry] == expected
        assert [(event.step, event.value) for event in events.Scalars(f"train/{name}")] == expected
    for entries in (seen, trainer.state.log_history):
        # The Trainer's own figures are there as well, also those of steps in which both are logged.
        assert [entry["step"] for entry in entries if "loss" in entry] == list(range(2, STEPS + 1, 2))
    json.dumps(trainer.state.log_history)


def test_arguments_are_checked_before_training():
    with pytest.raises(SparsityError):
        GMPCallback(1.5)
    with pytest.raises(gmp.ScheduleError, match="final_sparsity"):
        GMPCallback(0.01)
    for frequency in (0, 0.5, -1):
        with pytest.raises(gmp.ScheduleError, match="GMPCallback: frequency: expected a whole number >= 1"):
            GMPCallback(0.9, frequency=frequency)
    with pytest.raises(gmp.ScheduleError, match="fractions"):
        GMPCallback(0.9, stabilization=1, pruning=34)
    with pytest.raises(TypeError, match="target"):
        GMPCallback(0.9, target="head")


@pytest.mark.thorough
def test_arguments_of_the_scheduler_are_passed_on(tmp_path):
    callback = GMPCallback(0.9, targets="transformer.h.0.mlp", overrides={"*c_fc*": 0.5})
    make_trainer(tmp_path, callback).train()
    assert {name[16:]: round(found, 2) for name, found in callback.run.pruner.layer_sparsities().items()} == {
        "mlp.c_fc.weight": 0.5,
        "mlp.c_proj.weight": 0.9,
    }


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, GMPCallback.__module__)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'gmp-kernels\[transformers\]'"):
        importlib.import_module(GMPCallback.__module__)


def test_before_training_there_is_no_run():
    with pytest.raises(StateError, match="train first"):
        _ = GMPCallback(0.9).run
