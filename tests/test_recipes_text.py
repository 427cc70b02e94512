"""Containers, stages and overrides of recipes; what is malformed is refused in words."""

from __future__ import annotations

import contextlib
import json
import random
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmp_kernels import recipes
from gmp_kernels.errors import GMPError, GMPWarning, RecipeError
from gmp_kernels.recipes.modifiers import READERS, ConstantPruning, EpochRange, GradualPruning, SetLearningRate

GMP = """
pruning_modifiers:
  - !GMPruningModifier
    params: __ALL_PRUNABLE__
    init_sparsity: 0.05
    final_sparsity: {final}
    start_epoch: 0.0
    end_epoch: {end}
    update_frequency: 1.0
"""
PLAIN = GMP.format(final=0.8, end=10.0)


def gradual(recipe: recipes.Recipe) -> GradualPruning:
    (found,) = (modifier for modifier in recipe.modifiers if isinstance(modifier, GradualPruning))
    return found


# -- containers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fence", ["---", "+++"])
@pytest.mark.parametrize("before", ["", "<!--\nA licence.\n-->\n\n", "\n  \n"])
def test_front_matter(tmp_path: Path, fence: str, before: str) -> None:
    card = f"{before}{fence}\nfinal: 0.7{GMP.format(final='eval(final)', end=10)}{fence}\n\n# Title\n\n---\nkey: [\n"
    path = tmp_path / "recipe.md"
    path.write_text(card)
    for source in (path, str(path), card):
        assert gradual(recipes.load(source)).entries == ((0.7, ("__ALL_PRUNABLE__",)),)


@pytest.mark.parametrize("suffix", [".yaml", ".md"])
def test_recipes_written_on_windows(tmp_path: Path, suffix: str) -> None:
    text = "\ufeff" + (PLAIN if suffix == ".yaml" else f"---\n{PLAIN}---\n\n# Title\n")
    text = text.replace("\n", "\r\n")
    path = tmp_path / f"recipe{suffix}"
    path.write_bytes(text.encode())
    assert recipes.load(path) == recipes.load(text) == recipes.load(PLAIN)


def test_yaml_files_and_text_with_dashes(tmp_path: Path) -> None:
    path = tmp_path / "recipe.YAML"
    path.write_text("---\n" + PLAIN)
    assert recipes.load(path) == recipes.load("---\n" + PLAIN) == recipes.load(PLAIN)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("recipe.yml", PLAIN, ".yml is not read"),
        ("recipe.txt", PLAIN, "expected a .md or .yaml file"),
        ("recipe.md", PLAIN, "between two lines"),
        ("recipe.yaml", "\xff", "UTF-8"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, name: str, content: str, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(RecipeError, match=said):
        recipes.load(path)


def test_stubs_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="SparseZoo has been shut down"):
        recipes.load("zoo:cv/classification/resnet_v1-50/pytorch/sparseml/imagenet/pruned-moderate")
    with pytest.raises(FileNotFoundError):
        recipes.load(tmp_path / "none.yaml")
    with pytest.raises(TypeError, match="expected a path or the text"):
        recipes.load(b"recipe\n")  # type: ignore[arg-type]


def test_all_keys_with_modifiers_in_their_names_are_merged() -> None:
    more = "modifiers:\n  - !EpochRangeModifier {start_epoch: 0, end_epoch: 20}\n"
    more += "my_training_modifiers_2:\n  - !SetLearningRateModifier {learning_rate: 1e-4}\n"
    recipe = recipes.load(more + PLAIN)
    assert [type(modifier) for modifier in recipe.modifiers] == [EpochRange, SetLearningRate, GradualPruning]
    assert recipe.epochs == 20
    # YAML takes 1e-4 for text.
    assert isinstance(recipe.modifiers[1], SetLearningRate)
    assert recipe.modifiers[1].value == 1e-4


def test_a_list_alone_and_a_modifier_alone() -> None:
    item = "!EpochRangeModifier\nstart_epoch: 0\nend_epoch: 3\n"
    assert recipes.load(item).epochs == recipes.load("- " + item.replace("\n", "\n  ")).epochs == 3
    assert recipes.load("range: " + item.replace("\n", "\n  ")).epochs == 3


