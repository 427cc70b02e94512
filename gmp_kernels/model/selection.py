"""The one path from names, patterns and the default rule to what is pruned, of a model or of a checkpoint."""

from __future__ import annotations

import fnmatch
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

from gmp_kernels.errors import TargetError
from gmp_kernels.model.coverage import IGNORED, NOT_A_TARGET, Coverage, CoveredTensor

__all__ = ["Candidate", "TargetIndex", "reached_by_name", "shown_entry"]

E = TypeVar("E")


class Candidate(NamedTuple):
    """A tensor and what speaks against pruning it.

    Attributes
    ----------
    shape : tuple of int
    dtype : str
    is_small : bool
        A bias, norm, scale or constant, which only an exact name reaches.
    reason : str or None
        Why it is no default target; None if it is one.
    obstacle : str or None
        Why only an exact name reaches it, or nothing, whatever its role.
    can_be_target : bool
        Whether ``targets=`` would take it if it named it.
    """

    shape: tuple[int, ...]
    dtype: str
    is_small: bool
    reason: str | None
    obstacle: str | None
    can_be_target: bool

    @property
    def is_free(self) -> bool:
        """Whether a module or a pattern in ``targets`` takes it."""
        return not self.is_small and self.obstacle is None


class TargetIndex(ABC, Generic[E]):
    """Every name by which tensors can be meant.

    Parameters
    ----------
    candidates : mapping of str to Candidate
        In the order of the model or checkpoint.
    effective : mapping of str to str
        {name of a tensor: name of the weight that is computed from it}, equal if none is.
    words, noun : str
        For errors: which entries there are and where they are looked for, and what the tensors are called.
    """

    def __init__(
        self, candidates: Mapping[str, Candidate], effective: Mapping[str, str], *, words: str, noun: str
    ) -> None:
        self._candidates = candidates
        self._effective = effective
        self._words, self._noun = words, noun

    def find(self, what: str, entry: E) -> list[str]:
        """Return the names ``entry`` reaches; raise TargetError calling it an entry of ``what`` if there are none."""
        reached = self._reached_by(what, entry)
        if not reached:
            raise TargetError(
                f"{what}: expected {self._words}, got {entry!r}, which matches nothing; {self._near(what, entry)}"
            )
        return reached

    def choose(self, targets: Sequence[E] | None, ignore: Sequence[E] | None) -> tuple[list[str], Coverage]:
        """Return the names of what ``targets`` reach and ``ignore`` does not, in order, and the coverage by them.

        ``targets=None`` means ``gmp_kernels.model.roles.DEFAULT_RULE``. In ``targets``, all but exact names leave out
        biases, norms and scales, and what cannot be pruned.

        Raises
        ------
        TargetError
            An entry reaches nothing that can be pruned, or nothing is left.
        """
        meant: set[str] = set()
        if targets is None:
            reached = {name for name, candidate in self._candidates.items() if candidate.reason is None}
        else:
            reached = set()
            for entry in targets:
                found = self.find("targets", entry)
                meant.update(found)
                reached.update(self._narrow(entry, found))
        ignored: dict[str, E] = {}
        for entry in ignore or ():
            ignored = dict.fromkeys(self.find("ignore", entry), entry) | ignored
        chosen: list[CoveredTensor] = []
        left_out: list[CoveredTensor] = []
        for name, candidate in self._candidates.items():
            if name in reached:
                reason = f"{IGNORED} {shown_entry(ignored[name])}" if name in ignored else None
            elif targets is None or candidate.is_small:
                reason = candidate.reason
            else:
                reason = (candidate.obstacle if name in meant else None) or NOT_A_TARGET
            tensor = CoveredTensor(name, candidate.shape, candidate.dtype, reason or "", candidate.can_be_target)
            (left_out if reason else chosen).append(tensor)
        coverage = Coverage(tuple(chosen), tuple(left_out))
        if not chosen:
            raise TargetError(
                f"targets: expected at least one {self._noun} to prune, got none from targets={_shown(targets)} and "
                f"ignore={_shown(ignore)}; {self._advice(coverage)}"
            )
        return [tensor.name for tensor in chosen], coverage

    def _narrow(self, entry: E, reached: list[str]) -> list[str]:
        """Return those that can be pruned of what an entry of ``targets`` reaches."""
        if self._is_exact(entry):
            return self._checked(reached)
        free = [name for name in reached if self._candidates[name].is_free]
        if not free:
            raise TargetError(f"targets: expected {self._reason_against(entry, reached)}")
        return free

    @abstractmethod
    def _reached_by(self, what: str, entry: E) -> list[str]:
        """Return the names an entry means."""

    @abstractmethod
    def _is_exact(self, entry: E) -> bool:
        """Whether an entry is the name of one tensor."""

    @abstractmethod
    def _checked(self, reached: list[str]) -> list[str]:
        """Return those of what an exact name reaches that it stands for; refuse what cannot be pruned."""

    @abstractmethod
    def _near(self, what: str, entry: E) -> str:
        """Name what the entry may have meant."""

    @abstractmethod
    def _reason_against(self, entry: E, reached: list[str]) -> str:
        """Say what was expected, and why nothing that a target reaches can be pruned."""

    @abstractmethod
    def _advice(self, coverage: Coverage) -> str:
        """Say what to do where nothing is left to prune."""


def shown_entry(entry: object) -> str:
    """Return an entry as one would write it."""
    return entry.__name__ if isinstance(entry, type) else repr(entry)


def _shown(entries: Sequence[object] | None) -> str:
    return "None" if entries is None else f"[{', '.join(map(shown_entry, entries))}]"


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
