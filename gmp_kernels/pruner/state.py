"""State of a scheduler as checkpoints hold it, and masks that a run starts from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn

from gmp_kernels.distributed.placement import local, local_mask, whole_mask
from gmp_kernels.errors import ShapeError, StateError, TargetError
from gmp_kernels.masks import BitMask
from gmp_kernels.model.names import named_parameters, plain_name
from gmp_kernels.ops import Threshold
from gmp_kernels.reports import StepReport

__all__ = ["Saved", "Start", "pack", "starting_masks", "unpack"]

Start: TypeAlias = Mapping[str, BitMask] | str | PathLike[str] | None

STATE_VERSION = 3
PROGRESS = ("step_count", "num_uncounted", "num_calls", "is_current")
MOST_REPORTS = 64  # latest ones that a checkpoint keeps; only the last of them keeps its layers


class Saved(NamedTuple):
    """Contents of a state, for the parameters of this process.

    Attributes
    ----------
    progress : dict of str to int
        As ``Progress.state`` returns it; empty if only the masks are taken.
    masks : mapping of str to BitMask
    num_pruned : dict of str to int
        Pruned weights of whole layers.
    thresholds : dict of str to Threshold
    history : list of StepReport
    """

    progress: dict[str, int]
    masks: Mapping[str, BitMask]
    num_pruned: dict[str, int]
    thresholds: dict[str, Threshold]
    history: list[StepReport]


def pack(saved: Saved, parameters: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return copies of the masks and plain data, whose size does not grow with the number of updates."""
    reports = [report.to_dict() for report in saved.history[-MOST_REPORTS:]]
    for report in reports[:-1]:
        report["layers"] = ()
    # torch.distributed.checkpoint stores tuples as they are, whatever they hold.
    return {
        "version": STATE_VERSION,
        "settings": tuple(settings.items()),
        **saved.progress,
        "history": tuple(reports),
        "layers": {
            name: {
                "shape": tuple(parameter.shape),
                "mask": whole_mask(saved.masks[name], parameter),
                "num_pruned": saved.num_pruned[name],
                "threshold": list(saved.thresholds[name]) if name in saved.thresholds else None,
            }
            for name, parameter in parameters.items()
        },
    }


def unpack(state: Any, parameters: Mapping[str, torch.Tensor], settings: Mapping[str, Any] | None) -> Saved:
    """Return the contents of a state for these parameters and settings; if the settings are None, only the masks.

    Raises
    ------
    StateError
        The state is of another version, of other layers or of other settings, or damaged.
    """
    try:
        layers = _layers(state, parameters)
        masks = {name: local_mask(layers[name]["mask"], parameter) for name, parameter in parameters.items()}
        num_pruned = {name: int(layer["num_pruned"]) for name, layer in layers.items()}
        if settings is None:
            return Saved({}, masks, num_pruned, {}, [])
        found = dict(state["settings"])
        for setting, value in settings.items():
            if found.get(setting) != value:
                raise StateError(
                    f"load_state_dict: expected {setting} {value!r}, got {found.get(setting)!r}; build the scheduler "
                    "with the same arguments, or take only the masks along: load_state_dict(state, masks_only=True)"
                )
        return Saved(
            progress={key: int(state[key]) for key in PROGRESS},
            masks=masks,
            num_pruned=num_pruned,
            thresholds={n: Threshold(*layer["threshold"]) for n, layer in layers.items() if layer["threshold"]},
            history=[StepReport.from_dict(report) for report in state["history"]],
        )
    except StateError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise StateError(
            f"load_state_dict: expected what state_dict() returned, got damaged data ({error!r}); load another file"
        ) from error


