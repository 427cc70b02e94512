"""Write one shard of a pruned checkpoint: its targets pruned, all else copied."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import torch

from gmp_kernels.backends import Bracket, Cutoffs, Implementation, Layer, Selection, dtypes
from gmp_kernels.backends.keys import magnitude_of
from gmp_kernels.checkpoints.counting import Decision, Located, Workspace, check_finite, decide
from gmp_kernels.checkpoints.files import DTYPES, Shard, TensorInfo, header_of
from gmp_kernels.checkpoints.masks import MASK_SUFFIX, mask_metadata
from gmp_kernels.checkpoints.stream import Piece, Source, write_whole
from gmp_kernels.errors import DTypeError
from gmp_kernels.reports import LayerReport
from gmp_kernels.search.communicator import Communicator
from gmp_kernels.search.driver import select
from gmp_kernels.search.ties import tie_indices

__all__ = ["ShardWriter", "Target", "size_of"]

ALONE = Communicator(None)
NOTHING = Cutoffs([0], [0], [0], [0], [0], [-1])  # of a tensor without weights


class Target(NamedTuple):
    """Request for one tensor: its position among all targets, how many weights go, and if known already, which."""

    position: int
    num_prune: int
    decision: Decision | None


class _Output(NamedTuple):
    """Destination of the bytes of a tensor."""

    descriptor: int
    begin: int


class ShardWriter:
    """Writes shards.

    Parameters
    ----------
    workspace : Workspace
    dtype : torch.dtype or None
        Of floating-point tensors in the output; None: each keeps its own.
    """

    def __init__(self, workspace: Workspace, dtype: torch.dtype | None) -> None:
        self._workspace = workspace
        self._stream, self._implementation, _, self._progress = workspace
        self._dtype = dtype

    def write(self, shard: Shard, targets: Mapping[str, Target], path: Path, masks: Path | None) -> list[LayerReport]:
        """Write a shard to ``path`` and its packed masks to ``masks``, through to the disk; report on its targets.

        Raises
        ------
        CheckpointError, NonFiniteError, DTypeError, OSError
        """
        reports = []
        with contextlib.ExitStack() as stack:
            source = stack.enter_context(Source(shard.path))
            output = stack.enter_context(self._stream.created(path, source.stat))
            begins = self._begin(shard, source, output)
            bits = stack.enter_context(self._stream.created(masks, source.stat)) if masks is not None else None
            bit_begins = self._begin_masks(shard, targets, bits) if bits is not None else {}
            masked = [tensor for tensor in shard.tensors if tensor.name in targets]
            # Read ahead, unless it is going to be counted first.
            following = {t.name: after for t, after in pairwise(masked) if after.nbytes <= self._stream.num_bytes}
            for tensor in shard.tensors:
                place = _Output(output, begins[tensor.name])
                if tensor.name in targets:
                    bits_place = _Output(bits, bit_begins[tensor.name]) if bits is not None else None
                    selected = self._selected(source, shard, tensor, targets[tensor.name], following.get(tensor.name))
                    reports.append(self._prune(tensor, selected, place, bits_place))
                elif dtype_of(tensor, self._dtype) != tensor.dtype:
                    for piece in self._stream.weights(source, tensor, DTYPES[tensor.dtype]):
                        self._store(tensor, piece, place)
                else:
                    self._stream.copy(source, tensor.begin, tensor.nbytes, *place)
                self._progress(tensor.nbytes)
        return reports

    def _begin(self, shard: Shard, source: Source, output: int) -> dict[str, int]:
        """Write the header; return where each tensor begins."""
        if self._dtype is None:
            self._stream.copy(source, 0, shard.data_begin, output, 0)
            return {tensor.name: tensor.begin for tensor in shard.tensors}
        rows = [(t.name, dtype_of(t, self._dtype), t.shape, size_of(t, self._dtype)) for t in shard.tensors]
        return _write_header(output, rows, shard.metadata)

    def _begin_masks(self, shard: Shard, targets: Mapping[str, Target], output: int) -> dict[str, int]:
        masked = [tensor for tensor in shard.tensors if tensor.name in targets]
        rows = [(t.name + MASK_SUFFIX, "U8", (-(-t.numel // 8),), -(-t.numel // 8)) for t in masked]
        begins = _write_header(output, rows, mask_metadata({t.name: t.shape for t in masked}))
        return {name.removesuffix(MASK_SUFFIX): begin for name, begin in begins.items()}

    def _prune(
        self, tensor: TensorInfo, selected: Iterable[tuple[Piece, Cutoffs]], place: _Output, bits: _Output | None
    ) -> LayerReport:
        num_pruned, cutoffs = 0, NOTHING
        for piece, cutoffs in selected:
            weights = piece.data
            packed = torch.empty(-(-len(weights) // 8), dtype=torch.uint8, device="cpu")
            counts = self._implementation.prune([Layer(weights, None)], Selection(cutoffs), [packed])
            assert counts is not None
            num_pruned += counts.num_pruned[0]
            self._store(tensor, piece, place)
            if bits is not None:
                self._stream.write(bits.descriptor, packed, bits.begin + piece.begin // 8, piece.buffer)
        threshold = magnitude_of(cutoffs.keys[0], DTYPES[tensor.dtype])
        return LayerReport(tensor.name, threshold, tensor.numel, num_pruned, num_pruned, cutoffs.num_ties[0])

    def _selected(
        self, source: Source, shard: Shard, tensor: TensorInfo, target: Target, following: TensorInfo | None
    ) -> Iterator[tuple[Piece, Cutoffs]]:
        """Yield the pieces of a target, in order, each with what to prune of it."""
        pieces = self._stream.weights(source, tensor, DTYPES[tensor.dtype], following)
        decision = target.decision
        if decision is None and tensor.nbytes <= self._stream.num_bytes:
            held = list(pieces)
            layers = [Layer(piece.data, None) for piece in held]
            found = select(self._implementation, layers, [target.num_prune], [len(layers)]).cutoffs
            for piece, index in zip(held, found.nonfinite, strict=True):
                check_finite(tensor.name, target.position, piece.begin, index)
            for i, piece in enumerate(held):
                yield piece, Cutoffs.of([tuple(column[i] for column in found)])
            return
        if decision is None:
            group = {target.position: Located(shard, tensor)}
            decision = decide(group, self._workspace, target.num_prune, lambda _: True, ALONE)[target.position]
        for piece, tie_index in _tie_indices(self._implementation, decision, pieces):
            _, below, ties, kept = decision.threshold
            yield piece, Cutoffs.of([(decision.key, below, ties, kept, tie_index, -1)])

    def _store(self, tensor: TensorInfo, piece: Piece, place: _Output) -> None:
        """Write a piece, converted if need be."""
        begin, weights, buffer = piece
        if self._dtype is not None:
            converted = weights.to(self._dtype)
            if torch.isinf(converted).sum() > torch.isinf(weights).sum():
                raise DTypeError(
                    f"prune: expected values in the range of {self._dtype} in '{tensor.name}', got one beyond it near "
                    f"flat index {begin}; choose another --dtype"
                )
            weights = converted
        self._stream.write(place.descriptor, weights, place.begin + begin * weights.itemsize, buffer)


def _tie_indices(
    implementation: Implementation, decision: Decision, pieces: Iterable[Piece]
) -> Iterator[tuple[Piece, int]]:
    """Yield the pieces of a tensor, in order, each with the flat index in it from which on ties are pruned."""
    key, threshold, ties_left, kept_left = decision
    for piece in pieces:
        layer, n = Layer(piece.data, None), len(piece.data)
        if not threshold.num_ties or kept_left == ties_left:
            yield piece, n
            continue
        if not kept_left:
            yield piece, 0
            continue
        ties = implementation.count([layer], [Bracket(key, key)], 1)[0].inside
        tie_index = n if ties <= kept_left else tie_indices(implementation, [layer], [key], [ties], [kept_left])[0]
        ties_left, kept_left = ties_left - ties, kept_left - min(ties, kept_left)
        yield piece, tie_index


def dtype_of(tensor: TensorInfo, dtype: torch.dtype | None) -> str:
    """Return the name of the dtype that a tensor has in the output."""
    return tensor.dtype if dtype is None or tensor.dtype not in DTYPES else dtypes.DTYPES[dtype].stored


def size_of(tensor: TensorInfo, dtype: torch.dtype | None) -> int:
    """Return how many bytes a tensor takes in the output."""
    return tensor.nbytes if dtype is None or tensor.dtype not in DTYPES else tensor.numel * dtype.itemsize


def _write_header(
    descriptor: int, rows: Sequence[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str] | None
) -> dict[str, int]:
    header = header_of(rows, metadata)
    write_whole(descriptor, header, 0)
    ends = accumulate((nbytes for *_, nbytes in rows), initial=len(header))
    return {name: begin for (name, *_), begin in zip(rows, ends, strict=False)}
