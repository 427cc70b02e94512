"""Checks of weights, masks and counts, all of them before any memory is written.

Most calls come with the tensors of an earlier one. Whether a call may write to them follows from their addresses,
shapes and dtypes. So these are compared with those that passed before, and only a call that differs is checked in full.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from operator import attrgetter, is_
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch.nn.parameter import is_lazy

from gmp_kernels.backends.dtypes import DTYPES
from gmp_kernels.backends.layers import Layers
from gmp_kernels.backends.layouts import layouts_of
from gmp_kernels.backends.types import Layer
from gmp_kernels.errors import DTypeError, LayoutError, NonFiniteError, ShapeError, SparsityError
from gmp_kernels.formats import format_of
from gmp_kernels.masks import BitMask
from gmp_kernels.patterns import Pattern

__all__ = [
    "Weight",
    "adopt_bits",
    "check_choice",
    "check_disjoint",
    "check_finite",
    "check_fit",
    "check_mask",
    "check_tensors",
    "check_writable",
    "checked_layers",
    "forget",
    "label_of",
]

Weight: TypeAlias = torch.Tensor | np.ndarray

# Tensors of other types may be anything: shards, wrappers.
PLAIN = {torch.Tensor, torch.nn.Parameter}
MOST_LAYERS = 4096  # known at a time; about 1 KB each

_packed, _shape, _memory_format = map(attrgetter, ("packed", "shape", "memory_format"))


class _Known(NamedTuple):
    """A call that has passed the checks.

    Attributes
    ----------
    signature : list
        All that they depend on.
    elsewhere : list or None
        The same without the places of the masks that it writes, which may be any if they share no memory.
    layers : Layers
        Without tensors, to keep none alive.
    """

    signature: list[Any]
    elsewhere: list[Any] | None
    layers: Layers


# Keyed by kind of call, number of weights and first address.
_known: dict[tuple[object, int, int], _Known] = {}


def checked_layers(
    op: str,
    weights: Sequence[Weight],
    masks: Sequence[BitMask] | None,
    names: Sequence[str] | None,
    *,
    writes: Literal["nothing", "weights", "weights and masks"],
    patterns: Sequence[Pattern | None] | None = None,
    scores: Sequence[Weight] | None = None,
) -> Layers | None:
    """Check the tensors of a call and return them in the form backends take, not copied; None if there are none.

    Of a mask or scores in another memory format than their weight, the layers have a copy in that of the weight. A call
    that writes masks calls ``adopt_bits`` before.
    """
    if names is not None and len(names) != len(weights):
        raise ShapeError(f"{op}: expected one name per weight, got {len(names)} names for {len(weights)} weights")
    packed, signature = None, None
    are_plain = PLAIN.issuperset(map(type, weights)) and {BitMask}.issuperset(map(type, masks or ()))
    if weights and scores is None and are_plain:
        packed = None if masks is None else list(map(_packed, masks))
        signature = _signature(list(weights), masks, packed)  # type: ignore[arg-type]
    kind = writes if patterns is None else (writes, *patterns)
    key = None if signature is None else (kind, len(weights), weights[0].data_ptr())  # type: ignore[union-attr]
    known = _known.get(key) if key is not None else None
    if known is not None and known.signature == signature:
        return Layers(weights, packed, known.layers, patterns)  # type: ignore[arg-type]
    writes_masks = writes == "weights and masks" and masks is not None
    elsewhere = _elsewhere(weights, masks, packed) if writes_masks and key is not None else None  # type: ignore[arg-type]
    if known is not None and elsewhere is not None and known.elsewhere == elsewhere:
        # Only the masks lie elsewhere: a pruner gives copies of them if optimizer state is laid out by the old ones.
        check_disjoint(op, "masks", packed, names)  # type: ignore[arg-type]
        bits = packed
        layers = Layers(weights, bits, known.layers, patterns)  # type: ignore[arg-type]
        layers.prepared = {}
    else:
        checked = check_tensors(op, weights, masks, names)
        if writes != "nothing":
            check_writable(op, weights, checked, names)
        if writes_masks:
            check_disjoint(op, "masks", [mask.packed for mask in masks], names)  # type: ignore[union-attr]
        if not checked:
            return None
        bits = None if masks is None else [layer.mask for layer in checked]
        tensors = [layer.tensor for layer in checked]
        ranks = None if scores is None else _checked_scores(op, scores, tensors, names)
        if patterns is not None:
            check_fit(op, patterns, [tensor.shape for tensor in tensors], names)
        layers = Layers(tensors, bits, None, patterns, ranks)
    # The signature has to be that of the bits in the layers.
    if signature is not None and key is not None and (bits is None or all(map(is_, bits, packed))):  # type: ignore[arg-type]
        if sum(number for _, number, _ in list(_known)) + len(weights) > MOST_LAYERS:
            forget()
        _known[key] = _Known(signature, elsewhere, Layers((), None, layers))
    return layers


def adopt_bits(masks: Sequence[BitMask], layers: Layers) -> None:
    """Give masks in another memory format than their weights the copies that the layers have: what is kept stays."""
    assert layers.masks is not None
    if all(map(is_, map(_packed, masks), layers.masks)):
        return
    for mask, bits, weight in zip(masks, layers.masks, layers.weights, strict=True):
        if mask.packed is not bits:
            mask.become(BitMask.of(bits, mask.shape, format_of(weight)))


def forget() -> None:
    """Check the next call in full, whatever its tensors."""
    _known.clear()


def _signature(
    weights: list[torch.Tensor], masks: Sequence[BitMask] | None, packed: list[torch.Tensor] | None
) -> list[Any] | None:
    """Return everything that the checks of a call depend on, at little cost; None if they need more than that.

    An address implies the device, because no two devices share one. Storage sizes are part of the signature, because a
    storage that was cut may lie at the address of a larger one.
    """
    places = layouts_of([*weights, *(packed or [])], True, True)
    if places is None:
        return None  # not a tensor, one without an address, or a view; the check of each tensor says which
    return [places, *([list(map(get, masks)) for get in (_shape, _memory_format)] if masks is not None else [])]


def _elsewhere(weights: list[torch.Tensor], masks: Sequence[BitMask], packed: list[torch.Tensor]) -> list[Any] | None:
    """Return the signature of a call without the addresses of the masks; None if one does not begin its storage.

    If it does, the size of its storage says whether its bits are in memory.
    """
    if any(map(torch.Tensor.storage_offset, packed)):
        return None
    places = layouts_of(weights, True, True), layouts_of(packed, False, True)
    return [*places, *(list(map(get, masks)) for get in (_shape, _memory_format))]


def label_of(names: Sequence[str] | None, i: int) -> str:
    return f"weights[{i}]" if names is None else f"'{names[i]}'"


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether a tensor claims a device but has no memory there, so that its values are somewhere else."""
    try:
        return tensor.data_ptr() == 0 and tensor.device.type != "meta" and tensor.untyped_storage().nbytes() > 0
    except RuntimeError:
        return True


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether the storage reaches the tensor's last element: sharded training frees it between steps."""
    span = tensor.numel()
    if not tensor.is_contiguous():
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + span) * tensor.itemsize
    return tensor.numel() == 0 or tensor.untyped_storage().nbytes() >= needed


