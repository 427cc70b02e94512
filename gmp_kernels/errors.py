"""Exceptions of the package. Each is also the builtin it resembles, so that plain ``except ValueError`` keeps working.

A call that raises one of these has changed no weight, no mask and no state.
"""

from __future__ import annotations

import sys
import warnings
from functools import partial
from typing import Any

__all__ = [
    "BackendUnavailableError",
    "CaptureError",
    "CheckpointError",
    "DTypeError",
    "DeviceError",
    "DistributedError",
    "GMPError",
    "GMPWarning",
    "LayoutError",
    "NonFiniteError",
    "OutputError",
    "RecipeError",
    "ScheduleError",
    "ShapeError",
    "SparsityError",
    "StateError",
    "TargetError",
    "printable",
    "warn",
]


INSIDE = {"gmp_kernels", "torch"}


def printable(text: str, *, keep: str = "") -> str:
    """Return ``text`` with all characters escaped that have no glyph: controls, bidi overrides, surrogates and so on.

    Parameters
    ----------
    text : str
    keep : str
        Characters to leave as they are, such as a newline.

    Examples
    --------
    >>> printable("a\\x1b[2J")
    'a\\\\x1b[2J'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


class GMPError(Exception):
    """Base class of every error raised on purpose by this package.

    Names and paths that it quotes are shown escaped, as they may hold anything.
    """

    def __str__(self) -> str:
        return printable(super().__str__(), keep="\n")


class GMPWarning(UserWarning):
    """Category of every warning of this package: of repairs, omissions, and settings without the expected effect."""


def warn(message: str) -> None:
    """Issue a GMPWarning that points at the first line outside of this package and torch."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in INSIDE:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, GMPWarning, stacklevel=level)


class DTypeError(GMPError, TypeError):
    """A tensor whose dtype has no magnitude order here (integers, complex, bool, float8)."""


class ShapeError(GMPError, ValueError):
    """An empty tensor, a mask of another shape, or lists of different lengths."""


class LayoutError(GMPError, ValueError):
    """A tensor of other strides than those taken, not writable, sharing memory with another, or on another device."""


class SparsityError(GMPError, ValueError):
    """A sparsity outside [0, 1], or a num_prune outside [0, n]."""


class ScheduleError(GMPError, ValueError):
    """A schedule or stage length that describes no run."""


class RecipeError(GMPError, ValueError):
    """A recipe that cannot be read, or asks for what this library does not do."""


class TargetError(GMPError, ValueError):
    """A target or override that matches nothing, or a parameter that is not there any more."""


class StateError(GMPError, ValueError):
    """A ``state_dict`` that belongs to another model, another schedule or another version."""


class BackendUnavailableError(GMPError, RuntimeError):
    """A backend that was asked for by name and cannot run; the message says why."""


class NonFiniteError(GMPError, ValueError):
    """NaN or Inf among the weights that are not pruned yet.

    Attributes
    ----------
    layer : int
        Position in the list of weights.
    index : int
        Row-major flat index of the first such weight.
    """

    def __init__(self, message: str, *, layer: int, index: int) -> None:
        super().__init__(message)
        self.layer = layer
        self.index = index

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions are pickled by their positional arguments alone.
        return partial(NonFiniteError, layer=self.layer, index=self.index), self.args


class DeviceError(GMPError, RuntimeError):
    """The GPU reports an error, or has no memory left."""


class CaptureError(GMPError, RuntimeError):
    """A call that a CUDA graph cannot hold, or that would make the replays of a captured graph wrong."""


class DistributedError(GMPError, RuntimeError):
    """Another process of the run has died, has failed, or makes a different call."""


class CheckpointError(GMPError, ValueError):
    """A checkpoint that is corrupt, incomplete, contradicts its index, or changed while it was read."""


class OutputError(GMPError, OSError):
    """An output that is there already, lies where it must not, or cannot be written; the input is as it was."""
