"""Parameters of a model that a list of names, patterns and module types means."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from gmp_kernels.errors import DTypeError, TargetError
from gmp_kernels.model.coverage import FROZEN, IGNORED, NOT_A_TARGET, NOT_OPTIMIZED, Coverage, CoveredTensor
from gmp_kernels.model.facts import facts_of, refusals
from gmp_kernels.model.names import named_buffers, named_modules, named_parameters
from gmp_kernels.model.roles import COMPLEX, EMBEDDING, PARAMETRIZATION, QUANTIZED, SMALL, Roles, effective_name

__all__ = [
    "Entry",
    "ParameterIndex",
    "Place",
    "Selection",
    "check_optimized",
    "check_present",
    "reached_by_name",
]

Entry: TypeAlias = str | type[nn.Module]


class Selection(NamedTuple):
    """Choice of parameters to prune.

    Attributes
    ----------
    parameters : dict of str to Parameter
        {first name: parameter} in the order of the model.
    coverage : Coverage
        Everything the model has.
    """

    parameters: dict[str, nn.Parameter]
    coverage: Coverage


def check_optimized(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise TargetError for a target that is not among the optimizer's parameters."""
    held = _held(optimizer)
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
                f"built with, got {found}; call remove() and build a new GMPScheduler when the model changes"
            )


class Place(NamedTuple):
    """Position of a parameter in a model: the parameters of its module, and its key among them."""

    holder: dict[str, nn.Parameter | None]
    key: str