def may_overlap(tensor: torch.Tensor) -> bool:
    """Whether two elements may lie at one address, as in expanded tensors."""
    reach = 0  # of the dimensions so far, in elements
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


def check_tensors(
    op: str,
    weights: Sequence[Weight],
    masks: Sequence[BitMask | None] | None,
    names: Sequence[str] | None = None,
    *,
    optional_masks: bool = False,
) -> list[Layer]:
    """Check weights and masks and return them in the form backends take, not copied.

    With ``optional_masks``, an entry of ``masks`` may be None.
    """
    if masks is not None and len(masks) != len(weights):
        raise ShapeError(f"{op}: expected one mask per weight, got {len(masks)} masks for {len(weights)} weights")
    layers = []
    for i, weight in enumerate(weights):
        label = label_of(names, i)
        tensor = _tensor(op, weight, label)
        mask = None if masks is None else masks[i]
        if masks is not None and not (optional_masks and mask is None):
            check_mask(op, mask, tensor, label)
        bits = None if mask is None else mask.to(memory_format=format_of(tensor)).packed
        layers.append(Layer.of(tensor, bits))
    devices = {layer.weight.device for layer in layers}
    if devices == {torch.device("meta")}:
        raise LayoutError(f"{op}: expected weights in memory, got them on the meta device; load the model first")
    if len(devices) > 1:
        raise LayoutError(f"{op}: expected all weights on one device, got {sorted(map(str, devices))}; call per device")
    return layers


