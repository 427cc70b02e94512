"""The command `gmp-kernels prune`: its words, what it prints, and its exit codes."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from checkpoint_cases import INDEX, assert_pruned, contents, load, write_folder
from rich.console import Console
from safetensors.torch import save_file
from subprocesses import run_python
from typer.testing import CliRunner

from gmp_kernels.checkpoints import PruneJob
from gmp_kernels.tools.cli import checkpoints as cli_checkpoints
from gmp_kernels.tools.cli import main as cli

RUNNER = CliRunner(env={"COLUMNS": "160"})
TARGETS = [f"layers.{i}.{name}.weight" for i in range(3) for name in ("k", "q")]


def run(*arguments: str | Path) -> str:
    result = RUNNER.invoke(cli.app, ["prune", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def test_every_option_reaches_the_job(tmp_path: Path) -> None:
    source, target = write_folder(tmp_path / "in"), tmp_path / "out"
    output = run(source, target, "--sparsity", "0.25", "--scope", "global", "--ignore", "layers.1", "--targets", "*.q")
    assert "pruned 2 tensors to a sparsity of 0.2500, copied 10 others" in output
    assert output.rstrip().endswith(f"wrote {target}")
    assert_pruned(source, target, ["layers.0.q.weight", "layers.2.q.weight"], sparsity=0.25, scope="global")
    run(source, target, "--sparsity", "0.5", "--force", "--dtype", "bfloat16", "--masks", "--max-memory", "8")
    assert {str(load(target)[name].dtype) for name in TARGETS} == {"torch.bfloat16"}
    assert len(list((target / "masks").iterdir())) == 3


def test_what_is_kept_where_masks_would_lie_is_named(tmp_path: Path) -> None:
    source, target, beside = (tmp_path / f"{name}.safetensors" for name in ("in", "out", "out.masks"))
    save_file({"a.weight": torch.randn(4, 4)}, source)
    run(source, target, "--sparsity", "0.5", "--masks")
    assert str(beside) not in run(source, target, "--sparsity", "0.5", "--force") and not beside.exists()
    beside.write_text("dear")
    output = run(source, target, "--sparsity", "0.5", "--force")
    assert f"kept {beside}, which holds no masks of the new output" in output.splitlines()


def test_a_dry_run_checks_everything_and_writes_nothing(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in")
    output = run(source, tmp_path / "out", "--sparsity", "0.5", "--dry-run")
    lines = [line.split() for line in output.splitlines()]
    assert ["layers.1.q.weight", "F32", "21x30", "630", "315"] in lines
    assert "would prune 1890 of 3780 weights in 6 tensors and copy 6 as they are" in output
    output = run(source, tmp_path / "out", "--sparsity", "0.5", "--dry-run", "--scope", "global")
    assert "num_prune" not in output and "would prune 1890 of 3780 weights" in output
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    (source / INDEX).write_text("{}")
    assert RUNNER.invoke(cli.app, ["prune", str(source), "out", "--sparsity", "0.5", "--dry-run"]).exit_code == 1


def test_without_a_terminal_there_is_no_bar_and_with_one_there_is(tmp_path: Path) -> None:
    for is_terminal in (False, True):
        out = io.StringIO()
        console = Console(file=out, force_terminal=is_terminal, width=100)
        with cli_checkpoints._progress(console, "pruning") as advance:
            advance(1 << 20, 1 << 22)
        assert ("pruning" in out.getvalue() and "25%" in out.getvalue()) is is_terminal


def test_an_error_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in")
    done = run_python("-m", "gmp_kernels", "prune", source, source / "out", "--sparsity", "0.5")
    assert done.returncode == 1
    assert done.stderr.startswith(f"gmp-kernels: {source}/out: expected an output apart from the input")
    assert done.stderr.count("\n") == 1
    done = run_python("-m", "gmp_kernels", "prune", source)
    assert done.returncode == 2


INTERRUPT = """
import os, signal, sys
from gmp_kernels.tools.cli.main import main
from gmp_kernels.checkpoints import staging
# Whoever runs the tests in the background may have had it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
finish = staging.Staging.finish
def press(*arguments):
    finish(*arguments)
    os.kill(os.getpid(), signal.SIGINT)
staging.Staging.finish = press
main()
"""


def test_ctrl_c_keeps_what_is_finished_and_says_so(tmp_path: Path) -> None:
    source, target = write_folder(tmp_path / "in"), tmp_path / "out"
    done = run_python("-c", INTERRUPT, "prune", source, target, "--sparsity", "0.5")
    assert done.returncode == 130
    assert "--resume goes on from there" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", "in"]
    run(source, target, "--sparsity", "0.5", "--resume")
    PruneJob(source, tmp_path / "whole", sparsity=0.5).run()
    assert contents(target) == contents(tmp_path / "whole")
