"""Parameters of a model that a list of names, patterns and module types means."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from gmp_kernels.errors import TargetError

__all__ = [
    "Entry",
    "ParameterIndex",
    "check_optimized",
    "check_present",
    "compile_pattern",
    "is_pattern",
    "matches",
    "named_parameters",
]

Entry: TypeAlias = str | type[nn.Module]

PRUNABLE = (nn.Linear, _ConvNd)


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return every parameter under every name it has, without what ``torch.compile`` adds to the names."""
    return {_plain(name): parameter for name, parameter in model.named_parameters(remove_duplicate=False)}


def check_optimized(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise TargetError for a target that is not among the optimizer's parameters."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in parameters.items():
        if id(parameter) not in held:
            raise TargetError(
                f"GMPScheduler: expected every target among the optimizer's parameters, got '{name}', which is not "
                "(frozen?), so that nothing would keep it pruned; add it to the optimizer, or to ignore="
            )


def check_present(model: nn.Module, parameters: Mapping[str, nn.Parameter], shapes: Mapping[str, torch.Size]) -> None:
    """Raise TargetError for a target that was removed from the model, replaced or reshaped."""
    live = named_parameters(model)
    for name, parameter in parameters.items():
        if live.get(name) is not parameter or parameter.shape != shapes[name]:
            found = "nothing" if name not in live else f"one replaced or reshaped to {tuple(live[name].shape)}"
            raise TargetError(
                f"GMPScheduler: expected the parameter '{name}' of shape {tuple(shapes[name])} that the scheduler was "
                f"built with, got {found}; build a new GMPScheduler when the model changes"
            )


class ParameterIndex:
    """Every name by which the parameters of ``model`` can be meant.

    An entry is one of

    - an exact name: of a parameter, whatever it is, or of a module, meaning its own ``weight`` and every Linear and
      Conv weight below it;
    - a glob (``*``, ``?``, ``[...]``; case counts, ``*`` crosses dots) or ``"re:"`` and a regular expression that
      matches from the start of the name (``re.match``): names of parameters, or of modules that hold a ``weight``;
    - a module type, subclasses included: the ``weight`` of such modules and every Linear and Conv weight below them.

    A tied parameter is reached by each of its names and has one: the first, as in ``model.named_parameters()``.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = {_plain(name): module for name, module in model.named_modules(remove_duplicate=False)}
        self._parameters = named_parameters(model)
        self._first_names: dict[nn.Parameter, str] = {}
        for name, parameter in self._parameters.items():
            self._first_names.setdefault(parameter, name)

    def select(
        self, targets: Entry | Iterable[Entry] | None, ignore: Entry | Iterable[Entry] | None
    ) -> dict[str, nn.Parameter]:
        """Return {name: parameter} of what ``targets`` reach and ``ignore`` does not, in the model's order.

        Patterns and types in ``targets`` leave out parameters of fewer than two dimensions (biases, norm scales),
        which only an exact name reaches. ``targets=None`` means the weights of Linear and Conv modules.

        Raises
        ------
        TargetError
            An entry reaches nothing, nothing is left, or a parameter is not initialized yet.
        """
        if targets is None:
            reached = {name for kind in PRUNABLE for name in self._reached_by("targets", kind)}
        else:
            reached = {name for entry in _as_list(targets) for name in self._find_target(entry)}
        ignored = {name for entry in _as_list(ignore) for name in self.find("ignore", entry)}
        chosen = reached - ignored
        selected = {name: parameter for parameter, name in self._first_names.items() if name in chosen}
        if not selected:
            raise TargetError(
                f"targets: expected at least one parameter to prune, got none from targets={targets!r} and "
                f"ignore={ignore!r}; name parameters or modules, e.g. {self._examples()}"
            )
        for name, parameter in selected.items():
            if is_lazy(parameter):
                raise TargetError(
                    f"targets: expected initialized parameters, got '{name}' without a shape; run a forward pass first"
                )
        return selected

    def find(self, what: str, entry: Entry) -> list[str]:
        """Return the names ``entry`` reaches; raise TargetError calling it an entry of ``what`` if there are none."""
        reached = self._reached_by(what, entry)
        if not reached:
            raise TargetError(
                f"{what}: expected names, globs, 're:' patterns or module types found in the model, got {entry!r}, "
                f"which matches nothing; {self._near(entry)}"
            )
        return reached

    def _find_target(self, entry: Entry) -> list[str]:
        reached = self.find("targets", entry)
        if isinstance(entry, str) and not is_pattern(entry):
            return reached
        wide = [name for name in reached if is_lazy(self._parameters[name]) or self._parameters[name].ndim >= 2]
        if not wide:
            raise TargetError(
                f"targets: expected parameters of two or more dimensions, got {entry!r}, which matches only biases or "
                f"norm scales such as '{reached[0]}'; name those exactly if you mean them"
            )
        return wide

    def _reached_by(self, what: str, entry: Entry) -> list[str]:
        if isinstance(entry, type) and issubclass(entry, nn.Module):
            reached = [name for name in self._parameters if self._has_type(name, entry)]
        elif not isinstance(entry, str):
            raise TargetError(
                f"{what}: expected a name, a pattern or a module type, got {entry!r} of type {type(entry).__name__}; "
                "pass the name of a module or parameter, not the object"
            )
        elif is_pattern(entry):
            pattern = compile_pattern(what, entry)
            reached = [name for name in self._parameters if matches(name, pattern)]
        else:
            reached = [name for name in self._parameters if name == entry or self._lies_in(name, entry)]
        return list(dict.fromkeys(self._first_names[self._parameters[name]] for name in reached))

    def _has_type(self, name: str, kind: type[nn.Module]) -> bool:
        path, _, attribute = name.rpartition(".")
        if attribute != "weight":
            return False
        owner = self._modules[path]
        parts = path.split(".")
        above = (self._modules[".".join(parts[:depth])] for depth in range(len(parts)))
        return isinstance(owner, kind) or (isinstance(owner, PRUNABLE) and any(isinstance(m, kind) for m in above))

    def _lies_in(self, name: str, module: str) -> bool:
        path, _, attribute = name.rpartition(".")
        if attribute != "weight":
            return False
        return path == module or (isinstance(self._modules[path], PRUNABLE) and path.startswith(f"{module}."))

    def _near(self, entry: Entry) -> str:
        if isinstance(entry, type):
            return "module types here: " + ", ".join(sorted({type(m).__name__ for m in self._modules.values()}))
        names = [*self._parameters, *(name for name in self._modules if name)]
        near = difflib.get_close_matches(entry.removeprefix("re:"), names, n=3, cutoff=0.5)
        return "did you mean " + " or ".join(f"'{name}'" for name in near) if near else f"try {self._examples()}"

    def _examples(self) -> str:
        return ", ".join(f"'{name}'" for name in list(self._parameters)[:3]) or "(the model has no parameters)"


def _plain(name: str) -> str:
    """Drop the level ``torch.compile`` puts between a module and its wrapper, so that names and checkpoints stay."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _as_list(entries: Entry | Iterable[Entry] | None) -> Sequence[Entry]:
    if entries is None:
        return []
    return [entries] if isinstance(entries, (str, type)) else list(entries)


def is_pattern(entry: str) -> bool:
    """Tell a glob or ``re:`` pattern from a name."""
    return entry.startswith("re:") or any(character in entry for character in "*?[")


def compile_pattern(what: str, entry: str) -> re.Pattern[str]:
    """Return what a glob or ``re:`` pattern stands for; raise TargetError calling it an entry of ``what``."""
    if not entry.startswith("re:"):
        return re.compile(fnmatch.translate(entry))
    try:
        return re.compile(entry.removeprefix("re:"))
    except (re.error, RecursionError, OverflowError) as error:
        raise TargetError(f"{what}: expected a regular expression after 're:', got {entry!r}; {error}") from None


def matches(name: str, pattern: re.Pattern[str]) -> bool:
    """Whether the pattern means this parameter, by its own name or by that of the module whose ``weight`` it is."""
    path, _, attribute = name.rpartition(".")
    # The root module has no name to match.
    return bool(pattern.match(name) or (attribute == "weight" and path and pattern.match(path)))
