"""Shards that all ranks hold of the parameters to be pruned: agreement about them, and the update itself."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gmp_kernels.backends import choose
from gmp_kernels.backends.types import Brackets, Cutoffs, Implementation, Selection, Threshold
from gmp_kernels.checks import adopt_bits, check_finite
from gmp_kernels.counts import Caps, Ranking, select
from gmp_kernels.distributed.placement import is_sharded, region_of
from gmp_kernels.distributed.selection import Pieces, capped_cutoffs, cutoffs_of_all, ranked_regions
from gmp_kernels.errors import DistributedError, LayoutError, StateError
from gmp_kernels.formats import ROW_MAJOR
from gmp_kernels.masks import BitMask
from gmp_kernels.ops import NonFinite, PruneResult, Scope, thresholds_of
from gmp_kernels.patterns import Pattern
from gmp_kernels.search.brackets import brackets_near, without_far_below
from gmp_kernels.search.communicator import Communicator
from gmp_kernels.search.driver import Search
from gmp_kernels.search.placement import Placement

__all__ = ["Shards", "refuse_flattened"]

STEP = "GMPScheduler.step"


def refuse_flattened(model: nn.Module) -> None:
    """Raise LayoutError for a model whose parameters do not keep their shapes."""
    for module in model.modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise LayoutError(
                "GMPScheduler: expected parameters that keep their shape when sharded, got FullyShardedDataParallel, "
                "which flattens them; use torch.distributed.fsdp.fully_shard"
            )


class Shards:
    """The parameters to be pruned, as all ranks hold them.

    Parameters
    ----------
    communicator : Communicator
    parameters : mapping of str to torch.Tensor
        The same on every rank, in the same order.
    patterns : mapping of str to Pattern
        Of the layers that have one.
    """

    def __init__(
        self,
        communicator: Communicator,
        parameters: Mapping[str, torch.Tensor],
        patterns: Mapping[str, Pattern] | None = None,
    ) -> None:
        self.communicator, self._patterns = communicator, patterns or {}
        self._dtypes = {name: parameter.dtype for name, parameter in parameters.items()}
        self._own = {name: region_of(name, parameter) for name, parameter in parameters.items()}
        self._placements: dict[str, Placement] = {}
        self._ranked: dict[str, Placement] = {}  # of what is ranked: weights or blocks

    @classmethod
    def of(
        cls, model: nn.Module, parameters: Mapping[str, torch.Tensor], patterns: Mapping[str, Pattern] | None = None
    ) -> Shards | None:
        """Return the shards of a model whose parameters are sharded or replicated; None for plain tensors."""
        if not (dist.is_available() and dist.is_initialized()):
            return None
        group = _group(model, list(parameters.values()))
        return None if group is None else cls(Communicator(group), parameters, patterns)

    @property
    def are_copies(self) -> bool:
        """Whether the ranks have agreed, and each of them holds every layer as a whole."""
        placements = self._placements.values()
        return bool(placements) and all(placement.num_copies == self.communicator.size - 1 for placement in placements)

    def agree(self, facts: Mapping[str, object]) -> None:
        """Make sure that all ranks are in the same run, and exchange which rank holds which parts.

        Raises
        ------
        StateError
            The ranks differ. Raised on every rank, naming the difference.
        LayoutError
            The ranks do not hold each layer between them, or a group or block of a pattern lies on several. Raised on
            every rank.
        """
        layers = {f"layer '{name}'": (self._dtypes[name], own.shape) for name, own in self._own.items()}
        self._compare({**facts, "layers": list(self._own), **layers})
        gathered = self.communicator.gather(self._own)
        regions = {name: [own[name] for own in gathered] for name in self._own}
        self._placements = {name: Placement(name, held, self.communicator.rank) for name, held in regions.items()}
        ranked = {name: ranked_regions(name, pattern, regions[name]) for name, pattern in self._patterns.items()}
        divided = {name: Placement(name, held, self.communicator.rank) for name, held in ranked.items()}
        self._ranked = self._placements | divided

    def prune_(
        self,
        weights: Sequence[torch.Tensor],
        masks: Sequence[BitMask],
        num_prune: Sequence[int],
        *,
        names: Sequence[str],
        step: int,
        scope: Scope,
        nonfinite: NonFinite,
        previous: Sequence[Threshold | None],
        backend: str | None,
        scores: Callable[[], Sequence[torch.Tensor]] | None = None,
        caps: Caps | None = None,
        regrow: bool = False,
    ) -> PruneResult:
        """Prune like ``gmp_kernels.prune_``, where ``weights`` and ``masks`` are this rank's pieces of layers.

        Parameters
        ----------
        weights, masks : sequences
        num_prune : sequence of int
            Counts of the whole layers, or one count of all together.
        names, step
            Names of the layers, and the step of the update.
        scope, nonfinite, previous, backend
            As in ``gmp_kernels.prune_``.
        scores : callable, optional
            Returns this rank's pieces of the scores. What it raises is raised, and DistributedError on other ranks.
        caps, regrow
            As in ``gmp_kernels.ops.begin_prune``.

        Returns
        -------
        PruneResult
            The masks are those of the pieces; thresholds and counts those of the whole layers.

        Raises
        ------
        NonFiniteError, StateError
            The same on every rank.
        GMPError
            A tensor of this rank cannot be pruned; the other ranks raise DistributedError.
        DistributedError
            A rank does not answer.

        Notes
        -----
        Collectives: one maximum, two sums for most brackets and, if some ties stay and others do not, one more: a sum
        or, if the ranks' pieces interleave, lists of ties. One more if there are copies, in global scope, or with a
        pattern. Caps take three or more of each.
        """
        implementation = choose(backend, weights[0].device)
        is_global = scope == "global"
        patterns = [self._patterns.get(name) for name in names]
        own = weights, masks, names, patterns, scores
        pieces = Pieces.of(STEP, implementation, *own, is_global=is_global, regrow=regrow)
        checked, dtypes = pieces.checked, pieces.dtypes
        ranking = None
        if self._patterns or caps is not None:
            ranking = Ranking.of(patterns, [self._own[name].shape for name in names], is_global=is_global)
        facts: dict[str, object] = {"step": step, "num_prune": list(num_prune)}
        if scores is not None:
            facts["dtypes"] = dtypes
        placements = [self._placements[name] for name in names]
        num_before: list[int] | None = None
        alone: Collection[int] = ()
        if self.are_copies:
            found = Cutoffs.of([])
            if pieces.to_rank:
                sizes = pieces.to_rank.sizes
                hints, sizes = (previous[:1], [sum(sizes)]) if is_global else (previous, sizes)
                near = brackets_near(hints, num_prune, sizes, dtypes)
                selection, alone = select(implementation, pieces.to_rank, num_prune, ranking, is_global, near, caps)
                found = selection.cutoffs
            thresholds, chosen = thresholds_of(found, dtypes) if found.keys else [], found
            facts["thresholds"] = [(*t, index) for t, index in zip(thresholds, found.tie_indices, strict=True)]
            self._begin(facts, pieces.failure, names, found.nonfinite if nonfinite == "error" else [], None)
        else:
            found, num_before, alone = self._cutoffs_of_parts(
                implementation, pieces, facts, names, num_prune, ranking, is_global, nonfinite, previous, caps
            )
            thresholds = thresholds_of(found, dtypes)
            chosen = Cutoffs(*([column[i] for i in pieces.present] for column in found))
        counts = [(0, 0)] * len(weights)
        if checked:
            adopt_bits([masks[i] for i in pieces.present], checked)
            assert checked.masks is not None
            torch.autograd.graph.increment_version([*checked.weights, *checked.masks])
            written = implementation.prune(pieces.to_rank or checked, Selection(chosen), checked.masks)
            assert written is not None
            for i, num_pruned_now, num_new in zip(pieces.present, *written, strict=True):
                counts[i] = num_pruned_now, num_new
        if num_before is not None:
            totals = [threshold.num_pruned for threshold in thresholds]
            new = [after - before for after, before in zip(totals, num_before, strict=True)]
        else:
            totals, new = self._confirm(placements, masks, names, counts)
        thresholds = thresholds if ranking is None else ranking.thresholds(thresholds, alone)
        return PruneResult(list(masks), thresholds, totals, new)

    def _cutoffs_of_parts(
        self,
        implementation: Implementation,
        pieces: Pieces,
        facts: Mapping[str, object],
        names: Sequence[str],
        num_prune: Sequence[int],
        ranking: Ranking | None,
        is_global: bool,
        nonfinite: NonFinite,
        previous: Sequence[Threshold | None],
        caps: Caps | None,
    ) -> tuple[Cutoffs, list[int] | None, Collection[int]]:
        """Find the cutoffs of this rank's pieces, one for each layer, together with all ranks.

        Returns
        -------
        Cutoffs
        list of int or None
            How many weights of each layer are pruned already, where that is found on the way.
        collection of int
            Positions of layers at their caps.
        """
        placements, ranked = ([own[name] for name in names] for own in (self._placements, self._ranked))
        parts = self.communicator, implementation, pieces.layers, pieces.dtypes, ranked
        if ranking is None:
            wanted, own_nonfinite = list(num_prune), [-1]
        else:
            wanted = ranking.counts(num_prune)
            # What is protected, and so not ranked, may be NaN too.
            looks = nonfinite == "error" and pieces.failure is None
            own_nonfinite = pieces.nonfinite(implementation, placements) if looks else [-1]
            if caps is not None:
                self._begin(facts, pieces.failure, names, own_nonfinite, None)
                found, full = capped_cutoffs(*parts, wanted[0], *map(ranking.of_layers, caps))
                return found, None, full
            if list(num_prune) == ranking.most:
                self._begin(facts, pieces.failure, names, own_nonfinite, None)
                return cutoffs_of_all(pieces.dtypes, wanted * len(names) if is_global else wanted), None, ()
        group_sizes, hints = ([len(names)], previous[:1]) if is_global else ([1] * len(names), previous)
        search = Search(*parts, group_sizes, wanted, present=pieces.plain)
        is_anew = pieces.to_rank is not pieces.checked
        num_pruned = [None if ranking else 0 if last is None or is_anew else last.num_pruned for last in hints]
        estimated = search.estimate(num_pruned) if pieces.failure is None else None
        brackets = self._begin(facts, pieces.failure, names, own_nonfinite, estimated)
        cutoffs = search.find(without_far_below(brackets, hints, pieces.dtypes))
        search.locate_ties(cutoffs)
        num_before: list[int] | None = None
        if ranking is None:
            if nonfinite == "error" and cutoffs.has_nonfinite.any():
                check_finite(STEP, search.first_nonfinite(), names)
            if not is_global and not any(placement.has_copies for placement in placements):
                num_before = cutoffs.num_pruned.tolist()
        return search.cutoffs(cutoffs), num_before, ()

    def _begin(
        self,
        facts: Mapping[str, object],
        failure: Exception | None,
        names: Sequence[str],
        nonfinite: Sequence[int],
        brackets: Brackets | None,
    ) -> Brackets:
        """Raise on all ranks if one has failed or is at another update; return the union of all brackets.

        The message has the same size for every update, so that ranks at different steps do not misread each other.
        """
        digest = zlib.crc32(repr(facts).encode())
        ends = [] if brackets is None else [*(-brackets.lo).tolist(), *brackets.hi.tolist()]
        room = [0] * (2 * len(self._own) - len(ends))
        found = any(index >= 0 for index in nonfinite)
        maxima = self.communicator.largest(
            torch.tensor([failure is not None, found, digest, -digest, *ends, *room], device="cpu")
        ).numpy()
        merged = maxima[:4].tolist()
        if merged[0]:
            failures = self.communicator.gather(None if failure is None else str(failure))
            if failure is not None:
                raise failure
            rank, message = next((rank, message) for rank, message in enumerate(failures) if message is not None)
            raise DistributedError(
                f"{STEP}: expected tensors that can be pruned on every rank, got on rank {rank}: {message}"
            )
        if merged[1]:
            of_ranks = self.communicator.gather(nonfinite)
            first = [min((i for i in found if i >= 0), default=-1) for found in zip(*of_ranks, strict=True)]
            check_finite(STEP, first, names)
        if merged[2] != -merged[3]:
            self._compare(facts)
        lo, hi = maxima[4 : 4 + len(ends)].reshape(2, -1)
        return Brackets(-lo, hi)

    def _compare(self, facts: Mapping[str, object]) -> None:
        """Raise the same StateError on every rank if a fact differs between ranks that have it."""
        gathered = self.communicator.gather({name: repr(value) for name, value in facts.items()})
        differences = []
        for name in dict.fromkeys(name for of_rank in gathered for name in of_rank):
            holders: dict[str, list[int]] = {}
            for rank, of_rank in enumerate(gathered):
                if name in of_rank:
                    holders.setdefault(of_rank[name], []).append(rank)
            if len(holders) > 1:
                found = ", ".join(f"{value} on {_ranks(ranks)}" for value, ranks in holders.items())
                differences.append(f"{name}: {found}")
        if differences:
            raise StateError(
                f"{STEP}: expected the same on every rank, got {'; '.join(differences)}. Build the scheduler with the "
                "same arguments everywhere, load one checkpoint, and call step() equally often"
            )

    def _confirm(
        self,
        placements: Sequence[Placement],
        masks: Sequence[BitMask],
        names: Sequence[str],
        counts: Sequence[Sequence[int]],
    ) -> tuple[list[int], list[int]]:
        """Sum the counts of pruned weights, layer by layer, and make sure that copies have the same masks."""
        row_major = [mask.to(memory_format=ROW_MAJOR).packed for mask in masks]
        digests = [zlib.crc32(packed.cpu().numpy().tobytes()) for packed in row_major]
        rows = []
        for placement, digest, (num_pruned, num_new) in zip(placements, digests, counts, strict=True):
            # The primary subtracts its digest once for each other copy, so that equal ones cancel.
            own = [num_pruned, num_new, -placement.num_copies * digest] if placement.is_primary else [0, 0, digest]
            rows.append(own)
        sums = self.communicator.total(torch.tensor(rows, device="cpu"), torch.iinfo(torch.int64).max)
        if sums[:, 2].any():
            offsets = [placement.region.offsets for placement in placements]
            places = [f"mask of '{name}' at {place}" for name, place in zip(names, offsets, strict=True)]
            self._compare(dict(zip(places, digests, strict=True)))
        return sums[:, 0].tolist(), sums[:, 1].tolist()


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _group(model: nn.Module, parameters: Sequence[torch.Tensor]) -> dist.ProcessGroup | None:
    """Return the group of all processes that hold parts or copies of one of the parameters."""
    group: dist.ProcessGroup | None
    meshes = {parameter.device_mesh for parameter in parameters if is_sharded(parameter)}  # type: ignore[attr-defined]
    members = {tuple(sorted(mesh.mesh.flatten().tolist())): mesh for mesh in meshes}
    if members:
        everyone = tuple(sorted({rank for ranks in members for rank in ranks}))
        if len(everyone) == dist.get_world_size() or everyone not in members:
            return dist.group.WORLD
        mesh = members[everyone]
        group = mesh.get_group() if mesh.ndim == 1 else dist.new_group(list(everyone), use_local_synchronization=True)
    else:
        group = next((m.process_group for m in model.modules() if isinstance(m, DistributedDataParallel)), None)
    return group
