"""Modules and parameters put together to trees of any names, and what is done with such a tree."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from gmp_kernels import GMPScheduler, schedules
from gmp_kernels.backends.dtypes import DTYPES
from gmp_kernels.checkpoints.files import TensorInfo

FILE = Path("in.safetensors")
VOCABULARY, WIDTH, HIDDEN, EXPERTS = 96, 16, 40, 4
NAMES = DTYPES | {torch.int64: "I64", torch.uint8: "U8"}


class Tree(NamedTuple):
    """A model and the names of its default targets, in order."""

    model: nn.Module
    targets: list[str]


class Conv1D(nn.Module):
    """A projection with its weight transposed, as Hugging Face's GPT-2 has it."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))


class RMSNorm(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class Parameters(nn.Module):
    """Bare parameters, and buffers for what is given as plain tensors."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)


class TopKRouter(Parameters):
    pass


def bare(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def linear(outputs: int = WIDTH, inputs: int = WIDTH, bias: bool = False) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias)


def build(modules: Mapping[str, nn.Module]) -> nn.Module:
    """Return a model that has these modules by these names."""
    model = nn.Module()
    for name, module in modules.items():
        path, _, last = name.rpartition(".")
        parent = model
        for part in filter(None, path.split(".")):
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(last, module)
    return model


def weights(*paths: str) -> list[str]:
    return [f"{path}.weight" for path in paths]


def attention(path: str, names: str = "q_proj k_proj v_proj o_proj") -> dict[str, nn.Module]:
    return {f"{path}.{name}": linear() for name in names.split()}


def swiglu(path: str, names: str = "gate_proj up_proj down_proj") -> dict[str, nn.Module]:
    gate, up, down = names.split()
    return {
        f"{path}.{gate}": linear(HIDDEN),
        f"{path}.{up}": linear(HIDDEN),
        f"{path}.{down}": linear(WIDTH, HIDDEN),
    }


def schedule(model: nn.Module, sparsity: float = 0.5, **options) -> GMPScheduler:
    return GMPScheduler(model, torch.optim.SGD(model.parameters(), lr=0.1), schedules.OneShot(sparsity), **options)


def tensors_of(model: nn.Module) -> list[TensorInfo]:
    """Return the tensors of a checkpoint of the model: tied tensors once, under the name the model knows them by."""
    first = {parameter: name for name, parameter in model.named_parameters()}
    held = {first.get(tensor, name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    return [TensorInfo(FILE, name, NAMES[t.dtype], tuple(t.shape), 0, t.nbytes) for name, t in held.items()]
