"""The command line: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_cases import write_folder
from matplotlib.figure import Figure
from picture_cases import title_of
from subprocesses import ROOT, run_python
from typer.testing import CliRunner

from gmp_kernels import __version__, backends
from gmp_kernels.checkpoints import PruneJob
from gmp_kernels.tools.cli import main as cli
from gmp_kernels.tools.presets import PRESETS

SMALL = ["--stabilization", "1", "--pruning", "2", "--finetuning", "2", "--steps-per-epoch", "4", "--layer", "8x16"]

# A width of its own, so that no line wraps where the terminal of whoever runs this is narrow.
RUNNER = CliRunner(env={"COLUMNS": "120"})


def run(*args: str) -> str:
    result = RUNNER.invoke(cli.app, list(args))
    assert result.exit_code == 0, result.output
    return result.output


def lines(output: str) -> list[list[str]]:
    return [line.split() for line in output.splitlines()]


def test_info_names_the_versions_and_every_backend() -> None:
    output = run("info")
    assert f"gmp-kernels {__version__}, torch {torch.__version__}" in output
    shown = {line[0] for line in lines(output) if line}
    # The one that runs CUDA kernels on the host is for tests.
    assert "simt" not in shown
    assert {backend.name for backend in backends.available()} - {"simt"} <= shown
    assert ["reference", "0", "usable"] in lines(output)


def test_info_says_why_a_backend_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = next(backend for backend in backends.available() if backend.name == "reference")
    broken = backends.Backend("broken", 7, lambda: "pip install 'it[all]'", reference.supports, reference.load)
    monkeypatch.setattr(backends, "available", lambda: (broken,))
    assert ["broken", "7", "pip", "install", "'it[all]'"] in lines(run("info"))


def test_plan_of_the_presets() -> None:
    blog = lines(run("plan"))
    assert ["1", "5005", "pruning", "0.0500", "1275144", "0.01", "0.0001"] in blog
    assert "source: M. Kurtz" in " ".join(map(" ".join, blog)) and "source" not in run("plan", *SMALL)
    assert ["60", "300300", "fine-tuning", "0.9000", "22952623", "0.0001", "0"] in blog
    resnet50 = lines(run("plan", "resnet50"))
    assert ["43", "215215", "fine-tuning", "0.8500", "21677473", "0.001", "0"] in resnet50


def test_plan_of_own_numbers() -> None:
    output = lines(run("plan", *SMALL, "--initial-sparsity", "0.25", "--final-sparsity", "0.5"))
    assert [line for line in output if line and line[0].isdigit()] == [
        ["0", "0", "stabilization", "0.0000", "0", "0.01", "0.0001"],
        ["1", "4", "pruning", "0.2500", "32", "0.01", "0.0001"],
        ["2", "8", "pruning", "0.4688", "60", "0.01", "0.0001"],
        ["3", "12", "fine-tuning", "0.5000", "64", "0.01", "0"],
        ["4", "16", "fine-tuning", "0.5000", "64", "0.001", "0"],
        ["5", "20", "fine-tuning", "0.5000", "64", "0.0001", "0"],
    ]


def test_plan_layer_by_layer() -> None:
    output = lines(run("plan", *SMALL, "--layer", "10x10x3", "--per-layer"))
    assert ["layer0", "8x16", "6", "115", "0.8984"] in output
    assert ["layer1", "10x10x3", "15", "270", "0.9000"] in output
    # The densities of erk are as 24/128 to 23/300; round(0.1 * 428) = 43 weights are kept.
    output = lines(run("plan", *SMALL, "--layer", "10x10x3", "--per-layer", "--distribution", "erk"))
    assert ["layer0", "8x16", "0", "106", "0.8281"] in output
    assert ["layer1", "10x10x3", "21", "279", "0.9300"] in output
    output = lines(run("plan", *SMALL, "--layer", "10x10x3", "--per-layer", "--scope", "global"))
    assert ["all", "layers", "together", "-", "21", "385", "0.8995"] in output


def test_plan_of_other_curves_and_rates() -> None:
    shape = ["--kind", "linear", "--frequency", "0.5", "--lr", "cosine", "--finetuning-lr", "linear"]
    output = lines(run("plan", *SMALL, *shape))
    assert [(line[3], line[5]) for line in output if line and line[0].isdigit()] == [
        ("0.0000", "0.01"),
        ("0.0469", "0.01"),
        ("0.4766", "0.0055"),
        ("0.8984", "0.001"),
        ("0.8984", "0.0005"),
        ("0.8984", "0"),
    ]
    assert "5% to 90% (linear), 2 updates per epoch, 1 layer, all alike" in run("plan", *SMALL, *shape)


@pytest.mark.parametrize("is_folder", [True, False], ids=["folder", "file"])
def test_plan_takes_from_a_checkpoint_what_prune_would_prune(tmp_path: Path, is_folder: bool) -> None:
    source = write_folder(tmp_path / "in")
    source = source if is_folder else source / "model-00001-of-00003.safetensors"
    for targets, ignore in ((None, None), (None, ["*.k"]), (["re:.*q", "*embed*"], ["re:.*q.bias"])):
        job = PruneJob(source, tmp_path / "out", sparsity=0.5, targets=targets, ignore=ignore)
        file = tmp_path / "plan.json"
        chosen = [word for entry in targets or () for word in ("--targets", entry)]
        chosen += [word for entry in ignore or () for word in ("--ignore", entry)]
        shown = run("plan", str(source), "--preset", "resnet50", "--steps-per-epoch", "2", *chosen, "--json", str(file))
        document = json.loads(file.read_text())
        assert document["layers"] == {tensor.name: list(tensor.shape) for tensor in job.tensors}
        assert document["schedule"]["final_sparsity"] == 0.85
        assert f"{source}: 5% to 85% (cubic), an update every epoch, {len(job.tensors)} layer" in shown
        assert "stages, steps and learning rates of the preset 'resnet50', unless options say otherwise" in shown


def test_presets_are_explained() -> None:
    shown = run("plan", "--presets")
    assert [line.partition(":")[0] for line in shown.splitlines() if not line.startswith(" ")] == list(PRESETS)
    for words in (
        "70% to 90% (cubic), an update every 4 epochs, 72 layers, ranked together; stages of 2 + 24 + 4 epochs",
        "learning rate: rewind in the pruning stage, linear to 0 in fine-tuning",
        "arXiv:2210.06384",
        "arXiv:2501.12486",
    ):
        assert words in shown
    assert all(name in run("plan", "--help") for name in PRESETS)


def test_plan_as_json(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    assert str(file) in run("plan", *SMALL, "--json", str(file))
    document = json.loads(file.read_text())
    assert document["stages"] == {"stabilization": 1, "pruning": 2, "finetuning": 2, "steps_per_epoch": 4}
    assert document["schedule"]["kind"] == "Cubic"
    assert (document["scope"], document["distribution"]) == ("layer", "uniform")
    assert document["layers"] == {"layer0": [8, 16]}
    assert [row["num_prune"]["layer0"] for row in document["rows"]] == [0, 6, 102, 115, 115, 115]


def test_plan_draws_both_pictures(tmp_path: Path, saved: list[Figure]) -> None:
    run("plan", *SMALL, "--plot", str(tmp_path / "new" / "folder"))
    sparsity, rate = saved
    assert title_of(sparsity) == "Planned sparsity, blog: 5% to 90% (cubic), an update every epoch, 1 layer, all alike"
    assert title_of(rate) == "Learning rate, blog: constant in the pruning stage, two steps down in fine-tuning"
    (line,) = sparsity.axes[0].lines
    drawn = dict(zip(line.get_xdata(), line.get_ydata(), strict=True))
    assert drawn == {0: 0, 4: 6 / 128, 8: 102 / 128, 12: 115 / 128, 20: 115 / 128}
    # 30% and 65% of steps 12 to 20 are 14.4 and 17.2.
    assert list(rate.axes[0].lines[0].get_ydata()) == pytest.approx([0.01] * 14 + [0.001] * 3 + [0.0001] * 4)
    for name in ("sparsity.png", "learning_rate.png"):
        assert (tmp_path / "new" / "folder" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("shape", ["8x", "x8", "0x4", "8,4", "-8x4", ""])
def test_an_invalid_shape(shape: str) -> None:
    result = RUNNER.invoke(cli.app, ["plan", "--layer", shape])
    assert result.exit_code == 2
    assert "sizes joined by x" in result.output


def test_an_unknown_preset() -> None:
    for arguments in (["--preset", "vgg"], ["vgg"]):
        result = RUNNER.invoke(cli.app, ["plan", *arguments])
        assert result.exit_code == 2
        assert "resnet50" in result.output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("plan --final-sparsity 90", 2, "--final-sparsity: expected a fraction in [0, 1], not a"),
        ("prune in out --sparsity nan", 2, "--sparsity: expected a fraction in [0, 1], not a"),
        ("demo --sparsity 0.01", 2, "--sparsity: expected a number greater than or equal to 0.05, got '0.01'"),
        ("demo --seed x", 2, "--seed: expected a valid integer, got 'x'"),
        ("prune in out --sparsity .5 --scope all", 2, "--scope: expected 'layer' or 'global', got 'all'"),
        (
            "plan --initial-sparsity .5 --final-sparsity .2",
            1,
            "expected --initial-sparsity <= --final-sparsity, got 0.5",
        ),
        ("plan --pruning -1", 1, "--pruning: expected a finite number of epochs >= 0, got -1.0"),
        ("plan --pruning 1e9", 1, "expected a run of at most 10000000 optimizer steps, got 5.01e+12; shorten it"),
        ("plan --steps-per-epoch 100000000000", 1, "expected a run of at most 10000000 optimizer steps, got 6e+12"),
        ("plan --finetuning 1e308", 1, "--finetuning: expected a number of steps that a float can hold, got more"),
        (
            "plan nothing",
            2,
            "RUN: expected a preset (blog, resnet50, bert, gmp-star, llm-pretraining) or the path of a",
        ),
        ("plan bert --preset blog", 2, "--preset: expected none beside the preset 'bert', got 'blog'"),
        ("plan tests --layer 2x2", 2, "--layer: expected none beside a checkpoint, got '2x2'"),
        ("plan tests", 1, "tests: expected a folder with .safetensors files, got none"),
        ("plan --lr 0.01", 2, "--lr: expected 'constant', 'cosine', 'cyclic' or 'rewind', got '0.01'"),
        ("plan --frequency -1", 1, "--frequency: expected a finite number of epochs >= 0, got -1.0"),
        ("plan --targets a", 1, "--targets: expected names, globs or 're:' patterns found in the checkpoint, got 'a'"),
        ("plan --scope global --distribution erk", 1, "expected --distribution 'uniform' with --scope 'global', got"),
        (
            "inspect nowhere --plot a.pdf",
            1,
            "a.pdf: expected the name of a picture that ends in .png or .svg, got .pdf",
        ),
        ("bench --plot a", 1, "a: expected the name of a picture that ends in .png or .svg, got no suffix"),
        ("plan none.yaml", 1, "none.yaml: expected a file to read, got 'No such file or directory'; check the path"),
        ("plan --steps-per-epoch 0", 1, "--steps-per-epoch: expected a whole number >= 1, got 0"),
        (f"plan --layer {'9' * 5000}x2", 2, "--layer: expected sizes joined by x"),
        ("prune  out --sparsity .5", 2, "IN: expected a path, got an empty one"),
        ("prune in", 2, "Missing argument 'OUT'."),
        ("nothing", 2, "No such command 'nothing'."),
    ],
)
def test_what_is_wrong_is_one_line_that_names_flags(
    arguments: str, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["gmp-kernels", *arguments.split(" ")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith(f"gmp-kernels: {message}")
    assert ended.value.code == code


def test_messages_name_flags_instead_of_arguments() -> None:
    flags = cli.flags_of(["prune", "in", "--scope", "global"])
    assert flags["copy_others"] == "--copy-others" and "source" not in flags
    assert cli.in_flags("targets: got targets=['a'] and ignore=None; scope='layer' masks it", flags) == (
        "--targets: got --targets ['a'] and --ignore None; --scope 'layer' masks it"
    )
    paste = "Leave them out: ignore=['a b', 'c']"
    assert cli.in_flags(paste, flags) == "Leave them out: --ignore 'a b' --ignore c"
    assert cli.in_flags("filter: expected names", cli.flags_of(["inspect"])) == "--filter: expected names"
    assert cli.in_flags("in/masks: cannot be read", flags) == "in/masks: cannot be read"


def test_the_version() -> None:
    assert run("--version") == f"gmp-kernels {__version__}\n"


ENDING = """
import atexit, gc, sys
slow = {"torch._dynamo", "torch.distributed.tensor"}
atexit.register(lambda: print(gc.get_freeze_count() > 100_000, slow & set(sys.modules)))  # called last
from gmp_kernels.tools.cli.main import main
main()
"""


def test_short_commands_wait_neither_for_parts_of_torch_nor_for_garbage() -> None:
    done = run_python("-c", ENDING, "plan")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "True set()" and done.stderr == ""


def test_python_m_ends_without_an_error_where_nobody_reads_on() -> None:
    # Far more than a pipe holds.
    command = f"'{sys.executable}' -m gmp_kernels plan --steps-per-epoch 1 --finetuning 3000 | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.startswith("blog: 5% to 90% (cubic), ") and done.stdout.count("\n") == 1
    assert done.stderr == ""


WITHOUT_EXTRA = """
import os, sys, gmp_kernels
for missing in sys.argv[1:]:
    if os.fork() == 0:  # imports cannot be undone
        sys.modules[missing] = None
        import gmp_kernels.tools.cli.main
    os.wait()
