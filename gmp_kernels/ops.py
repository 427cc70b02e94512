"""The public operations: validate once, then straight to a backend.

Everything a user can get wrong is found here, before any memory is written; backends trust what they are given.
"""

from __future__ import annotations

import itertools
import numbers
import warnings
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch

from gmp_kernels.backends import Layer, Threshold, choose
from gmp_kernels.errors import DTypeError, LayoutError, NonFiniteError, ShapeError, SparsityError
from gmp_kernels.masks import BitMask

__all__ = ["PruneResult", "Threshold", "apply_masks_", "magnitude_threshold", "prune_"]

Weight: TypeAlias = torch.Tensor | np.ndarray
Scope: TypeAlias = Literal["layer", "global"]
NonFinite: TypeAlias = Literal["error", "keep"]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class PruneResult(NamedTuple):
    """What ``prune_`` did; every list has one entry per weight, in the order given.

    Attributes
    ----------
    masks : list of BitMask
        1 = kept. The masks passed in, updated in place, where there were any.
    thresholds : list of Threshold
        In global scope every entry is the one shared threshold, its counts running over all weights.
    num_pruned : list of int
        Zeros in the mask.
    num_newly_pruned : list of int
        Those among them that this call added.
    """

    masks: list[BitMask]
    thresholds: list[Threshold]
    num_pruned: list[int]
    num_newly_pruned: list[int]


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

    The order is: already pruned, then magnitude ascending, then higher flat index first; so of the weights that tie
    at the threshold those of lowest row-major flat index are kept. -0 equals +0, subnormals are distinct.

    Parameters
    ----------
    weight : torch.Tensor or numpy.ndarray
        Any shape, not empty, contiguous; float32, float64, bfloat16 or float16. Not modified, not copied.
    num_prune : int
        0 <= num_prune <= n, in weights. Includes those ``mask`` says are pruned already.
    mask : BitMask, optional
        Weights pruned already; they come first in the order, whatever value is stored there.
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
    layers = check_tensors(op, [weight], None if mask is None else [mask], None)
    _check_choice(op, "nonfinite", nonfinite, ("error", "keep"))
    counts = _num_prune(op, layers, None, num_prune, "layer")
    implementation = choose(backend, layers[0].weight.device)
    selections = implementation.select(layers, counts, [previous])
    if nonfinite == "error":
        check_finite(op, selections[0].nonfinite, None)
    return selections[0].threshold


