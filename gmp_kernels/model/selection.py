"""Choice of the tensors to prune by names, patterns or the default rule, for models and checkpoints alike."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, TypeAlias

from torch import nn

from gmp_kernels.errors import DTypeError, ShapeError, TargetError
from gmp_kernels.model.coverage import IGNORED, NOT_A_TARGET, Coverage, CoveredTensor
from gmp_kernels.model.roles import COMPLEX, EMPTY, NO_WEIGHTS, QUANTIZED, SMALL

__all__ = ["Entry", "TargetIndex", "shown_entry"]

Entry: TypeAlias = str | type[nn.Module]


class TargetIndex:
    """All names that reach tensors of a model or checkpoint, and the reasons against pruning them.

    Parameters
    ----------
    covered : sequence of (CoveredTensor, obstacle, refusal)
        The tensors in the order of the model or checkpoint, as the default targets cover them. The obstacle is the
        reason, other than its role, why only an exact name reaches a tensor, and the refusal why nothing does, or None.
    effective : mapping of str to str
        {name of a tensor: name of the weight that is computed from it}; the same name if none is.
    """

    WORDS: ClassVar[str]  # the entries that it knows, for errors
    NOUN: ClassVar[str]  # its tensors, for errors

    def __init__(
        self, covered: Sequence[tuple[CoveredTensor, str | None, str | None]], effective: Mapping[str, str]
    ) -> None:
        self._covered = {tensor.name: tensor for tensor, _, _ in covered}
        self._obstacles = {tensor.name: obstacle for tensor, obstacle, _ in covered}
        self._refusals = {tensor.name: refusal for tensor, _, refusal in covered}
        self._effective = effective

    def find(self, what: str, entry: Entry) -> list[str]:
        """Return the names ``entry`` reaches; raise TargetError calling it an entry of ``what`` if there are none."""
        reached = self._reached_by(what, entry)
        if not reached:
            raise TargetError(
                f"{what}: expected {self.WORDS}, got {entry!r}, which matches nothing; {self._near(what, entry)}"
            )
        return reached

    def choose(self, targets: Sequence[Entry] | None, ignore: Sequence[Entry] | None) -> tuple[list[str], Coverage]:
        """Return the names of tensors that ``targets`` reach and ``ignore`` does not, in order, and the coverage.

        ``targets=None`` means ``gmp_kernels.model.roles.DEFAULT_RULE``. In ``targets``, all but exact names leave out
        biases, norms and scales, and what cannot be pruned.

        Raises
        ------
        TargetError
            An entry reaches nothing that can be pruned, or nothing is left.
        TargetError, DTypeError, ShapeError
            A target named exactly, or the largest matrix where none can be pruned: a weight is computed from it, it has
            a dtype without a magnitude order, such as float8, or it is empty.
        """
        meant: set[str] = set()
        reached = {name for name, tensor in self._covered.items() if targets is None and not tensor.reason}
        for entry in targets or ():
            found = self.find("targets", entry)
            meant.update(found)
            if entry in self._effective or entry in self._effective.values():
                # The name of a computed weight means the tensor that decides its zeros.
                name = min(found, key=lambda n: (self._refusals[n] is not None, self._covered[n].reason == SMALL))
                self._refuse(name)
                reached.add(name)
            elif free := [name for name in found if self._is_free(name)]:
                reached.update(free)
            else:
                raise TargetError(f"targets: expected {self._reason_against(entry, found)}")
        ignored: dict[str, Entry] = {}
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

    def _reached_by(self, what: str, entry: Entry) -> list[str]:
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

    def _refuse(self, name: str) -> None:
        """Raise for a tensor that is named exactly and cannot be pruned."""
        tensor, reason = self._covered[name], self._refusals[name]
        if reason == COMPLEX:
            raise DTypeError(
                f"targets: expected real weights, got '{name}' of {tensor.dtype}; leave it out, or hold its real and "
                f"imaginary parts as two {self.NOUN}s, which are ranked as any others"
            )
        if reason in (QUANTIZED, NO_WEIGHTS):
            raise DTypeError(
                f"targets: expected float32, float64, bfloat16 or float16, got '{name}' of {tensor.dtype}; prune "
                "before quantizing, or leave it out"
            )
        if reason == EMPTY:
            raise ShapeError(f"targets: expected weights in '{name}', got shape {tensor.shape}; leave it out")
        if reason is not None:
            raise TargetError(
                f"targets: expected {self.NOUN}s whose zeros are zeros of the weight, got '{name}', which is {reason}; "
                "leave it out, or remove the parametrization first"
            )

    def _near(self, what: str, entry: Entry) -> str:
        """Suggest names for an entry that reaches nothing."""
        # Names that would be refused are not suggested.
        names = self._free() if what == "targets" else list(self._effective)
        paths = {".".join(parts[:depth]) for parts in (n.split(".") for n in names) for depth in range(1, len(parts))}
        called = [self._effective[name] for name in names]
        near = difflib.get_close_matches(str(entry).removeprefix("re:"), [*called, *sorted(paths)], n=3, cutoff=0.5)
        return "did you mean " + " or ".join(f"'{name}'" for name in near) if near else self._examples()

    def _reason_against(self, entry: Entry, reached: Sequence[str]) -> str:
        """Say what was expected of a target, and why nothing it reaches can be pruned."""
        shown, weights = shown_entry(entry), [name for name in reached if self._covered[name].reason != SMALL]
        if weights:
            name = weights[0]
            return (
                f"{self.NOUN}s that can be pruned, got {shown}, which matches none; '{name}' of dtype "
                f"{self._covered[name].dtype} is {self._obstacles[name]}; {self._examples()}"
            )
        named = [name for name in reached if self._obstacles[name] is None]
        advice = f"name those exactly if you mean them, such as '{named[0]}'" if named else self._examples()
        return (
            f"{self.NOUN}s of two or more dimensions, got {shown}, which matches only biases, norms or scales; {advice}"
        )

    def _free(self) -> list[str]:
        return [name for name in self._covered if self._is_free(name)]

    def _examples(self) -> str:
        examples = ", ".join(f"'{self._effective[name]}'" for name in self._free()[:3])
        return f"name e.g. {examples}" if examples else "there is nothing that can be pruned"

    def _advice(self, coverage: Coverage) -> str:
        """Say what to do where nothing is left to prune."""
        if (largest := coverage.largest_left_out(1)) and not any(t.can_be_target for t in coverage.left_out):
            self._refuse(largest[0].name)
        ignored = [tensor for tensor in coverage.left_out if tensor.reason.startswith(IGNORED)]
        others = [tensor for tensor in coverage.left_out if tensor.can_be_target and tensor not in ignored]
        if ignored:
            return f"'{ignored[0].name}' is {ignored[0].reason}, for one: drop that entry of ignore="
        if others:
            names = " or ".join(f"'{self._effective[tensor.name]}' ({tensor.reason})" for tensor in others[:3])
            return f"name what you mean in targets=, such as {names}"
        if largest:
            return f"'{largest[0].name}', the largest matrix, is left out as {largest[0].reason}"
        return "there are no matrices"


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
