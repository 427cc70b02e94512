"""Coverage: which weights of a model are pruned by default, what is left out and why, and what is said about it."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from model_trees import TREES
from safetensors.torch import save_file, save_model
from torch import nn
from tree_building import FILE, build, linear, schedule, tensors_of, weights
from typer.testing import CliRunner

from gmp_kernels import GMPScheduler, schedules
from gmp_kernels.checkpoints.files import TensorInfo
from gmp_kernels.checkpoints.targets import TensorIndex
from gmp_kernels.errors import DTypeError, TargetError
from gmp_kernels.model.coverage import Coverage, shown_names, shown_shape
from gmp_kernels.model.names import plain_name
from gmp_kernels.model.targets import ParameterIndex
from gmp_kernels.pruner.distributions import emptied_layers
from gmp_kernels.tools.cli import main as cli


def reasons(coverage: Coverage) -> dict[str, str]:
    return {tensor.name: tensor.reason for tensor in coverage.left_out}


@pytest.mark.parametrize("make", TREES.values(), ids=TREES)
def test_default_targets_of_models_people_train(make):
    model, targets = make()
    assert list(ParameterIndex(model).select(None, None)[0]) == targets


@pytest.mark.parametrize("make", TREES.values(), ids=TREES)
def test_a_checkpoint_has_the_targets_of_its_model(make):
    model, targets = make()
    found, _ = TensorIndex(tensors_of(model)).choose(None, None)
    assert {plain_name(name) for name in found} == set(targets)


@pytest.mark.parametrize(
    ("name", "tensor", "reason"),
    [
        ("gpt2", "transformer.wte.weight", "embedding"),
        ("gpt2", "transformer.h.0.ln_1.weight", "norm, bias, scale or constant"),
        ("llama", "model.embed_tokens.weight", "embedding"),
        ("llama", "lm_head.weight", "output head"),
        ("llama_of_meta", "output.weight", "output head"),
        ("bert", "cls.predictions.decoder.weight", "output head"),
        ("language_model_of_lstms", "decoder.weight", "output head"),
        ("mixtral", "model.layers.0.block_sparse_moe.gate.weight", "router"),
        ("qwen_moe", "model.layers.0.mlp.shared_expert_gate.weight", "router"),
        ("gpt_oss", "model.layers.0.mlp.router.weight", "router"),
        ("gpt_oss", "model.layers.0.mlp.experts.down_proj_bias", "norm, bias, scale or constant"),
        ("switch_transformer", "model.layers.0.mlp.router.classifier.weight", "router"),
        ("t5", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "embedding"),
        ("vit", "encoder.pos_embedding", "embedding"),
        ("swin", "layers.0.blocks.0.attn.relative_position_bias_table", "embedding"),
        ("mamba", "backbone.layers.0.mixer.A_log", "norm, bias, scale or constant"),
        ("lora", "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight", "low-rank adapter"),
    ],
)
def test_what_is_left_out_has_a_reason_in_models_and_checkpoints(name, tensor, reason):
    model, _ = TREES[name]()
    assert reasons(ParameterIndex(model).select(None, None)[1])[tensor] == reason
    assert reasons(TensorIndex(tensors_of(model)).choose(None, None)[1])[tensor] == reason


def test_the_types_of_modules_decide_where_names_mislead():
    class Lookup(nn.Embedding):
        pass

    lookups = {"lookup": nn.Embedding(9, 3), "codes": Lookup(7, 3), "bags": nn.EmbeddingBag(9, 3)}
    model = build({"embed_in": linear(4, 3), "norm": linear(3, 4), "ln": linear(4, 3)} | lookups)
    assert list(ParameterIndex(model).select(None, None)[0]) == weights("embed_in", "norm", "ln")


class WithHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = nn.Linear(4, 4), nn.Linear(4, 9)

    def get_output_embeddings(self) -> nn.Module:
        return self.out


def test_a_model_that_knows_its_output_embeddings_is_asked():
    coverage = ParameterIndex(nn.ModuleDict({"model": WithHead()})).select(None, None)[1]
    assert reasons(coverage)["model.out.weight"] == "output head"
    assert [tensor.name for tensor in coverage.targets] == ["model.body.weight"]


def test_one_head_of_many_rows_is_a_head_and_several_are_layers():
    layers = {"embed": nn.Embedding(12, 4), "up": linear(12, 4), "down": linear(4, 12)}
    assert list(ParameterIndex(build(layers)).select(None, None)[0]) == ["down.weight"]
    assert len(ParameterIndex(build(layers | {"up2": linear(12, 4)})).select(None, None)[0]) == 3


def test_a_tied_embedding_is_named_by_the_other_name():
    model = build({"decoder": linear(12, 4), "embed": nn.Embedding(12, 4), "layer": linear(4, 4)})
    model.embed.weight = model.decoder.weight
    coverage = ParameterIndex(model).select(None, None)[1]
    assert reasons(coverage)["decoder.weight"] == "tied to the embedding 'embed.weight'"
    assert [tensor.name for tensor in coverage.targets] == ["layer.weight"]


TABLE = """\
                               dtype    tensors  weights  share  largest
