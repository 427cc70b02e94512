"""The exact threshold of tensors that are read from files piece by piece."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Container, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch

from gmp_kernels.backends import choose
from gmp_kernels.backends.types import BracketCounts, Brackets, Layer
from gmp_kernels.checkpoints.files import DTYPES, TensorInfo
from gmp_kernels.checkpoints.stream import Stream, opened, read_into
from gmp_kernels.errors import NonFiniteError
from gmp_kernels.search.communicator import Communicator
from gmp_kernels.search.driver import Search
from gmp_kernels.search.placement import Placement, Region
from gmp_kernels.search.sample import estimate

__all__ = ["Decision", "check_finite", "decide"]

# Sample for a first estimate: so many blocks, evenly spread, each of a few pages.
SAMPLE_BLOCKS = 64
SAMPLE_BLOCK_BYTES = 1 << 14


class Decision(NamedTuple):
    """Cut of one tensor: keys below ``key`` are pruned, and all but the first ``own_ties_kept`` of ``own_ties`` at it.

    The other counts are those of all tensors that were ranked together.
    """

    key: int
    num_below: int
    num_ties: int
    num_ties_kept: int
    own_ties: int
    own_ties_kept: int


def check_finite(name: str, layer: int, begin: int, index: int) -> None:
    """Raise NonFiniteError unless ``index``, of the first NaN or Inf from flat index ``begin`` on, is -1."""
    if index >= 0:
        index += begin
        raise NonFiniteError(
            f"prune: expected finite weights, got NaN or Inf in '{name}' at flat index {index}; no output was written. "
            "Restore the checkpoint, or leave the tensor out with --ignore",
            layer=layer,
            index=index,
        )


def decide(
    group: Mapping[int, TensorInfo],
    stream: Stream,
    num_prune: int,
    mine: Container[Path],
    ranks: Communicator,
) -> dict[int, Decision]:
    """Rank all weights of a group of tensors together and return what is pruned of each.

    Parameters
    ----------
    group : mapping of int to TensorInfo
        {position in the list of all targets: tensor}, of one dtype, in the order of the flat index.
    stream : Stream
        Advances by the bytes read, but not by second reads.
    num_prune : int
    mine : container of Path
        The files that this rank reads; each file is read by one rank.
    ranks : Communicator

    Raises
    ------
    NonFiniteError
        A weight is NaN or Inf.
    """
    dtype = DTYPES[next(iter(group.values())).dtype]
    implementation, candidates = choose(None, stream.room.device), stream.room.view(dtype)
    positions = list(group)

    def read(
        own: Sequence[int], brackets: Brackets, num_bins: int, places: list[torch.Tensor | None] | None
    ) -> BracketCounts:
        used, counted = 0, BracketCounts.nothing(len(own), num_bins)
        for row, piece in enumerate(own):
            i, first = positions[piece], used
            tensor = group[i]
            bracket = Brackets(brackets.lo[row : row + 1], brackets.hi[row : row + 1])
            with opened(tensor.path) as source:
                for begin, weights, _buffer in stream.pieces(source, tensor.span, dtype):
                    place = candidates[used:] if places is not None and used <= len(candidates) else None
                    found = implementation.count([Layer(weights, None)], bracket, num_bins, [place])
                    check_finite(tensor.name, i, begin, int(found.nonfinite[0]))
                    used += int(found.inside[0])
                    for total, part in zip(counted, found._replace(nonfinite=0 * found.nonfinite), strict=True):
                        total[row] += part[0]
                    if places is not None:
                        stream.advance(weights.nbytes)
            # Candidates are kept between rounds, so that files are nearly always read once.
            if places is not None and used <= len(candidates):
                places[row] = candidates[first:used]
        return counted

    here = [i if tensor.path in mine else None for i, tensor in enumerate(group.values())]
    placements = [_placement(tensor.numel, tensor.path in mine) for tensor in group.values()]
    dtypes, sizes = [dtype] * len(group), [len(group)]
    search = Search(ranks, implementation, here, dtypes, placements, sizes, [num_prune], read)
    cutoffs = search.find(ranks.together(lambda: _estimate(list(group.values()), num_prune, dtype)))
    search.share_ties(cutoffs)
    shared = [int(column[0]) for column in cutoffs[:4]]
    ties = zip(search.num_ties.tolist(), search.num_ties_kept.tolist(), strict=True)
    return {i: Decision._make([*shared, *own]) for i, own in zip(group, ties, strict=True)}


def _placement(numel: int, is_mine: bool) -> Placement:
    whole, nothing = Region((numel,), (0,), (numel,)), Region((numel,), (0,), (0,))
    return Placement("tensor", [whole] if is_mine else [nothing, whole], 0)


def _estimate(tensors: Sequence[TensorInfo], num_prune: int, dtype: torch.dtype) -> Brackets:
    """Bracket the threshold by a sample of the whole group, the same on every rank."""
    ends = list(accumulate(tensor.nbytes for tensor in tensors))
    itemsize = dtype.itemsize
    sample = torch.empty(SAMPLE_BLOCKS * SAMPLE_BLOCK_BYTES, dtype=torch.uint8, device="cpu")
    used = 0
    for block in range(SAMPLE_BLOCKS):
        place = ends[-1] * block // SAMPLE_BLOCKS // itemsize * itemsize
        tensor = tensors[i := bisect_right(ends, place)]
        left = ends[i] - place
        nbytes = min(SAMPLE_BLOCK_BYTES, left, -(-ends[-1] // SAMPLE_BLOCKS // itemsize) * itemsize)
        with opened(tensor.path) as source:
            read_into(sample[used : used + nbytes], source, tensor.begin + tensor.nbytes - left)
        used += nbytes
    size = sum(tensor.numel for tensor in tensors)
    return estimate([[Layer(sample[:used].view(dtype), None)]], [num_prune], [0], [size], [1])[0]
