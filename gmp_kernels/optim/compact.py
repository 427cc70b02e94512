"""A parameter's state in its two forms, dense and compact: its entries, and conversion between the forms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch

from gmp_kernels.backends import choose
from gmp_kernels.backends.types import Compaction, StateMove
from gmp_kernels.distributed.placement import local, sharded_like
from gmp_kernels.errors import StateError
from gmp_kernels.formats import CHANNELS_LAST, ROW_MAJOR, in_memory_order, lie_alike
from gmp_kernels.masks import BitMask

__all__ = [
    "MASTER",
    "STEP",
    "CompactState",
    "as_count",
    "check_layout",
    "compact_names",
    "compacted",
    "expanded",
    "follow",
    "layout_of",
    "per_weight",
    "state_dtype_of",
    "version_of",
]

MASTER = "master_weight"  # the name of the float32 copy in the state
STEP = "step"


class CompactState(dict[str, Any]):
    """The state of one parameter, stored for the kept weights only, and the bits that tell which those are.

    State and layout are one object, so that both are always replaced together.

    Attributes
    ----------
    layout : Compaction
        Its bits must not be written; a write shows as a version of the bits other than ``version``.
    names : frozenset of str
        The entries that are stored in this layout.
    shape : torch.Size
        Shape of the part of the parameter that this process holds.
    is_row_major : bool
        Whether the values are in row-major order; if not, in that of channels_last.
    version : int
    """

    def __init__(self, values: Mapping[str, Any], layout: Compaction, names: Iterable[str], mask: BitMask) -> None:
        super().__init__(values)
        self.layout = layout
        self.names = frozenset(names)
        self.shape = mask.shape
        self.is_row_major = mask.memory_format is ROW_MAJOR
        self.version = version_of(layout.mask)

    @property
    def memory_format(self) -> torch.memory_format:
        """Format that the part had when its state was laid out."""
        return ROW_MAJOR if self.is_row_major else CHANNELS_LAST[len(self.shape)]

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the bits counts its versions from 0, so earlier writes could not be detected later.
        _check_bits("copying an optimizer", self)
        return self.__dict__

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        self.__dict__.update({"is_row_major": True} | attributes)  # older pickles do not tell
        self.version = version_of(self.layout.mask)


def version_of(tensor: torch.Tensor) -> int:
    """Return how often a tensor was written in place; 0 for inference tensors, which do not count."""
    return 0 if tensor.is_inference() else tensor._version


def layout_of(state: Mapping[str, Any] | None) -> Compaction | None:
    """Return the layout of a parameter's state; None if it is dense."""
    return state.layout if isinstance(state, CompactState) else None


def compact_names(state: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of the entries that are stored for the kept weights only."""
    return state.names if isinstance(state, CompactState) else frozenset()


def check_layout(optimizer: str, p: torch.Tensor, state: Mapping[str, Any] | None) -> None:
    """Raise StateError for compact state whose bits were written, or that is for another number of weights."""
    if not isinstance(state, CompactState):
        return
    _check_bits(optimizer, state)
    if state.shape.numel() != local(p).numel():
        raise StateError(
            f"{optimizer}: expected a parameter of the size for which its compact state was laid out, got one of "
            f"shape {tuple(p.shape)}; make a new optimizer, or a new parameter group, for a layer that has grown"
        )


def _check_bits(optimizer: str, state: CompactState) -> None:
    if state.version != version_of(state.layout.mask):
        raise StateError(
            f"{optimizer}: expected the mask of a parameter of shape {tuple(state.shape)} as it was when its compact "
            "state was laid out, got one that was written in place; let the scheduler prune, or prune a clone of its "
            "mask and give that to set_masks"
        )


def state_dtype_of(p: torch.Tensor, chosen: torch.dtype) -> torch.dtype:
    """Return the dtype in which the state of a parameter is kept if ``chosen`` is that of all others."""
    return torch.float64 if p.dtype == torch.float64 else chosen


def per_weight(p: torch.Tensor, state: Mapping[str, Any]) -> list[str]:
    """Return the names of the entries that have a value for each weight or, in compact form, for each kept weight."""
    compact = compact_names(state)
    return [
        name
        for name, value in state.items()
        if isinstance(value, torch.Tensor)
        and name != STEP
        and (name in compact or (value.shape == p.shape and value.is_floating_point()))
    ]


def follow(p: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return a dense entry in the memory format of the parameter; itself if it has that already."""
    return value if lie_alike(local(value), local(p)) else torch.empty_like(p, dtype=value.dtype).copy_(value)


def as_count(value: Any, device: torch.device) -> torch.Tensor:
    """Return a step count as a 0-d float32 tensor, because a 16-bit one would stop at 256 or 2048.

    Returns ``value`` itself if it is one already.
    """
    if isinstance(value, torch.Tensor):
        is_one = (
            type(value) is torch.Tensor and value.ndim == 0 and (value.dtype, value.device) == (torch.float32, device)
        )
        return value if is_one else value.detach().to(device, torch.float32).reshape(())
    return torch.tensor(float(value), dtype=torch.float32, device=device)


def compacted(
    states: Mapping[torch.Tensor, Mapping[str, Any]], masks: Mapping[torch.Tensor, BitMask], backend: str | None
) -> dict[torch.Tensor, CompactState]:
    """Return the states of these parameters laid out for the weights that their masks keep. Waits for a GPU once.

    The masks are in the memory formats of the parameters. Master weights stay dense.
    """
    found: dict[torch.Tensor, CompactState] = {}
    for device in {p.device for p in states}:
        owners = [p for p in states if p.device == device]
        implementation = choose(backend, device)
        layouts = implementation.compactions([(masks[p].packed, local(p).numel()) for p in owners])
        moves = []
        for p, layout in zip(owners, layouts, strict=True):
            state, packed, mask, numel = states[p], dict[str, torch.Tensor](), masks[p], local(p).numel()
            if isinstance(state, CompactState) and state.memory_format is not mask.memory_format:
                state = _spread(p, state, backend)
            before, compact = layout_of(state), compact_names(state)
            for name in per_weight(p, state):
                if name == MASTER:
                    continue
                source = state[name]
                if name not in compact:
                    whole = local(source).contiguous(memory_format=mask.memory_format)
                    source = in_memory_order(whole, mask.memory_format)
                packed[name] = torch.empty(layout.num_kept, dtype=source.dtype, device=device)
                moves.append(StateMove(source, before if name in compact else None, packed[name], layout, numel))
            found[p] = CompactState({**state, **packed}, layout, packed, mask)
        if moves:
            implementation.move_state(moves)
    return found


def expanded(optimizer: str, p: torch.Tensor, state: Mapping[str, Any], backend: str | None) -> dict[str, Any]:
    """Check the layout and return the state in torch's dense form, with zeros where compact state has no value."""
    check_layout(optimizer, p, state)
    return _spread(p, state, backend)


def _spread(p: torch.Tensor, state: Mapping[str, Any], backend: str | None) -> dict[str, Any]:
    """Return the state in the dense form."""
    if not isinstance(state, CompactState):
        return {**state}
    empty = partial(torch.empty, state.shape, device=p.device, memory_format=state.memory_format)
    spread = {name: empty(dtype=state[name].dtype) for name in state.names & state.keys()}
    if spread:
        in_memory = {name: in_memory_order(values, state.memory_format) for name, values in spread.items()}
        moves = [StateMove(state[name], state.layout, to, None, to.numel()) for name, to in in_memory.items()]
        choose(backend, p.device).move_state(moves)
    return {**state, **{name: follow(p, sharded_like(values, p)) for name, values in spread.items()}}
