"""State of a scheduler as checkpoints hold it, and masks that a run starts from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from os import PathLike
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn

from gmp_kernels.distributed.placement import (
    gathered_mask,
    is_sharded,
    local,
    local_mask,
    sum_over_shards,
    whole_mask,
)
from gmp_kernels.errors import ShapeError, StateError, TargetError
from gmp_kernels.formats import ROW_MAJOR, format_of
from gmp_kernels.masks import BitMask
from gmp_kernels.model.names import named_parameters, plain_name
from gmp_kernels.model.parametrized import kept_by_torch
from gmp_kernels.ops import Threshold
from gmp_kernels.pruner.enforcement import Enforcement
from gmp_kernels.pruner.layers import writable_mask
from gmp_kernels.pruner.limits import check_kept
from gmp_kernels.reports import StepReport

__all__ = ["Start", "begin_load", "gathered", "pack", "starting_masks"]

Start: TypeAlias = Mapping[str, BitMask] | str | PathLike[str] | None

STATE_VERSION = 3
PROGRESS = ("step_count", "num_uncounted", "num_calls", "is_current")
NO_PATTERN = "build the scheduler with the pattern of that run, or load another state"
MOST_REPORTS = 64  # latest ones that a checkpoint keeps; only the last of them keeps its layers


def pack(held: Enforcement, history: Sequence[StepReport]) -> dict[str, Any]:
    """Return copies of the masks and plain data, whose size does not grow with the number of updates."""
    reports = [report.to_dict() for report in history[-MOST_REPORTS:]]
    for report in reports[:-1]:
        report["layers"] = ()
    thresholds = held.thresholds
    # torch.distributed.checkpoint stores tuples as they are, whatever they hold.
    return {
        "version": STATE_VERSION,
        "settings": tuple(deepcopy(held.settings).items()),
        **held.progress.state(),
        "history": tuple(reports),
        "layers": {
            name: {
                "shape": tuple(parameter.shape),
                "mask": whole_mask(held.masks[name], parameter),
                "num_pruned": held.num_pruned[name],
                "threshold": list(thresholds[name]) if name in thresholds else None,
            }
            for name, parameter in held.parameters.items()
        },
    }


def gathered(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``pack`` has returned with the masks of whole layers, for a single file.

    Every rank has to call it. A layer at a time is gathered, which takes 1 byte per weight of it.
    """
    layers = {name: layer | {"mask": gathered_mask(layer["mask"])} for name, layer in state["layers"].items()}
    return {**state, "layers": layers}


def begin_load(state: Any, held: Enforcement, history: list[StepReport], *, masks_only: bool) -> Callable[[], None]:
    """Check what ``pack`` has returned, for the parameters of this process and the settings of its pruner.

    Returns
    -------
    callable
        Loads the state and applies its masks. May be called again if it is interrupted.

    Raises
    ------
    StateError
        The state is of another version, of other layers or of other settings, or damaged; or that of another rank is.
    """
    try:
        parsed = _parse(state, held, masks_only=masks_only)
    except StateError:
        _refuse_on_all_ranks(held, is_refused=True)
        raise
    _refuse_on_all_ranks(held, is_refused=False)
    check_kept(held.limits.patterns, parsed.masks, held.parameters, "loaded masks", NO_PATTERN, StateError)
    for name, parameter in held.parameters.items():
        if name in parsed.sharded:
            _check_shards(name, parsed.masks[name], parsed.num_pruned[name], parameter)

    def load() -> None:
        # Memory can run out only here, before anything is written.
        written = {name: writable_mask(held, name) for name in parsed.masks}
        loaded = {n: mask.to(memory_format=written[n].memory_format) for n, mask in parsed.masks.items()}
        for name, mask in loaded.items():
            held.masks[name].packed = written[name].packed.copy_(mask.packed)
        held.thresholds = parsed.thresholds
        held.have_agreed = False
        if not masks_only:
            history[:] = parsed.reports
            held.progress.restore(**parsed.position)
        held.masks_changed(parsed.num_pruned)
        held.apply(parsed.masks)

    return load


class _Parsed(NamedTuple):
    """Content of a state; most of it by layer."""

    masks: dict[str, BitMask]
    num_pruned: dict[str, int]
    sharded: set[str]  # names of the layers whose masks are
    position: dict[str, int]
    thresholds: dict[str, Threshold]
    reports: list[StepReport]


