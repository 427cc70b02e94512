"""Writing of a pruned checkpoint: its shards, with targets pruned and all else copied, and the files beside them."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch

from gmp_kernels.backends import choose, dtypes
from gmp_kernels.backends.keys import magnitude_of
from gmp_kernels.backends.types import Brackets, Cutoffs, Selection
from gmp_kernels.checkpoints.bands import Bands, first_nonfinite_of, ranked
from gmp_kernels.checkpoints.blocks import write_whole
from gmp_kernels.checkpoints.counting import Decision, check_finite, decide
from gmp_kernels.checkpoints.files import DTYPES, LENGTH_BYTES, Checkpoint, FileShard, TensorInfo
from gmp_kernels.checkpoints.folders import read_index
from gmp_kernels.checkpoints.masks import MASK_SUFFIX, mask_metadata
from gmp_kernels.checkpoints.outputs import reserve
from gmp_kernels.checkpoints.stream import NOTHING, Piece, Stream, opened
from gmp_kernels.errors import DTypeError
from gmp_kernels.patterns import Pattern
from gmp_kernels.reports import LayerReport
from gmp_kernels.search.communicator import Communicator
from gmp_kernels.search.driver import select_with

__all__ = ["copy_others", "write_shard"]

ALONE = Communicator(None)


def write_shard(
    shard: FileShard,
    targets: Mapping[str, int | Decision],
    pattern: Pattern | None,
    stream: Stream,
    path: Path,
    masks: Path | None,
    dtype: torch.dtype | None,
) -> list[LayerReport]:
    """Write a shard to ``path`` and its packed masks to ``masks``, through to the disk; report on its targets.

    Floating-point tensors get ``dtype``, or keep their own if it is None. ``targets`` says, by name and in order, what
    to prune of each target of the checkpoint: how many of its weights or blocks, those counted that ``pattern``
    protects, or which.

    Raises
    ------
    CheckpointError, NonFiniteError, DTypeError, OSError
    """
    reports: list[LayerReport] = []
    implementation = choose(None, torch.device("cpu"))
    positions = {name: i for i, name in enumerate(targets)}
    masked = [tensor for tensor in shard.tensors if tensor.name in targets]
    bands = {tensor.name: Bands.of(tensor, pattern) for tensor in masked}
    # The next target is read ahead, unless it has to be counted first.
    spans = {name: own.span for name, own in bands.items() if stream.holds(own.span)}
    following = {name: spans[after] for name, after in pairwise(bands) if after in spans}
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(opened(shard.path))
        output = stack.enter_context(stream.created(path, source))
        if dtype is None:
            reserve(output, shard.num_bytes)
            stream.copy(source, 0, shard.data_begin, output, 0)
            begins = {tensor.name: tensor.begin for tensor in shard.tensors}
        else:
            begins = _write_header(output, [_converted(tensor, dtype) for tensor in shard.tensors], shard.metadata)
        if masks is not None:
            bits = stack.enter_context(stream.created(masks, source))
            metadata = mask_metadata({tensor.name: tensor.shape for tensor in masked})
            bit_begins = _write_header(bits, [_bits_of(tensor) for tensor in masked], metadata)
        for tensor in shard.tensors:
            name, begin = tensor.name, begins[tensor.name]
            if name in targets:
                own = bands[name]
                pieces = stream.pieces(source, own.span, own.dtype, following.get(name, NOTHING))
                num_pruned = 0
                for piece, cutoffs in _cut(pieces, own, positions[name], targets[name], stream):
                    packed = torch.empty(-(-len(piece.data) // 8), dtype=torch.uint8, device="cpu")
                    counts = implementation.prune([own.layer(piece.data)], Selection(cutoffs), [packed])
                    assert counts is not None
                    num_pruned += counts.num_pruned[0]
                    key, num_ties = cutoffs.keys[0], cutoffs.num_ties[0]
                    _write(stream, tensor, piece, output, begin, dtype)
                    if masks is not None:
                        place = bit_begins[name + MASK_SUFFIX] + piece.begin // 8
                        stream.write(bits, packed, place, piece.buffer)
                # Where the pattern alone decides, nothing is compared.
                threshold = math.inf if key == own.largest_key else magnitude_of(key, own.ranked_dtype)
                reports.append(LayerReport(name, threshold, tensor.numel, num_pruned, num_pruned, num_ties))
            elif _converted(tensor, dtype).dtype != tensor.dtype:
                for piece in stream.pieces(source, tensor.span, DTYPES[tensor.dtype]):
                    _write(stream, tensor, piece, output, begin, dtype)
            else:
                stream.copy(source, tensor.begin, tensor.nbytes, output, begin)
            stream.advance(tensor.nbytes)
    return reports


def copy_others(
    checkpoint: Checkpoint, stream: Stream, folder: Path, dtype: torch.dtype | None, *, apart_from: Container[str]
) -> None:
    """Copy to ``folder`` all that belongs to a checkpoint, except its shards and the files in ``apart_from``.

    If ``dtype`` changes the sizes of the tensors, the index is adapted.

    Raises
    ------
    CheckpointError, OSError
    """
    for name, path in checkpoint.others.items():
        if name in apart_from:
            continue
        with opened(path) as source, stream.created(folder / name, source) as output:
            if name == checkpoint.index and dtype is not None:
                document = read_index(path)
                metadata = document.get("metadata")
                if isinstance(metadata, dict) and "total_size" in metadata:
                    metadata["total_size"] = sum(_converted(tensor, dtype).nbytes for tensor in checkpoint.tensors)
                write_whole(output, json.dumps(document, indent=2).encode(), 0)
            else:
                stream.copy(source, 0, os.fstat(source.fileno()).st_size, output, 0)


def _cut(
    pieces: Iterable[Piece], bands: Bands, position: int, pruned: int | Decision, stream: Stream
) -> Iterator[tuple[Piece, Cutoffs]]:
    """Yield the pieces of a target, in order, each with its cutoffs."""
    implementation, name = choose(None, stream.room.device), bands.tensor.name
    if isinstance(pruned, int) and stream.holds(bands.span):
        held = list(pieces)
        layers = [bands.layer(piece.data) for piece in held]
        found = select_with(implementation)(layers, [pruned], [len(layers)]).cutoffs
        for piece, index in zip(held, found.nonfinite, strict=True):
            check_finite(name, position, piece.begin, index)
        for i, piece in enumerate(held):
            yield piece, Cutoffs.of([tuple(column[i] for column in found)])
        return
    if isinstance(pruned, int):
        pruned = decide({position: bands}, stream, pruned, {bands.tensor.path}, ALONE)[position]
    key, below, ties, kept, ties_left, kept_left = pruned
    unit = 1 if bands.pattern is None else bands.pattern.unit
    for piece in pieces:
        layer = bands.layer(piece.data)
        if key == bands.largest_key:
            # Without a count, nothing has looked for them yet.
            check_finite(name, position, piece.begin, first_nonfinite_of(implementation, layer))
        tie_index = 0 if ties_left and not kept_left else len(piece.data) // unit
        if 0 < kept_left < ties_left:
            at_key, plain = Brackets.of([key], [key]), [ranked(implementation, layer)]
            below_here, ties_here, protected = (int(column[0]) for column in implementation.count(plain, at_key, 1)[:3])
            if kept_left < ties_here:
                # Within the piece, pruning this many weights has the same key as its threshold.
                own = select_with(implementation)(plain, [protected + below_here + ties_here - kept_left], [1], at_key)
                tie_index = own.cutoffs.tie_indices[0]
            ties_left, kept_left = ties_left - ties_here, kept_left - min(ties_here, kept_left)
        yield piece, Cutoffs.of([(key, below, ties, kept, tie_index, -1)])


def _write(
    stream: Stream, tensor: TensorInfo, piece: Piece, output: int, begin: int, dtype: torch.dtype | None
) -> None:
    """Write a piece of a tensor that begins at ``begin``, converted if need be."""
    weights = piece.data
    if dtype is not None:
        weights = weights.to(dtype)
        if torch.isinf(weights).sum() > torch.isinf(piece.data).sum():
            raise DTypeError(
                f"prune: expected values in the range of {dtype} in '{tensor.name}', got one beyond it near flat index "
                f"{piece.begin}; choose another --dtype"
            )
    stream.write(output, weights, begin + piece.begin * weights.itemsize, piece.buffer)


def _converted(tensor: TensorInfo, dtype: torch.dtype | None) -> TensorInfo:
    """Return a tensor as it is in an output of this dtype, except for its place there."""
    if dtype is None or tensor.dtype not in DTYPES:
        return tensor
    return tensor._replace(dtype=dtypes.DTYPES[dtype], nbytes=tensor.numel * dtype.itemsize)


def _bits_of(tensor: TensorInfo) -> TensorInfo:
    """Return the packed mask of a tensor, except for its place."""
    num_bytes = -(-tensor.numel // 8)
    return tensor._replace(name=tensor.name + MASK_SUFFIX, dtype="U8", shape=(num_bytes,), nbytes=num_bytes)


def _write_header(output: int, tensors: Sequence[TensorInfo], metadata: Mapping[str, str] | None) -> dict[str, int]:
    """Write a header for tensors in the order of their bytes, and make room for them; return where each begins."""
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    ends = [0, *accumulate(tensor.nbytes for tensor in tensors)]
    for tensor, offsets in zip(tensors, pairwise(ends), strict=True):
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    # Padded with spaces, so that the data begins at a multiple of 8, as the format wants it.
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(LENGTH_BYTES, "little") + text
    reserve(output, len(header) + ends[-1])
    write_whole(output, header, 0)
    return {tensor.name: len(header) + begin for tensor, begin in zip(tensors, ends, strict=False)}
