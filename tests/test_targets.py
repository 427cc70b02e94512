"""Parameters that names, globs, regular expressions and module types reach."""

import pytest
import torch
from torch import nn

from gmp_kernels.errors import TargetError
from gmp_kernels.targets import ParameterIndex


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
        self.head = nn.Linear(3, 5)


DEFAULT = ["layer1.conv", "layer1.fc", "layer2.conv", "layer2.fc", "Layer2", "head"]


def select(targets=None, ignore=None, model=None):
    return list(ParameterIndex(Net() if model is None else model).select(targets, ignore))


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
        ("layer1.norm", ["layer1.norm.weight"]),
        ("layer1", weights("layer1.conv", "layer1.fc")),
        (["head", "layer1.fc"], weights("layer1.fc", "head")),
        ("layer?.conv", weights("layer1.conv", "layer2.conv")),
        ("layer[2]*", weights("layer2.conv", "layer2.fc")),
        ("*.fc.weight", weights("layer1.fc", "layer2.fc")),
        ("*", ["scale", *weights("embed", *DEFAULT)]),
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
        (nn.Conv3d, None, "module types here: BatchNorm2d, Block, Conv1d, Conv2d, Embedding, Linear, Net"),
        (None, "heads", "ignore: .*did you mean 'head'"),
        ("HEAD", None, "HEAD"),
        ("*.bias", None, "two or more dimensions"),
        (nn.BatchNorm2d, None, "layer1.norm.weight"),
        ("re:(", None, "regular expression"),
        (Net().head, None, "not the object"),
        ([3], None, "of type int"),
        ([], None, "at least one parameter"),
        ("head", nn.Linear, "at least one parameter"),
    ],
)
def test_what_matches_nothing_is_named(targets, ignore, message):
    with pytest.raises(TargetError, match=message):
        select([targets] if isinstance(targets, nn.Module) else targets, ignore)


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
    assert select(model=tied()) == ["0.weight", "1.weight"]
    assert select("2", model=tied()) == ["0.weight"]
    assert select(["0", "2.weight"], model=tied()) == ["0.weight"]


@pytest.mark.parametrize("ignore", ["0", "2", nn.Embedding])
def test_tied_parameter_is_ignored_under_any_name(ignore):
    assert select(ignore=ignore, model=tied()) == ["1.weight"]


def test_names_are_the_same_compiled_and_plain():
    model = Net()
    names = select(model=model)
    model.layer1.fc = torch.compile(model.layer1.fc, backend="eager")
    assert select(model=torch.compile(model, backend="eager")) == names
    assert select("head", model=torch.compile(model, backend="eager")) == ["head.weight"]
