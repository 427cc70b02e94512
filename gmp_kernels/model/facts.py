"""Facts about parameters that need the model itself: the types of its modules, and parameters that cannot be pruned."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from gmp_kernels.model.parametrized import reasons_against
from gmp_kernels.model.roles import COMPLEX, QUANTIZED, Facts, effective_name

__all__ = ["facts_of", "refusals"]

MULTIPLIERS = (nn.Linear, nn.Bilinear, _ConvNd)
SEVERAL_WEIGHTS = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def facts_of(
    model: nn.Module, modules: Mapping[str, nn.Module], tensors: Mapping[str, torch.Tensor]
) -> dict[str, Facts]:
    """Return the facts of all parameters and buffers, by every name they have."""
    heads = _output_embeddings(model)
    facts = {}
    for name, tensor in tensors.items():
        path, _, attribute = effective_name(name, tensors).rpartition(".")
        owner = modules[path]
        kind = _kind(owner, attribute)
        if kind != "embedding" and any(tensor is head for head in heads):
            kind = "head"
        # A lazy tensor has no shape yet, though its module says what it will be.
        shape = ((0, 0) if kind == "weight" else (0,)) if is_lazy(tensor) else tuple(tensor.shape)
        facts[name] = Facts(shape, type(owner).__name__, kind)
    return facts


def refusals(model: nn.Module, first_names: Mapping[nn.Parameter, str]) -> dict[str, str]:
    """Return {name: reason} of parameters that cannot be pruned even if they are named."""
    parametrized = reasons_against(model)
    reasons = {}
    for parameter, name in first_names.items():
        reason = parametrized.get(parameter) or _refusal_of_type(parameter)
        if reason is not None:
            reasons[name] = reason
    return reasons


def _kind(owner: nn.Module, attribute: str) -> str:
    if isinstance(owner, EMBEDDINGS):
        return "embedding"
    if isinstance(owner, NORMS):
        return "norm"
    if isinstance(owner, SEVERAL_WEIGHTS):
        return "weight" if attribute.endswith("_weight") or attribute.startswith("weight_") else ""
    return "weight" if isinstance(owner, MULTIPLIERS) and attribute == "weight" else ""


def _output_embeddings(model: nn.Module) -> list[torch.Tensor]:
    """Return the weights of the output embeddings of Hugging Face models."""
    found = []
    for module in model.modules():
        try:
            head = module.get_output_embeddings()  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(head, nn.Module) and isinstance(getattr(head, "weight", None), torch.Tensor):
            found.append(head.weight)
    return found  # type: ignore[return-value]


def _refusal_of_type(parameter: torch.Tensor) -> str | None:
    if parameter.is_complex():
        return COMPLEX
    if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
        return QUANTIZED
    # Sharded parameters are known. Other tensors that redefine operations hold their weights elsewhere.
    is_plain = type(parameter).__torch_dispatch__ is torch.Tensor.__torch_dispatch__ or hasattr(parameter, "to_local")
    return None if is_plain else f"a {type(parameter).__name__}"
