"""Clipping of gradients and running averages of weights, both of which pruning otherwise distorts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from gmp_kernels.backends import choose
from gmp_kernels.backends.at_once import at_once
from gmp_kernels.backends.types import Constants, UpdateBatch, UpdateTensor
from gmp_kernels.checks import check_tensors, check_writable, may_overlap
from gmp_kernels.distributed.placement import local_grad, sharding_of, sum_over_shards
from gmp_kernels.errors import LayoutError, ShapeError, SparsityError
from gmp_kernels.formats import format_of
from gmp_kernels.library import define
from gmp_kernels.masks import BitMask
from gmp_kernels.ops import bit_masks, packed_beside
from gmp_kernels.optim.checks import is_dense, laid_out_like

__all__ = ["clip_grad_norm_", "ema_update_"]

PIECE = 1 << 18  # elements of a 16-bit gradient that are scaled at a time where torch makes float32 copies


@torch.no_grad()
def clip_grad_norm_(
    parameters: Iterable[torch.Tensor] | torch.Tensor,
    max_norm: float,
    *,
    masks: Sequence[BitMask | None] | None = None,
    error_if_nonfinite: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """Scale the gradients so that the 2-norm over the *kept* weights is at most ``max_norm``.

    ``torch.nn.utils.clip_grad_norm_`` counts the gradients of pruned weights too, and so clips a sparse model harder
    than its own gradient asks for; a NaN at a pruned weight would spoil the whole step.

    Parameters
    ----------
    parameters : iterable of torch.Tensor, or one
        Parameters without a gradient are skipped. The norm covers all shards of sharded ones (``DTensor``), so every
        rank has to make this call.
    max_norm : float
        At least 0.
    masks : sequence of BitMask or None, optional
        One entry per parameter, for the part of it that this process holds. None means that all of it is kept.
    error_if_nonfinite : bool
        Raise when the norm is NaN or Inf, before anything is scaled.
    backend : str, optional
        As in ``gmp_kernels.prune_``.

    Returns
    -------
    torch.Tensor
        The norm before clipping, 0-d float32. Summed in float64 in a fixed order: the same on every number of threads.

    Raises
    ------
    ShapeError, DTypeError, LayoutError
        Bad input.
    RuntimeError
        The norm is NaN or Inf and ``error_if_nonfinite`` is set, as in torch.
    """
    owners = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    given: Sequence[BitMask | None] = [None] * len(owners) if masks is None else list(masks)
    if len(given) != len(owners):
        raise ShapeError(f"clip_grad_norm_: expected one mask per parameter, got {len(given)} for {len(owners)}")
    pairs = [(p, mask) for p, mask in zip(owners, given, strict=True) if p.grad is not None]
    owners, bits = [p for p, _ in pairs], [mask for _, mask in pairs]
    gradients = [local_grad(p) for p in owners]
    if gradients and torch.compiler.is_compiling():
        norm: torch.Tensor = torch.ops.gmp_kernels.clip_gradients_(
            gradients, max_norm, packed_beside(bits, gradients), error_if_nonfinite=error_if_nonfinite, backend=backend
        )
        return norm
    return clip_gradients_(gradients, max_norm, bits, owners, error_if_nonfinite=error_if_nonfinite, backend=backend)


@torch.no_grad()
def clip_gradients_(
    gradients: Sequence[torch.Tensor],
    max_norm: float,
    masks: Sequence[BitMask | None],
    owners: Sequence[torch.Tensor],
    *,
    error_if_nonfinite: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """Do ``clip_grad_norm_`` on the gradients themselves; ``owners`` tell how each is sharded."""
    # Gradients that are sharded alike are summed over the shards together.
    alike: dict[object, list[int]] = {}
    for i, owner in enumerate(owners):
        alike.setdefault(sharding_of(owner), []).append(i)
    squares: float | torch.Tensor = 0.0
    for members in alike.values():
        present = [i for i in members if gradients[i].numel()]
        layers = check_tensors(
            "clip_grad_norm_",
            [_in_a_format(gradients[i]) for i in present],
            [masks[i] for i in present],
            [f"gradient {i}" for i in present],
            optional_masks=True,
        )
        for i in present:
            if may_overlap(gradients[i]):
                raise LayoutError(
                    f"clip_grad_norm_: expected elements with memory of their own in 'gradient {i}', got strides "
                    f"{gradients[i].stride()} for shape {tuple(gradients[i].shape)}; use .contiguous()"
                )
        here = choose(backend, layers[0].weight.device).sum_squares(layers) if layers else 0.0
        squares = squares + sum_over_shards(here, owners[members[0]])
    if not isinstance(squares, torch.Tensor):
        squares = torch.tensor(squares, dtype=torch.float64, device="cpu")  # whatever torch's default device is
    norm = squares.to(torch.float64).sqrt().to(torch.float32)
    if error_if_nonfinite and not torch.isfinite(norm):
        raise RuntimeError(f"clip_grad_norm_: the norm of the kept gradients is {float(norm)}; nothing was scaled")
    if gradients:
        _scale_(gradients, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    return norm


def _in_a_format(gradient: torch.Tensor) -> torch.Tensor:
    if gradient.layout is not torch.strided:
        return gradient  # which the checks refuse
    return gradient.contiguous() if format_of(gradient) is None else gradient


def _scale_(gradients: Sequence[torch.Tensor], factor: torch.Tensor) -> None:
    """Multiply by a 0-d float32 factor, in float32 at least: the same bits on every device.

    Scales all gradients or none. A gradient that several parameters share is scaled once.
    """
    unique = list({id(g): g for g in gradients}.values())
    for is_inference in (False, True):
        with torch.inference_mode(is_inference):
            at_once(list(_scaling([g for g in unique if g.is_inference() == is_inference], factor)))


def _scaling(gradients: Sequence[torch.Tensor], factor: torch.Tensor) -> Iterator[Callable[[], object]]:
    """Yield the calls that scale the gradients. All memory is allocated before the first call is made."""
    wide = [g for g in gradients if g.dtype in (torch.float32, torch.float64)]
    if wide:
        yield partial(torch._foreach_mul_, wide, factor)
    for g in gradients:
        if g.dtype in (torch.float32, torch.float64):
            continue
        if g.device.type != "cpu":
            # A GPU converts as it multiplies. A factor with as many dimensions as the gradient takes part in type
            # promotion, so torch multiplies in float32; it would round a 0-d factor to 16 bits first.
            yield partial(g.mul_, factor.reshape([1] * g.ndim))
            continue
        pieces = torch.split(g.as_strided((g.numel(),), (1,)), PIECE) if is_dense(g) else [g]
        buffer = torch.empty(pieces[0].shape, dtype=torch.float32, device="cpu")
        for piece in pieces:
            wider = buffer if piece.shape == buffer.shape else buffer[: len(piece)]
            yield from (partial(wider.copy_, piece), partial(wider.mul_, factor), partial(piece.copy_, wider))


@torch.no_grad()
def ema_update_(
    averages: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    decay: float,
    *,
    masks: Sequence[BitMask | None] | None = None,
    backend: str | None = None,
) -> None:
    """Move running averages of the weights towards them: ``average = decay * average + (1 - decay) * weight``.

    The average is exactly zero wherever the mask says pruned. An ordinary average would keep values of weights that are
    pruned by now, and so would not be sparse.

    Parameters
    ----------
    averages, weights : sequences of torch.Tensor
        Pairwise of one shape and dtype; ``averages`` are written.
    decay : float
        In [0, 1].
    masks : sequence of BitMask or None, optional
        One entry per pair. None means that all of it is kept.
    backend : str, optional
        As in ``gmp_kernels.prune_``.

    Raises
    ------
    ShapeError, DTypeError, LayoutError, SparsityError
        Bad input. Nothing has been written when one is raised.

    Notes
    -----
    One read of both and one write of the averages. With masks, a GPU writes their pruned positions before; an error or
    an interrupt between the two leaves these zero and the rest as it was.
    """
    if not 0.0 <= decay <= 1.0:
        raise SparsityError(f"ema_update_: expected a decay in [0, 1], got {decay!r}")
    if len(averages) != len(weights):
        raise ShapeError(f"ema_update_: expected one weight per average, got {len(weights)} for {len(averages)}")
    if not averages:
        return
    if torch.compiler.is_compiling():
        bits = packed_beside([None] * len(averages) if masks is None else masks, averages)
        torch.ops.gmp_kernels.ema_update_(averages, weights, decay, bits, backend=backend)
        return
    names = [f"averages[{i}]" for i in range(len(averages))]
    targets = check_tensors("ema_update_", averages, masks, names, optional_masks=True)
    check_writable("ema_update_", averages, targets, names)
    sources = check_tensors("ema_update_", weights, None)
    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
        if target.tensor.shape != source.tensor.shape or target.weight.dtype != source.weight.dtype:
            raise ShapeError(
                f"ema_update_: expected weights[{i}] of shape {tuple(target.tensor.shape)} and {target.weight.dtype}, "
                f"got {tuple(source.tensor.shape)} and {source.weight.dtype}"
            )
        if target.weight.device != source.weight.device:
            raise LayoutError(
                f"ema_update_: expected weights[{i}] on {target.weight.device} like its average, got it on "
                f"{source.weight.device}; move one of them"
            )
    implementation = choose(backend, targets[0].weight.device)
    torch.autograd.graph.increment_version([target.weight for target in targets])  # first, as in prune_
    masked = [target for target in targets if target.mask is not None]
    if masked and implementation.skips_pruned_blocks:
        implementation.apply(masked)  # there the averages still hold what was before
    implementation.update(
        "average",
        UpdateBatch([UpdateTensor(t.weight, mask=t.mask) for t in targets]),
        [laid_out_like(s.tensor, t.tensor) for s, t in zip(sources, targets, strict=True)],
        [0] * len(sources),
        Constants([({"one_minus_beta1": 1.0 - decay}, 1)], []),
    )


# -- the same operations for compiled graphs, which pass masks as packed bits ------------------------------------------


def _clip_packed(
    gradients: Sequence[torch.Tensor], max_norm: float, masks: Sequence[torch.Tensor | None], **options: Any
) -> torch.Tensor:
    return clip_gradients_(gradients, max_norm, bit_masks(masks, gradients), gradients, **options)


def _fake_norm(gradients: Sequence[torch.Tensor], *_: object, **__: object) -> torch.Tensor:
    # The norm is on the device that sums the squares. Empty gradients are summed by no backend.
    device = next((gradient.device for gradient in gradients if gradient.numel()), torch.device("cpu"))
    return torch.empty((), dtype=torch.float32, device=device)


def _ema_packed(
    averages: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    decay: float,
    masks: Sequence[torch.Tensor | None],
    **options: Any,
) -> None:
    ema_update_(averages, weights, decay, masks=bit_masks(masks, averages), **options)


define(
    "clip_gradients_(Tensor(a!)[] gradients, float max_norm, Tensor?[] masks, *, bool error_if_nonfinite=False, "
    "str? backend=None) -> Tensor",
    _clip_packed,
    _fake_norm,
)
define(
    "ema_update_(Tensor(a!)[] averages, Tensor[] weights, float decay, Tensor?[] masks, *, str? backend=None) -> ()",
    _ema_packed,
)