def _parse(state: Any, held: Enforcement, *, masks_only: bool) -> _Parsed:
    position: dict[str, int] = {}
    thresholds: dict[str, Threshold] = {}
    reports: list[StepReport] = []
    try:
        layers = _layers(state, held.parameters)
        masks = {name: local_mask(layers[name]["mask"], parameter) for name, parameter in held.parameters.items()}
        num_pruned = {name: int(layer["num_pruned"]) for name, layer in layers.items()}
        sharded = {name for name, layer in layers.items() if is_sharded(layer["mask"])}
        if not masks_only:
            found = dict(state["settings"])
            for setting, value in held.settings.items():
                if found.get(setting) != value:
                    where, expected, got = _first_difference(setting, value, found.get(setting))
                    raise StateError(
                        f"load_state_dict: expected {where} {expected!r}, got {got!r}; build the scheduler with the "
                        "same arguments, or take only the masks along: load_state_dict(state, masks_only=True)"
                    )
            position = {key: int(state[key]) for key in PROGRESS}
            thresholds = {n: Threshold(*layer["threshold"]) for n, layer in layers.items() if layer["threshold"]}
            reports = [StepReport.from_dict(report) for report in state["history"]]
    except StateError:
        raise
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise StateError(
            f"load_state_dict: expected what state_dict() returned, got damaged data ({error!r}); load another file"
        ) from error
    return _Parsed(masks, num_pruned, sharded, position, thresholds, reports)


def _first_difference(where: str, expected: Any, got: Any) -> tuple[str, Any, Any]:
    """Return where two values of a setting differ, as deep in their mappings as that goes, and the values there."""
    while isinstance(expected, Mapping) and isinstance(got, Mapping) and expected.keys() == got.keys():
        key = next(key for key, value in expected.items() if got[key] != value)
        where, expected, got = f"{where}[{key!r}]", expected[key], got[key]
    return where, expected, got


def _refuse_on_all_ranks(held: Enforcement, *, is_refused: bool) -> None:
    """Raise StateError if another rank has refused its state, which would leave this one waiting for its shards."""
    parameter = next((p for p in held.parameters.values() if is_sharded(p)), None)
    if parameter is not None and sum_over_shards(int(is_refused), parameter) and not is_refused:
        raise StateError(
            "load_state_dict: expected states that all ranks can load, got one that another rank has refused; its own "
            "message says why"
        )


def _check_shards(name: str, mask: BitMask, num_pruned: int, parameter: torch.Tensor) -> None:
    """Raise StateError on every rank unless the shards of a mask are those of all ranks."""
    found = int(sum_over_shards(mask.numel - mask.num_kept, parameter))
    if found != num_pruned:
        raise StateError(
            f"load_state_dict: expected shards of the mask of '{name}' that prune {num_pruned} weights together, got "
            f"{found}; one rank's shards have been loaded on all, or the ranks have loaded states of different steps. "
            "Save and load sharded masks with torch.distributed.checkpoint, or the state of a Run, whose masks are "
            "whole, in a single file"
        )


def _layers(state: Any, parameters: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return the layers of a state under the names that the parameters have here."""
    if not isinstance(state, Mapping) or state.get("version") != STATE_VERSION:
        if isinstance(state, Mapping) and "pruners" in state:
            raise StateError(
                "load_state_dict: expected what GMPScheduler.state_dict() returned, got the state of a Run; load it by "
                "run.load_state_dict"
            )
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
    start: Start, model: nn.Module, parameters: Mapping[str, nn.Parameter], *, regrow: bool = False
) -> tuple[dict[str, BitMask], bool]:
    """Return the masks that a run of these parameters starts with, and whether any were given.

    Masks of parameters not named keep everything, except that weights masked by torch's own pruning are always pruned.

    Parameters
    ----------
    start
        As in ``GMPScheduler``.
    model : torch.nn.Module
        Also tells errors whether it has a parameter of an unknown name.
    parameters : mapping of str to Parameter
    regrow : bool
        As in ``GMPScheduler``.

    Raises
    ------
    ValueError
        ``start`` with ``regrow``.
    TargetError
        A mask is for no parameter here.
    ShapeError
        A mask is of another shape than the whole parameter.
    CheckpointError
        The file of masks cannot be read.
    """
    if regrow and start is not None:
        raise ValueError(
            "GMPScheduler: expected start=None with regrow=True, which ranks all weights anew at each update, got "
            "masks to start from; leave one of them out"
        )
    if isinstance(start, str) and start == "zeros":
        masks = {name: BitMask.from_zeros(local(p).detach()) for name, p in parameters.items()}
    else:
        given = {} if start is None else _masks_given(start, model, parameters)
        masks = {
            name: given[name] if name in given else BitMask.ones(local(p).shape, p.device, _format(p))
            for name, p in parameters.items()
        }
    kept = kept_by_torch(model, parameters)
    for name, places in kept.items():
        masks[name].packed &= local_mask(places, parameters[name]).to(memory_format=masks[name].memory_format).packed
    return masks, start is not None or bool(kept)


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
        row_major = mask.to(memory_format=ROW_MAJOR).packed
        held = local_mask(row_major, parameter)
        masks[name] = held.to(parameter.device, memory_format=_format(parameter)).clone()
    return masks


def _format(parameter: torch.Tensor) -> torch.memory_format:
    """Return the memory format that the mask of a parameter is kept in."""
    return format_of(local(parameter)) or ROW_MAJOR
