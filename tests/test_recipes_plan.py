"""``gmp-kernels plan recipe.yaml``: what it prints, draws and writes, and what it warns of."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from picture_cases import title_of
from recipe_semantics import sparsity_at
from safetensors.torch import save_file
from typer.testing import CliRunner

from gmp_kernels import recipes
from gmp_kernels.tools.cli import main as cli
from gmp_kernels.tools.recipes import is_recipe

RECIPES = Path(__file__).parent / "recipes"
RUNNER = CliRunner(env={"COLUMNS": "200"})
SHAPES = {
    "embed.weight": (6, 5),
    "conv1.weight": (4, 3, 1, 1),
    "conv1.weight_scale": (4, 4),
    "norm.weight": (4,),
    "fc.weight": (10, 4),
    "fc.bias": (10,),
}
RAMP = "init_sparsity: 0.1, start_epoch: 1, end_epoch: 3, update_frequency: 0.001"


def plan(*arguments: object, code: int = 0) -> str:
    result = RUNNER.invoke(cli.app, ["plan", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output if code == 0 else str(result.exception) + result.output


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({name: torch.ones(shape) for name, shape in SHAPES.items()}, path)
    return path


def recipe_of(tmp_path: Path, *modifiers: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("modifiers:\n" + "".join(f"  - !{modifier}\n" for modifier in modifiers))
    return path


def rows_of(output: str) -> list[list[str]]:
    return [line.split() for line in output.splitlines()]


def test_a_recipe_alone(tmp_path: Path, saved: list[Figure]) -> None:
    recipe = os.path.relpath(RECIPES / "resnet50-beans-pruning.yaml")
    output = plan(recipe, "--steps-per-epoch", 4, "--plot", tmp_path)
    rows = rows_of(output)
    assert ["0", "0", "stabilization", "0.0000", "0.0001", "-"] in rows
    for epoch in range(1, 11):
        stage = "pruning" if epoch < 10 else "fine-tuning"
        (row,) = (row for row in rows if row[:1] == [str(epoch)])
        assert row[1:4] == [str(4 * epoch), stage, f"{sparsity_at(epoch, 1, 10, 0.05, 0.9):.4f}"]
    assert ["15", "60", "fine-tuning", "0.9000", "5e-05", "-"] in rows
    assert "num_prune" not in output
    assert [title_of(figure) for figure in saved] == [
        f"Planned sparsity, {recipe}: the weights of each modifier as one layer",
        f"Learning rate, {recipe}",
    ]
    assert (tmp_path / "sparsity.png").exists()
    assert (tmp_path / "learning_rate.png").exists()


def test_what_a_recipe_skips_is_said(tmp_path: Path) -> None:
    output = plan(RECIPES / "bert-base-prune90.md", "--plot", tmp_path / "new")
    (note,) = (line for line in output.splitlines() if line.startswith("note: "))
    assert note.startswith("note: recipe: skipped DistillationModifier")
    # It leaves the learning rate to the optimizer, and there is nothing to draw.
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["sparsity.png"]


def test_the_layers_of_a_checkpoint(tmp_path: Path, checkpoint: Path) -> None:
    recipe = recipe_of(
        tmp_path,
        f"GMPruningModifier {{params: [fc.weight, 're:conv1.weight'], final_sparsity: 0.8, {RAMP}}}",
        f"GMPruningModifier {{params: [embed.weight], final_sparsity: 0.5, {RAMP}}}",
    )
    arguments = (recipe, "--checkpoint", checkpoint, "--steps-per-epoch", 10, "--json", tmp_path / "plan.json")
    output = plan(*arguments, "--per-layer")
    document = json.loads((tmp_path / "plan.json").read_text())
    sizes = {
        "fc.weight": (0.8, 40),
        "conv1.weight": (0.8, 12),
        "conv1.weight_scale": (0.8, 16),
        "embed.weight": (0.5, 30),
    }
    for row in document["rows"]:
        sparsity = {
            name: 0.0 if row["epoch"] < 1 else sparsity_at(min(row["epoch"], 3), 1, 3, 0.1, final)
            for name, (final, _) in sizes.items()
        }
        assert row["num_prune"] == {name: round(sparsity[name] * n) for name, (_, n) in sizes.items()}
        assert row["learning_rate"] is None
    assert [row["epoch"] for row in document["rows"]] == [0, 1, 2, 3]
    assert "4 layers of" in output
    assert "GMPruningModifier: expected an end_epoch that the run of 30 steps reaches, got 3: its" in output
    assert "an update every 0.001 epochs is more than one per step" in output
    assert "'re:conv1.weight' matches beginnings of names, also of 'conv1.weight_scale'" in output
    # A name that is given exactly is meant.
    assert "'embed.weight' reaches" not in output
    (row,) = (line.split() for line in output.splitlines() if line.startswith("fc.weight"))
    assert row[-2:] == ["32", "0.8000"]


def test_weights_that_are_let_go_are_noted(tmp_path: Path) -> None:
    """Their sparsity is shown as if they were held."""
    ramp = f"GMPruningModifier {{final_sparsity: 0.8, leave_enabled: False, {RAMP}}}"
    output = plan(recipe_of(tmp_path, ramp, "EpochRangeModifier {end_epoch: 5}"))
    assert "its weights train again after epoch 3 (leave_enabled: False)" in output
    assert [row[:4] for row in rows_of(output) if row[:1] in (["3"], ["4"], ["5"])] == [
        [str(epoch), str(100 * epoch), "fine-tuning", "0.8000"] for epoch in (3, 4, 5)
    ]


def test_the_weight_decay_of_a_recipe(tmp_path: Path) -> None:
    decay = "SetWeightDecayModifier {weight_decay: 0.25, start_epoch: 2}"
    output = plan(recipe_of(tmp_path, f"GMPruningModifier {{final_sparsity: 0.8, {RAMP}}}", decay))
    assert [row[-2:] for row in rows_of(output) if row[:1] in (["0"], ["1"], ["2"], ["3"])] == [
        ["-", "-"],
        ["-", "-"],
        ["-", "0.25"],
        ["-", "0.25"],
    ]


def test_all_prunable_includes_embeddings(tmp_path: Path, checkpoint: Path) -> None:
    recipe = recipe_of(tmp_path, f"GlobalMagnitudePruningModifier {{final_sparsity: 0.8, {RAMP}}}")
    assert "'__ALL_PRUNABLE__' includes embeddings" in plan(recipe)
    output = plan(recipe, "--checkpoint", checkpoint)
    assert "'__ALL_PRUNABLE__' reaches 'embed.weight' (embedding)" in output
    assert str(round(0.8 * (30 + 12 + 40))) in output.rstrip().splitlines()[-1].split()


def test_targets_that_the_checkpoint_does_not_have(tmp_path: Path, checkpoint: Path) -> None:
    recipe = recipe_of(tmp_path, f"GMPruningModifier {{params: [fc.weigth], final_sparsity: 0.8, {RAMP}}}")
    assert "did you mean 'fc.weight'" in plan(recipe, "--checkpoint", checkpoint, code=1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((RECIPES / "resnet50-pruned.md", "--kind", "linear"), "the recipe says itself"),
        ((RECIPES / "resnet50-pruned.md", "--pruning", 3), "the recipe says itself"),
        (("blog", "--checkpoint", "x"), "expected a recipe to plan for it"),
    ],
)
def test_refusals(arguments: tuple[object, ...], said: str) -> None:
    result = RUNNER.invoke(cli.app, ["plan", *map(str, arguments)])
    assert result.exit_code != 0
    assert said in str(result.exception) + result.output


def test_what_names_a_recipe() -> None:
    assert all(map(is_recipe, ["recipe.yml", "recipe.YAML", "a/recipe.md", "zoo:cv/some/stub"]))
    assert not any(map(is_recipe, ["bert", "a/model", "model.safetensors", "yaml"]))


def test_a_recipe_too_long_to_plan_is_refused_at_once(tmp_path: Path) -> None:
    recipe = recipe_of(
        tmp_path, f"GMPruningModifier {{final_sparsity: 0.8, {RAMP}}}", "EpochRangeModifier {end_epoch: 1e6}"
    )
    assert "at most 10000000 optimizer steps, got 1e+08" in plan(recipe, code=1)


def test_a_recipe_that_only_holds_needs_a_checkpoint(tmp_path: Path, checkpoint: Path) -> None:
    recipe = recipe_of(tmp_path, "ConstantPruningModifier {params: [fc.weight]}", "EpochRangeModifier {end_epoch: 2}")
    assert recipes.load(recipe).epochs == 2
    result = RUNNER.invoke(cli.app, ["plan", str(recipe)])
    assert "expected a recipe that prunes gradually" in str(result.exception)
    with_zeros = tmp_path / "zeros.safetensors"
    save_file({"fc.weight": torch.eye(10, 4)}, with_zeros)
    output = plan(recipe, "--checkpoint", with_zeros, "--per-layer")
    rows = rows_of(output)
    # Only shapes are read, so the layers count as dense.
    for epoch in (0, 1, 2):
        assert [str(epoch), str(100 * epoch), "fine-tuning", "0.0000", "0", "-", "-"] in rows
    assert ["fc.weight", "10x4", "0", "0", "0.0000"] in rows
