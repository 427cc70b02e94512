"""Parameters of a model, or tensors of a checkpoint, by the names and patterns of a recipe."""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Self

from torch import nn
from torch.nn.modules.conv import _ConvNd

from gmp_kernels.errors import RecipeError
from gmp_kernels.model.names import named_modules, named_parameters
from gmp_kernels.recipes.modifiers import ALL, ALL_PRUNABLE

__all__ = ["Names"]

PRUNABLE = (nn.Linear, nn.Embedding, _ConvNd)


class Names:
    """Names that entries of a recipe can reach.

    Parameters
    ----------
    parameters : mapping of str to object
        All parameters; a tied one is the same object under each of its names.
    prunable : sequence of str
        Names that ``__ALL_PRUNABLE__`` means.
    **classes : sequence of str
        {name of a class of modules: names of their weights}.
    """

    def __init__(self, parameters: Mapping[str, Hashable], prunable: Sequence[str], **classes: Sequence[str]) -> None:
        self._parameters = parameters
        self._called = {**classes, ALL: list(parameters), ALL_PRUNABLE: prunable}
        self._first: dict[Hashable, str] = {}
        for name, parameter in parameters.items():
            self._first.setdefault(parameter, name)

    @classmethod
    def of_model(cls, model: nn.Module) -> Self:
        """Return the names of a model, without the levels that wrappers add."""
        parameters = named_parameters(model)
        prunable: list[str] = []
        classes: dict[str, list[str]] = {}
        for path, module in named_modules(model).items():
            weight = f"{path}.weight" if path else "weight"
            if weight in parameters:
                classes.setdefault(type(module).__name__, []).append(weight)
                if _is_prunable(module):
                    prunable.append(weight)
        return cls(parameters, prunable, **classes)

    def reached_by(self, where: str, entries: Sequence[str], *, strict: bool = True) -> list[str]:
        """Return the parameters that a modifier means, each once, under the first of its names.

        An entry is a full name, ``re:`` and a regular expression that matches from the start of a name, the name of a
        class of modules, which means their weights, ``__ALL__`` or ``__ALL_PRUNABLE__``.

        Raises
        ------
        RecipeError
            An entry is no regular expression, or with ``strict`` matches nothing.
        """
        found: list[str] = []
        for entry in entries:
            names = self._matching(where, entry)
            if strict and not names:
                near = difflib.get_close_matches(entry.removeprefix("re:"), list(self._parameters), n=3, cutoff=0.5)
                raise RecipeError(
                    f"recipe: {where}: expected names that the model has, got {entry!r}, which matches no parameter; "
                    + ("did you mean " + " or ".join(map(repr, near)) if near else "is it a recipe for another model?")
                )
            found += names
        return list(dict.fromkeys(self._first[self._parameters[name]] for name in found))

    def _matching(self, where: str, entry: str) -> Sequence[str]:
        if entry in self._parameters:
            return [entry]
        if not entry.startswith("re:"):
            return self._called.get(entry.upper() if entry.startswith("__") else entry, ())
        try:
            pattern = re.compile(entry.removeprefix("re:"))
        except (re.error, RecursionError, OverflowError) as error:
            raise RecipeError(
                f"recipe: {where}: expected a regular expression after 're:', got {entry!r}: {error}"
            ) from None
        return [name for name in self._parameters if pattern.match(name)]


def _is_prunable(module: nn.Module) -> bool:
    # The Conv1D of Hugging Face is a linear layer.
    return isinstance(module, PRUNABLE) or any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)
