"""Detection of changes to parameters without reading their weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter, getitem, is_
from typing import Any

import numpy as np
import torch
from torch import nn

from gmp_kernels.backends.layouts import sees_life
from gmp_kernels.checks import PLAIN
from gmp_kernels.distributed.placement import local
from gmp_kernels.formats import ROW_MAJOR, format_of, in_memory_order
from gmp_kernels.masks import BitMask
from gmp_kernels.model.targets import check_present
from gmp_kernels.pruner.zeroing import SLICE, slices

__all__ = ["Watch", "compare", "zeros_in"]

CANDIDATES = 1024  # weights of a layer from which a quick check picks pruned ones
SAMPLE = 32  # about so many are picked, if that does not wait for a GPU
GPU_INTERVAL = 16  # a quick check of weights on a GPU is made once in so many calls
STRIDE = 0x9E3779B1  # odd, and near the golden ratio of 2^32: multiples spread evenly over any layer

_version, _shape = attrgetter("_version"), attrgetter("shape")


def compare(weight: torch.Tensor, mask: BitMask) -> torch.Tensor:
    """Count the weights that contradict their mask.

    Parameters
    ----------
    weight : torch.Tensor
        A tensor of any dtype and strides, on any device.
    mask : BitMask
        A mask of its shape.

    Returns
    -------
    torch.Tensor
        int64 of shape (2,) on the weight's device: pruned weights that are not zero, and kept weights that are.

    Notes
    -----
    Temporary memory: about 4 MB.
    """
    found = torch.zeros(2, dtype=torch.int64, device=weight.device)
    for part, kept in slices(weight.detach(), mask):
        # A weight contradicts its mask if it is either zero or pruned, but not both.
        is_zero = part == 0
        differs = is_zero == kept
        found += torch.stack([differs.logical_and(is_zero.logical_not()).sum(), differs.logical_and_(is_zero).sum()])
    return found


def zeros_in(weight: torch.Tensor) -> list[torch.Tensor]:
    """Count the zeros of a tensor in parts: int64 of shape () on its device, of which the sum is the count.

    Temporary memory: about 1 MB; for strides of no memory format, a copy.
    """
    in_memory = in_memory_order(weight.detach(), format_of(weight) or ROW_MAJOR)
    pieces = -(-weight.numel() // SLICE) or 1
    return [part.numel() - torch.count_nonzero(part) for part in in_memory.reshape(-1).tensor_split(pieces)]


class Watch:
    """Parameters at their places in a model, and the versions they had when they were last seen."""

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self._model = model
        self._by_name = parameters
        self._parameters = list(parameters.values())
        self._shapes = list(map(_shape, self._parameters))
        self._versions: list[int] | None = None
        self._num_looks = 0
        # Of each layer, by the format of its mask, which may follow the weight to another one.
        self._samples: dict[tuple[str, torch.memory_format], tuple[torch.Tensor, torch.Tensor | None]] = {}
        # A GPU's answer to a quick check, and the event after which it is there.
        self._answer: tuple[torch.cuda.Event, torch.Tensor] | None = None
        # Once the parameters are found: their holders, keys and themselves; the modules on the way, now and then.
        self._found: list[Sequence[Any]] = []
        self._way: tuple[Sequence[object], Sequence[object]] = [], []

    def check_present(self) -> None:
        """Raise TargetError for a parameter that was removed from the model, replaced or reshaped."""
        try:
            # Modules are equal only if they are the same object.
            is_way_known = self._found and self._way[0] == self._way[1]
            if is_way_known and all(map(is_, map(getitem, *self._found[:2]), self._found[2])):
                return
        except KeyError:
            pass  # one was removed
        self._compare_with_model()
        # This is the first check, or another module leads to the same parameters now.
        ids = set(map(id, self._parameters))
        way = _way_to(ids, self._model)
        places = [(m._parameters, key, p) for m in way for key, p in m._parameters.items() if id(p) in ids]
        self._found = list(zip(*places, strict=True))
        modules = [module._modules for module in way if module._modules]
        self._way = modules, list(map(dict, modules))

    def check_shapes(self) -> None:
        """Raise TargetError for a parameter that was given other data, of another shape than it began with."""
        if list(map(_shape, self._parameters)) != self._shapes:
            self._compare_with_model()

    def contradictions(self, names: Iterable[str], masks: Mapping[str, BitMask]) -> dict[str, tuple[int, int]]:
        """Return, by parameter, how many pruned weights are not zero here and how many kept ones are."""
        self.check_shapes()
        # All comparisons are launched before the first result is waited for.
        found = {name: compare(local(self._by_name[name]), masks[name]) for name in names}
        return {name: tuple(counts.tolist()) for name, counts in found.items()}

    def zeros(self) -> dict[str, int]:
        """Return how many weights of each parameter are zero here."""
        self.check_shapes()
        # All counts are launched before the first is waited for.
        found = {name: zeros_in(local(p)) for name, p in self._by_name.items()}
        return {name: sum(map(int, counts)) for name, counts in found.items()}

    def _compare_with_model(self) -> None:
        check_present(self._model, self._by_name, dict(zip(self._by_name, self._shapes, strict=True)))

    def record(self) -> None:
        """Accept the parameters as they are now."""
        self._versions = list(map(_version, self._parameters))

    def distrust(self) -> None:
        """Report all parameters as written until they are recorded."""
        self._versions = [-1] * len(self._parameters)

    def expect_writes(self) -> None:
        """Accept the parameters as the next call of ``written`` finds them."""
        self._versions = None

    def written(self) -> list[str]:
        """Return the names of the parameters that torch saw written since they were recorded."""
        now = list(map(_version, self._parameters))
        if self._versions is None:
            self._versions = now
        if self._versions == now:
            return []
        versions = zip(self._by_name, self._versions, now, strict=True)
        return [name for name, old, new in versions if old != new]

    def forget_samples(self) -> None:
        """Make quick checks pick other weights, after masks have changed."""
        self._samples.clear()
        self._answer = None

    def sees_life(self, names: Sequence[str], masks: Mapping[str, BitMask]) -> bool:
        """Whether any pruned weight in a sample of one parameter is not zero; each call takes another parameter.

        Detects writes that leave no trace in versions: through ``.data``, or by shared memory. On a GPU the answer is
        that of an earlier call, and most calls do not check.
        """
        if not names:
            return False
        if self._answer is not None:
            event, answer = self._answer
            if not event.query():  # type: ignore[no-untyped-call]
                return False
            self._answer = None
            return bool(answer)
        self._num_looks += 1
        turn = self._num_looks
        if self._by_name[names[0]].device.type != "cpu":
            turn, rest = divmod(turn, GPU_INTERVAL)
            if rest:
                return False
        name = names[turn % len(names)]
        p, mask = self._by_name[name], masks[name]
        if type(p) in PLAIN:
            round_number = turn // len(names)
            has_life = sees_life(p, mask.packed, mask.shape, mask.memory_format is ROW_MAJOR, round_number)
            if has_life is not None:
                return has_life
        weight = local(p).detach()
        if weight.shape != mask.shape:
            return True
        key = name, mask.memory_format
        if key not in self._samples:
            self._samples[key] = _sample_of(mask, turn)
        indices, is_pruned = self._samples[key]
        # It takes a few elements of any strides without a copy.
        found = torch.take(in_memory_order(weight, mask.memory_format), indices)
        if is_pruned is None:
            return any(found.tolist())
        self._answer = _brought_back(found.ne(0).logical_and_(is_pruned).any())
        return False


def _way_to(parameters: set[int], module: nn.Module) -> list[nn.Module]:
    """Return this module and those in it that hold one of these parameters, given by id, or lead to one."""
    children = [child for child in module._modules.values() if child is not None]
    way = [holder for child in children for holder in _way_to(parameters, child)]
    return [module, *way] if way or not parameters.isdisjoint(map(id, module._parameters.values())) else []


def _sample_of(mask: BitMask, offset: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return places spread over the memory of the layer, and which of them are pruned: None if all are.

    On a GPU the pruned ones are not picked out, because that would wait for it.
    """
    device = mask.packed.device
    if device.type == "cpu":
        return _pruned_among(mask, offset), None
    indices = torch.arange(min(CANDIDATES, mask.numel), device=device)
    if mask.numel > CANDIDATES:
        indices = (indices + offset * CANDIDATES).mul_(STRIDE).remainder_(mask.numel)
    bits = mask.packed[indices >> 3] >> (indices & 7).to(torch.uint8)
    return indices, (bits & 1) == 0


def _pruned_among(mask: BitMask, offset: int) -> torch.Tensor:
    """Return places in memory of pruned weights from bytes that are spread over the mask.

    numpy takes a tenth of the time of torch for so few numbers, which matters in the first steps after an update.
    """
    packed = mask.packed.numpy()
    # Strides are odd, so that in a layer of 2^n columns a sample does not stay in one column.
    stride = packed.size // (CANDIDATES // 8) | 1
    first = offset % stride
    places = np.flatnonzero(np.unpackbits(packed[first::stride], bitorder="little") == 0)
    places = places[:: places.size // SAMPLE | 1]
    indices = places + (places >> 3) * (8 * stride - 8) + 8 * first
    return torch.from_numpy(indices[indices < mask.numel])


def _brought_back(found: torch.Tensor) -> tuple[torch.cuda.Event, torch.Tensor]:
    """Copy an answer from a GPU without waiting for it; it is there after the event."""
    answer = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True)
    answer.copy_(found, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(found.device))
    return event, answer
