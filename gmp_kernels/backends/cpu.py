"""The compiled CPU kernels (csrc/cpu): AVX-512, AVX2 or portable C++, on torch's number of threads."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

# Before _C: the process then has one OpenMP runtime, torch's, and our loops run on the threads torch keeps warm.
import torch

from gmp_kernels.backends import Backend, Layer, Selection, Threshold, Written, register

try:
    from gmp_kernels import _C
except ImportError as error:
    _C = None  # type: ignore[assignment]
    _import_error = str(error)


def _row(layer: Layer) -> tuple[int, int, int]:
    mask = 0 if layer.mask is None else layer.mask.data_ptr()
    return layer.weight.data_ptr(), layer.weight.numel(), mask


def _by_dtype(layers: Sequence[Layer]) -> dict[str, list[int]]:
    """Positions of the layers of each dtype, by the dtype's name in csrc/dtypes.h."""
    positions: dict[str, list[int]] = defaultdict(list)
    for i, layer in enumerate(layers):
        positions[str(layer.weight.dtype).removeprefix("torch.")].append(i)
    return positions


class Cpu:
    """Implementation of the three operations with one call per dtype, which nearly always means one call."""

    def select(
        self, layers: Sequence[Layer], num_prune: Sequence[int], hints: Sequence[Threshold | None]
    ) -> list[Selection]:
        is_global = len(num_prune) != len(layers)
        found: dict[int, Selection] = {}
        for dtype, positions in _by_dtype(layers).items():
            groups = [0] if is_global else positions
            selections = _C.select(
                dtype,
                [_row(layers[i]) for i in positions],
                [num_prune[g] for g in groups],
                [hints[g] for g in groups],
                torch.get_num_threads(),
            )
            for g, (threshold, cuts, nonfinite) in zip(groups, selections, strict=True):
                found[g] = Selection(Threshold(*threshold), tuple(cuts), tuple(nonfinite))
        return [found[g] for g in range(len(num_prune))]

    def prune(
        self, layers: Sequence[Layer], selections: Sequence[Selection], out: Sequence[torch.Tensor]
    ) -> list[Written]:
        cuts = [(selection.threshold.value, cut) for selection in selections for cut in selection.cuts]
        written: dict[int, Written] = {}
        for dtype, positions in _by_dtype(layers).items():
            counts = _C.apply(
                dtype,
                [_row(layers[i]) for i in positions],
                [cuts[i] for i in positions],
                [out[i].data_ptr() for i in positions],
                torch.get_num_threads(),
            )
            for i, (kept_before, kept) in zip(positions, counts, strict=True):
                written[i] = Written(layers[i].weight.numel() - kept, kept_before - kept)
        return [written[i] for i in range(len(layers))]

    def apply(self, layers: Sequence[Layer]) -> None:
        for dtype, positions in _by_dtype(layers).items():
            _C.apply(dtype, [_row(layers[i]) for i in positions], [], [], torch.get_num_threads())


def _probe() -> str | None:
    if _C is None:
        return f"its extension was not built ({_import_error}); install a C++ compiler and run pip install again"
    try:
        _C.isa()
    except ValueError as error:
        return str(error)
    return None


def _supports(device: torch.device) -> str | None:
    return None if device.type == "cpu" else f"it takes CPU tensors, got {device}; move them with .cpu()"


register(Backend("cpu", priority=10, probe=_probe, supports=_supports, load=Cpu))
