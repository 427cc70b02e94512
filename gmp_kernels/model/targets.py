"""Parameters of a model by names, patterns and module types."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from gmp_kernels.errors import DTypeError, TargetError
from gmp_kernels.model.coverage import FROZEN, IGNORED, NOT_OPTIMIZED, Coverage, CoveredTensor
from gmp_kernels.model.names import named_buffers, named_modules, named_parameters
from gmp_kernels.model.parametrized import reasons_against
from gmp_kernels.model.roles import COMPLEX, EMBEDDING, PARAMETRIZATION, QUANTIZED, SMALL, Roles, effective_name
from gmp_kernels.model.selection import TargetIndex, shown_entry

__all__ = ["Entry", "ParameterIndex", "check_optimized", "check_present"]

Entry: TypeAlias = str | type[nn.Module]

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


class ParameterIndex(TargetIndex[Entry]):
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
        self._modules = dict(named_modules(model))
        self._parameters = named_parameters(model)
        self._first_names: dict[nn.Parameter, str] = {}
        for name, parameter in self._parameters.items():
            self._first_names.setdefault(parameter, name)
        tensors = self._parameters | named_buffers(model)
        self._optimizer = optimizer
        parametrized = reasons_against(model)
        # {first name: reason} of parameters that cannot be pruned even if they are named.
        self._refusals = {
            name: reason
            for parameter, name in self._first_names.items()
            if (reason := parametrized.get(parameter) or _refusal_of_type(parameter)) is not None
        }
        effective = {name: effective_name(name, tensors) for name in tensors}
        roles = self._find_roles(_roles(model, self._modules, tensors, effective))
        held = set(self._first_names) if optimizer is None else _held(optimizer)
        covered = [self._cover(name, roles[name], is_held=p in held) for p, name in self._first_names.items()]
        super().__init__(covered, {name: effective[name] for name in self._parameters})

    def select(
        self, targets: Entry | Iterable[Entry] | None, ignore: Entry | Iterable[Entry] | None
    ) -> tuple[dict[str, nn.Parameter], Coverage]:
        """Return {first name: parameter} of all that ``targets`` reach and ``ignore`` does not, and the coverage.

        Like ``choose``, for entries as users give them. Modules, patterns and types in ``targets`` leave out frozen
        parameters too. A parameter that cannot be pruned must not be named exactly.

        Raises
        ------
        TargetError
            See ``choose``; or a parameter is not initialized yet.
        DTypeError
            A parameter named exactly has a dtype without a magnitude order.
        """
        names, coverage = self.choose(_as_list(targets), _as_list(ignore))
        for name in names:
            if is_lazy(self._parameters[name]):
                raise TargetError(
                    f"targets: expected initialized parameters, got '{name}' without a shape; run a forward pass first"
                )
        return {name: self._parameters[name] for name in names}, coverage

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
        """Return {first name: reason against it as a default target}, where any of its names gives one."""
        found: dict[str, str | None] = {}
        for name, parameter in self._parameters.items():
            reason, first = roles.reason_against(name), self._first_names[parameter]
            if name != first and reason == EMBEDDING and found[first] != EMBEDDING:
                reason = f"tied to the embedding '{name}'"
                found[first] = None
            found[first] = found.get(first) or reason
        return found

    def _cover(self, name: str, role: str | None, *, is_held: bool) -> tuple[CoveredTensor, str | None]:
        """Return a parameter of this role as the default rule covers it, and the obstacle to other targets."""
        parameter = self._parameters[name]
        is_uninitialized = is_lazy(parameter)
        frozen = None if parameter.requires_grad else FROZEN
        refusal = self._refusals.get(name) or (None if is_held else frozen or NOT_OPTIMIZED)
        obstacle = "empty" if not is_uninitialized and parameter.numel() == 0 else refusal or frozen
        # A refusal names the type of the parametrization, which says more than the role.
        reason = self._refusals.get(name, role) if role == PARAMETRIZATION else role or obstacle
        shape, dtype = () if is_uninitialized else tuple(parameter.shape), str(parameter.dtype).removeprefix("torch.")
        return CoveredTensor(name, shape, dtype, reason or "", role != SMALL and refusal is None), obstacle

    def _reached_by(self, what: str, entry: Entry) -> list[str]:
        if isinstance(entry, type) and issubclass(entry, nn.Module):
            reached = [name for name in self._parameters if any(isinstance(m, entry) for m in self._above(name))]
        elif not isinstance(entry, str):
            raise TargetError(
                f"{what}: expected a name, a pattern or a module type, got {entry!r} of type {type(entry).__name__}; "
                "pass the name of a module or parameter, not the object"
            )
        else:
            reached = super()._reached_by(what, entry)
        return list(dict.fromkeys(self._first_names[self._parameters[name]] for name in reached))

    def _is_exact(self, entry: Entry) -> bool:
        """Whether an entry is the name of a parameter, or of a weight that is computed from some."""
        return entry in self._parameters or entry in self._effective.values()

    def _above(self, name: str) -> Iterator[nn.Module]:
        parts = name.split(".")
        return (self._modules[".".join(parts[:depth])] for depth in range(len(parts)))

    def _named(self, reached: list[str]) -> list[str]:
        # The name of a computed weight means the parameter that decides its zeros.
        reached = [name for name in reached if name not in self._refusals] or reached
        self._refuse(reached[0])
        return reached

    def _reason_against(self, entry: Entry, reached: Sequence[str]) -> str:
        weights = [name for name in reached if self._covered[name].reason != SMALL]
        if weights:
            name = weights[0]
            return (
                f"parameters that can be pruned, got {shown_entry(entry)}, which matches none; '{name}' is "
                f"{self._obstacles[name]}; {self._examples()}"
            )
        named = [name for name in reached if self._obstacles[name] is None]
        advice = f"name those exactly if you mean them, such as '{named[0]}'" if named else self._examples()
        return (
            f"parameters of two or more dimensions, got {shown_entry(entry)}, which matches only biases, norms or "
            f"scales; {advice}"
        )

    def _free(self) -> list[str]:
        return [name for name in self._covered if self._is_free(name)]

    def _near(self, what: str, entry: Entry) -> str:
        # Names that would be refused are not suggested.
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
        if (largest := coverage.largest_left_out(1)) and not any(t.can_be_target for t in coverage.left_out):
            self._refuse_dtype(largest[0].name)
        ignored = [tensor for tensor in coverage.left_out if tensor.reason.startswith(IGNORED)]
        others = [tensor for tensor in coverage.left_out if tensor.can_be_target and tensor not in ignored]
        if ignored:
            return f"'{ignored[0].name}' is {ignored[0].reason}, for one: drop that entry of ignore="
        if others:
            names = " or ".join(f"'{self._effective[tensor.name]}' ({tensor.reason})" for tensor in others[:3])
            return f"name what you mean in targets=, such as {names}"
        if largest:
            return f"'{largest[0].name}', the largest matrix, is left out as {largest[0].reason}"
        return "the model has no matrices"


def _held(optimizer: torch.optim.Optimizer) -> set[torch.Tensor]:
    return {parameter for group in optimizer.param_groups for parameter in group["params"]}


def _as_list(entries: Entry | Iterable[Entry] | None) -> Sequence[Entry] | None:
    if entries is None:
        return None
    return [entries] if isinstance(entries, (str, type)) else list(entries)


def _roles(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    tensors: Mapping[str, torch.Tensor],
    effective: Mapping[str, str],
) -> Roles:
    """Return the roles of all parameters and buffers, by every name they have."""
    heads = _output_embeddings(model)
    shapes, types = {}, {}
    for name, tensor in tensors.items():
        path, _, attribute = effective[name].rpartition(".")
        owner = modules[path]
        kind = _kind(owner, attribute)
        if kind != "embedding" and any(tensor is head for head in heads):
            kind = "head"
        # A lazy tensor has no shape yet, though its module says what it will be.
        shapes[name] = ((0, 0) if kind == "weight" else (0,)) if is_lazy(tensor) else tuple(tensor.shape)
        types[name] = type(owner).__name__, kind
    return Roles(shapes, types)


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
