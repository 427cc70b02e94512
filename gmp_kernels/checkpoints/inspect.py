"""Statistics of a checkpoint: sparsity, ranges, and values that are none, tensor by tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gmp_kernels.checkpoints.files import DTYPES, TensorInfo, open_checkpoint
from gmp_kernels.checkpoints.stream import Source, Stream
from gmp_kernels.checkpoints.targets import find_tensors
from gmp_kernels.keys import keys_of, largest_key, magnitude_of

__all__ = ["BINS_PER_OCTAVE", "TensorStatistics", "inspect_checkpoint"]

PIECE_BYTES = 1 << 22  # what is computed from one piece stays in the caches
NUM_BUFFERS = 2  # one that is looked at, one that is read into
BINS_PER_OCTAVE = 4

# Float8 is looked at in float32, which holds all its values.
FLOATS = DTYPES | {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
MANTISSA_BITS = {torch.float64: 52, torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}
# Of these only zeros are counted, for which the sign does not matter.
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
    shape : tuple of int
    numel : int
    num_zeros : int or None
        -0 included; None for a dtype whose values are not looked at (complex, below 8 bits).
    num_nan, num_inf : int or None
        None unless the dtype is a floating-point one.
    largest, smallest : float or None
        Largest finite magnitude, and smallest that is not zero; None if there is none.
    histogram : dict of int to int
        If asked for: {b: how many magnitudes lie in [2^(b/4), 2^((b+1)/4))}, finite ones that are not zero, the bounds
        within an octave being those of the first two bits of the mantissa.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    numel: int
    num_zeros: int | None = None
    num_nan: int | None = None
    num_inf: int | None = None
    largest: float | None = None
    smallest: float | None = None
    histogram: Counter[int] = field(default_factory=Counter)

    @property
    def sparsity(self) -> float | None:
        """Fraction of zeros; None where they are not counted, or where there is nothing."""
        return None if self.num_zeros is None or not self.numel else self.num_zeros / self.numel

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as plain data, ready for JSON."""
        numbers = {key: value for key, value in vars(self).items() if key != "histogram"}
        histogram = {"histogram": dict(sorted(self.histogram.items()))} if self.histogram else {}
        return numbers | {"shape": list(self.shape), "sparsity": self.sparsity} | histogram


def inspect_checkpoint(
    path: Path,
    *,
    only: Sequence[str] | None = None,
    histogram: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[TensorStatistics]:
    """Read every tensor of a safetensors file or folder once; return its statistics, in the order of the checkpoint.

    Parameters
    ----------
    path : Path
    only : sequence of str, optional
        Names, globs or ``re:`` patterns of tensors or modules. Default: all tensors.
    histogram : bool
        Also count magnitudes by size, which takes longer than all else.
    progress : callable
        Called with the bytes read, and all there are.

    Raises
    ------
    CheckpointError
        The checkpoint is corrupt or cannot be read.
    TargetError
        An entry of ``only`` matches nothing.

    Notes
    -----
    Memory: a few pieces of 4 MB.
    """
    checkpoint = open_checkpoint(path)
    chosen = {tensor.name for tensor in checkpoint.tensors}
    if only is not None:
        chosen = {name for entry in only for name in find_tensors("filter", entry, checkpoint.tensors)}
    total = sum(tensor.nbytes for tensor in checkpoint.tensors if tensor.name in chosen)
    done, found = 0, []
    with Stream(PIECE_BYTES, NUM_BUFFERS) as stream:
        for shard in checkpoint.shards:
            with Source(shard.path) as source:
                for tensor in shard.tensors:
                    if tensor.name in chosen:
                        found.append(_statistics(stream, source, tensor, histogram=histogram))
                        done += tensor.nbytes
                        progress(done, total)
    return found


def _statistics(stream: Stream, source: Source, tensor: TensorInfo, *, histogram: bool) -> TensorStatistics:
    total = TensorStatistics(tensor.name, tensor.dtype, tensor.shape, tensor.numel)
    if tensor.dtype in FLOATS:
        total.num_zeros = total.num_nan = total.num_inf = 0
        for piece in stream.weights(source, tensor, FLOATS[tensor.dtype]):
            _add(total, piece.data if tensor.dtype in DTYPES else piece.data.float(), histogram=histogram)
    elif tensor.dtype in INTEGERS:
        pieces = stream.weights(source, tensor, INTEGERS[tensor.dtype])
        total.num_zeros = tensor.numel - sum(int(piece.data.count_nonzero()) for piece in pieces)
    return total


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
    # Zeros out of the way of the smallest.
    smallest = magnitude_of(int(keys.masked_fill(keys == 0, nan).min()), dtype)
    largest = magnitude_of(int(keys.max()), dtype)
    total.smallest = smallest if total.smallest is None else min(total.smallest, smallest)
    total.largest = largest if total.largest is None else max(total.largest, largest)
    if histogram:
        bits = keys[keys > 0]
        # The exponent and the first bits of the mantissa: four bins an octave, from that of 1 on.
        shift = MANTISSA_BITS[dtype] - (BINS_PER_OCTAVE.bit_length() - 1)
        one = int(keys_of(torch.ones(1, dtype=dtype, device="cpu"))) >> shift
        counts = torch.bincount(bits >> shift)
        total.histogram.update({int(b) - one: int(counts[b]) for b in counts.nonzero()})