def test_frameworks_in_tags_and_the_new_style() -> None:
    old = recipes.load(PLAIN)
    assert recipes.load(PLAIN.replace("!GMP", "!pytorch.GMP")) == old
    for new in (
        PLAIN.replace("- !GMPruningModifier", "GMPruningModifier:"),
        PLAIN.replace("\n    ", "\n        ").replace("- !GMPruningModifier", "- GMPruningModifier:"),
    ):
        assert recipes.load(new) == old
    new = """
    pruning_modifiers:
      MagnitudePruningModifier:
        targets: ['re:.*weight']
        init_sparsity: 0.1
        final_sparsity: 0.6
        start: 1
        end: 4.5
        update: 0.5
        update_scheduler: linear
        scheduler_args: {}
        mask_structure: unstructured
        leave_enabled: false
        apply_globally: false
      ConstantPruningModifier:
        targets: __ALL__
        start: 0
        update: 3
    """
    pruning, constant = recipes.load(new).modifiers
    assert isinstance(pruning, GradualPruning)
    assert pruning.entries == ((0.6, ("re:.*weight",)),)
    assert (pruning.initial, pruning.start, pruning.end, pruning.frequency) == (0.1, 1.0, 4.5, 0.5)
    assert (pruning.curve, pruning.leave_enabled, pruning.is_global) == ("linear", False, False)
    assert isinstance(constant, ConstantPruning)
    assert (constant.start, constant.end) == (0.0, -1.0)
    # All targets of the new style are weights.
    assert constant.entries == ((0.0, (r"re:(.*\.)?weight$",)),)
    every_step = recipes.load(new.replace("update: 0.5", "")).modifiers[0]
    assert isinstance(every_step, GradualPruning)
    assert every_step.frequency == -1


STAGED = """
final: 0.8
length: 4
first_stage:
  length: 3
  pruning_modifiers:
    - !GMPruningModifier
      {params: [a.weight], init_sparsity: 0, final_sparsity: eval(final), start_epoch: 0, end_epoch: eval(length),
       update_frequency: 1}
second_stage:
  start: eval(length + 1)
  training_modifiers:
    - !EpochRangeModifier {start_epoch: eval(start), end_epoch: eval(start + length)}
"""


def test_stages_have_variables_of_their_own() -> None:
    recipe = recipes.load(STAGED)
    assert gradual(recipe).end == 3
    assert recipe.epochs == 9
    changed = recipes.load(STAGED, {"length": 6, "final": 0.5})
    assert (gradual(changed).end, gradual(changed).entries[0][0], changed.epochs) == (6, 0.5, 13)


def test_variables_under_args() -> None:
    text = "args:\n  final: 0.75\n  half: eval(final / 2)\n" + GMP.format(final="eval(final)", end="eval(half)")
    assert (gradual(recipes.load(text)).entries[0][0], gradual(recipes.load(text)).end) == (0.75, 0.375)
    assert gradual(recipes.load(text, "final=0.5")).end == 0.25


# -- overrides ---------------------------------------------------------------------------------------------------------

SET = "final: &final 0.8\nend: 4\n" + GMP.format(final="eval(final)", end="eval(end)")


@pytest.mark.parametrize(
    "overrides",
    [
        {"final": 0.6, "end": 5},
        '{"final": 0.6, "end": 5}',
        "final=0.6,end=5",
        " final : 0.6 , end=5, ",
        {"final": "eval(end / 10 + 0.1)", "end": 5},
    ],
    ids=str,
)
def test_overrides(overrides: object) -> None:
    modifier = gradual(recipes.load(SET, overrides))  # type: ignore[arg-type]
    assert (modifier.entries[0][0], modifier.end) == (0.6, 5)


def test_overrides_leave_what_repeats_an_anchor_as_it_is() -> None:
    modifier = gradual(recipes.load(SET.replace("eval(final)", "*final"), {"final": 0.6, "end": 5}))
    assert (modifier.entries[0][0], modifier.end) == (0.8, 5)


def test_overrides_may_be_numbers_of_numpy() -> None:
    assert gradual(recipes.load(SET, {"final": np.float64(0.6)})).entries[0][0] == 0.6


def test_no_overrides_change_nothing() -> None:
    assert recipes.load(SET, "") == recipes.load(SET, {}) == recipes.load(SET)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"finale": 1}, "there are: end, final"),
        ("final", "name=value"),
        ("final=", "name=value"),
        ("{final=3", "name=value"),
        ("a=b=c", "name=value"),
        ("[1]", "JSON object"),
    ],
)
def test_overrides_that_are_refused(overrides: object, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        recipes.load(SET, overrides)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="mapping or text"):
        recipes.load(SET, 3)  # type: ignore[arg-type]


# -- malformed ---------------------------------------------------------------------------------------------------------

