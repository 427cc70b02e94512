"""Writes that an interrupt does not leave half done."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from gmp_kernels.distributed import Shards

__all__ = ["write_despite_interrupts"]

_T = TypeVar("_T")


def write_despite_interrupts(write: Callable[[], _T], shards: Shards | None) -> _T:
    """Call ``write``. After an interrupt call it again, which finishes the work, and then raise the interrupt."""
    try:
        return write()
    except Exception:
        raise
    except BaseException:
        # Other ranks would not take part in a second call.
        if shards is None:
            write()
        raise