def check_mask(op: str, mask: object, tensor: torch.Tensor, label: str) -> None:
    """Refuse anything that is not a mask of this tensor."""
    if not isinstance(mask, BitMask):
        raise DTypeError(f"{op}: expected a BitMask for {label}, got {type(mask).__name__}; use BitMask.from_bool(...)")
    if mask.shape != tensor.shape:
        raise ShapeError(
            f"{op}: expected a mask of shape {tuple(tensor.shape)} for {label}, got {tuple(mask.shape)}; a mask "
            "belongs to one weight"
        )
    if not isinstance(mask.packed, torch.Tensor):
        raise DTypeError(
            f"{op}: expected a tensor of packed bits in the mask of {label}, got {type(mask.packed).__name__}; make a "
            "new BitMask"
        )
    if mask.packed.device != tensor.device:
        raise LayoutError(
            f"{op}: expected the mask of {label} on {tensor.device}, got {mask.packed.device}; use mask.to(device)"
        )
    if not mask.is_packed or is_wrapper(mask.packed) or not has_memory(mask.packed):
        raise ShapeError(
            f"{op}: expected {-(-mask.numel // 8)} contiguous bytes as the mask of {label}, got {mask.packed.dtype} of "
            f"shape {tuple(mask.packed.shape)}; make a new BitMask"
        )


def _tensor(op: str, weight: Weight, label: str) -> torch.Tensor:
    """Return a weight as a tensor that shares its memory; refuse what backends do not take."""
    if isinstance(weight, np.ma.MaskedArray):
        raise LayoutError(
            f"{op}: expected a plain array for {label}, got a masked one, some of whose values do not count; pass "
            ".data or .filled(0)"
        )
    if isinstance(weight, np.ndarray):
        # Checked before torch sees it: from_numpy has error messages of its own, and warns about read-only arrays.
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
        _check_kind(op, weight, label)
        tensor = weight.detach()
    else:
        raise DTypeError(
            f"{op}: expected a torch.Tensor or numpy.ndarray for {label}, got {type(weight).__name__}; "
            f"pass {_instead_of(weight)}"
        )
    if tensor.dtype not in DTYPES:
        raise DTypeError(
            f"{op}: expected float32, float64, bfloat16 or float16 for {label}, got {tensor.dtype}; "
            + ("prune its torch.view_as_real" if tensor.is_complex() else "prune before quantizing, or cast")
        )
    if format_of(tensor) is None:
        raise LayoutError(
            f"{op}: expected a contiguous or channels_last tensor for {label} (shape {tuple(tensor.shape)}), got "
            f"strides {tensor.stride()}; use .contiguous()"
        )
    if tensor.numel() == 0:
        raise ShapeError(
            f"{op}: expected at least one weight in {label}, got shape {tuple(tensor.shape)}; leave it out"
        )
    if not has_memory(tensor):
        raise LayoutError(
            f"{op}: expected {label} in memory, got a tensor whose storage was freed or cut; gather it first"
        )
    return tensor


def _check_kind(op: str, weight: torch.Tensor, label: str) -> None:
    """Refuse tensors that are not numbers in memory, before asking for a shape, which some of them do not have."""
    if is_lazy(weight):
        raise LayoutError(f"{op}: expected {label} initialized, got a lazy parameter; run the model on a batch first")
    if weight.is_nested or weight.layout != torch.strided:
        found = "a nested one; use its parts" if weight.is_nested else f"layout {weight.layout}; use .to_dense()"
        raise LayoutError(f"{op}: expected a dense tensor for {label}, got {found}")
    if hasattr(weight, "to_local"):
        raise LayoutError(
            f"{op}: expected a plain tensor for {label}, got a DTensor, whose local shard is not the layer; use "
            "GMPScheduler, which selects over all ranks"
        )
    if is_wrapper(weight):
        name = type(weight).__name__
        found = (
            "one inside a function transform"
            if type(weight) in PLAIN
            else f"a {name}, which keeps its values elsewhere"
        )
        raise LayoutError(
            f"{op}: expected a plain tensor for {label}, got {found}; prune before quantizing or wrapping it, or "
            "outside of the transform"
        )
    if weight.is_neg():
        raise LayoutError(f"{op}: expected a plain tensor for {label}, got a view that negates; use .resolve_neg()")


