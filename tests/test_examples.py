"""The examples run, and say what they promise."""

from __future__ import annotations

import runpy
import sys

import pytest
import torch
from subprocesses import ROOT, run_python

SAID = {
    "train.py": "sparsity 0.9000, ",
    "resume.py": "sparsity 0.9000; the same bits as without a stop: True",
    "recipe.py": "sparsity 0.8500 as the recipe says",
    "tensors.py": "of them newly: sparsity 0.9000",
    "weight_sparse_transformer.py": "fewest weights of a neuron: 2",
    "torchtitan_hook.py": "sparsity 0.9000 after 120 steps, weight decay {0.0}, ",
    "two_to_four.py": "sparsity 0.5000; torch takes 256 x 64 and 256 x 256 as 2:4",
}
ARGUMENTS = {"two_to_four.py": ["2"]}  # of examples that can be shorter
# The trainers' packages take long to import, and keep state of their own in the process.
SAID_WITH_TRAINERS = {
    "accelerate_loop.py": "sparsity 0.9000 after 100 steps; the same bits as without a stop: True",
    "hf_trainer.py": "loaded: sparsity 0.9000",
    "lightning_module.py": "sparsity 0.9000, ",
}


def test_every_example_is_run() -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == SAID.keys() | SAID_WITH_TRAINERS.keys()


@pytest.mark.parametrize("name", SAID)
@pytest.mark.filterwarnings("error::gmp_kernels.GMPWarning")
def test_example(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *ARGUMENTS.get(name, ())])
    with torch.random.fork_rng():  # the examples seed it
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    assert SAID[name] in capsys.readouterr().out


@pytest.mark.parametrize("name", SAID_WITH_TRAINERS)
@pytest.mark.thorough
def test_example_with_a_trainer(name: str) -> None:
    done = run_python(ROOT / "examples" / name)
    assert done.returncode == 0, done.stderr
    assert SAID_WITH_TRAINERS[name] in done.stdout
