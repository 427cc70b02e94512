"""The exact threshold of tensors that are read from files piece by piece."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate
from typing import NamedTuple

import torch

from gmp_kernels.backends import Bracket, Census, Implementation, Layer, Threshold
from gmp_kernels.checkpoints.files import DTYPES, Shard, TensorInfo
from gmp_kernels.checkpoints.stream import Source, Stream
from gmp_kernels.distributed.communicator import Communicator
from gmp_kernels.errors import NonFiniteError
from gmp_kernels.search.cutoffs import Counted, divide_ties, find_cuts

__all__ = ["Counter", "Decision", "Located", "Workspace", "check_finite"]

NUM_BINS = 2048
# What is read for a first guess: so many blocks, evenly spread, each of a few pages.
SAMPLE_BLOCKS = 64
SAMPLE_BLOCK_BYTES = 1 << 14


class Workspace(NamedTuple):
    """Stream, backend and memory of a run.

    Attributes
    ----------
    stream : Stream
    implementation : Implementation
    room : torch.Tensor
        uint8, aligned: holds candidates between the rounds of counting, so that nearly always files are read once.
    progress : callable
        Told the bytes done.
    """

    stream: Stream
    implementation: Implementation
    room: torch.Tensor
    progress: Callable[[int], None]


class Located(NamedTuple):
    """A tensor and the file it lies in."""

    shard: Shard
    tensor: TensorInfo


class Decision(NamedTuple):
    """Cut of one tensor: pruned are keys below ``key``, and of the ``num_ties`` equal to it all but the first few.

    ``threshold`` is that of all tensors that were ranked together.
    """

    key: int
    threshold: Threshold
    num_ties: int
    num_ties_kept: int


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


class Counter:
    """Counts a group of tensors of one dtype, in the order of the flat index, until it knows what to prune of each.

    Parameters
    ----------
    group : mapping of int to Located
        {position in the list of all targets: tensor}.
    workspace : Workspace
        Its progress is told the bytes read, the first time they are.
    """

    def __init__(self, group: Mapping[int, Located], workspace: Workspace) -> None:
        self._group = group
        self._stream, self._implementation, room, self._progress = workspace
        self._dtype = DTYPES[next(iter(group.values())).tensor.dtype]
        self._room = room.view(self._dtype)
        self._bracket = Bracket(0, -1)
        self._counted: dict[int, Census] = {}
        # The bracket whose keys the room holds, and where in it those of each tensor lie.
        self._held = Bracket(0, -1)
        self._places: dict[int, slice] = {}

    def decide(self, num_prune: int, mine: Callable[[Shard], bool], ranks: Communicator) -> dict[int, Decision]:
        """Rank all weights of the group together and return what is pruned of each tensor.

        ``mine`` tells which files this rank reads; each file is one rank's.

        Raises
        ------
        NonFiniteError
            A weight is NaN or Inf.
        """
        own = {i: located for i, located in self._group.items() if mine(located.shard)}

        def count(brackets: Mapping[int, Bracket]) -> dict[int, Counted]:
            ranks.together(lambda: self._count(own, brackets[0]))
            whole = _sum(ranks.gather(_sum(self._counted.values())))
            return {0: Counted(whole.below, whole.pruned, whole.nonfinite, whole.bins.numpy().cumsum())}

        bracket = ranks.together(lambda: self._guess(num_prune))
        (cut,) = find_cuts([num_prune], [self._dtype], [bracket], count)
        ties = dict.fromkeys(self._group, 0)
        if cut.threshold.num_ties:
            # The last round had a bin for each key.
            found = {i: int(census.bins[cut.key - self._bracket.lo]) for i, census in self._counted.items()}
            for counted in ranks.gather(found):
                ties |= counted
        kept = divide_ties(list(ties.values()), cut.threshold.num_ties_kept)
        numbers = zip(ties.items(), kept, strict=True)
        return {i: Decision(cut.key, cut.threshold, num_ties, num_kept) for (i, num_ties), num_kept in numbers}

    def _guess(self, num_prune: int) -> Bracket:
        """Sample the whole group, on every rank the same."""
        tensors = list(self._group.values())
        ends = list(accumulate(located.tensor.nbytes for located in tensors))
        itemsize = self._dtype.itemsize
        sample = torch.empty(SAMPLE_BLOCKS * SAMPLE_BLOCK_BYTES, dtype=torch.uint8, device="cpu")
        used = 0
        for block in range(SAMPLE_BLOCKS):
            place = ends[-1] * block // SAMPLE_BLOCKS // itemsize * itemsize
            shard, tensor = tensors[i := bisect_right(ends, place)]
            left = ends[i] - place
            nbytes = min(SAMPLE_BLOCK_BYTES, left, -(-ends[-1] // SAMPLE_BLOCKS // itemsize) * itemsize)
            with Source(shard.path) as source:
                source.read(sample[used : used + nbytes], tensor.begin + tensor.nbytes - left)
            used += nbytes
        share = num_prune / sum(located.tensor.numel for located in tensors)
        return self._implementation.sample([Layer(sample[:used].view(self._dtype), None)], [share])[0]

    def _count(self, own: Mapping[int, Located], bracket: Bracket) -> None:
        """Count this rank's tensors against the bracket, from the candidates if they suffice."""
        first_round = not self._counted
        self._bracket = bracket
        if self._held.lo <= bracket.lo and bracket.hi <= self._held.hi:
            for i, place in self._places.items():
                self._counted[i] = self._census(self._room[place], None)
            return
        self._places, used, fits = {}, 0, True
        for i, (shard, tensor) in own.items():
            censuses, first = [], used
            with Source(shard.path) as source:
                for begin, weights, _ in self._stream.weights(source, tensor, self._dtype):
                    census = self._census(weights, self._room[used:] if fits else None)
                    check_finite(tensor.name, i, begin, census.nonfinite)
                    fits = fits and census.inside <= len(self._room) - used
                    used += census.inside if fits else 0
                    censuses.append(census)
                    if first_round:
                        self._progress(weights.nbytes)
            self._counted[i] = _sum(censuses)
            self._places[i] = slice(first, used)
        self._held = bracket if fits else Bracket(0, -1)

    def _census(self, weights: torch.Tensor, room: torch.Tensor | None) -> Census:
        if not len(weights):
            return _sum([])
        return self._implementation.count([Layer(weights, None)], [self._bracket], NUM_BINS, [room])[0]


def _sum(censuses: Iterable[Census]) -> Census:
    below, inside, pruned, bins = 0, 0, 0, torch.zeros(NUM_BINS, dtype=torch.int64, device="cpu")
    for census in censuses:
        below, inside, pruned = below + census.below, inside + census.inside, pruned + census.pruned
        bins += census.bins
    return Census(below, inside, pruned, -1, bins)
