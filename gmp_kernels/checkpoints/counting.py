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
from gmp_kernels.checkpoints.bands import Bands, first_nonfinite_of, ranked
from gmp_kernels.checkpoints.stream import Stream, opened, read_into
from gmp_kernels.errors import NonFiniteError
from gmp_kernels.masks import BitMask
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
    group: Mapping[int, Bands],
    stream: Stream,
    num_prune: int,
    mine: Container[Path],
    ranks: Communicator,
) -> dict[int, Decision]:
    """Rank all weights of a group of tensors together and return what is pruned of each.

    Parameters
    ----------
    group : mapping of int to Bands
        {position in the list of all targets: bands of the tensor}, of one dtype, in the order of the flat index.
    stream : Stream
        Advances by the bytes read, but not by second reads.
    num_prune : int
        Of what is ranked, those counted that are protected.
    mine : container of Path
        The files that this rank reads; each file is read by one rank.
    ranks : Communicator

    Raises
    ------
    NonFiniteError
        A weight is NaN or Inf.
    """
    dtype = next(iter(group.values())).ranked_dtype
    implementation, candidates = choose(None, stream.room.device), stream.room.view(dtype)
    positions = list(group)

    def read(
        own: Sequence[int], brackets: Brackets, num_bins: int, places: list[torch.Tensor | None] | None
    ) -> BracketCounts:
        used, counted = 0, BracketCounts.nothing(len(own), num_bins)
        for row, piece in enumerate(own):
            i, first = positions[piece], used
            bands = group[i]
            tensor = bands.tensor
            bracket = Brackets(brackets.lo[row : row + 1], brackets.hi[row : row + 1])
            with opened(tensor.path) as source:
                for begin, weights, _buffer in stream.pieces(source, bands.span, bands.dtype):
                    layer = bands.layer(weights)
                    if bands.pattern is not None and places is not None:
                        check_finite(tensor.name, i, begin, first_nonfinite_of(implementation, layer))
                    place = candidates[used:] if places is not None and used <= len(candidates) else None
                    found = implementation.count([ranked(implementation, layer)], bracket, num_bins, [place])
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

    are_mine = [bands.tensor.path in mine for bands in group.values()]
    here = [i if is_mine else None for i, is_mine in enumerate(are_mine)]
    placements = [
        _placement(bands.num_ranked, is_mine) for bands, is_mine in zip(group.values(), are_mine, strict=True)
    ]
    dtypes, sizes = [dtype] * len(group), [len(group)]
    search = Search(ranks, implementation, here, dtypes, placements, sizes, [num_prune], read)
    cutoffs = search.find(ranks.together(lambda: _estimate(list(group.values()), num_prune)))
    search.share_ties(cutoffs)
    shared = [int(column[0]) for column in cutoffs[:4]]
    ties = zip(search.num_ties.tolist(), search.num_ties_kept.tolist(), strict=True)
    return {i: Decision._make([*shared, *own]) for i, own in zip(group, ties, strict=True)}


def _placement(numel: int, is_mine: bool) -> Placement:
    whole, nothing = Region((numel,), (0,), (numel,)), Region((numel,), (0,), (0,))
    return Placement("tensor", [whole] if is_mine else [nothing, whole], 0)


def _estimate(group: Sequence[Bands], num_prune: int) -> Brackets:
    """Bracket the threshold by a sample of the whole group, the same on every rank."""
    ends = list(accumulate(bands.tensor.nbytes for bands in group))
    implementation = choose(None, torch.device("cpu"))
    most = min(SAMPLE_BLOCK_BYTES, -(-ends[-1] // SAMPLE_BLOCKS))
    weights, kept = [], []
    for block in range(SAMPLE_BLOCKS):
        place = ends[-1] * block // SAMPLE_BLOCKS
        bands = group[i := bisect_right(ends, place)]
        spans, shape = bands.sample(place - ends[i] + bands.tensor.nbytes, most)
        buffer, used = torch.empty(sum(map(len, spans)), dtype=torch.uint8, device="cpu"), 0
        with opened(bands.tensor.path) as source:
            for span in spans:
                read_into(buffer[used : used + len(span)], source, bands.tensor.begin + span.start)
                used += len(span)
        layer = ranked(implementation, Layer(buffer.view(bands.dtype).view(shape), None, pattern=bands.pattern))
        weights.append(layer.weight.flatten())
        if layer.mask is not None:
            kept.append(BitMask.of(layer.mask, weights[-1].shape).to_bool())
            # Samples take weights that are not kept to be zero.
            weights[-1] = weights[-1].masked_fill(~kept[-1], 0.0)
    size, protected = (sum(column) for column in zip(*((b.num_ranked, b.num_protected) for b in group), strict=True))
    mask = BitMask.from_bool(torch.cat(kept)).packed if kept else None
    return estimate([[Layer(torch.cat(weights), mask)]], [num_prune], [protected], [size], [1])[0]
