"""Modifiers of a recipe with their arguments, checked; the names of SparseML's keys and values end here."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

from gmp_kernels.errors import RecipeError
from gmp_kernels.recipes.arguments import MOST_EPOCHS, Arguments, flat
from gmp_kernels.recipes.text import Item
from gmp_kernels.recipes.timing import CURVES

__all__ = [
    "ALL",
    "ALL_PRUNABLE",
    "ConstantPruning",
    "EpochRange",
    "GradualPruning",
    "LearningRate",
    "LearningRateFunction",
    "Modifier",
    "Pruning",
    "SetLearningRate",
    "SetOption",
    "SetWeightDecay",
    "TrainableParams",
    "read",
]

ALL, ALL_PRUNABLE = "__ALL__", "__ALL_PRUNABLE__"
FROM_PARAM = "__FROM_PARAM__"
LR_FUNCTIONS = ("linear", "cosine", "cyclic_linear")

# Modifiers that do something else than gradual magnitude pruning: a recipe runs without them, and says so.
WORDS_OUTSIDE = """
Distillation PerLayerDistillation OutputDistillation
Quantization LegacyQuantization vLLMQuantization GPTQ SmoothQuant LogarithmicEqualization
OBSPruning OBSXPruning MFACPruning GlobalMFACPruning MovementPruning AdaPrune Powerpropagation
ACDCPruning RigLPruning TopKASTPruning StructuredPruning LayerPruning LayerThinning
SparseGPT WandaPruning FastOBCQPruning ASPruning AS Logging SetParam GradualParam
"""
OUTSIDE = frozenset(f"{word}Modifier" for word in WORDS_OUTSIDE.split())


@dataclass(frozen=True)
class Modifier:
    """Part of a recipe.

    Attributes
    ----------
    name : str
        Name and place in the recipe, for messages.
    start, end : float
        Epochs. A start of -1 means at once, an end of -1 never.
    """

    name: str
    start: float = -1.0
    end: float = -1.0


@dataclass(frozen=True)
class Pruning(Modifier):
    """Prune the parameters of ``entries``.

    These are (final sparsity, names and patterns); the first that reaches a parameter counts.
    """

    entries: tuple[tuple[float, tuple[str, ...]], ...] = field(kw_only=True)


@dataclass(frozen=True)
class GradualPruning(Pruning):
    """Raise the sparsity from ``initial``, or from the zeros of each parameter if None; ``frequency`` is in epochs."""

    initial: float | None = field(kw_only=True)
    frequency: float = field(kw_only=True)
    curve: str = field(kw_only=True)
    leave_enabled: bool = field(kw_only=True)
    is_global: bool = field(kw_only=True)


class ConstantPruning(Pruning):
    """Hold the zeros that parameters have; the sparsity of its entries is 0."""


@dataclass(frozen=True)
class EpochRange(Modifier):
    """Give the run its length."""


@dataclass(frozen=True)
class SetOption(Modifier):
    """Set an option of param groups, of all if None, once."""

    value: float = field(kw_only=True)
    groups: frozenset[int] | None = field(kw_only=True)


class SetLearningRate(SetOption):
    """Set the learning rate."""


class SetWeightDecay(SetOption):
    """Set the weight decay."""


@dataclass(frozen=True)
class LearningRateFunction(Modifier):
    """Take the learning rate along a curve from ``initial`` to ``final``, again in each cycle of ``cycle`` epochs."""

    function: str = field(kw_only=True)
    initial: float = field(kw_only=True)
    final: float = field(kw_only=True)
    cycle: float = field(kw_only=True)
    groups: frozenset[int] | None = field(kw_only=True)


@dataclass(frozen=True)
class LearningRate(Modifier):
    """Let the learning rate follow a torch lr_scheduler of the class ``kind``, whose lengths are in epochs."""

    kind: str = field(kw_only=True)
    initial: float = field(kw_only=True)
    gamma: float = field(default=1.0, kw_only=True)
    milestones: tuple[float, ...] = field(default=(), kw_only=True)
    step_size: float = field(default=1.0, kw_only=True)
    lowest: float = field(default=0.0, kw_only=True)


@dataclass(frozen=True)
class TrainableParams(Modifier):
    """Let parameters train, or not, until the end; then as before."""

    names: tuple[str, ...] = field(kw_only=True)
    trainable: bool = field(kw_only=True)
    strict: bool = field(kw_only=True)


def _gradual(arguments: Arguments, *, is_global: bool = False) -> GradualPruning:
    mask = arguments.take("mask_type", "unstructured")
    if mask != "unstructured":
        raise arguments.error(
            "mask_type unstructured",
            repr(mask),
            "blocks and N:M (such as 2:4, tensorrt) are patterns that this library does not prune to yet",
        )
    for key, only in (("phased", False), ("score_type", "magnitude"), ("scheduler_args", {})):
        if (value := arguments.take(key, only)) not in (only, str(only)):
            raise arguments.error(f"{only!r} for {key!r}", repr(value), "gradual magnitude pruning has no other")
    params = _params(arguments)
    final = arguments.take("final_sparsity")
    if isinstance(final, dict):
        if params:
            raise arguments.error("no 'params' beside a mapping of 'final_sparsity'", repr(list(params)), "write []")
        entries = tuple(
            (arguments.checked_number("final_sparsity", key, most=1), arguments.names("final_sparsity", value))
            for key, value in final.items()
        )
        if not entries or not all(names for _, names in entries):
            raise arguments.error("names for each sparsity of 'final_sparsity'", repr(final), "name parameters")
    else:
        entries = ((arguments.checked_number("final_sparsity", final, most=1), params or (ALL_PRUNABLE,)),)
    initial = arguments.take("init_sparsity")
    from_param = initial == FROM_PARAM
    initial = None if from_param else arguments.checked_number("init_sparsity", initial, most=1)
    lowest = min(sparsity for sparsity, _ in entries)
    if initial is not None and initial > lowest:
        raise arguments.error(
            "init_sparsity <= final_sparsity",
            f"{initial:g} and {lowest:g}",
            "pruned weights never come back: start lower",
        )
    if arguments.flag("global_sparsity", False):
        is_global = True
    if is_global and (from_param or len({sparsity for sparsity, _ in entries}) > 1):
        raise arguments.error(
            "one initial and one final sparsity where all parameters are ranked together",
            FROM_PARAM if from_param else repr(final),
            "give numbers, or prune by layer",
        )
    return GradualPruning(
        **arguments.times(),
        initial=initial,
        entries=entries,
        # A new recipe that does not say when to update does so at every step.
        frequency=arguments.number(
            "update_frequency", *([-1.0] if arguments.is_new else []), least=-1, most=MOST_EPOCHS
        ),
        curve=arguments.word("inter_func", tuple(CURVES), "cubic"),
        leave_enabled=arguments.flag("leave_enabled", True),
        is_global=is_global,
    )


def _params(arguments: Arguments) -> tuple[str, ...]:
    """Return names and patterns. In the new style all means the weights of all layers, without their biases."""
    names = arguments.names("params", arguments.take("params", []))
    return tuple(r"re:(.*\.)?weight$" if arguments.is_new and name == ALL else name for name in names)


def _constant(arguments: Arguments) -> ConstantPruning:
    arguments.take("update_frequency", None)
    return ConstantPruning(**arguments.times(), entries=((0.0, _params(arguments) or (ALL_PRUNABLE,)),))


def _set_option(arguments: Arguments, kind: type[SetOption], key: str) -> SetOption:
    arguments.take("end_epoch", None)
    return kind(**arguments.times(), value=arguments.number(key), groups=arguments.groups())


def _rate_function(arguments: Arguments) -> LearningRateFunction:
    arguments.take("update_frequency", None)
    function = arguments.word("lr_func", LR_FUNCTIONS)
    times = arguments.times()
    start, end = max(times["start"], 0.0), times["end"]
    if end <= start:
        raise arguments.error(
            "start_epoch < end_epoch", f"{start:g} and {end:g}", "say where the learning rate ends up"
        )
    cycle = arguments.number("cycle_epochs", -1.0, least=-1)
    if cycle != -1 and cycle <= 0:
        raise arguments.error("epochs > 0 for 'cycle_epochs'", f"{cycle:g}", "say how long a cycle is")
    return LearningRateFunction(
        **times,
        function=function,
        initial=arguments.number("init_lr"),
        final=arguments.number("final_lr"),
        cycle=end - start if cycle == -1 or function != "cyclic_linear" else cycle,
        groups=arguments.groups(),
    )


def _rate_scheduler(arguments: Arguments) -> LearningRate:
    arguments.take("update_frequency", None)
    kind = arguments.word("lr_class", ("StepLR", "MultiStepLR", "ExponentialLR", "CosineAnnealingWarmRestarts"))
    kwargs = arguments.take("lr_kwargs", {})
    if not isinstance(kwargs, dict):
        raise arguments.error("keys and values for 'lr_kwargs'", repr(kwargs), "write e.g. {gamma: 0.1}")
    times = arguments.times()
    inner = Arguments(f"{arguments.where}: lr_kwargs", kwargs)
    found: dict[str, Any] = {}
    if kind == "CosineAnnealingWarmRestarts":
        found = {"lowest": inner.number("lr_min"), "step_size": inner.number("cycle_epochs")}
    else:
        found["gamma"] = inner.number("gamma")
    if kind == "StepLR":
        found["step_size"] = inner.number("step_size")
    if kind == "MultiStepLR":
        found["milestones"] = tuple(
            inner.checked_number("milestones", value) for value in flat(inner.take("milestones"))
        )
        outside = [m for m in found["milestones"] if m <= max(times["start"], 0) or 0 <= times["end"] <= m]
        if outside:
            raise inner.error("milestones between start_epoch and end_epoch", f"{outside[0]:g}", "move it")
    if found.get("step_size") == 0:
        raise inner.error("a length > 0", "0", "give it in epochs")
    inner.finish()
    return LearningRate(**times, kind=kind, initial=arguments.number("init_lr"), **found)


def _trainable(arguments: Arguments) -> TrainableParams:
    return TrainableParams(
        names=arguments.names("params", arguments.take("params")) or (ALL,),
        trainable=arguments.flag("trainable"),
        strict=arguments.flag("params_strict", True),
        **arguments.times(),
    )


Reader: TypeAlias = Callable[[Arguments], Modifier]
READERS: dict[str, Reader] = {
    "GMPruningModifier": _gradual,
    "MagnitudePruningModifier": _gradual,
    "GlobalMagnitudePruningModifier": partial(_gradual, is_global=True),
    "ConstantPruningModifier": _constant,
    "EpochRangeModifier": lambda arguments: EpochRange(**arguments.times()),
    "SetLearningRateModifier": partial(_set_option, kind=SetLearningRate, key="learning_rate"),
    "LearningRateFunctionModifier": _rate_function,
    "LearningRateModifier": _rate_scheduler,
    "SetWeightDecayModifier": partial(_set_option, kind=SetWeightDecay, key="weight_decay"),
    "TrainableParamsModifier": _trainable,
}


def read(items: Iterable[Item]) -> tuple[tuple[Modifier, ...], tuple[str, ...]]:
    """Return the modifiers in their order, and the names of those that are outside of gradual magnitude pruning.

    Raises
    ------
    RecipeError
        A modifier is unknown, or asks for what this library does not do.
    """
    modifiers: list[Modifier] = []
    outside: list[str] = []
    for number, item in enumerate(items, 1):
        if item.name in READERS:
            arguments = Arguments(f"modifier {number}, {item.name}", item.arguments)
            modifiers.append(READERS[item.name](arguments))
            arguments.finish()
        elif item.name in OUTSIDE:
            outside.append(item.name)
        else:
            near = difflib.get_close_matches(item.name, [*READERS, *OUTSIDE], n=1)
            raise RecipeError(
                f"recipe: modifier {number}: expected one of {', '.join(READERS)}, got {item.name!r}; "
                + (f"did you mean {near[0]!r}?" if near else "leave it out")
            )
    return tuple(modifiers), tuple(outside)