MALFORMED = [
    ("a: [1\n", "expected YAML"),
    ("a: *none\n", "expected YAML"),
    ("\n", "is it a recipe"),
    ("just words\nand more\n", "is it a recipe"),
    ("a: 1\n---\nb: 2\n", "expected YAML"),
    ("a: !!python/object/apply:os.system ['true']\n", "expected YAML"),
    ("a: !!set {1, [2]}\n", "expected"),
    ("? [a]\n: 1\n", "expected YAML"),
    ("a: \0\n", "expected YAML"),
    ("a: !!bool 3\n", "its tag does not fit"),
    ("a: !!int ''\n", "its tag does not fit"),
    ("a: !!timestamp 2020-13-45\n", "expected YAML"),
    ("? !A {b: 1}\n: 2\n", "its tag does not fit"),
    ("a: 1\n", "expected modifiers, got none"),
    ("pruning_modifiers:\n", "expected modifiers, got none"),
    ("pruning_modifiers: 3\n", "expected '- !NameOfModifier'"),
    ("pruning_modifiers:\n  - 3\n", "expected '- !NameOfModifier'"),
    ("pruning_modifiers:\n  - !GMPruningModifier [1]\n", "keys and values after"),
    ("pruning_modifiers:\n  - !GMPruningModifier 3\n", "keys and values after"),
    ("steps:\n  - !EpochRangeModifier {end_epoch: 3}\n", "rename it to 'steps_modifiers'"),
    ("modifiers:\n  - !GMPRuningModifier {}\n", "did you mean 'GMPruningModifier'"),
    ("modifiers:\n  - !Nothing {}\n", "expected one of GMPruningModifier"),
    ("a: &a [*a]\nmodifiers:\n  - !EpochRangeModifier {end_epoch: eval(a)}\n", "nested at most"),
    ("a: &a [1]\nmodifiers:\n  - !EpochRangeModifier &m {end_epoch: *m}\n", "expected"),
]
MALFORMED.append(
    (
        "l0: &l0 [x]\n"
        + "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]\n" for i in range(1, 9))
        + PLAIN.replace("__ALL_PRUNABLE__", "*l8"),
        "at most 100000 values",
    )
)
CHANGED = [
    ("params: __ALL_PRUNABLE__", "params: [3]", "names and 're:' patterns"),
    ("init_sparsity: 0.05", "init_sparsity: 5 %", "a finite number from 0 to 1"),
    ("init_sparsity: 0.05", "init_sparsity: [0.05]", "a finite number from 0 to 1"),
    ("init_sparsity: 0.05", f"init_sparsity: 1{'0' * 400}", "a finite number from 0 to 1"),
    ("init_sparsity: 0.05", "init_sparsity: .nan", "a finite number from 0 to 1"),
    ("    init_sparsity: 0.05\n", "", "a value for 'init_sparsity'"),
    ("    update_frequency: 1.0\n", "", "a value for 'update_frequency'"),
    ("final_sparsity: 0.8", "final_sparsity: 1.8", "a finite number from 0 to 1"),
    ("final_sparsity: 0.8", "final_sparsity: 0.01", "pruned weights never come back"),
    ("final_sparsity: 0.8", "final_sparsity: {0.5: [a.weight]}", "no 'params' beside a mapping"),
    ("end_epoch: 10.0", "end_epoch: -2", "a finite number from -1 to 1e+06"),
    ("end_epoch: 10.0", "end_epoch: -0.5", "an epoch >= 0, or -1"),
    ("end_epoch: 10.0", "end_epoch: 1e300", "a finite number from"),
    ("start_epoch: 0.0", "start_epoch: 11", "start_epoch <= end_epoch"),
    ("start_epoch: 0.0", "start_epoch: later", "a finite number"),
    ("start_epoch: 0.0", "start_epoch: yes", "a finite number"),
    ("update_frequency: 1.0", "update_frequency: -3", "a finite number from -1"),
    ("update_frequency: 1.0", "update_frequency: 1\n    inter_func: cosine", "one of linear, cubic, inverse_cubic"),
    ("update_frequency: 1.0", "update_frequency: 1\n    leave_enabled: 2", "True or False"),
    ("update_frequency: 1.0", "update_frequency: 1\n    mask_type: '2:4'", "does not prune to yet"),
    ("update_frequency: 1.0", "update_frequency: 1\n    mask_type: [1, 4]", "does not prune to yet"),
    ("update_frequency: 1.0", "update_frequency: 1\n    mask_type: block4", "does not prune to yet"),
    ("update_frequency: 1.0", "update_frequency: 1\n    mask_type: tensorrt", "does not prune to yet"),
    ("update_frequency: 1.0", "update_frequency: 1\n    phased: True", "False for 'phased'"),
    ("update_frequency: 1.0", "update_frequency: 1\n    score_type: movement", "'magnitude' for 'score_type'"),
    ("update_frequency: 1.0", "update_frequency: 1\n    scheduler_args: {exponent: 2}", "for 'scheduler_args'"),
    ("update_frequency: 1.0", "update_frequncy: 1", "a value for 'update_frequency'"),
    ("update_frequency: 1.0", "update_frequency: 1\n    leave_enable: True", "did you mean 'leave_enabled'"),
    ("update_frequency: 1.0", "update_frequency: 1\n    nothing: True", "leave it out"),
    ("update_frequency: 1.0", "update_frequency: 1\n    update: 1", "leave one of them out"),
    (
        "!GMPruningModifier",
        "!GlobalMagnitudePruningModifier\n    inter_func: cubic\n    global_sparsity: 3",
        "True or False",
    ),
]
MALFORMED += [(PLAIN.replace(old, new), said) for old, new, said in CHANGED]
RAMP = "start_epoch: 0, end_epoch: 1, update_frequency: 1"
OTHERS = [
    (
        f"!GlobalMagnitudePruningModifier {{init_sparsity: __FROM_PARAM__, final_sparsity: 0.5, {RAMP}}}",
        "ranked together",
    ),
    (
        f"!GMPruningModifier {{init_sparsity: 0, final_sparsity: {{0.5: a, 0.6: b}}, global_sparsity: 1 > 0, {RAMP}}}",
        "True or False",
    ),
    (
        f"!GMPruningModifier {{init_sparsity: 0, final_sparsity: {{0.5: a, 0.6: b}}, global_sparsity: True, {RAMP}}}",
        "ranked together",
    ),
    (f"!GMPruningModifier {{init_sparsity: 0, final_sparsity: {{}}, {RAMP}}}", "names for each sparsity"),
    (f"!GMPruningModifier {{init_sparsity: 0, final_sparsity: {{0.5: []}}, {RAMP}}}", "names for each sparsity"),
    (
        "!LearningRateFunctionModifier {lr_func: linear, init_lr: 1, final_lr: 0, start_epoch: 0, end_epoch: -1}",
        "start_epoch < end_epoch",
    ),
    (
        "!LearningRateFunctionModifier {lr_func: step, init_lr: 1, final_lr: 0, start_epoch: 0, end_epoch: 1}",
        "one of linear, cosine, cyclic_linear",
    ),
    (
        "!LearningRateFunctionModifier {lr_func: linear, init_lr: 1, final_lr: 0, end_epoch: 1, cycle_epochs: 0}",
        "epochs > 0 for 'cycle_epochs'",
    ),
    ("!LearningRateModifier {lr_class: OneCycleLR, lr_kwargs: {}, init_lr: 1, start_epoch: 0}", "one of StepLR"),
    ("!LearningRateModifier {lr_class: StepLR, lr_kwargs: [], init_lr: 1, start_epoch: 0}", "keys and values"),
    ("!LearningRateModifier {lr_class: StepLR, lr_kwargs: {gamma: 1}, init_lr: 1}", "a value for 'step_size'"),
    ("!LearningRateModifier {lr_class: StepLR, lr_kwargs: {gamma: 1, step_size: 0}, init_lr: 1}", "a length > 0"),
    ("!LearningRateModifier {lr_class: ExponentialLR, lr_kwargs: {gama: 1}, init_lr: 1}", "a value for 'gamma'"),
    (
        "!LearningRateModifier {lr_class: MultiStepLR, lr_kwargs: {gamma: 1, milestones: 3}, init_lr: 1, end_epoch: 2}",
        "milestones between",
    ),
    (
        "!LearningRateModifier {lr_class: StepLR, lr_kwargs: {gamma: 1, step_size: 1, last_epoch: 2}, init_lr: 1}",
        "'last_epoch'",
    ),
    ("!SetLearningRateModifier {learning_rate: fast}", "a finite number"),
    ("!SetWeightDecayModifier {weight_decay: 0, param_groups: [-1]}", "indices of param groups"),
    ("!SetWeightDecayModifier {weight_decay: 0, param_groups: first}", "indices of param groups"),
    ("!TrainableParamsModifier {params: __ALL__}", "a value for 'trainable'"),
    ("!EpochRangeModifier {end_epochs: 3}", "did you mean 'end_epoch'"),
]
MALFORMED += [(f"modifiers:\n  - {item}\n", said) for item, said in OTHERS]