def _layers(state: Any, parameters: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return the layers of a state under the names that the parameters have here."""
    if not isinstance(state, Mapping) or state.get("version") != STATE_VERSION:
        found = state.get("version") if isinstance(state, Mapping) else type(state).__name__
        raise StateError(
            f"load_state_dict: expected what GMPScheduler.state_dict() returned, of version {STATE_VERSION}, got "
            f"{found!r}; load the pruner's own part of the checkpoint"
        )
    names = _names_here(state["layers"], parameters)
    layers = {names[name]: layer for name, layer in state["layers"].items()}
    found = {f"{name} {tuple(layer['shape'])}" for name, layer in layers.items()}
    expected = {f"{name} {tuple(parameter.shape)}" for name, parameter in parameters.items()}
    if expected != found:
        raise StateError(
            f"load_state_dict: expected the layers of this scheduler, got missing: {sorted(expected - found)}, "
            f"unexpected: {sorted(found - expected)}; load it into the same model with the same targets"
        )
    return {name: layers[name] for name in parameters}


def _names_here(names: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """Return {saved name: name here}, since names may have been saved with prefixes of wrappers that are gone now."""
    names, known = list(names), set(known)
    plain = {name: plain_name(name) for name in names}
    if not known.intersection(plain.values()):
        for prefix in ("module.", "model."):
            shorter = {name: inner.removeprefix(prefix) for name, inner in plain.items()}
            if known.intersection(shorter.values()):
                return shorter
    return plain


def starting_masks(
    start: Start, model: nn.Module, parameters: Mapping[str, torch.Tensor], kept: Mapping[str, torch.Tensor]
) -> dict[str, BitMask]:
    """Return the masks that a run of these parameters starts with; those of parameters not named keep everything.

    Parameters
    ----------
    start
        As in ``GMPScheduler``.
    model : torch.nn.Module
        Tells errors whether it has a parameter of an unknown name.
    parameters : mapping of str to Parameter
    kept : mapping of str to Tensor
        As ``kept_by_torch`` returns it. Weights not kept there are pruned, whatever ``start`` says.

    Raises
    ------
    TargetError
        A mask is for no parameter here.
    ShapeError
        A mask is of another shape than the whole parameter.
    CheckpointError
        The file of masks cannot be read.
    """
    if isinstance(start, str) and start == "zeros":
        masks = {name: BitMask.from_zeros(local(p).detach()) for name, p in parameters.items()}
    else:
        given = {} if start is None else _masks_given(start, model, parameters)
        masks = {
            name: given[name] if name in given else BitMask.ones(local(p).shape, p.device)
            for name, p in parameters.items()
        }
    for name, places in kept.items():
        masks[name].packed &= local_mask(places, parameters[name]).packed
    return masks


def _masks_given(
    start: Mapping[str, BitMask] | str | PathLike[str], model: nn.Module, parameters: Mapping[str, torch.Tensor]
) -> dict[str, BitMask]:
    """Return the masks of a mapping or a file, for what this process holds; copies, because the pruner writes them."""
    if isinstance(start, (str, PathLike)):
        # Reading files takes the safetensors package, which nothing else here needs.
        from gmp_kernels.checkpoints.masks import read_masks

        start = read_masks(start)
    masks_given = start.values() if isinstance(start, Mapping) else [start]
    others = [type(mask).__name__ for mask in masks_given if not isinstance(mask, BitMask)]
    if others:
        raise TypeError(
            f"GMPScheduler: expected start to be None, 'zeros', {{name: BitMask}} or the path of masks, got a "
            f"{others[0]}; pack bool tensors by BitMask.from_bool, and give a pruner's state_dict() to load_state_dict"
        )
    names = _names_here(start, parameters)
    masks = {}
    for name, mask in ((names[name], mask) for name, mask in start.items()):
        if name not in parameters:
            raise TargetError(
                f"GMPScheduler: expected start to have masks of targets, got one of '{name}'; "
                + (
                    "add it to targets=, so that something holds it, or leave its mask out"
                    if name in named_parameters(model)
                    else "the model has no parameter of that name: rename the mask, or pass start='zeros', which takes "
                    "the zeros of the weights themselves"
                )
            )
        parameter = parameters[name]
        if mask.shape != parameter.shape:
            raise ShapeError(
                f"GMPScheduler: expected the mask that starts '{name}' of shape {tuple(parameter.shape)}, got "
                f"{tuple(mask.shape)}; is it of another model?"
            )
        masks[name] = local_mask(mask.packed, parameter).to(parameter.device).clone()
    return masks
