"""Shards that all ranks hold of the parameters to be pruned: agreement about them, and the update itself."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gmp_kernels.backends import choose
from gmp_kernels.backends.layers import Layers
from gmp_kernels.backends.types import Brackets, Cutoffs, Layer, Selection, Threshold
from gmp_kernels.checks import adopt_bits, check_finite, checked_layers
from gmp_kernels.distributed.placement import is_sharded, region_of
from gmp_kernels.errors import DistributedError, GMPError, LayoutError, StateError
from gmp_kernels.formats import ROW_MAJOR
from gmp_kernels.masks import BitMask
from gmp_kernels.ops import NonFinite, PruneResult, Scope, thresholds_of
from gmp_kernels.search.brackets import brackets_near, without_far_below
from gmp_kernels.search.communicator import Communicator
from gmp_kernels.search.driver import Search, select_with
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
    """

    def __init__(self, communicator: Communicator, parameters: Mapping[str, torch.Tensor]) -> None:
        self.communicator = communicator
        self._dtypes = {name: parameter.dtype for name, parameter in parameters.items()}
        self._own = {name: region_of(name, parameter) for name, parameter in parameters.items()}
        self._placements: dict[str, Placement] = {}

    @classmethod
    def of(cls, model: nn.Module, parameters: Mapping[str, torch.Tensor]) -> Shards | None:
        """Return the shards of a model whose parameters are sharded or replicated; None for plain tensors."""
        if not (dist.is_available() and dist.is_initialized()):
            return None
        group = _group(model, list(parameters.values()))
        return None if group is None else cls(Communicator(group), parameters)

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
            The ranks do not hold each layer between them.
        """
        layers = {f"layer '{name}'": (self._dtypes[name], own.shape) for name, own in self._own.items()}
        self._compare({**facts, "layers": list(self._own), **layers})
        gathered = self.communicator.gather(self._own)
        self._placements = {
            name: Placement(name, [own[name] for own in gathered], self.communicator.rank) for name in self._own
        }

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
        or, if the ranks' pieces interleave, lists of ties. One more if there are copies, or in global scope.
        """
        failure = None
        checked: Layers | None = None
        layers: list[Layer | None] = [None] * len(weights)
        present = [i for i, weight in enumerate(weights) if weight.numel()]
        own = [weights[i] for i in present], [masks[i] for i in present], [names[i] for i in present]
        try:
            checked = checked_layers(STEP, *own, writes="weights and masks")
            for i, layer in zip(present, checked or (), strict=True):
                layers[i] = layer
        except GMPError as error:
            failure = error
        implementation = choose(backend, weights[0].device)
        is_global = scope == "global"
        placements, dtypes = [self._placements[name] for name in names], [weight.dtype for weight in weights]
        sizes = [placement.size for placement in placements]
        sizes, hints = ([sum(sizes)], previous[:1]) if is_global else (sizes, previous)
        facts: dict[str, object] = {"step": step, "num_prune": list(num_prune)}
        num_before: list[int] | None = None
        if self.are_copies:
            found = Cutoffs.of([])
            if checked:
                group_sizes = [len(checked)] if is_global else [1] * len(checked)
                near = brackets_near(hints, num_prune, sizes, dtypes)
                found = select_with(implementation)(checked, num_prune, group_sizes, near, prunes=True).cutoffs
            thresholds, chosen = thresholds_of(found, dtypes) if checked else [], found
            facts["thresholds"] = [(*t, index) for t, index in zip(thresholds, found.tie_indices, strict=True)]
            self._begin(facts, failure, names, found.nonfinite if nonfinite == "error" else [], None)
        else:
            group_sizes = [len(layers)] if is_global else [1] * len(layers)
            own_layers = layers, dtypes, placements
            search = Search(self.communicator, implementation, *own_layers, group_sizes, num_prune, present=checked)
            num_pruned = [0 if last is None else last.num_pruned for last in hints]
            brackets = self._begin(facts, failure, names, [], None if failure else search.estimate(num_pruned))
            cutoffs = search.find(without_far_below(brackets, hints, dtypes))
            search.locate_ties(cutoffs)
            if nonfinite == "error" and cutoffs.has_nonfinite.any():
                check_finite(STEP, search.first_nonfinite(), names)
            of_pieces = search.cutoffs(cutoffs)
            thresholds = thresholds_of(of_pieces, dtypes)
            chosen = Cutoffs(*([column[i] for i in present] for column in of_pieces))
            if not is_global and not any(placement.has_copies for placement in placements):
                num_before = cutoffs.num_pruned.tolist()
        counts = [(0, 0)] * len(layers)
        if checked:
            adopt_bits(own[1], checked)
            assert checked.masks is not None
            torch.autograd.graph.increment_version([*checked.weights, *checked.masks])
            written = implementation.prune(checked, Selection(chosen), checked.masks)
            assert written is not None
            for i, num_pruned_now, num_new in zip(present, *written, strict=True):
                counts[i] = num_pruned_now, num_new
        if num_before is not None:
            totals = [threshold.num_pruned for threshold in thresholds]
            new = [after - before for after, before in zip(totals, num_before, strict=True)]
        else:
            totals, new = self._confirm(placements, masks, names, counts)
        return PruneResult(list(masks), thresholds, totals, new)

    def _begin(
        self,
        facts: Mapping[str, object],
        failure: GMPError | None,
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
