"""Parameters that names, globs, regular expressions and module types reach."""

import re

import pytest
import torch
from torch import nn

from gmp_kernels.errors import DTypeError, TargetError
from gmp_kernels.model.targets import ParameterIndex


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.fc = nn.Linear(3, 3)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.layer1 = Block()
        self.layer2 = Block()
        self.Layer2 = nn.Conv1d(3, 3, 1)
        self.scale = nn.Parameter(torch.ones(3, 3))
        self.head = nn.Linear(3, 4)


DEFAULT = ["layer1.conv", "layer1.fc", "layer2.conv", "layer2.fc", "Layer2", "head"]


def select(targets=None, ignore=None, model=None):
    return list(ParameterIndex(Net() if model is None else model).select(targets, ignore)[0])


def weights(*modules):
    return [f"{module}.weight" for module in modules]


def test_default_is_the_weights_of_linear_and_conv():
    assert select() == weights(*DEFAULT)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("head.weight", ["head.weight"]),
        ("head.bias", ["head.bias"]),
        ("head", ["head.weight"]),
        ("scale", ["scale"]),
        ("embed", ["embed.weight"]),
        ("layer1.norm.weight", ["layer1.norm.weight"]),
        ("layer1", weights("layer1.conv", "layer1.fc")),
        (["head", "layer1.fc"], weights("layer1.fc", "head")),
        ("layer?.conv", weights("layer1.conv", "layer2.conv")),
        ("layer[2]*", weights("layer2.conv", "layer2.fc")),
        ("*.fc.weight", weights("layer1.fc", "layer2.fc")),
        ("*", weights("embed", *DEFAULT)),
        ("layer?", weights("layer1.conv", "layer1.fc", "layer2.conv", "layer2.fc")),
        ("re:layer[12]$", weights("layer1.conv", "layer1.fc", "layer2.conv", "layer2.fc")),
        ("re:layer1", weights("layer1.conv", "layer1.fc")),
        ("re:.*fc$", weights("layer1.fc", "layer2.fc")),
        ("re:ayer", None),
        (nn.Linear, weights("layer1.fc", "layer2.fc", "head")),
        (nn.modules.conv._ConvNd, weights("layer1.conv", "layer2.conv", "Layer2")),
        (nn.Embedding, ["embed.weight"]),
        (Block, weights("layer1.conv", "layer1.fc", "layer2.conv", "layer2.fc")),
        ([nn.Conv1d, "head"], weights("Layer2", "head")),
    ],
)
def test_targets(targets, expected):
    if expected is None:
        with pytest.raises(TargetError):
            select(targets)
    else:
        assert select(targets) == expected


@pytest.mark.parametrize(
    ("ignore", "gone"),
    [
        ("head", ["head"]),
        ("layer2", ["layer2.conv", "layer2.fc"]),
        ("*.conv", ["layer1.conv", "layer2.conv"]),
        (["re:layer", nn.Conv1d], ["layer1.conv", "layer1.fc", "layer2.conv", "layer2.fc", "Layer2"]),
        # Present in the model though never a target: no mistake.
        ([nn.BatchNorm2d, "*.bias"], []),
    ],
)
def test_ignore(ignore, gone):
    assert select(ignore=ignore) == weights(*(name for name in DEFAULT if name not in gone))


@pytest.mark.parametrize(
    ("targets", "ignore", "message"),
    [
        ("layer1.cnv.weight", None, "did you mean 'layer1.conv.weight'"),
        (["head", "hed"], None, "'hed', which matches nothing; did you mean 'head'"),
        ("layer3.*", None, "layer3"),
        (nn.Conv3d, None, "module types here: Block, Conv1d, Conv2d, Embedding, Linear, Net$"),
        (None, nn.Conv3d, "ignore: .*module types here: BatchNorm2d, Block, Conv1d, Conv2d, Embedding, Linear, Net$"),
        (None, "heads", "ignore: .*did you mean 'head'"),
        ("HEAD", None, "HEAD"),
        ("*.bias", None, "two or more dimensions.*such as 'layer1.conv.bias'"),
        (nn.BatchNorm2d, None, "such as 'layer1.norm.weight'"),
        ("layer1.norm", None, "such as 'layer1.norm.weight'"),
        ("re:(", None, "regular expression"),
        (Net().head, None, "of type Linear; .* not the object"),
        ([Net().head], None, "of type Linear; .* not the object"),
        (nn.Sequential(nn.Linear(3, 4)), None, "of type Sequential"),
        (Net().head.weight, None, "of type Parameter"),
        (3, None, "of type int"),
        ([3], None, "of type int"),
        ([], None, "at least one parameter"),
        ("head", nn.Linear, "'head.weight' is ignored by Linear, for one: drop that entry"),
    ],
)
def test_what_matches_nothing_is_named(targets, ignore, message):
    with pytest.raises(TargetError, match=message):
        select(targets, ignore)


