"""Tensor subclasses as quantization libraries make them: their values are not where their memory would be."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map

aten = torch.ops.aten


class Codes(torch.Tensor):
    """float32 as 8-bit codes, a scale, and the code that stands for zero. What is computed from it is a plain tensor.

    Operations in place but ``copy_`` act on such a temporary, and are lost.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: int
    copies: bool

    @staticmethod
    def __new__(cls, values: torch.Tensor, *, zero: int = 0, copies: bool = True) -> Codes:
        self = torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32, device=values.device)
        self.codes, self.scale = torch.zeros(values.shape, dtype=torch.int8), torch.ones(())
        self.zero, self.copies = zero, True
        self.copy_(values)
        self.copies = copies
        return self

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["codes", "scale"], self.zero

    def dequantize(self) -> torch.Tensor:
        return (self.codes.float() - self.zero) * self.scale

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (aten.detach.default, aten.alias.default):
            found = cls(args[0].dequantize(), zero=args[0].zero)
            found.codes, found.scale, found.copies = args[0].codes, args[0].scale, args[0].copies
            return return_and_correct_aliasing(function, args, kwargs or {}, found)
        plain = tree_map(lambda a: a.dequantize() if isinstance(a, cls) else a, args)
        if function is aten.copy_.default and isinstance(args[0], cls):
            to, values = args[0], plain[1]
            if to.copies:
                to.scale.copy_(values.abs().max() / (127 - abs(to.zero)) + 1e-12)
                to.codes.copy_((values / to.scale).round() + to.zero)
            return to
        return function(*plain, **tree_map(lambda a: a.dequantize() if isinstance(a, cls) else a, kwargs or {}))
