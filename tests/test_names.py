"""Names of parameters under wrappers, which are those of the model inside."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DataParallel, DistributedDataParallel

from gmp_kernels.model.names import named_modules, named_parameters, plain_name


class Net(nn.Module):
    """A layer called "module" in front of another one, so that no name can be told by its words."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3))
        self.head = nn.Linear(3, 2, bias=False)
        self.head.register_parameter("empty", None)
        self.head.register_buffer("nothing", None)


PARAMETERS = ["module.0.weight", "module.1.weight", "module.1.bias", "head.weight"]
BUFFERS = ["module.1.running_mean", "module.1.running_var", "module.1.num_batches_tracked"]


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


def inside(wrap: Callable[[nn.Module], nn.Module], name: str) -> Callable[[nn.Module], nn.Module]:
    """Wrap the submodule of this name alone."""

    def apply(model: nn.Module) -> nn.Module:
        setattr(model, name, wrap(getattr(model, name)))
        return model

    return apply


@pytest.fixture(autouse=True, scope="module")
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


WRAPPERS: dict[str, list[Callable[[nn.Module], nn.Module]]] = {
    "nothing": [],
    "DDP": [DistributedDataParallel],
    "DataParallel": [DataParallel],
    "DDP in DataParallel": [DistributedDataParallel, DataParallel],
    "compiled": [compiled],
    "compiled DDP": [DistributedDataParallel, compiled],
    "DDP of compiled": [compiled, DistributedDataParallel],
    "compiled inside of DDP": [inside(compiled, "module"), DistributedDataParallel],
    "checkpointing inside": [inside(checkpoint_wrapper, "module")],
    "checkpointing and compilation of one": [inside(checkpoint_wrapper, "head"), inside(compiled, "head")],
    "DataParallel inside": [inside(DataParallel, "module")],
    "DataParallel inside of DDP": [inside(DataParallel, "module"), DistributedDataParallel],
    "all": [inside(checkpoint_wrapper, "module"), inside(DataParallel, "head"), compiled, DistributedDataParallel],
}


@pytest.mark.parametrize("wrappers", WRAPPERS.values(), ids=WRAPPERS)
def test_names_are_those_without_wrappers(wrappers: list[Callable[[nn.Module], nn.Module]]) -> None:
    model: nn.Module = Net()
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    for wrap in wrappers:
        model = wrap(model)
    assert list(named_parameters(model)) == PARAMETERS
    assert all(named_parameters(model)[name] is parameter for name, parameter in parameters.items())
    tensors = named_parameters(model, buffers=True)
    assert sorted(tensors) == sorted(PARAMETERS + BUFFERS)
    assert all(tensors[name] is tensor for name, tensor in (parameters | buffers).items())
    modules = named_modules(model)
    assert set(modules) == {"", "module", "module.0", "module.1", "head"}
    # By a name that wrapper and wrapped share, the one that has the parameters is found.
    assert "weight" in modules["head"]._parameters and len(modules["module"]._modules) == 2


def test_a_shared_module_has_all_its_names() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    model.append(model[0])
    assert list(named_parameters(DataParallel(model))) == ["0.weight", "1.weight"]


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("_orig_mod.module.weight", "module.weight"),
        ("0._checkpoint_wrapped_module.weight", "0.weight"),
        ("_forward_module._fsdp_wrapped_module.a._orig_mod.weight", "a.weight"),
        ("_orig_mod", ""),
        ("my_orig_mod.weight", "my_orig_mod.weight"),
        ("module.weight", "module.weight"),
    ],
)
def test_plain_names(name: str, plain: str) -> None:
    assert plain_name(name) == plain
