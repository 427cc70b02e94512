"""The examples run, and say what they promise."""

from __future__ import annotations

import pytest
from subprocesses import ROOT, run_python

SAID = {
    "accelerate_loop.py": "sparsity 0.9000 after 100 steps; the same bits as without a stop: True",
    "torchtitan_hook.py": "sparsity 0.9000 after 120 steps, weight decay {0.0}, ",
    "lightning_module.py": "sparsity 0.9000, ",
    "hf_trainer.py": "loaded: sparsity 0.9000",
    "train.py": "sparsity 0.9000, ",
    "resume.py": "sparsity 0.9000; the same bits as without a stop: True",
    "recipe.py": "sparsity 0.8500 as the recipe says",
    "tensors.py": "of them newly: sparsity 0.9000",
}


SLOW = {"accelerate_loop.py", "hf_trainer.py", "lightning_module.py"}  # to import what they need


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(path.name, marks=pytest.mark.thorough if path.name in SLOW else ())
        for path in sorted((ROOT / "examples").glob("*.py"))
    ],
)
def test_example(name: str) -> None:
    done = run_python(ROOT / "examples" / name)
    assert done.returncode == 0, done.stderr
    assert SAID[name] in done.stdout
