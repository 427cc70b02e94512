"""Pieces of layers that several ranks hold, and their cutoffs where one search of all layers is not enough."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from gmp_kernels.backends.keys import largest_key
from gmp_kernels.backends.layers import Layers, ranked_dtype
from gmp_kernels.backends.types import Brackets, Cutoffs, Implementation, Integers, Layer
from gmp_kernels.checks import checked_layers
from gmp_kernels.errors import DTypeError, LayoutError
from gmp_kernels.masks import BitMask
from gmp_kernels.patterns import Pattern
from gmp_kernels.search.caps import KeyCounts, divide, merged
from gmp_kernels.search.communicator import Communicator
from gmp_kernels.search.cutoffs import GroupCutoffs
from gmp_kernels.search.driver import Search, nonfinite_in
from gmp_kernels.search.placement import Placement, Region

__all__ = ["Pieces", "capped_cutoffs", "cutoffs_of_all", "ranked_regions"]


class Pieces(NamedTuple):
    """Pieces that this rank holds of the layers of an update.

    Attributes
    ----------
    present : list of int
        Positions of the layers of which it holds anything.
    dtypes : list of torch.dtype
        Of what is ranked, for all layers.
    checked : Layers or None
        Those present; None if there are none, or they cannot be pruned.
    to_rank : Layers or None
        The same, without their masks if these may grow back.
    plain : sequence of Layer
        What is ranked of them.
    failure : Exception or None
        Why they cannot be pruned.
    """

    present: list[int]
    dtypes: list[torch.dtype]
    checked: Layers | None = None
    to_rank: Layers | None = None
    plain: Sequence[Layer] = ()
    failure: Exception | None = None

    @classmethod
    def of(
        cls,
        op: str,
        implementation: Implementation,
        weights: Sequence[torch.Tensor],
        masks: Sequence[BitMask],
        names: Sequence[str],
        patterns: Sequence[Pattern | None],
        scores: Callable[[], Sequence[torch.Tensor]] | None,
        *,
        is_global: bool,
        regrow: bool = False,
    ) -> Pieces:
        """Check pieces of layers, whose scores a function returns."""
        present = [i for i, weight in enumerate(weights) if weight.numel()]
        dtypes = [weight.dtype for weight in weights]
        has_patterns = any(pattern is not None for pattern in patterns)
        try:
            given: Sequence[torch.Tensor] | None = None if scores is None else scores()
            if given is not None or has_patterns:
                own_scores: Sequence[torch.Tensor | None] = given or [None] * len(weights)
                rows = zip(weights, patterns, own_scores, strict=True)
                dtypes = [ranked_dtype(Layer(weight, None, False, pattern, own)) for weight, pattern, own in rows]
            if is_global and len(set(dtypes)) > 1:
                found = ", ".join(sorted(map(str, set(dtypes))))
                raise DTypeError(f"{op}: expected one dtype for scope='global', got {found}; use scope='layer'")
            checked = checked_layers(
                op,
                [weights[i] for i in present],
                [masks[i] for i in present],
                [names[i] for i in present],
                writes="weights and masks",
                patterns=[patterns[i] for i in present] if has_patterns else None,
                scores=None if given is None else [given[i] for i in present],
            )
            to_rank = checked.unmasked() if regrow and checked is not None else checked
            plain: Sequence[Layer] = to_rank or ()
            if to_rank is not None and not to_rank.are_plain:
                plain = implementation.ranked(to_rank)
        except Exception as error:  # also whatever a function of the user raises
            return cls(present, dtypes, failure=error)
        return cls(present, dtypes, checked, to_rank, plain)

    @property
    def layers(self) -> list[Layer | None]:
        """Ranked pieces of all layers; None where this rank holds nothing."""
        found: list[Layer | None] = [None] * len(self.dtypes)
        for i, layer in zip(self.present, self.plain, strict=False):
            found[i] = layer
        return found

    def nonfinite(self, implementation: Implementation, placements: Sequence[Placement]) -> list[int]:
        """Return the flat index in each whole layer of the first unpruned NaN or Inf here, -1 if there is none."""
        found = [-1] * len(placements)
        for i, at in zip(self.present, nonfinite_in(implementation, self.to_rank) if self.to_rank else (), strict=True):
            found[i] = at if at < 0 else placements[i].region.to_global(at)
        return found


def ranked_regions(name: str, pattern: Pattern, regions: Sequence[Region]) -> list[Region]:
    """Return the regions of what is ranked, given those of the weights of a layer that all ranks hold.

    Raises
    ------
    LayoutError
        A group or block lies on several ranks.
    """
    for rank, region in enumerate(regions):
        reason = pattern.part_misfit(*region) if region.numel else None
        if reason is not None:
            raise LayoutError(
                f"GMPScheduler.step: expected ranks that hold whole groups or blocks of '{name}' ({pattern}), got a "
                f"part of shape {region.sizes} on rank {rank}: {reason}; shard it along another dimension or over a "
                f"number of ranks that fits, or leave it out of pattern="
            )
    shape = pattern.ranked_shape(regions[0].shape)
    return [Region(shape, *pattern.ranked_part(region.offsets, region.sizes, region.shape)) for region in regions]


def cutoffs_of_all(dtypes: Sequence[torch.dtype], numbers: Sequence[int]) -> Cutoffs:
    """Return the cutoffs that prune all that is not protected, given how many weights each counts."""
    nothing = [0] * len(dtypes)
    keys = [largest_key(dtype) for dtype in dtypes]
    return Cutoffs(keys, list(numbers), nothing, nothing, nothing, [-1] * len(dtypes))


def capped_cutoffs(
    communicator: Communicator,
    implementation: Implementation,
    layers: Sequence[Layer | None],
    dtypes: Sequence[torch.dtype],
    placements: Sequence[Placement],
    num_prune: int,
    caps: Sequence[int],
    num_pruned: Sequence[int],
) -> tuple[Cutoffs, Mapping[int, int]]:
    """Find the cutoffs of pieces of layers that are ranked together, none of which loses more than its cap.

    ``layers`` to ``placements`` are as in ``Search``; the rest and the answer as in ``search.caps.select_capped``.
    """
    last: tuple[Search, GroupCutoffs] | None = None

    def searched(
        members: Sequence[int], counts: Sequence[int], group_sizes: Sequence[int]
    ) -> tuple[Search, GroupCutoffs]:
        search = Search(
            communicator,
            implementation,
            [layers[i] for i in members],
            [dtypes[i] for i in members],
            [placements[i] for i in members],
            group_sizes,
            counts,
        )
        brackets = search.estimate([None] * len(counts))
        lo, hi = communicator.largest(torch.from_numpy(np.stack((-brackets.lo, brackets.hi)))).numpy()
        return search, search.find(Brackets(-lo, hi))

    def losses(rest: Sequence[int], count: int) -> Integers:
        nonlocal last
        last = searched(rest, [count], [len(rest)])
        found = last[1]
        rows = np.zeros((len(rest), 3), np.int64)
        own = [row for row, i in enumerate(rest) if layers[i] is not None and placements[i].is_primary]
        if own:
            pieces = [layer for i in rest if (layer := layers[i]) is not None and placements[i].is_primary]
            keys = found.keys[:1].tolist() * len(own)
            counts = implementation.count(pieces, Brackets.of(keys, keys), 1)
            rows[own] = np.stack((counts.below, counts.inside, counts.pruned), axis=1)
        largest = max(placements[i].size for i in rest)
        at_key = KeyCounts(*communicator.total(torch.from_numpy(rows), largest).numpy().T)
        return at_key.losses(int(found.num_ties[0]), int(found.num_ties_kept[0]))

    rest, full = divide(num_prune, caps, num_pruned, losses)
    searches = [(rest, last)] if rest and last is not None else []
    if full:
        searches.append((list(full), searched(list(full), list(full.values()), [1] * len(full))))
    parts = []
    for members, (search, found) in searches:
        search.locate_ties(found)
        parts.append((members, search.cutoffs(found)))
    return merged(parts), full
