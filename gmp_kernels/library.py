"""Definitions of operations for ``torch.library``, each of which is one node of a compiled graph.

A module defines the operations that stand for its own functions. The schema says what a call writes, and the fake
kernel what it returns. The real kernel validates and goes straight to a backend. Inside a compiled region users make
the same calls as outside: ``optimizer.step()``, ``apply_masks_``, ``ema_update_`` and ``clip_grad_norm_`` become
``torch.ops.gmp_kernels.*`` when they are traced. ``prune_`` and ``magnitude_threshold`` return Python numbers, so a
compiled region has to call them by that name.

Eager calls bypass these operations: the dispatcher and the masks made from their bits took about a third of the time
of ``apply_masks_`` over 161 small tensors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["define"]

# A CUDA graph would freeze the values that kernels get from the host: counts, thresholds, learning rates. torch 2.8 has
# no such tag.
_TAGS = tuple(tag for tag in [getattr(torch.Tag, "cudagraph_unsafe", None)] if tag is not None)

# The definitions live as long as this object does.
_library = torch.library.Library("gmp_kernels", "DEF")  # type: ignore[no-untyped-call]


def define(schema: str, kernel: Callable[..., object], fake: Callable[..., object] = lambda *_, **__: None) -> None:
    """Define ``torch.ops.gmp_kernels.<name>``.

    Parameters
    ----------
    schema : str
        Name, arguments and results, as ``torch.library.Library.define`` takes them.
    kernel : callable
        The operation, for the CPU and CUDA alike.
    fake : callable
        Returns what the kernel returns, without values; by default nothing.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=_TAGS)  # type: ignore[no-untyped-call]
    for key in ("CPU", "CUDA"):
        _library.impl(name, kernel, key)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"gmp_kernels::{name}", fake, lib=_library)
