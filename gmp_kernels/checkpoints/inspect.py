"""Statistics of a checkpoint, tensor by tensor: sparsity, patterns, ranges, NaN and Inf."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any, Literal

import torch

from gmp_kernels.backends.keys import key_of, keys_of, largest_key, magnitude_of
from gmp_kernels.checkpoints.files import DTYPES, Checkpoint, TensorInfo, open_checkpoint
from gmp_kernels.checkpoints.masks import masks_in
from gmp_kernels.checkpoints.recognition import Recognition
from gmp_kernels.checkpoints.stream import Stream, opened
from gmp_kernels.checkpoints.targets import TensorIndex
from gmp_kernels.masks import BitMask

__all__ = ["BINS_PER_OCTAVE", "TensorStatistics", "inspect_checkpoint", "total_of"]

PIECE_BYTES = 1 << 22  # so that a piece and its keys stay in the caches
NUM_BUFFERS = 2  # one is counted while the other is read into
BINS_PER_OCTAVE = 4

# Float8 is counted in float32, which holds all its values.
FLOATS = DTYPES | {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
# Only zeros of these are counted, whatever the sign.
INTEGERS = (
    dict.fromkeys(("BOOL", "I8", "U8"), torch.uint8)
    | dict.fromkeys(("I16", "U16"), torch.int16)
    | dict.fromkeys(("I32", "U32"), torch.int32)
    | dict.fromkeys(("I64", "U64"), torch.int64)
)


@dataclass
class TensorStatistics:
    """Statistics of one tensor.

    Attributes
    ----------
    name, dtype : str
        As in the file.
    kind : {"weight", "mask", "other"}
        A mask belongs to a weight: packed bits that ``gmp-kernels prune --masks`` writes, or a mask that
        ``torch.nn.utils.prune`` keeps beside the original. "other" is every other tensor whose dtype is not a
        floating-point one, such as counters and quantized weights.
    shape : tuple of int
        For packed bits the shape of the weight, with one bit as one element.
    numel : int
    num_zeros : int or None
        Includes -0. None for a dtype whose values are not read (complex, below 8 bits).
    num_nan, num_inf : int or None
        None unless the dtype is a floating-point one.
    patterns : tuple of str
        The tightest of the usual patterns N:M and the largest of the usual blocks to which all zeros keep; empty if
        there are no zeros, or nothing else.
    largest, smallest : float or None
        Largest finite magnitude, and smallest that is not zero; None if there is none.
    histogram : dict of int to int
        If requested: {b: number of finite, nonzero magnitudes in [2^(b/4), 2^((b+1)/4))}. Within an octave, the bounds
        are those of the first two bits of the mantissa.
    """

    name: str
    dtype: str
    kind: Literal["weight", "mask", "other"]
    shape: tuple[int, ...]
    numel: int
    num_zeros: int | None = None
    num_nan: int | None = None
    num_inf: int | None = None
    largest: float | None = None
    smallest: float | None = None
    patterns: tuple[str, ...] = ()
    histogram: Counter[int] = field(default_factory=Counter)

    @property
    def sparsity(self) -> float | None:
        """Fraction of zeros; None if they are not counted or the tensor is empty."""
        return None if self.num_zeros is None or not self.numel else self.num_zeros / self.numel

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as plain data, ready for JSON."""
        numbers = {key: value for key, value in vars(self).items() if key != "histogram"}
        histogram = {"histogram": dict(sorted(self.histogram.items()))} if self.histogram else {}
        lists = {"shape": list(self.shape), "patterns": list(self.patterns)}
        return numbers | lists | {"sparsity": self.sparsity} | histogram