def prune_(
    weights: Weight | Sequence[Weight],
    *,
    sparsity: float | Sequence[float] | None = None,
    num_prune: int | Sequence[int] | None = None,
    masks: BitMask | Sequence[BitMask] | None = None,
    scope: Scope = "layer",
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
        Contiguous, not empty, on one device, sharing no memory; float32, float64, bfloat16 or float16. Global scope
        needs a single dtype, because magnitudes of different dtypes have no common key.
    sparsity : float or sequence of float, optional
        Fraction to prune, in [0, 1]. One value, or one per weight (layer scope).
    num_prune : int or sequence of int, optional
        The same as a count. Exactly one of the two is given.
    masks : BitMask or sequence of BitMask, optional
        Updated in place and returned. Default: nothing is pruned yet.
    scope : {"layer", "global"}
    nonfinite : {"error", "keep"}
        As in ``magnitude_threshold``.
    previous : sequence of Threshold or None, optional
        Thresholds of an earlier call on the same weights; they may save a pass, and never change the result.
    names : sequence of str, optional
        What error messages call the weights; default "weights[i]".
    backend : str, optional

    Returns
    -------
    PruneResult

    Raises
    ------
    DTypeError, ShapeError, LayoutError, SparsityError, NonFiniteError, BackendUnavailableError
        Nothing has been written when one is raised.

    Notes
    -----
    Two reads of the weights, one write of the cache lines that change, 1 bit per weight of mask. Temporary memory:
    under 5% of the largest weight's bytes plus 4 MB, whatever the number of weights.

    References
    ----------
    .. [1] M. Zhu and S. Gupta, "To prune, or not to prune", 2017, arXiv:1710.01878.
    """
    op = "prune_"
    weights_, masks_ = _as_lists(weights, masks)
    names = _names(op, names, len(weights_))
    layers = check_tensors(op, weights_, masks_, names)
    _check_choice(op, "scope", scope, ("layer", "global"))
    _check_choice(op, "nonfinite", nonfinite, ("error", "keep"))
    counts = _num_prune(op, layers, sparsity, num_prune, scope)
    check_writable(op, weights_, layers, names)
    check_disjoint(op, "masks", [layer.mask for layer in layers if layer.mask is not None], names)
    if scope == "global" and len({layer.weight.dtype for layer in layers}) > 1:
        found = ", ".join(sorted({str(layer.weight.dtype) for layer in layers}))
        raise DTypeError(f"{op}: expected one dtype for scope='global', got {found}; cast, or use scope='layer'")
    hints = _hints(op, previous, len(layers), scope)
    if not layers:
        return PruneResult([], [], [], [])

    implementation = choose(backend, layers[0].weight.device)
    if masks_ is None:
        masks_ = [BitMask.empty(layer.weight.shape, layer.weight.device) for layer in layers]
    out = [mask.packed for mask in masks_]
    chosen = implementation.select(layers, counts, hints, prunes=True)
    written = implementation.prune(layers, chosen, out, finite=nonfinite == "error")
    if nonfinite == "error":
        check_finite(op, [index for selection in chosen for index in selection.nonfinite], names)
    bump_versions([*(layer.weight for layer in layers), *out])
    return PruneResult(
        masks=masks_,
        thresholds=[selection.threshold for selection in chosen for _ in selection.cuts],
        num_pruned=[count.num_pruned for count in written],
        num_newly_pruned=[count.num_newly_pruned for count in written],
    )


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
        its optimizer state.
    backend : str, optional

    Raises
    ------
    DTypeError, ShapeError, LayoutError, BackendUnavailableError
        Nothing has been written when one is raised.

    Notes
    -----
    One read of weights and bits, one write of the cache lines that change. No temporary memory.
    """
    op = "apply_masks_"
    weights_, masks_ = _as_lists(weights, masks)
    if weights_ and torch.compiler.is_compiling():
        torch.ops.gmp_kernels.apply_masks_(weights_, [mask.packed for mask in masks_ or []], backend=backend)
        return
    layers = check_tensors(op, weights_, masks_, None)
    check_writable(op, weights_, layers, None)
    if layers:
        choose(backend, layers[0].weight.device).apply(layers)
        bump_versions(layer.weight for layer in layers)


def _as_lists(
    weights: Weight | Sequence[Weight], masks: BitMask | Sequence[BitMask] | None
) -> tuple[list[Weight], list[BitMask] | None]:
    weights = [weights] if isinstance(weights, (torch.Tensor, np.ndarray)) else list(weights)
    if masks is not None:
        masks = [masks] if isinstance(masks, BitMask) else list(masks)
    return weights, masks


def _names(op: str, names: Sequence[str] | None, num_weights: int) -> list[str] | None:
    if names is not None and len(names) != num_weights:
        raise ShapeError(f"{op}: expected one name per weight, got {len(names)} names for {num_weights} weights")
    return None if names is None else list(names)


def _label(names: Sequence[str] | None, i: int) -> str:
    return f"weights[{i}]" if names is None else f"'{names[i]}'"


def check_tensors(
    op: str,
    weights: Sequence[Weight],
    masks: Sequence[BitMask | None] | None,
    names: Sequence[str] | None = None,
    *,
    optional_masks: bool = False,
) -> list[Layer]:
    """Check weights and masks and bring them into the form backends take, without copying.

    With ``optional_masks``, an entry of ``masks`` may be None.
    """
    if masks is not None and len(masks) != len(weights):
        raise ShapeError(f"{op}: expected one mask per weight, got {len(masks)} masks for {len(weights)} weights")
    layers = []
    for i, weight in enumerate(weights):
        tensor = _tensor(op, weight, names, i)
        mask = None
        if masks is not None and not (optional_masks and masks[i] is None):
            mask = masks[i]
            if not isinstance(mask, BitMask):
                raise DTypeError(
                    f"{op}: expected a BitMask for {_label(names, i)}, got {type(mask).__name__}; "
                    "use BitMask.from_bool(...)"
                )
            if mask.shape != tensor.shape:
                raise ShapeError(
                    f"{op}: expected a mask of shape {tuple(tensor.shape)} for {_label(names, i)}, "
                    f"got {tuple(mask.shape)}; a mask belongs to one weight"
                )
            if mask.packed.device != tensor.device:
                raise LayoutError(
                    f"{op}: expected the mask of {_label(names, i)} on {tensor.device}, got {mask.packed.device}; "
                    "use mask.to(device)"
                )
        layers.append(Layer(tensor, None if mask is None else mask.packed))
    devices = {layer.weight.device for layer in layers}
    if len(devices) > 1:
        raise LayoutError(f"{op}: expected all weights on one device, got {sorted(map(str, devices))}; call per device")
    return layers


def _tensor(op: str, weight: Weight, names: Sequence[str] | None, i: int) -> torch.Tensor:
    label = _label(names, i)
    if isinstance(weight, np.ndarray):
        # Checked before torch sees it: from_numpy refuses some of these in words of its own, and warns on read-only.
        if weight.dtype not in (np.float16, np.float32, np.float64) or not weight.dtype.isnative:
            raise DTypeError(
                f"{op}: expected float32, float64 or float16 in native byte order for {label}, got {weight.dtype.str}; "
                "use .astype(numpy.float32)"
            )
        if not weight.flags.c_contiguous:
            raise LayoutError(f"{op}: expected a C-contiguous array for {label}, got strides {weight.strides}; copy it")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            tensor = torch.from_numpy(weight)
    elif isinstance(weight, torch.Tensor):
        tensor = weight.detach()
    else:
        raise DTypeError(f"{op}: expected a torch.Tensor or numpy.ndarray for {label}, got {type(weight).__name__}")
    if tensor.dtype not in DTYPES:
        raise DTypeError(
            f"{op}: expected float32, float64, bfloat16 or float16 for {label}, got {tensor.dtype}; "
            "prune before quantizing, or cast"
        )
    if hasattr(tensor, "to_local"):
        raise LayoutError(
            f"{op}: expected a plain tensor for {label}, got a DTensor, whose local shard is not the layer"
        )
    if tensor.layout != torch.strided or not tensor.is_contiguous() or tensor.is_neg():
        found = f"strides {tensor.stride()}" if tensor.layout == torch.strided else f"layout {tensor.layout}"
        raise LayoutError(
            f"{op}: expected a contiguous tensor for {label} (shape {tuple(tensor.shape)}), got {found}; "
            "use .contiguous(), or model.to(memory_format=torch.contiguous_format)"
        )
    if tensor.numel() == 0:
        raise ShapeError(
            f"{op}: expected at least one weight in {label}, got shape {tuple(tensor.shape)}; leave it out"
        )
    return tensor


def check_writable(op: str, weights: Sequence[Weight], layers: Sequence[Layer], names: Sequence[str] | None) -> None:
    """Refuse weights that cannot be written, one by one or together."""
    for i, weight in enumerate(weights):
        if isinstance(weight, np.ndarray) and not weight.flags.writeable:
            raise LayoutError(f"{op}: expected a writable array for {_label(names, i)}, got a read-only one; copy it")
    check_disjoint(op, "weights", [layer.weight for layer in layers], names)


def check_disjoint(op: str, what: str, tensors: Sequence[torch.Tensor], names: Sequence[str] | None) -> None:
    """Refuse tensors that share memory: writing them one after another or in parallel would not mean one thing."""
    spans = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, i) for i, tensor in enumerate(tensors))
    for (_, end, i), (start, _, j) in itertools.pairwise(spans):
        if start < end:
            raise LayoutError(
                f"{op}: expected {what} that share no memory, but those of {_label(names, i)} and {_label(names, j)} "
                "overlap (tied parameters?); pass each once"
            )


