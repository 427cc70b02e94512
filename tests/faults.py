"""Interrupts between any two instructions of Python, and memory that runs out at any allocation."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

import gmp_kernels

WATCHED = tuple(str(Path(package.__file__).parent) for package in (gmp_kernels, torch.optim))

# torch's functions by which the package gets memory. What writes in place gets none.
ALLOCATING = {
    *("empty", "zeros", "ones", "full", "tensor", "as_tensor", "arange", "empty_like", "zeros_like", "stack", "clone"),
    *("cat", "to", "contiguous", "float", "double", "masked_fill", "bitwise_not", "__invert__", "to_dense"),
}


@contextmanager
def interrupted(after: int) -> Iterator[None]:
    """Raise KeyboardInterrupt before the instruction of that number, counted in the package's frames and torch.optim's.

    In a block with fewer instructions nothing is raised.
    """
    left = after

    def local(frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        nonlocal left
        if event == "opcode":
            left -= 1
            if left < 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return local

    def entered(frame: FrameType, _: str, __: Any) -> Callable[..., Any] | None:
        if not frame.f_code.co_filename.startswith(WATCHED):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return local

    before, is_grad_enabled = sys.gettrace(), torch.is_grad_enabled()
    sys.settrace(entered)
    try:
        yield
    finally:
        sys.settrace(before)
        assert torch.is_grad_enabled() is is_grad_enabled


class OutOfMemory(TorchFunctionMode):
    """Raises MemoryError at the allocation of that number; with fewer of them it does nothing."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(function, "__name__", "") in ALLOCATING:
            self.left -= 1
            if self.left < 0:
                raise MemoryError("no memory left")
        return function(*args, **(kwargs or {}))
