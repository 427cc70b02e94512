"""Pruning a checkpoint in processes of their own: killed at any moment, shared by ranks, and how much memory."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from checkpoint_cases import assert_pruned, contents, load, model_tensors, write_folder
from safetensors.torch import save_file
from subprocesses import ROOT, run_python

from gmp_kernels.checkpoints import PruneJob

TESTS = Path(__file__).parent
NUM_KILLS = 50


@pytest.mark.thorough
def test_killed_at_any_moment_it_leaves_nothing_or_the_whole_and_can_be_resumed(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    write_folder(
        tmp_path / "in",
        [{f"{i}.{j}.weight": torch.randn(40, 50, generator=generator).bfloat16() for j in "ab"} for i in range(6)],
    )
    done = run_python(TESTS / "checkpoint_crashes.py", tmp_path, str(NUM_KILLS), "0", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    left = json.loads(done.stdout)
    assert sum(left.values()) >= NUM_KILLS
    # Or else the moments were not spread over the run.
    assert left["nothing"] and left["begun"], left


def torchrun(num_ranks: int, *command: str | Path) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={num_ranks}", "--standalone"]
    return run_python(*launcher, *command, OMP_NUM_THREADS="1")


def prune_on_ranks(num_ranks: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return torchrun(num_ranks, "-m", "gmp_kernels", "prune", *arguments)


@pytest.mark.parametrize(("scope", "num_ranks"), [("layer", 2), ("global", 2), ("global", 4)])
@pytest.mark.sampled(3)
def test_ranks_share_the_shards_and_agree(tmp_path: Path, scope: str, num_ranks: int) -> None:
    source = write_folder(tmp_path / "in", model_tensors(torch.bfloat16))
    done = prune_on_ranks(num_ranks, source, tmp_path / "out", "--sparsity", "0.7", "--scope", scope, "--masks")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pruned 6 tensors to a sparsity of 0.7") == 1
    job = PruneJob(source, tmp_path / "alone", sparsity=0.7, scope=scope, masks=True)
    job.run()
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    assert_pruned(source, tmp_path / "out", [t.name for t in job.tensors], sparsity=0.7, scope=scope)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "in", "out"]


SLOW_RANK = """
import os, sys, time
from pathlib import Path
from gmp_kernels.checkpoints import PruneJob
from gmp_kernels.checkpoints.staging import Staging
finished = Staging.finished
def late(self):
    time.sleep(0.5)
    return finished(self)
if os.environ["RANK"] == sys.argv[2]:
    Staging.finished = late
folder = Path(sys.argv[1])
PruneJob(folder / "in", folder / "out", sparsity=0.7).run()
"""


@pytest.mark.parametrize("slow", [0, 1])
@pytest.mark.sampled(3)
def test_a_rank_that_is_late_to_look_divides_the_shards_like_the_others(tmp_path: Path, slow: int) -> None:
    source = write_folder(tmp_path / "in", model_tensors())
    (tmp_path / "slow_rank.py").write_text(SLOW_RANK)
    done = torchrun(2, tmp_path / "slow_rank.py", tmp_path, str(slow))
    assert done.returncode == 0, done.stderr
    job = PruneJob(source, tmp_path / "alone", sparsity=0.7)
    job.run()
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


@pytest.mark.parametrize("scope", ["layer", pytest.param("global", marks=pytest.mark.thorough)])
def test_what_is_wrong_on_one_rank_ends_all(tmp_path: Path, scope: str) -> None:
    shards = model_tensors()
    shards[1]["layers.1.k.weight"][3, 3] = torch.nan
    source = write_folder(tmp_path / "in", shards)
    done = prune_on_ranks(3, source, tmp_path / "out", "--sparsity", "0.7", "--scope", scope)
    assert done.returncode != 0
    message = "gmp-kernels: prune: expected finite weights, got NaN or Inf in 'layers.1.k.weight' at flat index 93"
    assert done.stderr.count(message) == 3, done.stderr
    assert not (tmp_path / "out").exists()


MEASURE = """
import sys, torch
from pathlib import Path
from gmp_kernels.checkpoints import PruneJob
from peak_memory import peak, reset_peak
folder, scope = Path(sys.argv[1]), sys.argv[2]
PruneJob(folder / "small.safetensors", folder / "first.safetensors", sparsity=0.5).run()
reset_peak()
before = peak()
PruneJob(folder / "in.safetensors", folder / "out.safetensors", sparsity=0.9, scope=scope, masks=True).run(
    max_memory=int(sys.argv[3])
)
print(peak() - before)
"""


@pytest.mark.parametrize("num_tensors", [2, pytest.param(24, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_memory_is_what_was_allowed_whatever_the_size(tmp_path: Path, scope: str, num_tensors: int) -> None:
    allowed, size = 16 << 20, 128 << 20
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, size // num_tensors // 256, generator=generator)
    save_file({f"{i}.weight": weight.clone() for i in range(num_tensors)}, tmp_path / "in.safetensors")
    save_file({"a.weight": torch.ones(8, 8)}, tmp_path / "small.safetensors")
    done = run_python("-c", MEASURE, tmp_path, scope, str(allowed), PYTHONPATH=f"{ROOT}{os.pathsep}{TESTS}")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= allowed + (4 << 20)
    assert len(load(tmp_path / "out.safetensors")) == num_tensors
