"""Writes that belong together, done with no Python between them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from operator import call

__all__ = ["at_once"]


def at_once(calls: Iterable[Callable[[], object]]) -> None:
    """Make the calls one after another; an interrupt comes before the first or after the last.

    Python raises KeyboardInterrupt only between two Python instructions. No such instruction runs here while the calls
    are C functions, or ``functools.partial`` of them. The first call that raises ends the sequence.
    """
    deque(map(call, [*calls]), maxlen=0)