"""


@pytest.mark.thorough
def test_without_its_extra_it_says_what_to_install() -> None:
    names = ["typer", "rich", "safetensors"]
    said = run_python("-c", WITHOUT_EXTRA, *names).stderr.splitlines()
    expected = "gmp-kernels: the command line needs {}; run: pip install 'gmp-kernels[cli]'"
    assert said == [expected.format(name) for name in names]


WITHOUT_MATPLOTLIB = """
import sys

sys.modules["matplotlib"] = None
from gmp_kernels.tools.cli import main

for arguments in ("plan --plot", "inspect nowhere --plot", "bench --plot", "bench --output"):
    sys.argv = ["gmp-kernels", *arguments.split(), sys.argv[-1]]
    try:
        main.main()
    except SystemExit as ended:
        assert ended.code == 1, arguments
"""


def test_without_matplotlib_a_picture_is_refused_before_anything_else(tmp_path: Path) -> None:
    done = run_python("-c", WITHOUT_MATPLOTLIB, tmp_path / "new")
    said = "gmp-kernels: pictures: expected matplotlib to be installed, got none; run: pip install 'gmp-kernels[cli]'\n"
    assert done.stderr == 4 * said
    assert (done.returncode, done.stdout) == (0, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [[], ["prune"], ["inspect"], ["demo"], ["info"], ["plan"], ["bench"]])
def test_help_shows_flags_without_a_value(command: list[str]) -> None:
    shown = run(*command, "--help")
    assert "--help" in shown and "bool" not in shown.lower()
    assert command != ["plan"] or "<int>" in shown or "INTEGER" in shown


def test_the_library_imports_no_package_of_the_extras() -> None:
    extras = {"typer", "rich", "matplotlib", "safetensors", "sklearn", "yaml"}
    extras |= {"transformers", "accelerate", "lightning", "pytorch_lightning"}
    done = run_python("-c", f"import sys, gmp_kernels; print({extras} & set(sys.modules))")
    assert done.stdout.strip() == "set()"
