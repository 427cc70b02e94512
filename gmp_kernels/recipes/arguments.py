"""The arguments of one modifier as a recipe gives them, checked one by one."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterator
from typing import Any, ClassVar

from gmp_kernels.errors import RecipeError
from gmp_kernels.recipes.expressions import number_in

__all__ = ["MOST_EPOCHS", "Arguments", "flat"]

MOST_EPOCHS = 1e6


class Arguments:
    """Arguments of one modifier; each is taken once, and what is left is refused."""

    # Earlier versions took these for their loggers. They change nothing in a run.
    IGNORED = ("log_types", "constant_logging")

    # Keys of the new style, by those of the old.
    NEW: ClassVar = {
        "start_epoch": "start",
        "end_epoch": "end",
        "update_frequency": "update",
        "params": "targets",
        "inter_func": "update_scheduler",
        "mask_type": "mask_structure",
        "global_sparsity": "apply_globally",
    }

    def __init__(self, where: str, given: dict[str, Any]) -> None:
        self.where = where
        self.is_new = "targets" in given
        self._left = {key: value for key, value in given.items() if key not in self.IGNORED}
        self._taken: list[str] = []

    def error(self, expected: str, got: object, advice: str) -> RecipeError:
        return RecipeError(f"recipe: {self.where}: expected {expected}, got {got}; {advice}")

    def take(self, key: str, *default: Any) -> Any:
        """Return the value under a key, or under its name in the new style."""
        found = [name for name in (key, self.NEW.get(key)) if name in self._left]
        self._taken.append(key)
        if len(found) > 1:
            raise self.error(f"{key!r} or {found[1]!r}", "both", "leave one of them out")
        if not found and not default:
            raise self.error(f"a value for {key!r}", "none", f"write '{key}:' among its arguments")
        value = self._left.pop(found[0]) if found else None
        return default[0] if value is None and default else value

    def number(self, key: str, *default: float, least: float = 0, most: float = math.inf) -> float:
        return self.checked_number(key, self.take(key, *default), least, most)

    def checked_number(self, key: str, value: Any, least: float = 0, most: float = math.inf) -> float:
        number = number_in(value)
        if number is None or not math.isfinite(number) or not least <= number <= most:
            bounds = f">= {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
            raise self.error(f"a finite number {bounds} for {key!r}", repr(value), "write a number or eval(...)")
        return float(number)

    def word(self, key: str, choices: Collection[str], *default: str) -> str:
        value = self.take(key, *default)
        if value not in choices:
            raise self.error(f"one of {', '.join(choices)} for {key!r}", repr(value), "write one of them")
        return str(value)

    def flag(self, key: str, *default: bool) -> bool:
        value = self.take(key, *default)
        # Values of overrides may be words.
        value = {"true": True, "false": False}.get(str(value).lower(), value)
        if not isinstance(value, bool):
            raise self.error(f"True or False for {key!r}", repr(value), "write one of them")
        return value

    def names(self, key: str, value: Any) -> tuple[str, ...]:
        """Return names and patterns, given as one or as a list of them or of lists."""
        found = tuple(flat(value))
        for name in found:
            if not isinstance(name, str) or not name:
                raise self.error(f"names and 're:' patterns for {key!r}", repr(name), "write each as text")
        return found

    def groups(self) -> frozenset[int] | None:
        """Return indices of param groups; None for all, which an empty list means as well."""
        value = self.take("param_groups", None)
        indices = list(flat(value or []))
        if not all(isinstance(index, int) and not isinstance(index, bool) and index >= 0 for index in indices):
            raise self.error("indices of param groups for 'param_groups'", repr(value), "count them from 0")
        return frozenset(indices) or None

    def times(self) -> dict[str, Any]:
        """Return name, start and end of the modifier."""
        found = {}
        for key in ("start_epoch", "end_epoch"):
            value = self.number(key, -1.0, least=-1, most=MOST_EPOCHS)
            if -1 < value < 0:
                raise self.error(f"an epoch >= 0, or -1, for {key!r}", f"{value:g}", "count from the start of the run")
            found[key] = value
        start, end = found.values()
        if end != -1 and end < start:
            raise self.error("start_epoch <= end_epoch", f"{start:g} and {end:g}", "swap them, or end at -1 for never")
        return {"name": self.where, "start": start, "end": end}

    def finish(self) -> None:
        """Refuse arguments that nothing has taken."""
        for key in self._left:
            near = difflib.get_close_matches(key, self._taken, n=1)
            advice = f"did you mean {near[0]!r}?" if near else "leave it out"
            raise self.error(f"arguments among {', '.join(sorted(set(self._taken)))}", repr(key), advice)


def flat(value: Any) -> Iterator[Any]:
    """Yield what is in a list and in lists in it, or a value that is no list."""
    if isinstance(value, list):
        for item in value:
            yield from flat(item)
    elif value is not None:
        yield value