def _check_choice(op: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{op}: expected {name} to be one of {choices}, got {value!r}")


def _num_prune(
    op: str,
    layers: Sequence[Layer],
    sparsity: float | Sequence[float] | None,
    num_prune: int | Sequence[int] | None,
    scope: str,
) -> list[int]:
    """Counts to prune: one per layer, or a single one in global scope."""
    if (sparsity is None) == (num_prune is None):
        given = "neither" if sparsity is None else "both"
        raise SparsityError(f"{op}: expected exactly one of sparsity and num_prune, got {given}")
    sizes = [layer.weight.numel() for layer in layers]
    if scope == "global":
        sizes = [sum(sizes)]
    given_values = num_prune if sparsity is None else sparsity
    values = list(given_values) if isinstance(given_values, (Sequence, np.ndarray)) else [given_values] * len(sizes)
    if len(values) != len(sizes):
        expected = "a single value for scope='global'" if scope == "global" else f"1 or {len(sizes)} values"
        raise ShapeError(f"{op}: expected {expected} of sparsity or num_prune, got {len(values)}")
    return [
        _exact_count(op, value, n) if sparsity is None else round(check_sparsity(op, value) * n)
        for value, n in zip(values, sizes, strict=True)
    ]


def check_sparsity(op: str, value: object) -> float:
    """Return ``value`` as a float if it is a sparsity, i.e. a real number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, np.number)) or not 0.0 <= float(value) <= 1.0:
        raise SparsityError(f"{op}: expected a sparsity in [0, 1] (a fraction, not a percentage), got {value!r}")
    return float(value)


def _exact_count(op: str, value: object, n: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (numbers.Integral, np.integer)):
        raise SparsityError(f"{op}: expected an integer num_prune, got {value!r}; a fraction goes in sparsity=")
    if not 0 <= int(value) <= n:
        raise SparsityError(f"{op}: expected 0 <= num_prune <= {n} (the number of weights), got {int(value)}")
    return int(value)


def _hints(op: str, previous: Sequence[Threshold | None] | None, num_layers: int, scope: str) -> list[Threshold | None]:
    if previous is not None and len(previous) != num_layers:
        raise ShapeError(f"{op}: expected one previous threshold per weight, got {len(previous)} for {num_layers}")
    hints: list[Threshold | None] = [None] * num_layers if previous is None else list(previous)
    return hints[:1] if scope == "global" else hints


def check_finite(op: str, nonfinite: Iterable[int], names: Sequence[str] | None) -> None:
    """Refuse NaN and Inf, given the flat index of the first unpruned one in each weight, or -1."""
    for layer, index in enumerate(nonfinite):
        if index >= 0:
            raise NonFiniteError(
                f"{op}: expected finite weights, got NaN or Inf in {_label(names, layer)} at flat index {index}; "
                "nothing was changed. Find what diverged, or rank them above every number with nonfinite='keep'",
                layer=layer,
                index=index,
            )


def bump_versions(tensors: Iterable[torch.Tensor]) -> None:
    """Tell autograd about writes it cannot see: a stale saved tensor then raises instead of giving wrong gradients."""
    torch.autograd.graph.increment_version(tensors)
