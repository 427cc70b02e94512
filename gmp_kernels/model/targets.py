"""Parameters of a model by names, patterns and module types."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from gmp_kernels.errors import TargetError
from gmp_kernels.model.coverage import FROZEN, NOT_OPTIMIZED, Coverage, CoveredTensor
from gmp_kernels.model.names import named_modules, named_parameters
from gmp_kernels.model.parametrized import reasons_against
from gmp_kernels.model.roles import COMPLEX, EMBEDDING, EMPTY, PARAMETRIZATION, QUANTIZED, SMALL, Roles, effective_name
from gmp_kernels.model.selection import Entry, TargetIndex

__all__ = ["Entry", "ParameterIndex", "check_optimized", "check_present"]

T = TypeVar("T")

MULTIPLIERS = (nn.Linear, nn.Bilinear, _ConvNd)
SEVERAL_WEIGHTS = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def check_optimized(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise TargetError for a target that is not among the optimizer's parameters."""
    held = _held(optimizer)
    for name, parameter in parameters.items():
        if parameter not in held:
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


class ParameterIndex(TargetIndex):
    """All names by which the parameters of ``model`` can be given.

    An entry is one of

    - an exact name of a parameter of any kind. The name of a weight that is computed from a parameter (by weight_norm,
      spectral_norm, torch's own pruning) is one of that parameter's names;
    - an exact name of a module, meaning everything in it, at any depth;
    - a glob (``*``, ``?``, ``[...]``; case counts, ``*`` crosses dots) or ``"re:"`` and a regular expression that
      matches from the start of the name (``re.match``): names of parameters, or of modules, meaning everything in them;
    - a module type, subclasses included, meaning everything in such modules.

    An entry that is a name in the model is never taken for a pattern. A tied parameter is reached by each of its names
    and listed under the first, as in ``model.named_parameters()``.

    Parameters
    ----------
    model : torch.nn.Module
    optimizer : torch.optim.Optimizer, optional
        Without it every parameter counts as optimized.
    """

    WORDS = "names, globs, 're:' patterns or module types found in the model"
    NOUN = "parameter"

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        self._modules = named_modules(model)
        self._parameters = named_parameters(model)
        self._first_names: dict[nn.Parameter, str] = {}
        for name, parameter in self._parameters.items():
            self._first_names.setdefault(parameter, name)
        self._optimizer = optimizer
        tensors = named_parameters(model, buffers=True)
        effective = {name: effective_name(name, tensors) for name in tensors}
        roles = self._find_roles(model, tensors, effective)
        held = set(self._first_names) if optimizer is None else _held(optimizer)
        parametrized = reasons_against(model)
        covered = []
        for parameter, name in self._first_names.items():
            is_held, role = parameter in held, roles[name]
            refusal = parametrized.get(parameter) or _refusal_of_type(parameter)
            obstacle = refusal or (FROZEN if not parameter.requires_grad else None if is_held else NOT_OPTIMIZED)
            # A refusal names the type of the parametrization, which says more than the role.
            reason = refusal if refusal and role == PARAMETRIZATION else role or obstacle
            shape = () if is_lazy(parameter) else tuple(parameter.shape)
            can_be_target = role != SMALL and refusal is None and is_held
            dtype = str(parameter.dtype).removeprefix("torch.")
            covered.append((CoveredTensor(name, shape, dtype, reason or "", can_be_target), obstacle, refusal))
        super().__init__(covered, {name: effective[name] for name in self._parameters})

    def select(
        self, targets: Entry | Iterable[Entry] | None, ignore: Entry | Iterable[Entry] | None
    ) -> tuple[dict[str, nn.Parameter], Coverage]:
        """Return {first name: parameter} of all that ``targets`` reach and ``ignore`` does not, and the coverage.

        Like ``choose``, for entries as users give them. Modules, patterns and types in ``targets`` leave out frozen
        parameters too. A parameter that cannot be pruned must not be named exactly.

        Raises
        ------
        TargetError, DTypeError, ShapeError
            See ``choose``; or a parameter is not initialized yet, or not in the optimizer though named exactly.
        """
        names, coverage = self.choose(_as_list(targets), _as_list(ignore))
        parameters = {name: self._parameters[name] for name in names}
        for name, parameter in parameters.items():
            if is_lazy(parameter):
                raise TargetError(
                    f"targets: expected initialized parameters, got '{name}' without a shape; run a forward pass first"
                )
        if self._optimizer is not None:
            check_optimized(self._optimizer, parameters)
        return parameters, coverage

    def assigned(self, what: str, entries: Mapping[Entry, T], targets: Container[str]) -> list[tuple[T, list[str]]]:
        """Return values with the targets that their entries reach and no earlier entry does, none empty.

        Raises
        ------
        TargetError
            An entry, of the argument ``what``, reaches no target.
        """
        taken: set[str] = set()
        found = []
        for entry, value in entries.items():
            reached = [name for name in self.find(what, entry) if name in targets]
            if not reached:
                raise TargetError(
                    f"{what}: expected entries that reach a target, got {entry!r}, which reaches only parameters "
                    "that are not pruned; add them to targets="
                )
            if own := [name for name in reached if name not in taken]:
                found.append((value, own))
                taken.update(own)
        return found

    def _find_roles(
        self, model: nn.Module, tensors: Mapping[str, torch.Tensor], effective: Mapping[str, str]
    ) -> dict[str, str | None]:
        """Return {first name: reason against it as a default target}, where any of its names gives one."""
        heads = _output_embeddings(model)
        shapes, types = {}, {}
        for name, tensor in tensors.items():
            path, _, attribute = effective[name].rpartition(".")
            owner = self._modules[path]
            kind = _kind(owner, attribute)
            if kind != "embedding" and any(tensor is head for head in heads):
                kind = "head"
            # A lazy tensor has no shape yet, though its module says what it will be.
            shapes[name] = ((0, 0) if kind == "weight" else (0,)) if is_lazy(tensor) else tuple(tensor.shape)
            types[name] = type(owner).__name__, kind
        roles = Roles(shapes, types)
        found: dict[str, str | None] = {}
        for name, parameter in self._parameters.items():
            reason, first = roles.reason_against(name), self._first_names[parameter]
            if name != first and reason == EMBEDDING and found[first] != EMBEDDING:
                reason = f"tied to the embedding '{name}'"
                found[first] = None
            found[first] = found.get(first) or reason
        return found

    def _reached_by(self, what: str, entry: Entry) -> list[str]:
        if isinstance(entry, type) and issubclass(entry, nn.Module):
            reached = [name for name in self._parameters if any(isinstance(m, entry) for m in self._above(name))]
        elif not isinstance(entry, str):
            raise TargetError(
                f"{what}: expected a name, a pattern or a module type, got an object of type "
                f"{type(entry).__name__}; pass the name of a module or parameter, not the object"
            )
        else:
            reached = super()._reached_by(what, entry)
        return list(dict.fromkeys(self._first_names[self._parameters[name]] for name in reached))

    def _above(self, name: str) -> Iterator[nn.Module]:
        parts = name.split(".")
        return (self._modules[".".join(parts[:depth])] for depth in range(len(parts)))

    def _near(self, what: str, entry: Entry) -> str:
        if isinstance(entry, str):
            return super()._near(what, entry)
        names = self._free() if what == "targets" else self._parameters
        return "module types here: " + ", ".join(sorted({type(m).__name__ for n in names for m in self._above(n)}))


def _held(optimizer: torch.optim.Optimizer) -> set[torch.Tensor]:
    return {parameter for group in optimizer.param_groups for parameter in group["params"]}


def _as_list(entries: Entry | Iterable[Entry] | None) -> Sequence[Entry] | None:
    if entries is None:
        return None
    # Modules and tensors may be iterated over, but what they hold is not what was given.
    is_one = isinstance(entries, (str, type, nn.Module, torch.Tensor)) or not isinstance(entries, Iterable)
    return [entries] if is_one else list(entries)  # type: ignore[arg-type, list-item]


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
    if not is_lazy(parameter) and parameter.numel() == 0:
        return EMPTY
    if parameter.is_complex():
        return COMPLEX
    if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
        return QUANTIZED
    # Sharded parameters are known. Other tensors that redefine operations hold their weights elsewhere.
    is_plain = type(parameter).__torch_dispatch__ is torch.Tensor.__torch_dispatch__ or hasattr(parameter, "to_local")
    return None if is_plain else f"a {type(parameter).__name__}"