@pytest.mark.parametrize(("text", "said"), MALFORMED, ids=[f"{i}-{said}" for i, (_, said) in enumerate(MALFORMED)])
def test_malformed(text: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipes.load(text)
    assert said in str(caught.value)
    assert "; " in str(caught.value) or "expected YAML" in str(caught.value)


def test_arguments_of_loggers_are_ignored() -> None:
    assert recipes.load(PLAIN + "    log_types: __ALL__\n    constant_logging: True\n") == recipes.load(PLAIN)


OUTSIDE = """
Distillation PerLayerDistillation Quantization LegacyQuantization GPTQ SmoothQuant
OBSPruning MFACPruning GlobalMFACPruning MovementPruning RigLPruning TopKASTPruning SparseGPT WandaPruning
StructuredPruning LayerPruning LayerThinning Logging
"""


@pytest.mark.parametrize("name", OUTSIDE.split())
def test_modifiers_outside_are_skipped_with_one_warning(name: str) -> None:
    text = PLAIN + f"  - !{name}Modifier {{any: thing}}\n  - !ACDCPruningModifier\n"
    with pytest.warns(GMPWarning, match=f"skipped {name}Modifier, ACDCPruningModifier") as caught:
        recipe = recipes.load(text)
    assert len(caught) == 1
    assert recipe.skipped == (f"{name}Modifier", "ACDCPruningModifier")
    assert recipe.modifiers == recipes.load(PLAIN).modifiers


def test_a_recipe_of_nothing_but_what_is_skipped_has_no_length() -> None:
    with pytest.warns(GMPWarning, match="skipped"):
        recipe = recipes.load("modifiers:\n  - !DistillationModifier {}\n")
    assert recipe.epochs == 0
    assert recipe.trace(10) == ({}, [None], [None])


def test_a_ramp_without_an_end_says_so() -> None:
    with pytest.warns(GMPWarning, match="has no end and stays at init_sparsity"):
        recipes.load(GMP.format(final=0.8, end=-1))


@settings(deadline=None, max_examples=150)
@given(seed=st.integers(0, 2**32))
def test_damaged_recipes_never_raise_anything_else(seed: int) -> None:
    source = random.Random(seed)
    text = source.choice([STAGED, SET, PLAIN])
    for _ in range(source.randrange(1, 4)):
        at = source.randrange(len(text))
        piece = source.choice(
            ["", "\n", ": ", "!", "&a ", "*a", "{", "]", "eval(", "- ", "-1", "~", "\t", "'", "9" * 5000]
        )
        text = text[:at] + piece + text[at + source.randrange(4) :]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(GMPError):
            recipes.load(text)


KEYS = (
    *("params", "targets", "init_sparsity", "final_sparsity", "start_epoch", "end", "update_frequency", "inter_func"),
    *("mask_type", "leave_enabled", "global_sparsity", "phased", "score_type", "scheduler_args", "learning_rate"),
    *("param_groups", "lr_func", "init_lr", "final_lr", "cycle_epochs", "lr_class", "lr_kwargs", "weight_decay"),
    *("trainable", "params_strict"),
)
SCALARS = st.sampled_from(
    [None, True, False, -1, 0, 1, 2.5, "linear", "cosine", "StepLR", "1e-3", "", "__ALL__", "eval(1)"]
)
VALUES = SCALARS | st.floats() | st.integers() | st.text(max_size=3)
VALUES |= st.lists(VALUES, max_size=3) | st.dictionaries(st.sampled_from(["gamma", "step_size", "0.5", ""]), VALUES)


@settings(deadline=None, max_examples=300)
@given(name=st.sampled_from(sorted(READERS)), arguments=st.dictionaries(st.sampled_from(KEYS), VALUES))
def test_arguments_of_any_type_never_raise_anything_else(name: str, arguments: dict[str, object]) -> None:
    text = json.dumps({"modifiers": [{name: arguments}, {"EpochRangeModifier": {"end_epoch": 2}}]}) + "\n"
    with warnings.catch_warnings(), contextlib.suppress(GMPError):
        warnings.simplefilter("ignore")
        recipe = recipes.load(text)
        if recipe.epochs < 100:
            recipe.trace(3)


def test_without_pyyaml_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'gmp-kernels\[recipes\]'"):
        recipes.load(PLAIN)
