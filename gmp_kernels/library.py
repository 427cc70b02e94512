"""The operations as ``torch.library`` knows them: each is one node of a compiled graph.

A schema says what a call writes and a fake kernel what it returns; the kernel itself is the public function, which
validates and goes straight to a backend. Inside a compiled region users call what they call outside of it:
``optimizer.step()``, ``apply_masks_``, ``ema_update_`` and ``clip_grad_norm_`` become ``torch.ops.gmp_kernels.*`` when
they are traced. ``prune_`` and ``magnitude_threshold``, which return Python numbers, need that name there.

Eager calls do not come this way: the dispatcher and the masks made from their bits took about a third of the time of
``apply_masks_`` over 161 small tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from gmp_kernels.errors import ShapeError, TargetError
from gmp_kernels.masks import BitMask
from gmp_kernels.ops import NonFinite, Scope, apply_masks_, magnitude_threshold, prune_
from gmp_kernels.optim.gradients import clip_gradients_, ema_update_
from gmp_kernels.optim.masked import MaskedOptimizer

__all__: list[str] = []

# A CUDA graph would freeze what kernels get from the host: counts, thresholds, learning rates. torch 2.8 does not know
# the tag.
_TAGS = tuple(tag for tag in [getattr(torch.Tag, "cudagraph_unsafe", None)] if tag is not None)

# What it defines lives as long as it does.
_library = torch.library.Library("gmp_kernels", "DEF")  # type: ignore[no-untyped-call]


def _define(schema: str, kernel: Callable[..., object], fake: Callable[..., object]) -> None:
    name = schema.partition("(")[0]
    _library.define(schema, tags=_TAGS)  # type: ignore[no-untyped-call]
    for key in ("CPU", "CUDA"):
        _library.impl(name, kernel, key)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"gmp_kernels::{name}", fake, lib=_library)


def _returns_nothing(*_: object, **__: object) -> None:
    """Fake kernel of what only writes."""


def _bit_masks(packed: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> list[BitMask]:
    return [BitMask.of(bits, weight.shape) for bits, weight in zip(packed, weights, strict=True)]


def _optional_bit_masks(packed: Sequence[torch.Tensor | None], weights: Sequence[torch.Tensor]) -> list[BitMask | None]:
    return [
        None if bits is None else BitMask.of(bits, weight.shape) for bits, weight in zip(packed, weights, strict=True)
    ]


def _magnitude_threshold(
    weight: torch.Tensor,
    num_prune: int,
    mask: torch.Tensor | None = None,
    *,
    nonfinite: NonFinite = "error",
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    (bits,) = _optional_bit_masks([mask], [weight])
    value, *counts = magnitude_threshold(weight, num_prune, mask=bits, nonfinite=nonfinite, backend=backend)
    return weight.new_tensor(value), weight.new_tensor(counts, dtype=torch.int64)


def _fake_magnitude_threshold(weight: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor, torch.Tensor]:
    return weight.new_empty(()), weight.new_empty(3, dtype=torch.int64)


def _prune(
    weights: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor],
    num_prune: Sequence[int],
    *,
    scope: Scope = "layer",
    nonfinite: NonFinite = "error",
    backend: str | None = None,
) -> None:
    bits = _bit_masks(masks, weights)
    prune_(weights, num_prune=num_prune, masks=bits, scope=scope, nonfinite=nonfinite, backend=backend)


def _apply_masks(weights: Sequence[torch.Tensor], masks: Sequence[torch.Tensor], *, backend: str | None = None) -> None:
    apply_masks_(weights, _bit_masks(masks, weights), backend=backend)


@torch.no_grad()
def _optimizer_step(
    handle: int, positions: Sequence[int], weights: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]
) -> None:
    """``positions`` says which of the optimizer's parameters the weights are.

    They need not be the parameters themselves: a graph may hold the value of one in a buffer and write it back later.
    """
    optimizer = MaskedOptimizer.by_handle.get(handle)
    if optimizer is None:
        raise TargetError(
            f"optimizer_step_: expected the handle of a living optimizer, got {handle}; call optimizer.step(), or "
            "compile again what was compiled with an optimizer that is gone"
        )
    owned = [p for group in optimizer.param_groups for p in group["params"]]
    given = dict(zip([owned[i] for i in positions], zip(weights, gradients, strict=True), strict=True))
    for i, (p, (weight, gradient)) in zip(positions, given.items(), strict=True):
        expected, found = ((t.shape, t.stride(), t.dtype, t.device, g.shape) for t, g in ((p, p), (weight, gradient)))
        if expected != found:
            raise ShapeError(
                f"optimizer_step_: expected shape, strides, dtype, device and gradient's shape of parameter {i}, "
                f"{expected}, got {found}; compile again after converting a model"
            )
    optimizer.update_(given)


def _ema_update(
    averages: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    decay: float,
    masks: Sequence[torch.Tensor | None],
    *,
    backend: str | None = None,
) -> None:
    ema_update_(averages, weights, decay, masks=_optional_bit_masks(masks, averages), backend=backend)


def _clip_gradients(
    gradients: Sequence[torch.Tensor],
    max_norm: float,
    masks: Sequence[torch.Tensor | None],
    *,
    error_if_nonfinite: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    bits = _optional_bit_masks(masks, gradients)
    return clip_gradients_(gradients, max_norm, bits, gradients, error_if_nonfinite=error_if_nonfinite, backend=backend)


def _fake_clip_gradients(gradients: Sequence[torch.Tensor], *_: object, **__: object) -> torch.Tensor:
    # The norm is where the squares were summed. Of empty gradients no backend sums any.
    device = next((gradient.device for gradient in gradients if gradient.numel()), torch.device("cpu"))
    return torch.empty((), dtype=torch.float32, device=device)


# SymInt: a num_prune that changes makes a graph dynamic, once, instead of being compiled into it each time.
_define(
    "magnitude_threshold(Tensor weight, SymInt num_prune, Tensor? mask=None, *, str nonfinite='error', "
    "str? backend=None) -> (Tensor value, Tensor counts)",
    _magnitude_threshold,
    _fake_magnitude_threshold,
)
_define(
    "prune_(Tensor(a!)[] weights, Tensor(b!)[] masks, SymInt[] num_prune, *, str scope='layer', "
    "str nonfinite='error', str? backend=None) -> ()",
    _prune,
    _returns_nothing,
)
_define(
    "apply_masks_(Tensor(a!)[] weights, Tensor[] masks, *, str? backend=None) -> ()",
    _apply_masks,
    _returns_nothing,
)
_define(
    "optimizer_step_(int handle, int[] positions, Tensor(a!)[] weights, Tensor[] gradients) -> ()",
    _optimizer_step,
    _returns_nothing,
)
_define(
    "ema_update_(Tensor(a!)[] averages, Tensor[] weights, float decay, Tensor?[] masks, *, str? backend=None) -> ()",
    _ema_update,
    _returns_nothing,
)
_define(
    "clip_gradients_(Tensor(a!)[] gradients, float max_norm, Tensor?[] masks, *, bool error_if_nonfinite=False, "
    "str? backend=None) -> Tensor",
    _clip_gradients,
    _fake_clip_gradients,
)
