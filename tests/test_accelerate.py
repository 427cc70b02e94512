"""Pruning in loops of Hugging Face Accelerate, the real one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate_loops import ACCUMULATION, BATCHES, Loop
from compared_runs import OPTIMIZERS, assert_same_bits


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_before_or_after_prepare_is_the_same(optimizer, precision):
    loops = [Loop(optimizer, attaches, precision=precision) for attaches in ("before", "after")]
    for loop in loops:
        loop.train()
        assert loop.run.step_count == BATCHES // ACCUMULATION
        assert loop.run.pruner._held.progress.position.num_calls == BATCHES
        assert list(loop.run.pruner.verify().values()) == [round(0.9 * 512), round(0.9 * 256)]
        # The learning rate of a run of 16 steps, with two drops to a tenth of it in fine-tuning.
        assert loop.optimizer.param_groups[0]["lr"] == pytest.approx(0.0001)
        assert loop.optimizer.param_groups[0]["weight_decay"] == 0.0
    assert_same_bits(loops[0].bits(), loops[1].bits())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("attaches", ["before", "after"])
@pytest.mark.parametrize("stop", [12, 26])  # within and after the pruning stage
def test_a_resumed_run_has_the_bits_of_one_that_was_not_interrupted(tmp_path, optimizer, attaches, stop):
    whole = Loop(optimizer, attaches)
    whole.train()
    stopped = Loop(optimizer, attaches)
    stopped.train(end=stop)
    stopped.accelerator.save_state(str(tmp_path))
    resumed = Loop(optimizer, attaches)
    resumed.accelerator.load_state(str(tmp_path))
    resumed.train(begin=stop)
    assert_same_bits(resumed.bits(), whole.bits())


@pytest.mark.parametrize("attaches", ["before", "after"])
def test_steps_that_are_skipped_do_not_count(attaches):
    loop = Loop("torch", attaches, scaler=torch.amp.GradScaler("cpu", init_scale=4.0))
    loop.train(overflows=(5, 11, 24))
    assert loop.run.step_count == BATCHES // ACCUMULATION - 3
    assert [report.step for report in loop.run.pruner.history][-1] == 9
    loop.run.pruner.verify()


def test_what_is_saved_is_exactly_sparse(tmp_path: Path):
    from safetensors.torch import load_file

    loop = Loop("gmp", "after")
    loop.train()
    loop.accelerator.save_model(loop.model, str(tmp_path))
    saved = load_file(tmp_path / "model.safetensors")
    assert [int((saved[name] == 0).sum()) for name in ("0.weight", "2.weight")] == [round(0.9 * 512), round(0.9 * 256)]