def _instead_of(given: object) -> str:
    """Say what to pass instead of this object."""
    if isinstance(given, torch.nn.Module):
        return (
            "its weights, such as [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)], or give the "
            "model to GMPScheduler"
        )
    if isinstance(given, torch.optim.Optimizer):
        return "the weights it steps, such as [model.fc.weight], or give model and optimizer to GMPScheduler"
    if isinstance(given, dict):
        return "its tensors that are to be pruned, such as [state['fc.weight']]"
    if isinstance(given, tuple):
        return "the tensors without their names"
    return "weights, alone or in a list"


def _checked_scores(
    op: str, scores: Sequence[Weight], weights: Sequence[torch.Tensor], names: Sequence[str] | None
) -> list[torch.Tensor]:
    """Return scores laid out as their weights are; refuse all that cannot rank these."""
    if len(scores) != len(weights):
        raise ShapeError(f"{op}: expected scores for each of {len(weights)} weights, got {len(scores)} tensors of them")
    found = []
    for i, (given, weight) in enumerate(zip(scores, weights, strict=True)):
        label = f"the scores of {label_of(names, i)}"
        if isinstance(given, torch.Tensor):
            _check_kind(op, given, label)
            memory_format = format_of(weight)
            if given.shape == weight.shape and memory_format is not None and format_of(given) != memory_format:
                given = given.detach().contiguous(memory_format=memory_format)
        tensor = _tensor(op, given, label)
        if tensor.shape != weight.shape or tensor.device != weight.device:
            raise ShapeError(
                f"{op}: expected {label} of shape {tuple(weight.shape)} on {weight.device}, got "
                f"{tuple(tensor.shape)} on {tensor.device}; give one score per weight"
            )
        lowest = tensor.amin().item()  # NaN if there is any
        if not lowest >= 0:
            raise SparsityError(
                f"{op}: expected no negative number and no NaN in {label}, got {lowest}; weights with a score of 0 go "
                "first"
            )
        found.append(tensor)
    check_disjoint(op, "weights and scores", [*weights, *found], [*(names or ()), *(names or ())] or None)
    return found


def check_fit(
    op: str, patterns: Sequence[Pattern | None], shapes: Sequence[Sequence[int]], names: Sequence[str] | None
) -> None:
    """Refuse weights whose shapes cannot have their patterns, all of them in one message."""
    misfits = [
        (label_of(names, i), f"{label_of(names, i)} cannot be {pattern}: {reason}")
        for i, (pattern, shape) in enumerate(zip(patterns, shapes, strict=True))
        if pattern is not None and (reason := pattern.misfit(shape)) is not None
    ]
    if misfits:
        found = "; ".join(word for _, word in misfits)
        raise ShapeError(
            f"{op}: expected weights whose shapes fit their patterns, got {found}. Leave them out"
            + (f": ignore=[{', '.join(name for name, _ in misfits)}]" if names else "")
        )


def check_writable(op: str, weights: Sequence[Weight], layers: Sequence[Layer], names: Sequence[str] | None) -> None:
    """Refuse weights that cannot be written, one by one or together."""
    for i, weight in enumerate(weights):
        if isinstance(weight, np.ndarray) and not weight.flags.writeable:
            raise LayoutError(f"{op}: expected a writable array for {label_of(names, i)}, got a read-only one; copy it")
    check_disjoint(op, "weights", [layer.weight for layer in layers], names)


def check_disjoint(op: str, what: str, tensors: Sequence[torch.Tensor], names: Sequence[str] | None) -> None:
    """Refuse tensors that share memory: the result would depend on the order of the writes."""
    spans = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, i) for i, tensor in enumerate(tensors))
    for (_, end, i), (start, _, j) in itertools.pairwise(spans):
        if start < end:
            raise LayoutError(
                f"{op}: expected {what} that share no memory, but those of {label_of(names, i)} and "
                f"{label_of(names, j)} overlap (tied parameters?); pass each once"
            )


def check_choice(op: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{op}: expected {name} to be one of {choices}, got {value!r}")


def check_finite(op: str, nonfinite: Sequence[int], names: Sequence[str] | None) -> None:
    """Refuse NaN and Inf, given the flat index of the first unpruned one in each weight, or -1."""
    if max(nonfinite, default=-1) < 0:
        return
    for layer, index in enumerate(nonfinite):
        if index >= 0:
            raise NonFiniteError(
                f"{op}: expected finite weights, got NaN or Inf in {label_of(names, layer)} at flat index {index}; "
                "nothing was changed. Find what diverged, or rank them above every number with nonfinite='keep'",
                layer=layer,
                index=index,
            )
