"""Weights that a module computes from other parameters, and which of these can be pruned in their place.

A zero of the parameter must be a zero of the weight. That holds where the weight is a multiple of the parameter:
weight_norm and spectral_norm scale it, torch's own pruning masks it. Any other parametrization may do anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

__all__ = ["follow_update_", "kept_by_torch", "reasons_against"]

SCALINGS = (parametrizations._WeightNorm, parametrizations._SpectralNorm)
LENGTHS = "a length that weight_norm keeps apart"


def reasons_against(model: nn.Module) -> dict[nn.Parameter, str]:
    """Return {parameter: reason} of parameters that cannot be pruned because a module computes a weight from them."""
    reasons = {lengths: LENGTHS for _, lengths, _ in _weight_norms(model)}
    for module in model.modules():
        if not isinstance(module, parametrize.ParametrizationList):
            continue
        if others := sorted({type(step).__name__.lstrip("_") for step in module if not isinstance(step, SCALINGS)}):
            reasons |= dict.fromkeys(module.parameters(), f"parametrized by {', '.join(others)}")
    return reasons


def kept_by_torch(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Return {name: bool tensor of its shape, True = kept} of the parameters that torch's own pruning masks.

    A parameter that several modules share keeps every weight that one of them keeps. Memory: 1 byte per weight of these
    parameters.
    """
    names = {parameter: name for name, parameter in parameters.items() if name.endswith("_orig")}
    if not names:  # as nearly always
        return {}
    found: dict[nn.Parameter, list[torch.Tensor | None]] = {parameter: [] for parameter in names}
    for module in model.modules():
        hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, prune.BasePruningMethod)]
        masks = {f"{hook._tensor_name}_orig": getattr(module, f"{hook._tensor_name}_mask") for hook in hooks}
        for key, parameter in module._parameters.items():
            if parameter in found:
                found[parameter].append(masks.get(key))
    kept = {}
    for parameter, uses in found.items():
        places = [mask != 0 for mask in uses if mask is not None]
        if len(places) == len(uses):
            kept[names[parameter]] = torch.stack(places).any(0) if len(places) > 1 else places[0]
    return kept


def follow_update_(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> str | None:
    """Update the weights that modules compute from these parameters; return a warning if one became NaN.

    Layers under weight_norm are read once. Models without such weights cost nothing.
    """
    if not any("parametrizations" in name or name.endswith(("_orig", "_v")) for name in parameters):
        return None
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            # The hooks of old-style functions compute the weight before every forward pass. Until then the weight
            # would be the one from before the update.
            if isinstance(hook, SpectralNorm):
                # The hook itself would take a step of the power iteration.
                setattr(module, hook.name, hook.compute_weight(module, do_power_iteration=False))
            elif isinstance(hook, (WeightNorm, prune.BasePruningMethod)):
                hook(module, ())
    names = {parameter: name for name, parameter in parameters.items()}
    rows = {}  # numbers of all-zero rows, by name of the directions
    for directions, _, dim in _weight_norms(model):
        if directions in names and not hasattr(directions, "to_local"):
            lengths = torch.norm_except_dim(directions.detach(), 2, dim)
            if count := lengths.numel() - int(lengths.count_nonzero()):
                rows[names[directions]] = count
    if not rows:
        return None
    name, count = next(iter(rows.items()))
    return (
        f"expected weights left in every row under weight_norm, got {count} without one in '{name}' "
        f"({len(rows)} such layers), which its forward pass divides by zero; remove the weight_norm before pruning "
        "(torch.nn.utils.parametrize.remove_parametrizations), or prune less of it"
    )


def _weight_norms(model: nn.Module) -> Iterator[tuple[nn.Parameter, nn.Parameter, int]]:
    """Yield directions, lengths, and the dimension along which the rows lie."""
    for module in model.modules():
        if isinstance(module, parametrize.ParametrizationList):
            for step in module:
                if isinstance(step, parametrizations._WeightNorm):
                    yield module.original1, module.original0, step.dim  # type: ignore[misc]
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm):
                yield getattr(module, f"{hook.name}_v"), getattr(module, f"{hook.name}_g"), hook.dim
