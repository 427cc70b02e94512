"""Models on several processes: what ``distributed_jobs`` do there. Each job asserts for itself, on every rank."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from subprocesses import run_python

JOBS = Path(__file__).parent / "distributed_jobs"


def passes(ended: subprocess.CompletedProcess[str]) -> None:
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize(
    "layouts",
    [
        ("rows", "columns_and_copies"),
        pytest.param(("columns", "rows_and_columns", "columns_and_rows"), marks=pytest.mark.thorough),
        pytest.param(("rows_twice", "copies_of_rows", "copies"), marks=pytest.mark.thorough),
    ],
)
def test_masks_of_shards_are_those_of_one_process(layouts):
    passes(run_python(JOBS / "masks.py", *layouts, OMP_NUM_THREADS="1"))


@pytest.mark.parametrize(
    "layouts",
    [
        ("rows",),
        pytest.param(("columns", "columns_and_copies", "copies"), marks=pytest.mark.thorough),
        pytest.param(("rows_and_columns", "rows_twice", "copies_of_rows"), marks=pytest.mark.thorough),
    ],
)
def test_patterns_caps_and_scores_of_shards_are_those_of_one_process(layouts):
    passes(run_python(JOBS / "patterns.py", *layouts, OMP_NUM_THREADS="1"))


@pytest.mark.thorough
def test_training_of_shards_is_that_of_one_process():
    passes(run_python(JOBS / "training.py", OMP_NUM_THREADS="1"))


@pytest.mark.thorough
def test_training_under_torchrun():
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4")
    passes(run_python(*torchrun, JOBS / "training.py", "copies_of_rows", OMP_NUM_THREADS="1"))


@pytest.mark.thorough
@pytest.mark.parametrize("job", ["hf_trainer.py", "lightning_trainer.py", "accelerate_loop.py"])
def test_trainers(tmp_path, job):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    passes(run_python(*torchrun, JOBS / job, tmp_path, OMP_NUM_THREADS="1"))


@pytest.mark.thorough
def test_a_checkpoint_goes_on_on_another_number_of_ranks(tmp_path):
    passes(run_python(JOBS / "resume.py", tmp_path, OMP_NUM_THREADS="1"))


@pytest.mark.thorough
def test_the_benchmark_of_ranks_runs():
    small = ("--ranks", "2", "--layers", "2", "--rows", "64", "--columns", "64")
    passes(run_python(JOBS.parents[1] / "benchmarks" / "distributed.py", *small, OMP_NUM_THREADS="1"))


def test_what_goes_wrong_on_one_rank_all_ranks_say(tmp_path):
    passes(run_python(JOBS / "faults.py", tmp_path, OMP_NUM_THREADS="1"))
