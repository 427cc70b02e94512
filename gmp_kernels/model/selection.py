"""Choice of the tensors to prune by names, patterns or the default rule, for models and checkpoints alike."""

from __future__ import annotations

import difflib
import fnmatch
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Generic, TypeVar

from gmp_kernels.errors import TargetError
from gmp_kernels.model.coverage import IGNORED, NOT_A_TARGET, Coverage, CoveredTensor
from gmp_kernels.model.roles import SMALL

__all__ = ["TargetIndex", "shown_entry"]

E = TypeVar("E")


class TargetIndex(ABC, Generic[E]):
    """All names that reach tensors of a model or checkpoint, and the reasons against pruning them.

    Parameters
    ----------
    covered : sequence of tuple of CoveredTensor and str or None
        The tensors in the order of the model or checkpoint, as the default targets cover them. Each comes with its
        obstacle: the reason, other than its role, why only an exact name reaches it, or nothing does.
    effective : mapping of str to str
        {name of a tensor: name of the weight that is computed from it}; the same name if none is.
    """

    WORDS: ClassVar[str]  # the entries that it knows, for errors
    NOUN: ClassVar[str]  # its tensors, for errors

    def __init__(self, covered: Sequence[tuple[CoveredTensor, str | None]], effective: Mapping[str, str]) -> None:
        self._covered = {tensor.name: tensor for tensor, _ in covered}
        self._obstacles = {tensor.name: obstacle for tensor, obstacle in covered}
        self._effective = effective

    def find(self, what: str, entry: E) -> list[str]:
        """Return the names ``entry`` reaches; raise TargetError calling it an entry of ``what`` if there are none."""
        reached = self._reached_by(what, entry)
        if not reached:
            raise TargetError(
                f"{what}: expected {self.WORDS}, got {entry!r}, which matches nothing; {self._near(what, entry)}"
            )
        return reached

    def choose(self, targets: Sequence[E] | None, ignore: Sequence[E] | None) -> tuple[list[str], Coverage]:
        """Return the names of tensors that ``targets`` reach and ``ignore`` does not, in order, and the coverage.

        ``targets=None`` means ``gmp_kernels.model.roles.DEFAULT_RULE``. In ``targets``, all but exact names leave out
        biases, norms and scales, and what cannot be pruned.

        Raises
        ------
        TargetError
            An entry reaches nothing that can be pruned, or nothing is left.
        """
        meant: set[str] = set()
        reached = {name for name, tensor in self._covered.items() if targets is None and not tensor.reason}
        for entry in targets or ():
            found = self.find("targets", entry)
            meant.update(found)
            if self._is_exact(entry):
                reached.update(self._named(found))
            elif free := [name for name in found if self._is_free(name)]:
                reached.update(free)
            else:
                raise TargetError(f"targets: expected {self._reason_against(entry, found)}")
        ignored: dict[str, E] = {}
        for entry in ignore or ():
            ignored = dict.fromkeys(self.find("ignore", entry), entry) | ignored
        chosen, left_out = list[CoveredTensor](), list[CoveredTensor]()
        for name, tensor in self._covered.items():
            reason = tensor.reason
            if name in reached:
                reason = f"{IGNORED} {shown_entry(ignored[name])}" if name in ignored else ""
            elif targets is not None and reason != SMALL:
                reason = (self._obstacles[name] if name in meant else None) or NOT_A_TARGET
            (left_out if reason else chosen).append(replace(tensor, reason=reason))
        coverage = Coverage(tuple(chosen), tuple(left_out))
        if not chosen:
            raise TargetError(
                f"targets: expected at least one {self.NOUN} to prune, got none from targets={_shown(targets)} and "
                f"ignore={_shown(ignore)}; {self._advice(coverage)}"
            )
        return [tensor.name for tensor in chosen], coverage

    def _is_free(self, name: str) -> bool:
        """Whether a module or a pattern in ``targets`` takes a tensor."""
        return self._covered[name].reason != SMALL and self._obstacles[name] is None

    def _reached_by(self, what: str, entry: E) -> list[str]:
        """Return the names that an entry means.

        They are those of one tensor, of all below a module, or of all that a pattern matches. An entry that is a name
        there is never taken for a pattern.

        Raises
        ------
        TargetError
            The entry begins with "re:" but is no regular expression.
        """
        assert isinstance(entry, str)
        names = self._effective
        if exact := [name for name, weight in names.items() if entry in (name, weight)]:
            return exact
        below = f"{entry}."
        if inside := [name for name in names if name.startswith(below)]:
            return inside
        if not (entry.startswith("re:") or any(character in entry for character in "*?[")):
            return []
        pattern = _compile(what, entry)
        return [n for n, weight in names.items() if _matches(n, pattern) or (weight != n and _matches(weight, pattern))]

    def _is_exact(self, entry: E) -> bool:
        """Whether an entry is the name of one tensor."""
        return entry in self._covered

    @abstractmethod
    def _named(self, reached: list[str]) -> list[str]:
        """Return the tensors that an exact name stands for, of those it reaches; refuse any that cannot be pruned."""

    def _near(self, what: str, entry: E) -> str:
        """Suggest names for an entry that reaches nothing."""
        names = [name for name in self._covered if what != "targets" or self._is_free(name)]
        near = difflib.get_close_matches(str(entry).removeprefix("re:"), names, n=3, cutoff=0.5) or names[:3]
        return f"there are e.g. {', '.join(map(repr, near))}"

    def _reason_against(self, entry: E, reached: Sequence[str]) -> str:
        """Say what was expected of a target, and why nothing it reaches can be pruned."""
        largest = max((self._covered[name] for name in reached), key=lambda tensor: tensor.num_weights)
        return (
            f"floating-point weights of two or more dimensions, got {entry!r}, which matches only others; "
            f"'{largest.name}' of dtype {largest.dtype}, for one, is {self._obstacles[largest.name] or largest.reason}"
        )

    @abstractmethod
    def _advice(self, coverage: Coverage) -> str:
        """Say what to do where nothing is left to prune."""


def shown_entry(entry: object) -> str:
    """Return an entry as a user would write it."""
    return entry.__name__ if isinstance(entry, type) else repr(entry)


def _shown(entries: Sequence[object] | None) -> str:
    return "None" if entries is None else f"[{', '.join(map(shown_entry, entries))}]"


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