def inspect_checkpoint(
    checkpoint: Path | Checkpoint,
    *,
    only: Sequence[str] | None = None,
    histogram: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[TensorStatistics]:
    """Read every tensor of a safetensors file or folder once; return its statistics, in the order of the checkpoint.

    Parameters
    ----------
    checkpoint : Path or Checkpoint
        A path, or the result of ``open_checkpoint`` for it.
    only : sequence of str, optional
        Names, globs or ``re:`` patterns of tensors or modules. Default: all tensors.
    histogram : bool
        Also count magnitudes by size, which takes longer than everything else.
    progress : callable
        Called with the number of bytes read and their total.

    Raises
    ------
    CheckpointError
        The checkpoint is corrupt or cannot be read.
    TargetError
        An entry of ``only`` matches nothing.

    Notes
    -----
    Memory: a few pieces of 4 MB. Blocks of several rows are looked for if these rows fit into one.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_checkpoint(checkpoint)
    tensors = checkpoint.tensors
    chosen = {tensor.name for tensor in tensors}
    if only is not None:
        index = TensorIndex(tensors)
        chosen = {name for entry in only for name in index.find("filter", entry)}
    total = sum(tensor.nbytes for tensor in tensors if tensor.name in chosen)
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    done, found = 0, []
    with Stream(PIECE_BYTES, NUM_BUFFERS) as stream:
        for shard in checkpoint.shards:
            packed = masks_in(shard.metadata) or {}
            with opened(shard.path) as source:
                for tensor in shard.tensors:
                    if tensor.name in chosen:
                        statistics = _new_statistics(tensor, shapes, packed)
                        _count(statistics, stream, source, tensor, histogram=histogram)
                        found.append(statistics)
                        done += tensor.nbytes
                        progress(done, total)
    return found


def total_of(found: Sequence[TensorStatistics]) -> TensorStatistics:
    """Return the statistics of all weights as if they were one; masks and other tensors are not weights."""
    weights = [t for t in found if t.kind == "weight" and t.num_zeros is not None]
    magnitudes = [m for t in weights for m in (t.smallest, t.largest) if m is not None]
    numel = sum(t.numel for t in weights)
    total = TensorStatistics("total", "", "weight", (numel,), numel)
    total.num_zeros = sum(t.num_zeros or 0 for t in weights)
    total.num_nan = sum(t.num_nan or 0 for t in weights)
    total.num_inf = sum(t.num_inf or 0 for t in weights)
    total.largest, total.smallest = max(magnitudes, default=None), min(magnitudes, default=None)
    for tensor in weights:
        total.histogram.update(tensor.histogram)
    return total


def _new_statistics(
    tensor: TensorInfo, shapes: Mapping[str, Sequence[int]], packed: Mapping[str, tuple[int, ...]]
) -> TensorStatistics:
    name, shape = tensor.name, tensor.shape
    of_weight = packed.get(name)
    if tensor.dtype == "U8" and of_weight is not None and -(-math.prod(of_weight) // 8) == tensor.numel:
        return TensorStatistics(name, "bits", "mask", of_weight, math.prod(of_weight))
    if name.endswith("_mask") and shapes.get(f"{name.removesuffix('mask')}orig") == shape:
        return TensorStatistics(name, tensor.dtype, "mask", shape, tensor.numel)
    return TensorStatistics(name, tensor.dtype, "weight" if tensor.dtype in FLOATS else "other", shape, tensor.numel)


def _count(total: TensorStatistics, stream: Stream, source: FileIO, tensor: TensorInfo, *, histogram: bool) -> None:
    if total.dtype == "bits":
        pieces = stream.pieces(source, tensor.span)
        kept = sum(BitMask.of(piece.data, torch.Size([8 * len(piece.data)])).num_kept for piece in pieces)
        total.num_zeros = max(0, total.numel - kept)
        return
    dtype = FLOATS.get(tensor.dtype) or INTEGERS.get(tensor.dtype)
    if dtype is None:
        return
    recognition = Recognition(tensor.shape, PIECE_BYTES // dtype.itemsize)
    span = tensor.span._replace(unit=recognition.unit * dtype.itemsize)
    total.num_zeros = 0
    if tensor.dtype in FLOATS:
        total.num_nan = total.num_inf = 0
    for piece in stream.pieces(source, span, dtype):
        # Float8 has few operations of its own.
        values = piece.data.float() if tensor.dtype in FLOATS and tensor.dtype not in DTYPES else piece.data
        before = total.num_zeros
        if tensor.dtype in FLOATS:
            _add(total, values, histogram=histogram)
        else:
            total.num_zeros += len(values) - int(values.count_nonzero())
        recognition.add(values, total.num_zeros - before)
    total.patterns = recognition.found()


def _add(total: TensorStatistics, piece: torch.Tensor, *, histogram: bool) -> None:
    assert total.num_zeros is not None and total.num_nan is not None and total.num_inf is not None
    dtype = piece.dtype
    nan = largest_key(dtype)
    keys = keys_of(piece)
    if int(keys.max()) >= nan - 1:
        total.num_nan += int((keys == nan).sum())
        total.num_inf += int((keys == nan - 1).sum())
        keys = keys[keys < nan - 1]
    num_kept = int(keys.count_nonzero())
    total.num_zeros += len(keys) - num_kept
    if not num_kept:
        return
    # A zero is not the smallest magnitude.
    smallest = magnitude_of(int(keys.masked_fill(keys == 0, nan).min()), dtype)
    largest = magnitude_of(int(keys.max()), dtype)
    total.smallest = smallest if total.smallest is None else min(total.smallest, smallest)
    total.largest = largest if total.largest is None else max(total.largest, largest)
    if histogram:
        bits = keys[keys > 0]
        # The exponent and the first bits of the mantissa give four bins per octave; bin 0 begins at 1.
        one, two = key_of(1.0, dtype), key_of(2.0, dtype)
        shift = ((two - one) // BINS_PER_OCTAVE).bit_length() - 1
        counts = torch.bincount(bits >> shift)
        total.histogram.update({int(b) - (one >> shift): int(counts[b]) for b in counts.nonzero()})