targets                        float32        1      800  66.7%  layer.weight (20x40)
embedding                      float32        1      320  26.7%  embed.weight (8x40)
ignored by 'out'               float32        1       60   5.0%  out.weight (3x20)
norm, bias, scale or constant  float32        1       20   1.7%  layer.bias (20)
targets are 66.7% of the weights, 67.8% of those in matrices"""


def test_printing_a_pruner_shows_schedule_targets_share_and_what_is_left_out():
    model = build({"embed": nn.Embedding(8, 40), "layer": linear(20, 40, bias=True), "out": linear(3, 20)})
    pruner = schedule(model, ignore="out")
    coverage = pruner.coverage()
    assert str(coverage) == TABLE and str(coverage).isascii()
    assert coverage.share_of_model == 800 / 1200 and coverage.share_of_matrices == 800 / 1180
    assert [tensor.name for tensor in coverage.largest_left_out(2)] == ["embed.weight", "out.weight"]
    assert str(pruner).endswith(TABLE) and "OneShot(sparsity=0.5" in str(pruner)


def test_names_with_control_characters_are_shown_escaped():
    infos = [
        TensorInfo(FILE, "a\x1b[31m.weight", "F32", (4, 4), 0, 64),
        TensorInfo(FILE, "b\n.weight", "I64", (4, 4), 0, 128),
    ]
    table = str(TensorIndex(infos).choose(None, None)[1])
    assert r"a\x1b[31m.weight (4x4)" in table and r"b\n.weight (4x4)" in table and len(table.splitlines()) == 4


def gap_of(model: nn.Module, *, parameters=None, **options) -> str:
    """Return what building a scheduler warns of, or an empty string."""
    optimizer = torch.optim.SGD(model.parameters() if parameters is None else parameters, lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        GMPScheduler(model, optimizer, schedules.OneShot(0.5), **options)
    assert {Path(warning.filename).name for warning in caught} <= {"test_coverage.py"}
    return "; ".join(str(warning.message) for warning in caught)


def large_and_small() -> nn.Module:
    tables = {f"embed{i}": nn.Embedding(10 * i, 8) for i in range(1, 5)}
    return build(tables | {"layer": linear(8, 8), "other": linear(8, 8)})


def test_less_than_half_of_the_matrices_is_worth_a_warning():
    warning = gap_of(large_and_small())
    assert "got 13.8%" in warning and "targets='*'" in warning
    for i, name in enumerate(["embed4.weight", "embed3.weight", "embed2.weight"]):
        assert f"'{name}' (embedding)" in warning, i
    assert "embed1" not in warning
    assert not gap_of(large_and_small(), targets="*")
    assert not gap_of(large_and_small(), targets="layer")


def test_a_warning_does_not_advise_what_would_be_refused():
    model = build({"layer": linear(4, 4), "spectral": linear(8, 8).to(torch.complex64)})
    assert "'spectral.weight' (complex); they cannot be pruned as they are" in gap_of(model)


def test_names_and_shapes_are_shown_shortened():
    assert shown_names(["a", "b\x07", "c"]) == r"'a', 'b\x07', 'c'"
    assert shown_names(["a", "b", "c", "d", "e"]) == "'a', 'b', 'c' and 2 others"
    assert [shown_shape(shape) for shape in ((3, 1, 2), (3,), ())] == ["3x1x2", "3", "scalar"]


def test_what_was_ignored_is_not_missed():
    model = build({f"layer{i}": linear(8, 8) for i in range(4)})
    assert not gap_of(model, ignore=["layer0", "layer1", "layer2"])


@pytest.mark.parametrize("targets", [None, "*", nn.Linear, "layers"])
def test_many_frozen_parameters_are_worth_a_warning_and_few_are_not(targets):
    model = build({f"layers.{i}": linear(8, 8) for i in range(4)})
    for i in range(3):
        model.get_submodule(f"layers.{i}").requires_grad_(False)
        parameters = [p for p in model.parameters() if p.requires_grad]
        warning = gap_of(model, parameters=parameters, targets=targets)
        assert ("'layers.0.weight' (frozen)" in warning and "requires_grad" in warning) is (i == 2)
    unknown = [model.get_submodule("layers.3").weight]
    for i in range(3):
        model.get_submodule(f"layers.{i}").requires_grad_(True)
    assert "'layers.0.weight' (not in the optimizer)" in gap_of(model, parameters=unknown, targets=targets)
    # Nobody has meant the others.
    assert not gap_of(model, parameters=unknown, targets="layers.3")


def test_complex_weights_are_left_out_or_refused_at_construction():
    model = build({"spectral": linear(4, 4).to(torch.complex64), "layer": linear(4, 4)})
    pruner = schedule(model)
    assert list(pruner.masks) == ["layer.weight"]
    assert reasons(pruner.coverage())["spectral.weight"] == "complex"
    for refused, options in ((model, {"targets": "spectral.weight"}), (build({"spectral": model.spectral}), {})):
        with pytest.raises(DTypeError, match=r"expected real weights, got 'spectral\.weight' of complex64"):
            schedule(refused, **options)
    with pytest.raises(TargetError, match="is ignored by 'layer'"):
        schedule(model, ignore="layer")


def test_emptied_layers():
    assert emptied_layers(["a", "b", "c"], [4, 1, 9], [3, 1, 9]) == ["b", "c"]


@pytest.mark.parametrize(
    ("sparsity", "options", "names"),
    [
        (0.95, {}, "'tiny.weight', 'thin.weight'"),
        (0.9, {}, ""),
        (0.5, {"overrides": {"large": 1.0}}, "'large.weight'"),
        (0.95, {"distribution": "erk"}, ""),
        (0.95, {"scope": "global"}, ""),
        (1.0, {"scope": "global"}, "'tiny.weight', 'thin.weight', 'large.weight'"),
        (1.0, {}, "'tiny.weight', 'thin.weight', 'large.weight'"),
        (0.95, {"ignore": ["tiny", "thin"]}, ""),
    ],
)
def test_layers_that_the_schedule_empties_are_named(sparsity, options, names):
    model = build({"tiny": linear(1, 8), "thin": linear(2, 4), "large": linear(40, 40)})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        schedule(model, sparsity, **options)
    assert [str(warning.message).partition(" prunes all of ")[2].partition(";")[0] for warning in caught] == (
        [names] if names else []
    )


def test_the_command_line_says_what_is_covered_by_dtype_and_reason(tmp_path):
    model, targets = TREES["gpt_oss"]()
    model.register_buffer("packed_blocks", torch.zeros(4, 900, dtype=torch.uint8))
    model.register_buffer("old_weight", torch.zeros(30, 30).to(torch.float8_e4m3fn))
    save_model(model, str(tmp_path / "in.safetensors"))
    arguments = ["prune", str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors"), "--sparsity", "0.5"]
    for options in (["--dry-run"], []):
        done = CliRunner(env={"COLUMNS": "160"}).invoke(cli.app, [*arguments, *options, "--ignore", "*.q_proj"])
        assert done.exit_code == 0, done.output
        rows = [line.split() for line in done.output.splitlines()]
        for row in (
            ["targets", "F32", str(len(targets) - 1), "8,448"],
            ["quantized", "U8", "1", "3,600"],
            ["quantized", "F8_E4M3", "1", "900"],
            ["ignored", "by", "'*.q_proj'", "F32", "1", "256"],
            ["embedding", "F32", "1", "1,536"],
            ["output", "head", "F32", "1", "1,536"],
            ["router", "F32", "1", "64"],
        ):
            assert row in [found[: len(row)] for found in rows], row
        assert "targets are 50.5% of the weights" in done.output


def test_the_command_line_names_tensors_without_a_weight_left(tmp_path):
    small, large = torch.full((2, 2), 0.1), torch.ones(8, 8)
    save_file({"small.weight": small, "large.weight": large}, tmp_path / "in.safetensors")
    arguments = ["prune", str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors"), "--scope", "global"]
    done = CliRunner().invoke(cli.app, [*arguments, "--sparsity", "0.5"])
    assert "no weight is left in 'small.weight'\n" in done.output
    done = CliRunner().invoke(cli.app, [*arguments, "--sparsity", "0.02", "--force"])
    assert "no weight is left" not in done.output and done.exit_code == 0
    done = CliRunner().invoke(cli.app, [*arguments, "--force", "--dry-run", "--scope", "layer", "--sparsity", "0.99"])
    assert "no weight is left in 'small.weight'\n" in done.output


def test_entries_for_checkpoints_mean_what_they_mean_for_models():
    model, _ = TREES["gpt_oss"]()
    tensors = tensors_of(model)
    for entry in ("model.layers.0.mlp", "model", "*experts", "re:.*mlp$", "lm_head", "*", "model.layers.0.self_attn"):
        expected = set(ParameterIndex(model).select(entry, None)[0])
        assert set(TensorIndex(tensors).choose([entry], None)[0]) == expected, entry


def test_a_checkpoint_refuses_what_cannot_be_pruned_by_its_reason():
    infos = [
        TensorInfo(FILE, "layer.weight", "F32", (4, 4), 0, 64),
        TensorInfo(FILE, "layer.bias", "F32", (4,), 64, 16),
        TensorInfo(FILE, "packed.qweight", "I32", (8, 8), 80, 256),
        TensorInfo(FILE, "packed.scales", "F16", (2, 8), 336, 32),
        TensorInfo(FILE, "waves.weight", "C64", (8, 8), 368, 512),
    ]
    assert TensorIndex(infos).choose(["*"], None)[0] == ["layer.weight"]
    for entry, reason in [("packed", "'packed.qweight' of dtype I32.*quantized"), ("waves", "complex")]:
        with pytest.raises(TargetError, match=reason):
            TensorIndex(infos).choose([entry], None)
    with pytest.raises(DTypeError, match=r"got 'packed\.qweight' of I32; prune before quantizing"):
        TensorIndex(infos[1:]).choose(None, None)
    with pytest.raises(TargetError, match=r"did you mean 'layer\.weight'$"):
        TensorIndex(infos).choose(["packed.qweigth"], None)


def test_layers_of_no_size_are_left_out():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about the initialization of nothing
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 0))
    pruner = schedule(model)
    assert list(pruner.masks) == ["0.weight"]
    assert reasons(pruner.coverage())["1.weight"] == "empty"
