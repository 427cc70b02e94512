"""Coverage: which weights of a model are pruned by default, what is left out and why, and what is said about it."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from model_trees import TREES
from safetensors.torch import save_file, save_model
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from tree_building import bare, build, linear, weights
from typer.testing import CliRunner

from gmp_kernels import GMPScheduler, cli, schedules
from gmp_kernels.checkpoints.files import DTYPES, TensorInfo
from gmp_kernels.checkpoints.targets import cover_tensors, select_tensors
from gmp_kernels.coverage import Coverage
from gmp_kernels.distributions import emptied_layers
from gmp_kernels.errors import DTypeError, TargetError
from gmp_kernels.names import plain_name
from gmp_kernels.targets import ParameterIndex

NAMES = {dtype: name for name, dtype in DTYPES.items()} | {torch.int64: "I64", torch.uint8: "U8"}


def schedule(model: nn.Module, sparsity: float = 0.5, **options) -> GMPScheduler:
    return GMPScheduler(model, torch.optim.SGD(model.parameters(), lr=0.1), schedules.OneShot(sparsity), **options)


def tensors_of(model: nn.Module) -> list[TensorInfo]:
    """What a checkpoint of the model holds: tied tensors once, under the name the model knows them by."""
    first = {parameter: name for name, parameter in model.named_parameters()}
    held = {first.get(tensor, name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    return [TensorInfo(name, NAMES[t.dtype], tuple(t.shape), 0, t.nbytes) for name, t in held.items()]


def reasons(coverage: Coverage) -> dict[str, str]:
    return {tensor.name: tensor.reason for tensor in coverage.left_out}


@pytest.mark.parametrize("make", TREES.values(), ids=TREES)
def test_default_targets_of_models_people_train(make):
    model, targets = make()
    assert list(ParameterIndex(model).select(None, None).parameters) == targets


@pytest.mark.parametrize("make", TREES.values(), ids=TREES)
def test_a_checkpoint_has_the_targets_of_its_model(make):
    model, targets = make()
    found = select_tensors(tensors_of(model), None, None)
    assert {plain_name(tensor.name) for tensor in found} == set(targets)


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
    assert reasons(ParameterIndex(model).select(None, None).coverage)[tensor] == reason
    assert reasons(cover_tensors(tensors_of(model), None, None))[tensor] == reason


def test_the_types_of_modules_decide_where_names_mislead():
    class Lookup(nn.Embedding):
        pass

    lookups = {"lookup": nn.Embedding(9, 3), "codes": Lookup(7, 3), "bags": nn.EmbeddingBag(9, 3)}
    model = build({"embed_in": linear(4, 3), "norm": linear(3, 4), "ln": linear(4, 3)} | lookups)
    assert list(ParameterIndex(model).select(None, None).parameters) == weights("embed_in", "norm", "ln")


class WithHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = nn.Linear(4, 4), nn.Linear(4, 9)

    def get_output_embeddings(self) -> nn.Module:
        return self.out


def test_a_model_that_knows_its_output_embeddings_is_asked():
    coverage = ParameterIndex(nn.ModuleDict({"model": WithHead()})).select(None, None).coverage
    assert reasons(coverage)["model.out.weight"] == "output head"
    assert [tensor.name for tensor in coverage.targets] == ["model.body.weight"]


def test_one_head_of_many_rows_is_a_head_and_several_are_layers():
    layers = {"embed": nn.Embedding(12, 4), "up": linear(12, 4), "down": linear(4, 12)}
    assert list(ParameterIndex(build(layers)).select(None, None).parameters) == ["down.weight"]
    assert len(ParameterIndex(build(layers | {"up2": linear(12, 4)})).select(None, None).parameters) == 3


def test_a_tied_embedding_is_named_by_the_other_name():
    model = build({"decoder": linear(12, 4), "embed": nn.Embedding(12, 4), "layer": linear(4, 4)})
    model.embed.weight = model.decoder.weight
    coverage = ParameterIndex(model).select(None, None).coverage
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
    infos = [TensorInfo("a\x1b[31m.weight", "F32", (4, 4), 0, 64), TensorInfo("b\n.weight", "I64", (4, 4), 0, 128)]
    table = str(cover_tensors(infos, None, None))
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


PARAMETRIZED = {
    "weight_norm": (parametrizations.weight_norm, "0.parametrizations.weight.original1"),
    "spectral_norm": (parametrizations.spectral_norm, "0.parametrizations.weight.original"),
    "old weight_norm": (nn.utils.weight_norm, "0.weight_v"),
    "old spectral_norm": (nn.utils.spectral_norm, "0.weight_orig"),
    "torch prune": (lambda layer: prune.random_unstructured(layer, "weight", 0.1), "0.weight_orig"),
    "torch prune twice": (
        lambda layer: prune.identity(prune.random_unstructured(layer, "weight", 0.1), "weight"),
        "0.weight_orig",
    ),
    "both": (
        lambda layer: parametrizations.spectral_norm(parametrizations.weight_norm(layer)),
        "0.parametrizations.weight.original1",
    ),
}


def parametrized(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(PARAMETRIZED[kind][0](nn.Linear(64, 16)), nn.ReLU(), nn.Linear(16, 4))


@pytest.mark.parametrize("kind", PARAMETRIZED)
def test_zeros_of_what_a_weight_is_computed_from_are_zeros_of_the_weight(kind):
    model, name = parametrized(kind), PARAMETRIZED[kind][1]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    pruner = GMPScheduler(model, optimizer, schedules.Linear(0.2, 0.5, 1, 3))
    assert list(pruner.masks) == [name, "2.weight"]
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(8, 64)).square().sum().backward()
        optimizer.step()
        pruner.step()
        pruned = ~pruner.masks[name].to_bool()
        # Before the next forward pass as well as after it.
        assert not model[0].weight[pruned].any() and model[0].weight.isfinite().all()
    assert int(pruned.sum()) == 512
    model(torch.randn(8, 64))
    assert not model[0].weight[pruned].any()
    restored = parametrized(kind)
    other = GMPScheduler(restored, torch.optim.Adam(restored.parameters()), schedules.Linear(0.2, 0.5, 1, 3))
    restored.load_state_dict(model.state_dict())
    other.load_state_dict(pruner.state_dict())
    assert not restored[0].weight[pruned].any()


@pytest.mark.parametrize("kind", PARAMETRIZED)
@pytest.mark.parametrize("targets", ["0.weight", "0", nn.Linear, "*.weight", "re:0", ["0.weight", "2"]])
def test_a_computed_weight_can_be_meant_by_its_own_name(kind, targets):
    names = list(ParameterIndex(parametrized(kind)).select(targets, None).parameters)
    assert names[0] == PARAMETRIZED[kind][1] and len(names) == (1 if targets in ("0.weight", "0", "re:0") else 2)


@pytest.mark.parametrize("kind", PARAMETRIZED)
def test_a_checkpoint_with_computed_weights_has_the_targets_of_its_model(kind):
    model = parametrized(kind)
    chosen = {tensor.name for tensor in select_tensors(tensors_of(model), None, None)}
    assert chosen == set(ParameterIndex(model).select(None, None).parameters)
    assert [t.name for t in select_tensors(tensors_of(model), ["0.weight"], None)] == [PARAMETRIZED[kind][1]]


class Symmetric(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.triu() + weight.triu(1).T


class LowRank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = bare(1, 8), bare(8, 1)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.up @ self.down


@pytest.mark.parametrize(
    ("wrap", "kind"),
    [
        (parametrizations.orthogonal, "Orthogonal"),
        (lambda layer: parametrize.register_parametrization(layer, "weight", Symmetric()), "Symmetric"),
        (lambda layer: parametrize.register_parametrization(layer, "weight", LowRank()), "LowRank"),
        (
            lambda layer: parametrize.register_parametrization(
                parametrizations.spectral_norm(layer), "weight", Symmetric()
            ),
            "Symmetric",
        ),
    ],
)
def test_other_parametrizations_are_left_out_and_refused_by_name(wrap, kind):
    model = nn.Sequential(wrap(nn.Linear(8, 8)), nn.Linear(8, 4))
    names, coverage = ParameterIndex(model).select(None, None)
    assert list(names) == ["1.weight"]
    matrices = [tensor for tensor in coverage.left_out if len(tensor.shape) == 2]
    assert matrices and {tensor.reason for tensor in matrices} == {f"parametrized by {kind}"}
    for name in ("0.weight", "0.parametrizations.weight.original"):
        with pytest.raises(TargetError, match=f"which is parametrized by {kind}; leave it out, or remove"):
            ParameterIndex(model).select(name, None)
    with pytest.raises(TargetError, match=f"is parametrized by {kind}"):
        ParameterIndex(model).select("0", None)
    assert list(ParameterIndex(model).select("*", None).parameters) == ["1.weight"]
    if kind == "Orthogonal":
        assert [tensor.name for tensor in select_tensors(tensors_of(model), None, None)] == ["1.weight"]


@pytest.mark.parametrize("kind", ["weight_norm", "old weight_norm"])
def test_lengths_of_weight_norm_are_no_targets(kind):
    model = parametrized(kind)
    lengths = PARAMETRIZED[kind][1].replace("original1", "original0").replace("_v", "_g")
    assert lengths not in ParameterIndex(model).select("*", None).parameters
    with pytest.raises(TargetError, match="a length that weight_norm keeps apart"):
        ParameterIndex(model).select(lengths, None)


@pytest.mark.parametrize("kind", ["weight_norm", "old weight_norm"])
def test_a_row_of_weight_norm_that_loses_every_weight_is_named(kind):
    model, name = parametrized(kind), PARAMETRIZED[kind][1]
    with torch.no_grad():
        model.get_parameter(name)[3] *= 1e-3
        model.get_parameter(name)[5] *= 1e-3
    pruner = schedule(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=f"got 2 without one in '{name}'.*remove the weight_norm before pruning"):
            pruner.step()
    # As an error, it comes when everything else is done.
    assert len(pruner.history) == 1 and pruner.masks[name].sparsity == 0.5


def test_the_power_iteration_of_spectral_norm_is_left_alone():
    model = parametrized("old spectral_norm")
    before = model[0].weight_u.clone()
    schedule(model).step()
    assert torch.equal(model[0].weight_u, before)


def test_recurrent_layers_under_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.utils.weight_norm(nn.LSTM(8, 6), "weight_hh_l0")
    pruner = schedule(model)
    assert list(pruner.masks) == ["weight_ih_l0", "weight_hh_l0_v"]
    pruner.step()
    assert (model.weight_hh_l0 == 0).float().mean() == 0.5


def test_complex_weights_are_left_out_or_refused_at_construction():
    model = build({"spectral": linear(4, 4).to(torch.complex64), "layer": linear(4, 4)})
    pruner = schedule(model)
    assert list(pruner.masks) == ["layer.weight"]
    assert reasons(pruner.coverage())["spectral.weight"] == "complex"
    for refused, options in ((model, {"targets": "spectral.weight"}), (build({"spectral": model.spectral}), {})):
        with pytest.raises(DTypeError, match=r"expected real weights, got 'spectral\.weight' of torch\.complex64"):
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
        expected = set(ParameterIndex(model).select(entry, None).parameters)
        assert {tensor.name for tensor in select_tensors(tensors, [entry], None)} == expected, entry


def test_a_checkpoint_refuses_what_cannot_be_pruned_by_its_reason():
    infos = [
        TensorInfo("layer.weight", "F32", (4, 4), 0, 64),
        TensorInfo("layer.bias", "F32", (4,), 64, 16),
        TensorInfo("packed.qweight", "I32", (8, 8), 80, 256),
        TensorInfo("packed.scales", "F16", (2, 8), 336, 32),
        TensorInfo("waves.weight", "C64", (8, 8), 368, 512),
    ]
    assert [tensor.name for tensor in select_tensors(infos, ["*"], None)] == ["layer.weight"]
    for entry, reason in [("packed", "'packed.qweight' of dtype I32.*quantized"), ("waves", "complex")]:
        with pytest.raises(TargetError, match=reason):
            select_tensors(infos, [entry], None)
    with pytest.raises(TargetError, match=r"heads of language models; 'waves\.weight' is left out: complex$"):
        select_tensors(infos[1:], None, None)
    with pytest.raises(TargetError, match=r"there are e\.g\. 'layer\.weight'$"):
        select_tensors(infos, ["packed.qweigth"], None)


def test_layers_of_no_size_are_left_out():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about the initialization of nothing
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 0))
    pruner = schedule(model)
    assert list(pruner.masks) == ["0.weight"]
    assert reasons(pruner.coverage())["1.weight"] == "empty"