class ParameterIndex:
    """Every name by which the parameters of ``model`` can be meant.

    An entry is one of

    - an exact name of a parameter, whatever it is. A weight that is computed from a parameter (by weight_norm,
      spectral_norm, torch's own pruning) is one of that parameter's names;
    - an exact name of a module, meaning everything in it, at any depth;
    - a glob (``*``, ``?``, ``[...]``; case counts, ``*`` crosses dots) or ``"re:"`` and a regular expression that
      matches from the start of the name (``re.match``): names of parameters, or of modules, meaning everything in them;
    - a module type, subclasses included, meaning everything in such modules.

    What is in the model by that name is never taken for a pattern. A tied parameter is reached by each of its names
    and has one: the first, as in ``model.named_parameters()``.

    Parameters
    ----------
    model : torch.nn.Module
    optimizer : torch.optim.Optimizer, optional
        Without it every parameter counts as optimized.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        self._modules = dict(named_modules(model))
        self._parameters = named_parameters(model)
        self._first_names: dict[nn.Parameter, str] = {}
        for name, parameter in self._parameters.items():
            self._first_names.setdefault(parameter, name)
        tensors = self._parameters | named_buffers(model)
        self._effective = {name: effective_name(name, tensors) for name in self._parameters}
        self._optimizer = optimizer
        self._held = None if optimizer is None else _held(optimizer)
        self._refusals = refusals(model, self._first_names)
        self._roles = self._find_roles(Roles(facts_of(model, self._modules, tensors)))

    def select(self, targets: Entry | Iterable[Entry] | None, ignore: Entry | Iterable[Entry] | None) -> Selection:
        """Return what ``targets`` reach and ``ignore`` does not.

        ``targets=None`` means ``gmp_kernels.model.roles.DEFAULT_RULE``. In ``targets``, modules, patterns and types
        leave out what only an exact name reaches: biases, norms and scales, and frozen parameters. They also leave out
        what cannot be pruned, which an exact name may not mean.

        Raises
        ------
        TargetError
            An entry reaches nothing that can be pruned, nothing is left, or a parameter is not initialized yet.
        DTypeError
            A parameter named exactly has a dtype without a magnitude order.
        """
        if targets is None:
            meant = {name for name, role in self._roles.items() if role is None}
            reached = {name for name in meant if self._obstacle(name) is None}
        else:
            meant = {name for entry in _as_list(targets) for name in self.find("targets", entry)}
            reached = {name for entry in _as_list(targets) for name in self._find_target(entry)}
        ignored: dict[str, Entry] = {}
        for entry in _as_list(ignore):
            ignored = dict.fromkeys(self.find("ignore", entry), entry) | ignored
        parameters = {name: p for p, name in self._first_names.items() if name in reached and name not in ignored}
        ignored = {name: entry for name, entry in ignored.items() if name in reached}
        coverage = self._cover(parameters, meant, ignored, by_default=targets is None)
        if not parameters:
            if (largest := coverage.largest_left_out(1)) and not any(t.can_be_target for t in coverage.left_out):
                self._refuse_dtype(largest[0].name)
            raise TargetError(
                f"targets: expected at least one parameter to prune, got none from targets={_shown_entries(targets)} "
                f"and ignore={_shown_entries(ignore)}; {self._advice(coverage)}"
            )
        for name, parameter in parameters.items():
            if is_lazy(parameter):
                raise TargetError(
                    f"targets: expected initialized parameters, got '{name}' without a shape; run a forward pass first"
                )
        return Selection(parameters, coverage)

    def places(self, names: Iterable[str]) -> dict[str, Place]:
        """Return where in the model the parameters of these names are."""
        found = {}
        for name in names:
            path, _, key = name.rpartition(".")
            found[name] = Place(self._modules[path]._parameters, key)
        return found

    def find(self, what: str, entry: Entry) -> list[str]:
        """Return the names ``entry`` reaches; raise TargetError calling it an entry of ``what`` if there are none."""
        reached = self._reached_by(what, entry)
        if not reached:
            raise TargetError(
                f"{what}: expected names, globs, 're:' patterns or module types found in the model, got {entry!r}, "
                f"which matches nothing; {self._near(what, entry)}"
            )
        return reached

    def _find_target(self, entry: Entry) -> list[str]:
        reached = self.find("targets", entry)
        if self._is_exact(entry):
            self._refuse(reached[0])
            return reached
        weights = [name for name in reached if self._roles[name] != SMALL]
        free = [name for name in weights if self._obstacle(name) is None]
        if free:
            return free
        if weights:
            name = weights[0]
            raise TargetError(
                f"targets: expected parameters that can be pruned, got {_shown_entry(entry)}, which matches none; "
                f"'{name}' is {self._obstacle(name)}; {self._examples()}"
            )
        named = [name for name in reached if self._refusal(name) is None]
        advice = f"name those exactly if you mean them, such as '{named[0]}'" if named else self._examples()
        raise TargetError(
            f"targets: expected parameters of two or more dimensions, got {_shown_entry(entry)}, which matches only "
            f"biases, norms or scales; {advice}"
        )

    def _refuse(self, name: str) -> None:
        """Raise for a parameter that is named exactly and cannot be pruned."""
        parameter = self._parameters[name]
        reason = self._refusals.get(name)
        if reason is None and self._optimizer is not None:
            check_optimized(self._optimizer, {name: parameter})
        self._refuse_dtype(name)
        if reason is not None:
            raise TargetError(
                f"targets: expected parameters whose zeros are zeros of the weight, got '{name}', which is {reason}; "
                "leave it out, or remove the parametrization first"
            )

    def _refuse_dtype(self, name: str) -> None:
        reason, dtype = self._refusals.get(name), self._parameters[name].dtype
        if reason == COMPLEX:
            raise DTypeError(
                f"targets: expected real weights, got '{name}' of {dtype}; leave it out, or hold its real "
                "and imaginary parts as two parameters, which are ranked as any others"
            )
        if reason == QUANTIZED:
            raise DTypeError(
                f"targets: expected float32, float64, bfloat16 or float16, got '{name}' of {dtype}; prune "
                "before quantizing, or leave it out"
            )

    def _find_roles(self, roles: Roles) -> dict[str, str | None]:
        """Return {first name: why it is no default target}, by whichever of its names gives a reason."""
        found: dict[str, str | None] = {}
        for name, parameter in self._parameters.items():
            reason, first = roles.reason_against(name), self._first_names[parameter]
            if name != first and reason == EMBEDDING and found[first] != EMBEDDING:
                reason = f"tied to the embedding '{name}'"
                found[first] = None
            found[first] = found.get(first) or reason
        return found

    def _refusal(self, name: str) -> str | None:
        """Return why nothing reaches this parameter."""
        if name in self._refusals:
            return self._refusals[name]
        is_held = self._held is None or id(self._parameters[name]) in self._held
        return None if is_held else NOT_OPTIMIZED if self._parameters[name].requires_grad else FROZEN

    def _obstacle(self, name: str) -> str | None:
        """Return why only an exact name, or nothing, reaches this parameter."""
        parameter = self._parameters[name]
        if not is_lazy(parameter) and parameter.numel() == 0:
            return "empty"
        return self._refusal(name) or (None if parameter.requires_grad else FROZEN)

    def _cover(
        self,
        parameters: Mapping[str, nn.Parameter],
        meant: Container[str],
        ignored: Mapping[str, Entry],
        *,
        by_default: bool,
    ) -> Coverage:
        targets: list[CoveredTensor] = []
        left_out: list[CoveredTensor] = []
        for parameter, name in self._first_names.items():
            role = self._roles[name]
            if name in parameters:
                reason = ""
            elif name in ignored:
                reason = f"{IGNORED} {_shown_entry(ignored[name])}"
            elif role is not None and (role == SMALL or by_default):
                # The type of a parametrization says more than that there is one.
                reason = self._refusals.get(name, role) if role == PARAMETRIZATION else role
            else:
                reason = (self._obstacle(name) if name in meant else None) or NOT_A_TARGET
            shape = () if is_lazy(parameter) else tuple(parameter.shape)
            can_be_target = role != SMALL and self._refusal(name) is None
            tensor = CoveredTensor(name, shape, str(parameter.dtype).removeprefix("torch."), reason, can_be_target)
            (targets if name in parameters else left_out).append(tensor)
        return Coverage(tuple(targets), tuple(left_out))

    def _reached_by(self, what: str, entry: Entry) -> list[str]:
        if isinstance(entry, type) and issubclass(entry, nn.Module):
            reached = [name for name in self._parameters if any(isinstance(m, entry) for m in self._above(name))]
        elif not isinstance(entry, str):
            raise TargetError(
                f"{what}: expected a name, a pattern or a module type, got {entry!r} of type {type(entry).__name__}; "
                "pass the name of a module or parameter, not the object"
            )
        else:
            reached = reached_by_name(what, entry, self._effective)
        if what == "targets" and self._is_exact(entry):
            # Of what a weight is computed from, its name means the part that decides its zeros.
            reached = [name for name in reached if name not in self._refusals] or reached
        return list(dict.fromkeys(self._first_names[self._parameters[name]] for name in reached))

    def _is_exact(self, entry: Entry) -> bool:
        """Whether an entry is the name of a parameter, or of a weight that is computed from some."""
        return entry in self._parameters or entry in self._effective.values()

    def _above(self, name: str) -> Iterator[nn.Module]:
        parts = name.split(".")
        return (self._modules[".".join(parts[:depth])] for depth in range(len(parts)))

    def _free(self) -> list[str]:
        return [n for n in self._roles if self._roles[n] != SMALL and self._obstacle(n) is None]

    def _near(self, what: str, entry: Entry) -> str:
        # What would be refused is no advice.
        names = self._free() if what == "targets" else list(self._parameters)
        if isinstance(entry, type):
            return "module types here: " + ", ".join(sorted({type(m).__name__ for n in names for m in self._above(n)}))
        paths = {".".join(parts[:depth]) for parts in (n.split(".") for n in names) for depth in range(1, len(parts))}
        called = [self._effective[name] for name in names]
        near = difflib.get_close_matches(entry.removeprefix("re:"), [*called, *sorted(paths)], n=3, cutoff=0.5)
        return "did you mean " + " or ".join(f"'{name}'" for name in near) if near else self._examples()

    def _examples(self) -> str:
        examples = ", ".join(f"'{self._effective[name]}'" for name in self._free()[:3])
        return f"name e.g. {examples}" if examples else "the model has nothing that can be pruned"

    def _advice(self, coverage: Coverage) -> str:
        """Say what to do where nothing is left to prune."""
        ignored = [tensor for tensor in coverage.left_out if tensor.reason.startswith(IGNORED)]
        others = [tensor for tensor in coverage.left_out if tensor.can_be_target and tensor not in ignored]
        if ignored:
            return f"'{ignored[0].name}' is {ignored[0].reason}, for one: drop that entry of ignore="
        if others:
            names = " or ".join(f"'{self._effective[tensor.name]}' ({tensor.reason})" for tensor in others[:3])
            return f"name what you mean in targets=, such as {names}"
        if largest := coverage.largest_left_out(1):
            return f"'{largest[0].name}', the largest matrix, is left out as {largest[0].reason}"
        return "the model has no matrices"


def _held(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _as_list(entries: Entry | Iterable[Entry] | None) -> Sequence[Entry]:
    if entries is None:
        return []
    return [entries] if isinstance(entries, (str, type)) else list(entries)


def _shown_entry(entry: Entry) -> str:
    """Return an entry as one would write it."""
    return entry.__name__ if isinstance(entry, type) else repr(entry)


def _shown_entries(entries: Entry | Iterable[Entry] | None) -> str:
    return "None" if entries is None else f"[{', '.join(map(_shown_entry, _as_list(entries)))}]"


def reached_by_name(what: str, entry: str, effective: Mapping[str, str]) -> list[str]:
    """Return the names that an entry means: of one parameter, of all below a module, or of all that a pattern matches.

    Parameters
    ----------
    what : str
        The list that the entry is from, for errors.
    entry : str
        What is there by that name is never taken for a pattern.
    effective : mapping of str to str
        {name of a parameter: name of the weight that is computed from it}, equal if none is.

    Raises
    ------
    TargetError
        It is no regular expression, though it begins as one.
    """
    if exact := [name for name, weight in effective.items() if entry in (name, weight)]:
        return exact
    below = f"{entry}."
    if inside := [name for name in effective if name.startswith(below)]:
        return inside
    if not (entry.startswith("re:") or any(character in entry for character in "*?[")):
        return []
    pattern = _compile(what, entry)
    return [n for n, weight in effective.items() if _matches(n, pattern) or (weight != n and _matches(weight, pattern))]


def _compile(what: str, entry: str) -> re.Pattern[str]:
    if not entry.startswith("re:"):
        return re.compile(fnmatch.translate(entry))
    try:
        return re.compile(entry.removeprefix("re:"))
    except (re.error, RecursionError, OverflowError) as error:
        raise TargetError(f"{what}: expected a regular expression after 're:', got {entry!r}; {error}") from None


def _matches(name: str, pattern: re.Pattern[str]) -> bool:
    """Whether the pattern means this parameter, by its own name or by that of a module it lies in."""
    # The root module has no name to match.
    return any(pattern.match(name[:end]) for end in [*(dot.start() for dot in re.finditer(r"\.", name)), len(name)])