def test_model_without_prunable_weights():
    with pytest.raises(TargetError, match="at least one parameter"):
        select(model=nn.LayerNorm(4))


def test_bare_linear():
    assert select(model=nn.Linear(2, 2)) == ["weight"]


def test_lazy_parameters_need_a_forward_pass():
    with pytest.raises(TargetError, match="run a forward pass first"):
        select(model=nn.LazyLinear(4))


def tied() -> nn.Module:
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 6))
    model[2].weight = model[0].weight
    return model


def test_tied_parameter_is_one_under_its_first_name():
    assert select(model=tied()) == ["1.weight"]
    assert select("2", model=tied()) == ["0.weight"]
    assert select(["0", "2.weight"], model=tied()) == ["0.weight"]


@pytest.mark.parametrize("ignore", ["0", "2", nn.Embedding])
def test_tied_parameter_is_ignored_under_any_name(ignore):
    assert select("*", ignore=ignore, model=tied()) == ["1.weight"]


def test_names_are_the_same_compiled_and_plain():
    model = Net()
    names = select(model=model)
    model.layer1.fc = torch.compile(model.layer1.fc, backend="eager")
    assert select(model=torch.compile(model, backend="eager")) == names
    assert select("head", model=torch.compile(model, backend="eager")) == ["head.weight"]


