"""Pruning of a checkpoint from disk to disk, in memory that does not depend on its size."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gmp_kernels.checkpoints.bands import Bands
from gmp_kernels.checkpoints.counting import Decision, decide
from gmp_kernels.checkpoints.files import FileShard, open_checkpoint
from gmp_kernels.checkpoints.masks import is_file_of_masks
from gmp_kernels.checkpoints.outputs import check_named, check_target, keep_folder_permissions
from gmp_kernels.checkpoints.staging import PLACED, Staging, output_errors
from gmp_kernels.checkpoints.stream import PIECE_UNIT, Stream, num_pieces
from gmp_kernels.checkpoints.targets import TensorIndex
from gmp_kernels.checkpoints.writing import copy_others, write_shard
from gmp_kernels.checks import check_fit
from gmp_kernels.counts import Ranking, counts_to_prune, patterns_of
from gmp_kernels.errors import DeviceError, DTypeError, OutputError
from gmp_kernels.ops import Scope
from gmp_kernels.patterns import Pattern
from gmp_kernels.reports import LayerReport
from gmp_kernels.schedules import check_sparsity
from gmp_kernels.search.communicator import Communicator, of_torchrun

__all__ = ["DEFAULT_MEMORY", "PruneJob", "PruneReport"]

DEFAULT_MEMORY = 256 << 20
LEAST_MEMORY = 64 << 20
LARGEST_PIECE = 1 << 22
STREAM_BUFFERS = 8
MASKS = "masks"


@dataclass(frozen=True)
class PruneReport:
    """Results of a run.

    Attributes
    ----------
    layers : tuple of LayerReport
        One per pruned tensor, in the order of the checkpoint.
    num_bytes : int
        Size of the input's shards.
    seconds : float
        Wall time of this run.
    """

    layers: tuple[LayerReport, ...]
    num_bytes: int
    seconds: float

    @property
    def sparsity(self) -> float:
        """Fraction of pruned weights over all ``layers``."""
        return sum(layer.num_pruned for layer in self.layers) / sum(layer.num_weights for layer in self.layers)


class PruneJob:
    """One run, checked in full before anything is written.

    Parameters
    ----------
    source : Path
        A safetensors file, or a folder of them, with or without an index.
    target : Path
        The output: a file or folder like ``source``, apart from it.
    sparsity : float
        Fraction of each target (scope "layer") or of all of them together ("global") to prune, in [0, 1].
    scope : {"layer", "global"}
        In global scope all targets must have one dtype. Ties keep the lowest flat index, which runs through the shards
        in the order of their names, and through each shard in the order of its bytes.
    pattern : Pattern, optional
        ``NM`` or ``Block``, of all targets. With blocks the sparsity is counted in them.
    targets, ignore : sequence of str, optional
        See ``TensorIndex``. Default: ``DEFAULT_RULE``.
    dtype : torch.dtype, optional
        Floating-point tensors of the output get this dtype, after pruning. Default: every tensor keeps its own, and
        the header is copied as it is.
    masks : bool
        Also write the packed masks: ``<target>.masks.safetensors`` beside a file (without the file's own suffix),
        ``masks/<shard>`` in a folder.
    force : bool
        Replace an existing output, once the new one is complete. Masks beside a replaced file are removed with it.
    copy_others : bool
        Also copy files in the folder that do not belong to the model, unchanged: weights in other formats, adapters,
        states of optimizers. Default: they are left out.

    Attributes
    ----------
    checkpoint : Checkpoint
        Its ``left_out`` lists the files that are not copied, and why.
    tensors : list of TensorInfo
        The targets.
    coverage : Coverage
        Coverage of the checkpoint by its targets.

    Raises
    ------
    CheckpointError
        The input is corrupt or contradicts itself.
    OutputError
        The output exists already or lies where it must not, or the folder beside it, where it would grow, is not ours.
    SparsityError, TargetError, DTypeError, ShapeError
        Among them more than the pattern allows, and targets that do not fit it, all of them named.
    """

    def __init__(
        self,
        source: Path,
        target: Path,
        *,
        sparsity: float,
        scope: Scope = "layer",
        pattern: Pattern | None = None,
        targets: Sequence[str] | None = None,
        ignore: Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
        masks: bool = False,
        force: bool = False,
        copy_others: bool = False,
    ) -> None:
        self._sparsity, self._pattern = check_sparsity("prune", sparsity), pattern
        check_named(target)
        self.checkpoint = open_checkpoint(source, copy_others=copy_others)
        names, self.coverage = TensorIndex(self.checkpoint.tensors).choose(targets, ignore)
        chosen = set(names)
        self.tensors = [tensor for tensor in self.checkpoint.tensors if tensor.name in chosen]
        found = {tensor.dtype for tensor in self.tensors}
        if scope == "global" and len(found) > 1:
            raise DTypeError(
                f"prune: expected one dtype for scope='global', got {', '.join(sorted(found))}; "
                "use scope='layer', or leave the others out"
            )
        patterns = patterns_of("prune", pattern, len(self.tensors), scope) or [None] * len(self.tensors)
        names, shapes = [tensor.name for tensor in self.tensors], [tensor.shape for tensor in self.tensors]
        check_fit("prune", patterns, shapes, names)
        self._bands = [Bands.of(*one) for one in zip(self.tensors, patterns, strict=True)]
        self._ranking = Ranking.of(patterns, shapes, is_global=scope == "global")
        self._target = target
        # The place of the masks, if the output is a file.
        self._beside = target.with_name(f"{target.stem}.{MASKS}.safetensors")
        self._scope = scope
        self._ranking.check("prune", self.num_prune(), patterns, names)
        self._dtype = dtype
        self._masks = masks
        self._force = force
        self._copy_others = copy_others
        for shard in self.checkpoint.shards:
            if masks and shard.name.startswith(f"{MASKS}/"):
                raise OutputError(f"{source}: expected no shard in {MASKS}/, where the masks go, got {shard.name!r}")
        self._check_targets(resume=True)
        with Staging(target) as staging:
            staging.join()

    def num_prune(self) -> list[int]:
        """Return how many weights to prune: one count per target in layer scope, one for all in global scope."""
        sizes = [tensor.numel for tensor in self.tensors]
        return counts_to_prune("prune", sizes, self._sparsity, None, self._scope, self._ranking.units)

    def is_begun(self) -> bool:
        """Whether there is an interrupted run of this output to resume."""
        return Staging(self._target).is_begun()

    def kept_beside(self) -> Path | None:
        """Return the file in the place of the output's masks, if this run writes none; after it, one it has kept."""
        has_own = self._masks or not self.checkpoint.root.is_file()
        return None if has_own or not os.path.lexists(self._beside) else self._beside

    def run(
        self,
        *,
        resume: bool = False,
        max_memory: int = DEFAULT_MEMORY,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> PruneReport:
        """Write the output.

        Under ``torchrun`` the shards are divided among the ranks, all of which call this; the result is the same.

        Parameters
        ----------
        resume : bool
            Go on after the last shard that an interrupted run with the same input and settings has finished.
        max_memory : int
            Bytes for weights, candidates and masks at a time, in addition to the memory of Python and torch themselves.
        progress : callable
            Called with the number of bytes done by this process and its total.

        Raises
        ------
        CheckpointError
            The input cannot be read, or has changed during the run.
        OutputError
            The output cannot be written.
        NonFiniteError
            A target holds NaN or Inf.
        StateError
            The run to resume had another input or other settings.
        DTypeError
            A value of the checkpoint is beyond the range of the requested dtype.

        Notes
        -----
        Tensors of up to 0.47 of ``max_memory`` (less with ``dtype``) are read once. Larger ones, and in global scope
        all, are read twice, but once where a pattern prunes all that it allows. Blocks of several rows need memory for
        two such bands of the widest tensor, even if that is more than ``max_memory``. Shards and the output have
        reached the disk before they count as finished.
        """
        start = time.perf_counter()
        self._check_targets(resume=resume)
        if max_memory <= 0:
            raise DeviceError(f"prune: expected memory to work in, got max_memory={max_memory}; give some MB")
        # Take no more than this checkpoint can use.
        max_memory = min(max_memory, LEAST_MEMORY + 4 * self.checkpoint.num_bytes)
        with (
            of_torchrun("prune", "a process has died; run again with --resume") as ranks,
            Staging(self._target) as staging,
            _cores_to_spare(),
        ):
            ranks.together(lambda: staging.begin(self._settings(), resume=resume) if ranks.rank == 0 else None)
            ranks.together(staging.join)
            # All ranks look before any can finish another shard, because they must divide the same ones.
            owned = _divide(self.checkpoint.shards, ranks, ranks.together(staging.finished))
            with self._stream(max_memory) as stream:
                stream.advance = self._advance(stream, owned, staging, progress)
                targets = self._decide(stream, owned, staging, ranks)
                ranks.together(lambda: self._write(stream, owned, targets, staging, ranks))
            records = ranks.together(staging.finished)
            ranks.together(lambda: self._conclude(staging) if ranks.rank == 0 else None)
        layers = tuple(LayerReport(**row) for shard in sorted(records) for row in records[shard])
        return PruneReport(layers, self.checkpoint.num_bytes, time.perf_counter() - start)

    def _stream(self, max_memory: int) -> Stream:
        """Allocate the memory of a run: buffers, and room for candidates."""
        spans = [bands.span for bands in self._bands]
        longest = max((span.unit for span in spans), default=0)
        piece_bytes, num_buffers = _buffers(max_memory, self._dtype, self._scope, longest)
        room = max_memory // 2 // PIECE_UNIT * PIECE_UNIT
        if self._scope == "layer" and all(num_pieces(span, piece_bytes) <= num_buffers for span in spans):
            # Each tensor is held as a whole, so there are no candidates. With more buffers, the next one is read while
            # the last is still being written.
            num_buffers, room = 2 * num_buffers, 0
        try:
            return Stream(piece_bytes, num_buffers, room)
        except (RuntimeError, MemoryError) as error:
            raise DeviceError(f"prune: no memory left, {max_memory >> 20} MB were allowed; allow less") from error

    def _renames(self) -> dict[str, Path]:
        """Return {path in the staging folder: final path}, in the order of the renames."""
        if self.checkpoint.root.is_dir():
            return {"files": self._target}
        name = self.checkpoint.root.name
        masks = {f"files/{MASKS}/{name}": self._beside}
        # The masks come first, so that an output never exists without its masks.
        return (masks if self._masks else {}) | {f"files/{name}": self._target}

    def _check_targets(self, *, resume: bool) -> None:
        """Refuse existing outputs, unless the run to resume has put them there itself."""
        staging = Staging(self._target)
        inputs = [shard.path for shard in self.checkpoint.shards] + list(self.checkpoint.others.values())
        for path in self._renames().values():
            if not (resume and staging.has_placed(path)):
                check_target(path, inputs, root=self.checkpoint.root, force=self._force)

    def _settings(self) -> dict[str, Any]:
        """Return everything that the output depends on."""
        return {
            "sparsity": self._sparsity,
            "scope": self._scope,
            "pattern": None if self._pattern is None else repr(self._pattern),
            "dtype": str(self._dtype),
            "masks": self._masks,
            "copy_others": self._copy_others,
            "targets": [tensor.name for tensor in self.tensors],
            "input": self.checkpoint.identity(),
        }

    def _advance(
        self, stream: Stream, owned: Mapping[int, FileShard], staging: Staging, progress: Callable[[int, int], None]
    ) -> Callable[[int], None]:
        """Return a function that adds bytes to those done and tells ``progress``."""
        # Tensors that are not held as a whole are read once more, to be counted.
        mine, is_noted = {shard.path for shard in owned.values()}, staging.noted("decisions") is not None
        is_read_again = [
            not (is_noted or is_decided) if self._scope == "global" else not (is_decided or stream.holds(bands.span))
            for bands, is_decided in zip(self._bands, self._are_decided(), strict=True)
        ]
        counted = sum(
            tensor.nbytes
            for tensor, again in zip(self.tensors, is_read_again, strict=True)
            if again and tensor.path in mine
        )
        done, total = 0, counted + sum(tensor.nbytes for shard in owned.values() for tensor in shard.tensors)

        def advance(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            progress(done, total)

        return advance

    def _are_decided(self) -> list[bool]:
        """Return which targets lose all that their pattern allows, so that nothing has to be counted."""
        ranking = self._ranking
        decided = [n == most for n, most in zip(self.num_prune(), ranking.most, strict=True)]
        are = decided if self._scope == "layer" else decided * len(self.tensors)
        return [self._pattern is not None and is_decided for is_decided in are]

    def _decide(
        self, stream: Stream, owned: Mapping[int, FileShard], staging: Staging, ranks: Communicator
    ) -> dict[str, int | Decision]:
        """Return {name: how much to prune of what is ranked or, in global scope, which}, counted or noted before."""
        counts, decided = self._ranking.counts(self.num_prune()), self._are_decided()
        pruned: Sequence[int | Decision]
        if self._scope == "layer" or all(decided):
            pruned = counts if self._scope == "layer" else counts * len(self.tensors)
        elif (noted := staging.noted("decisions")) is not None:
            pruned = [Decision(*one) for one in noted]
        else:
            mine = {shard.path for shard in owned.values()}
            found = decide(dict(enumerate(self._bands)), stream, counts[0], mine, ranks)
            pruned = list(found.values())
            if ranks.rank == 0:
                staging.note("decisions", pruned)
        return {
            bands.tensor.name: Decision(bands.largest_key, 0, 0, 0, 0, 0) if is_decided else one
            for bands, is_decided, one in zip(self._bands, decided, pruned, strict=True)
        }

    def _write(
        self,
        stream: Stream,
        owned: Mapping[int, FileShard],
        targets: Mapping[str, int | Decision],
        staging: Staging,
        ranks: Communicator,
    ) -> None:
        """Write this rank's shards and, on the first rank, the other files of the output."""
        if staging.noted(PLACED) is not None:
            return  # a run that was stopped at its end
        with output_errors(self._target):
            for i, shard in owned.items():
                masks = staging.files / MASKS / shard.name if self._masks else None
                path = staging.files / shard.name
                reports = write_shard(shard, targets, self._pattern, stream, path, masks, self._dtype)
                staging.finish(i, [asdict(report) for report in reports])
            if ranks.rank == 0:
                # Masks in the input, from an earlier run, do not replace our own.
                own_masks = {f"{MASKS}/{shard.name}" for shard in self.checkpoint.shards} if self._masks else set()
                copy_others(self.checkpoint, stream, staging.files, self._dtype, apart_from=own_masks)

    def _conclude(self, staging: Staging) -> None:
        self.checkpoint.check_unchanged()
        if self._force:
            # Only checkpoints are replaced, and another file may have taken the name during the run.
            self._check_targets(resume=True)
        if self.checkpoint.root.is_dir():
            with output_errors(self._target):
                keep_folder_permissions(staging.files, self.checkpoint.root)
        # Masks of an earlier output of that name do not fit the new one.
        old = self.kept_beside() if self._force else None
        if old is not None and (not is_file_of_masks(old) or old.samefile(self.checkpoint.root)):
            old = None
        staging.commit(self._renames(), force=self._force, old=old)


def _buffers(max_memory: int, dtype: torch.dtype | None, scope: Scope, least: int = 0) -> tuple[int, int]:
    """Return the bytes of a piece, not below ``least``, and the number of buffers."""
    # A piece is small enough to stay in the caches from reading to writing.
    piece_bytes = max(PIECE_UNIT, min(LARGEST_PIECE, max_memory // 32) // PIECE_UNIT * PIECE_UNIT)
    piece_bytes = max(piece_bytes, -(-least // PIECE_UNIT) * PIECE_UNIT)
    # Half of the memory is for candidates, the other half for pieces, each with its mask and converted copy. The worst
    # case is weights of two bytes, of which a piece holds the most.
    bits_per_weight = 16 + 1 + (0 if dtype is None else 8 * dtype.itemsize)
    num_buffers = max(2, max_memory // 2 * 16 // bits_per_weight // piece_bytes)
    # Global scope holds no tensor as a whole, and the contents of few buffers stay in the caches.
    return piece_bytes, num_buffers if scope == "layer" else min(num_buffers, STREAM_BUFFERS)


@contextlib.contextmanager
def _cores_to_spare() -> Iterator[None]:
    """Leave one core to the thread that writes and one to the system's writing to the disk.

    An idle kernel thread spins until the next call, and would take that core from them.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(max(1, num_threads - 2))
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _divide(shards: Sequence[FileShard], ranks: Communicator, finished: Container[int]) -> dict[int, FileShard]:
    """Return {position: shard} that this rank has to do: each shard, from the largest on, goes to the least loaded."""
    loads = [0] * ranks.size
    owned = {}
    for i in sorted(range(len(shards)), key=lambda i: -shards[i].num_bytes):
        if i not in finished:
            rank = loads.index(min(loads))
            loads[rank] += shards[i].num_bytes
            if rank == ranks.rank:
                owned[i] = shards[i]
    return dict(sorted(owned.items()))
