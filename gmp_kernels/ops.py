"""The public operations: validate once, then straight to a backend.

All user errors are found before any memory is written (``checks``); backends trust their input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch

from gmp_kernels.backends import choose
from gmp_kernels.backends.keys import magnitude_of, magnitudes_of_keys
from gmp_kernels.backends.types import Cutoffs, Selection, Threshold
from gmp_kernels.checks import (
    Weight,
    adopt_bits,
    check_choice,
    check_finite,
    checked_layers,
)
from gmp_kernels.counts import Caps, Ranking, check_unbroken, counts_to_prune, patterns_of, select
from gmp_kernels.errors import DeviceError, DTypeError, ShapeError
from gmp_kernels.formats import ROW_MAJOR, format_of
from gmp_kernels.library import define
from gmp_kernels.masks import BitMask
from gmp_kernels.patterns import Pattern
from gmp_kernels.search.brackets import brackets_near
from gmp_kernels.search.driver import select_with

__all__ = ["PruneResult", "Threshold", "apply_masks_", "magnitude_threshold", "prune_", "thresholds_of"]

Scope: TypeAlias = Literal["layer", "global"]
NonFinite: TypeAlias = Literal["error", "keep"]

FEW = 16  # layers, for which numpy takes longer than Python


class PruneResult(NamedTuple):
    """Result of ``prune_``; every list has one entry per weight, in the order given.

    Attributes
    ----------
    masks : list of BitMask
        1 = kept. If masks were passed in, these are the same objects, updated in place.
    thresholds : list of Threshold
        In global scope every entry is the one shared threshold, its counts running over all weights.
    num_pruned : list of int
        Zeros in the mask.
    num_newly_pruned : list of int
        Zeros that this call added.
    """

    masks: list[BitMask]
    thresholds: list[Threshold]
    num_pruned: list[int]
    num_newly_pruned: list[int]

    def __str__(self) -> str:
        pruned, total = sum(self.num_pruned), sum(mask.numel for mask in self.masks)
        tensors = "1 tensor" if len(self.masks) == 1 else f"{len(self.masks)} tensors"
        return (
            f"pruned {pruned} of {total} weights in {tensors}, {sum(self.num_newly_pruned)} of them newly: "
            f"sparsity {pruned / max(1, total):.4f}"
        )


def magnitude_threshold(
    weight: Weight,
    num_prune: int,
    *,
    mask: BitMask | None = None,
    nonfinite: NonFinite = "error",
    previous: Threshold | None = None,
    backend: str | None = None,
) -> Threshold:
    """Exact magnitude at which ``num_prune`` weights are pruned. Changes nothing.

    The order is: already pruned, then magnitude ascending, then higher flat index first. So of the weights that tie
    at the threshold, those with the lowest row-major flat index are kept. -0 equals +0, subnormals are distinct.

    Parameters
    ----------
    weight : torch.Tensor or numpy.ndarray
        Any shape, not empty, contiguous or in channels_last (for 5 dimensions ``channels_last_3d``); float32, float64,
        bfloat16 or float16. Not modified, not copied.
    num_prune : int
        0 <= num_prune <= n. Includes the weights that ``mask`` marks as pruned already.
    mask : BitMask, optional
        Marks the weights pruned already; they come first in the order, whatever their stored values.
    nonfinite : {"error", "keep"}
        "keep" ranks Inf above every number and NaN (all NaN being one value) above Inf.
    previous : Threshold, optional
        An earlier threshold of the same weight. Saves the sampling pass when the new one lies close; never changes
        the result.
    backend : str, optional
        Name of a backend; default ``GMP_KERNELS_BACKEND``, else the fastest that can run.

    Returns
    -------
    Threshold
        ``value, num_below, num_ties, num_ties_kept``; pruned = num_below + num_ties - num_ties_kept.

    Raises
    ------
    DTypeError, ShapeError, LayoutError, SparsityError
        Bad input; the message says what was expected.
    NonFiniteError
        NaN or Inf among the unpruned weights and ``nonfinite="error"``.
    BackendUnavailableError
        The named backend cannot run.

    Notes
    -----
    One read of the weight when the sampled bracket holds (checked by counts, never assumed), at most one more per
    11 bits of the key when it does not. Temporary memory: under 5% of the weight's bytes plus 4 MB.

    Algorithm: sampled bracket, counted and refined (R. W. Floyd and R. L. Rivest, "Expected time bounds for
    selection", Comm. ACM 18(3), 1975, doi:10.1145/360680.360691).
    """
    op = "magnitude_threshold"
    layers = checked_layers(op, [weight], None if mask is None else [mask], None, writes="nothing")
    assert layers is not None
    check_choice(op, "nonfinite", nonfinite, ("error", "keep"))
    counts = counts_to_prune(op, layers.sizes, None, num_prune, "layer")
    brackets = None if previous is None else brackets_near([previous], counts, layers.sizes, layers.dtypes)
    found = select_with(choose(backend, layers.device))(layers, counts, [1], brackets).cutoffs
    if nonfinite == "error":
        check_finite(op, found.nonfinite, None)
    return thresholds_of(found, layers.dtypes)[0]


def prune_(
    weights: Weight | Sequence[Weight],
    *,
    sparsity: float | Sequence[float] | None = None,
    num_prune: int | Sequence[int] | None = None,
    masks: BitMask | Sequence[BitMask] | None = None,
    scope: Scope = "layer",
    pattern: Pattern | Sequence[Pattern | None] | None = None,
    scores: Weight | Sequence[Weight] | None = None,
    nonfinite: NonFinite = "error",
    previous: Sequence[Threshold | None] | None = None,
    names: Sequence[str] | None = None,
    backend: str | None = None,
) -> PruneResult:
    """Zero the weights of smallest magnitude, in place, and return which were kept.

    Exactly ``num_prune = round(sparsity * n)`` weights end up pruned, per weight tensor, or over all of them together
    with ``scope="global"``. Masks only shrink: a weight pruned already stays so, and if more are pruned than asked
    for, nothing changes. Ties keep the lowest flat index (in global scope it runs through the weights in order).
    Pruned weights become +0.0.

    Parameters
    ----------
    weights : torch.Tensor or numpy.ndarray, or a sequence of them
        Each contiguous or in channels_last, not empty, on one device, sharing no memory; float32, float64, bfloat16 or
        float16. Global scope needs a single dtype, because magnitudes of different dtypes have no common key.
    sparsity : float or sequence of float, optional
        Fraction to prune, in [0, 1]. One value, or one per weight (layer scope).
    num_prune : int or sequence of int, optional
        The same as a count. Exactly one of the two is given.
    masks : BitMask or sequence of BitMask, optional
        Updated in place and returned. Default: nothing is pruned yet. A mask in another memory format than its weight
        is brought into that of the weight; its ``packed`` is then another tensor.
    scope : {"layer", "global"}
        "layer" ranks each weight tensor by itself, "global" ranks all of them together.
    pattern : Pattern or sequence of Pattern or None, optional
        ``NM``, ``Block`` or ``Unstructured``: which weights may be pruned, and which only together. One for all, or one
        per weight; in global scope all have blocks of one size, or none has blocks. Masks that are given have to keep
        to it. With ``Block``, counts are of whole blocks and thresholds count blocks.
    scores : torch.Tensor or numpy.ndarray, or a sequence of them, optional
        Ranked instead of the magnitudes, one tensor per weight: of its shape, floating, no entry negative or NaN.
        Scores in another memory format are copied. Global scope needs them in a single dtype.
    nonfinite : {"error", "keep"}
        As in ``magnitude_threshold``.
    previous : sequence of Threshold or None, optional
        Thresholds of an earlier call on the same weights; they may save a pass, and never change the result.
    names : sequence of str, optional
        Names of the weights in error messages; default "weights[i]".
    backend : str, optional
        As in ``magnitude_threshold``.

    Returns
    -------
    PruneResult
        Masks, thresholds and counts, one of each per weight.

    Raises
    ------
    DTypeError, ShapeError, LayoutError, SparsityError, NonFiniteError, BackendUnavailableError
        Nothing has been written when one is raised. SparsityError: also more than the pattern allows, masks that break
        it, or scores that are negative or NaN. ShapeError: also weights that do not fit it, all of them named.

    Notes
    -----
    Two reads of the weights, one write of the cache lines that change, 1 bit per weight of mask. Temporary memory:
    under 5% of the largest weight's bytes plus 4 MB. With thousands of tensors or billions of weights it can be more:
    300 bytes per tensor plus one byte per 2000 weights. On a GPU, patterns also take 1 bit per weight, 4 bytes per
    block, and up to 16 per row with ``min_kept_per_row``. Where a pattern alone decides, because as much is pruned as
    it allows, nothing is searched, and thresholds are Inf.

    References
    ----------
    M. Zhu and S. Gupta, "To prune, or not to prune", 2017, arXiv:1710.01878.
    """
    given = weights, masks, scope, nonfinite, previous, names, backend, sparsity, num_prune
    return begin_prune(*given, pattern=pattern, scores=scores)()


def begin_prune(
    weights: Weight | Sequence[Weight],
    masks: BitMask | Sequence[BitMask] | None,
    scope: Scope,
    nonfinite: NonFinite,
    previous: Sequence[Threshold | None] | None,
    names: Sequence[str] | None,
    backend: str | None,
    sparsity: float | Sequence[float] | None = None,
    num_prune: int | Sequence[int] | None = None,
    *,
    pattern: Pattern | Sequence[Pattern | None] | None = None,
    scores: Weight | Sequence[Weight] | None = None,
    regrow: bool = False,
    caps: Caps | None = None,
    are_unbroken: bool = False,
) -> Callable[[], PruneResult]:
    """Do everything in ``prune_`` that comes before its first write. Takes the same arguments, and two for pruners.

    Parameters
    ----------
    caps : Caps, optional
        In global scope no layer loses more than its cap, and the others lose what that withholds. A layer at its cap
        has a threshold of its own.
    are_unbroken : bool
        The masks are known to keep to the pattern.

    Notes
    -----
    With ``regrow``, masks are written and not read: all weights are ranked anew, those too that were pruned.

    Returns
    -------
    callable
        Writes the weights and masks and returns the result. If it is interrupted, call it again to finish the writes.
        The second result has the same thresholds, but does not count weights pruned by the first call as newly pruned.
    """
    op = "prune_"
    weights_ = _as_list(weights)
    masks_ = None if masks is None else _as_list(masks)
    check_choice(op, "scope", scope, ("layer", "global"))
    check_choice(op, "nonfinite", nonfinite, ("error", "keep"))
    patterns = patterns_of(op, pattern, len(weights_), scope)
    ranks = None if scores is None else _as_list(scores)
    layers = checked_layers(op, weights_, masks_, names, writes="weights and masks", patterns=patterns, scores=ranks)
    is_global = scope == "global"
    ranking = None
    if layers is not None and (patterns is not None or caps is not None):
        patterns = patterns or [None] * len(layers)
        ranking = Ranking.of(patterns, [weight.shape for weight in layers.weights], is_global=is_global)
    units = 1 if ranking is None else ranking.units
    counts = counts_to_prune(op, layers.sizes if layers else [], sparsity, num_prune, scope, units)
    dtypes = layers.ranked_dtypes if layers else []
    if is_global and len(set(dtypes)) > 1:
        found = ", ".join(sorted(map(str, set(dtypes))))
        raise DTypeError(f"{op}: expected one dtype for scope='global', got {found}; cast, or use scope='layer'")
    if previous is not None and len(previous) != len(weights_):
        raise ShapeError(f"{op}: expected one previous threshold per weight, got {len(previous)} for {len(weights_)}")
    if layers is None:
        return lambda: PruneResult([], [], [], [])

    implementation = choose(backend, layers.device)
    given, layers = layers, layers.unmasked() if regrow else layers
    sizes = [sum(layers.sizes)] if is_global else layers.sizes
    if ranking is not None:
        assert patterns is not None
        ranking.check(op, counts, patterns, names)
        if masks_ is not None and not (are_unbroken or regrow):
            check_unbroken(op, layers, names)
        sizes = ranking.sizes
    brackets = None
    if previous is not None:
        wanted = counts if ranking is None else [n // unit for n, unit in zip(counts, ranking.units, strict=True)]
        brackets = brackets_near(previous[: len(sizes)], wanted, sizes, dtypes)
    finite = nonfinite == "error"
    selection, alone = select(implementation, layers, counts, ranking, is_global, brackets, caps, finite=finite)
    # This runs while a GPU selects.
    if masks_ is None:
        try:
            masks_ = list(map(BitMask.empty, layers.weights))
        except torch.OutOfMemoryError as error:
            raise DeviceError(
                f"{op}: no memory left on {layers.device} for the masks, nothing was changed ({error}); free some, or "
                "prune fewer layers at a time"
            ) from error
        out: Sequence[torch.Tensor] = [mask.packed for mask in masks_]
    else:
        assert given.masks is not None
        out = given.masks
    if nonfinite == "error" and not selection.is_lazy:
        check_finite(op, selection.cutoffs.nonfinite, names)
    is_first = True

    def write() -> PruneResult:
        nonlocal is_first
        # A second attempt reuses the cutoffs, because selecting again would see the zeros of the first. It needs a new
        # Selection, because a GPU has already counted in the first one.
        chosen = selection if is_first else Selection(selection.cutoffs)
        is_first = False
        if given.masks is not None:
            adopt_bits(masks_, given)
        # Versions come first, so that no interrupt can leave a write that autograd does not know of. The write, or all
        # launches of it, is a single call.
        torch.autograd.graph.increment_version([*layers.weights, *out])
        counted = implementation.prune(layers, chosen, out, finite=nonfinite == "error")
        cutoffs = chosen.cutoffs
        if counted is None:
            check_finite(op, cutoffs.nonfinite, names)
        assert counted is not None
        thresholds = thresholds_of(cutoffs, dtypes)
        if ranking is not None:
            thresholds = ranking.thresholds(thresholds, alone)
        return PruneResult(masks_, thresholds, *counted)

    return write


def apply_masks_(
    weights: Weight | Sequence[Weight], masks: BitMask | Sequence[BitMask], *, backend: str | None = None
) -> None:
    """Set every weight whose mask bit is 0 to +0.0, in place; a NaN there becomes zero too.

    Parameters
    ----------
    weights : torch.Tensor or numpy.ndarray, or a sequence of them
        As in ``prune_``.
    masks : BitMask or sequence of BitMask
        One per weight, of its shape, on its device. The same mask may serve several tensors, such as a weight and
        its optimizer state. It is read faster in the memory format of its tensor.
    backend : str, optional
        As in ``magnitude_threshold``.

    Raises
    ------
    DTypeError, ShapeError, LayoutError, BackendUnavailableError
        Nothing has been written when one is raised.

    Notes
    -----
    One read of weights and bits, one write of the cache lines that change. No temporary memory, except on a GPU: about
    100 bytes per tensor, kept for the next call.
    """
    op = "apply_masks_"
    weights_, masks_ = _as_list(weights), _as_list(masks)
    if weights_ and torch.compiler.is_compiling():
        torch.ops.gmp_kernels.apply_masks_(weights_, packed_beside(masks_, weights_), backend=backend)
        return
    layers = checked_layers(op, weights_, masks_, None, writes="weights")
    if layers is not None:
        implementation = choose(backend, layers.device)
        torch.autograd.graph.increment_version(layers.weights)  # first, as in prune_
        implementation.apply(layers)


def _as_list(given: Any) -> list[Any]:
    """Return ``given`` as a list. A single object becomes its only entry; the checks refuse an unsuitable one."""
    if isinstance(given, (list, tuple)):
        return list(given)
    is_one = isinstance(given, (torch.Tensor, np.ndarray, torch.nn.Module, dict, str)) or not hasattr(given, "__iter__")
    return [given] if is_one else list(given)


def thresholds_of(cutoffs: Cutoffs, dtypes: Sequence[torch.dtype]) -> list[Threshold]:
    """Return the threshold of every layer."""
    if len(dtypes) > FEW and len(set(dtypes)) == 1:
        values: list[float] = magnitudes_of_keys(np.array(cutoffs.keys), dtypes[0]).tolist()
    else:
        values = list(map(magnitude_of, cutoffs.keys, dtypes))
    columns = values, cutoffs.num_below, cutoffs.num_ties, cutoffs.num_ties_kept
    # Calling Threshold() takes twice as long.
    return list(map(tuple.__new__, repeat(Threshold), zip(*columns, strict=True)))


# -- the same operations for compiled graphs, which pass masks as packed bits ------------------------------------------


def _threshold_as_tensors(
    weight: torch.Tensor, num_prune: int, mask: torch.Tensor | None = None, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    (bits,) = bit_masks([mask], [weight])
    value, *counts = magnitude_threshold(weight, num_prune, mask=bits, **options)
    return weight.new_tensor(value), weight.new_tensor(counts, dtype=torch.int64)


def _fake_threshold(weight: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor, torch.Tensor]:
    return weight.new_empty(()), weight.new_empty(3, dtype=torch.int64)


def _prune_packed(
    weights: Sequence[torch.Tensor], masks: Sequence[torch.Tensor], num_prune: Sequence[int], **options: Any
) -> None:
    prune_(weights, num_prune=num_prune, masks=bit_masks(masks, weights), **options)


def _apply_packed(weights: Sequence[torch.Tensor], masks: Sequence[torch.Tensor], **options: Any) -> None:
    apply_masks_(weights, bit_masks(masks, weights), **options)


def packed_beside(masks: Sequence[BitMask | None], weights: Sequence[torch.Tensor]) -> list[Any]:
    """Return the packed bits of masks in the formats of their weights, row-major for those of none; None stays None."""
    pairs = zip(masks, weights, strict=True)
    return [None if mask is None else mask.to(memory_format=format_of(w) or ROW_MAJOR).packed for mask, w in pairs]


def bit_masks(packed: Sequence[torch.Tensor | None], weights: Sequence[torch.Tensor]) -> list[Any]:
    """Return the masks of these weights, given their packed bits in the weights' formats; None stays None."""
    pairs = zip(packed, weights, strict=True)
    return [None if bits is None else BitMask.of(bits, w.shape, format_of(w)) for bits, w in pairs]


# With SymInt, a num_prune that changes makes the graph dynamic once; with int, every new value would recompile it.
define(
    "magnitude_threshold(Tensor weight, SymInt num_prune, Tensor? mask=None, *, str nonfinite='error', "
    "str? backend=None) -> (Tensor value, Tensor counts)",
    _threshold_as_tensors,
    _fake_threshold,
)
define(
    "prune_(Tensor(a!)[] weights, Tensor(b!)[] masks, SymInt[] num_prune, *, str scope='layer', "
    "str nonfinite='error', str? backend=None) -> ()",
    _prune_packed,
)
define("apply_masks_(Tensor(a!)[] weights, Tensor[] masks, *, str? backend=None) -> ()", _apply_packed)