class Mixer(nn.Module):
    """A module with weights of every kind, some of them deep in it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, kdim=4, vdim=6)
        self.rnn = nn.LSTM(8, 6, proj_size=2, bidirectional=True)
        self.cell = nn.GRUCell(8, 3)
        self.experts = nn.ParameterDict({"up": nn.Parameter(torch.randn(2, 8, 4))})
        self.table = nn.Embedding(7, 5)
        self.norm = nn.LayerNorm([4, 4])


MIXED = [
    *(f"mixer.attention.{name}_proj_weight" for name in "qkv"),
    "mixer.attention.out_proj.weight",
    *(f"mixer.rnn.weight_{kind}_l0{way}" for way in ("", "_reverse") for kind in ("ih", "hh", "hr")),
    *("mixer.cell.weight_ih", "mixer.cell.weight_hh", "mixer.experts.up", "mixer.table.weight"),
]


@pytest.mark.parametrize("entry", ["mixer", Mixer, "mix*", "re:mixer$", "mixer.*", nn.Module])
def test_a_module_by_any_word_is_everything_in_it_but_norms_and_biases(entry):
    model = nn.ModuleDict({"mixer": Mixer(), "head": nn.Linear(2, 2)})
    others = ["head.weight"] if entry is nn.Module else []
    assert select(entry, model=model) == MIXED + others
    # In ignore= and overrides= it is all of it.
    below = {name for name, _ in model.named_parameters() if entry is nn.Module or name.startswith("mixer")}
    assert set(ParameterIndex(model).find("overrides", entry)) == below
    if not others:
        assert select(ignore=entry, model=model) == ["head.weight"]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (nn.MultiheadAttention, MIXED[:4]),
        (nn.RNNBase, MIXED[4:10]),
        (nn.GRUCell, MIXED[10:12]),
        (nn.ParameterDict, ["mixer.experts.up"]),
        ("mixer.rnn", MIXED[4:10]),
        ("*.rnn", MIXED[4:10]),
        ("*weight_h?_l0", ["mixer.rnn.weight_hh_l0", "mixer.rnn.weight_hr_l0"]),
    ],
)
def test_weights_that_are_not_called_weight(entry, expected):
    assert select(entry, model=nn.ModuleDict({"mixer": Mixer()})) == expected


def test_a_name_is_never_taken_for_a_pattern():
    model = nn.Module()
    for name in ("conv[3x3]", "conv3", "re:conv", "*"):
        model.add_module(name, nn.Conv2d(2, 2, 3))
    assert select("conv[3x3]", model=model) == ["conv[3x3].weight"]
    assert select("conv[3x3].weight", model=model) == ["conv[3x3].weight"]
    assert select("re:conv", model=model) == ["re:conv.weight"]
    assert select("*", model=model) == ["*.weight"]
    assert select(ignore="*", model=model) == ["conv[3x3].weight", "conv3.weight", "re:conv.weight"]
    assert select("conv[3]", model=model) == ["conv3.weight"]


def frozen_net() -> tuple[Net, torch.optim.Optimizer]:
    """Two blocks; the first is frozen, and the head is not given to the optimizer."""
    model = Net()
    model.layer1.requires_grad_(False)
    return model, torch.optim.SGD([p for n, p in model.named_parameters() if p.requires_grad and "head" not in n], 0.1)


def test_what_nothing_would_hold_at_zero_is_left_out_unless_it_is_named():
    index = ParameterIndex(*frozen_net())
    names, coverage = index.select(None, None)
    assert list(names) == weights("layer2.conv", "layer2.fc", "Layer2")
    reasons = {tensor.name: tensor.reason for tensor in coverage.left_out}
    assert reasons["layer1.conv.weight"] == "frozen"
    assert reasons["head.weight"] == "not in the optimizer"
    assert list(index.select(["*.conv", nn.Linear], None)[0]) == weights("layer2.conv", "layer2.fc")
    for entry, name in [("head.weight", "head.weight"), ("layer1.fc.weight", "layer1.fc.weight")]:
        with pytest.raises(TargetError, match=f"the optimizer's parameters, got '{name}'"):
            index.select(entry, None)
    for entry in ("head", "layer1", "layer1*"):
        with pytest.raises(TargetError, match=r"can be pruned, got .* is (frozen|not in the optimizer)"):
            index.select(entry, None)


def test_a_frozen_parameter_of_the_optimizer_is_pruned_if_it_is_named():
    model = Net()
    model.head.requires_grad_(False)
    index = ParameterIndex(model, torch.optim.SGD(model.parameters(), 0.1))
    assert "head.weight" not in index.select(None, None)[0]
    assert list(index.select("head.weight", None)[0]) == ["head.weight"]


def test_advice_names_nothing_that_would_be_refused():
    model, optimizer = frozen_net()
    index = ParameterIndex(model, optimizer)
    for targets, ignore in [("hed", None), ("layer1.cnv", None), ("head", None), (nn.Conv3d, None), ([], None)]:
        with pytest.raises(TargetError) as refusal:
            index.select(targets, ignore)
        advice = str(refusal.value).rpartition(";")[2]
        for name in re.findall("'([^']+)'", advice):
            assert list(index.select(name, None)[0]), name
        if "types" in advice:
            for kind in advice.rpartition(":")[2].split(","):
                assert index.select(globals().get(kind.strip()) or getattr(nn, kind.strip()), None)[0]


@pytest.mark.parametrize(
    ("dtype", "reason", "message"),
    [
        (
            torch.complex64,
            "complex",
            "real weights, got 'head.weight' of complex64; leave it out, or hold its real",
        ),
        (torch.float8_e4m3fn, "quantized", "got 'head.weight' of float8_e4m3fn; prune before quantizing"),
        (torch.uint8, "quantized", "got 'head.weight' of uint8; prune before quantizing"),
    ],
)
def test_dtypes_without_an_order_are_left_out_and_refused_by_name(dtype, reason, message):
    model = Net()
    model.head.weight = nn.Parameter(model.head.weight.detach().to(dtype), requires_grad=False)
    names, coverage = ParameterIndex(model).select(None, None)
    assert "head.weight" not in names
    assert {tensor.reason for tensor in coverage.left_out if tensor.name == "head.weight"} == {reason}
    with pytest.raises(DTypeError, match=message):
        select("head.weight", model=model)
    with pytest.raises(TargetError, match=f"'head.weight' of dtype .* is {reason}"):
        select("head", model=model)


def test_tensors_that_keep_their_weights_elsewhere_are_refused_by_name():
    class Packed(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            raise NotImplementedError

    model = Net()
    packed = torch.Tensor._make_wrapper_subclass(Packed, (4, 3))
    del model.head.weight
    model.head._parameters["weight"] = packed
    assert "head.weight" not in select(model=model)
    with pytest.raises(TargetError, match=r"'head\.weight', which is a Packed"):
        select("head.weight", model=model)
