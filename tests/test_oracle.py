"""Every backend, the oracle first of all, against the definition of the order written out in plain Python."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gmp_kernels import BitMask, Threshold, magnitude_threshold, prune_
from gmp_kernels.tools.testing import DTYPES, adversarial_cases

CASE_NAMES = list(adversarial_cases(1, torch.float32))


class Ranked(NamedTuple):
    """One weight; tuples sort in the order weights are pruned in."""

    kept: bool
    is_nan: bool
    magnitude: float
    minus_index: int

    @property
    def level(self) -> tuple[bool, bool, float]:
        return self[:3]


def brute_force(weights: list[float], kept: list[bool], num_prune: int) -> tuple[list[bool], Threshold]:
    order = sorted(
        Ranked(k, math.isnan(w), 0.0 if math.isnan(w) else abs(w), -i)
        for i, (w, k) in enumerate(zip(weights, kept, strict=True))
    )
    new_kept = list(kept)
    for ranked in order[:num_prune]:
        new_kept[-ranked.minus_index] = False
    already = kept.count(False)
    if num_prune <= already:
        return new_kept, Threshold(0.0, already, 0, 0)
    last = order[num_prune - 1]
    ties = [ranked for ranked in order if ranked.level == last.level]
    num_ties_kept = sum(new_kept[-ranked.minus_index] for ranked in ties)
    value = math.nan if last.is_nan else last.magnitude
    return new_kept, Threshold(value, order.index(ties[0]), len(ties), num_ties_kept)


@st.composite
def weights_and_masks(draw: st.DrawFn, max_layers: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    dtype = draw(st.sampled_from(DTYPES))
    weights = []
    for _ in range(draw(st.integers(1, max_layers))):
        n = draw(st.integers(1, 40))
        few = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-7, math.inf, -math.inf, math.nan])
        values = st.one_of(few, st.floats(width=16 if dtype == torch.float16 else 32))
        weights.append(torch.tensor(draw(st.lists(values, min_size=n, max_size=n)), dtype=torch.float64).to(dtype))
    kept = [torch.tensor(draw(st.lists(st.booleans(), min_size=len(w), max_size=len(w)))) for w in weights]
    return weights, kept


@given(drawn=weights_and_masks(max_layers=1), data=st.data())
def test_one_layer_is_the_definition(backend: str, device: torch.device, drawn: tuple, data: st.DataObject) -> None:
    (weight,), (kept,) = drawn
    num_prune = data.draw(st.integers(0, len(weight)))
    new_kept, threshold = brute_force(weight.tolist(), kept.tolist(), num_prune)
    request = {"nonfinite": "keep", "backend": backend}
    mask = BitMask.from_bool(kept).to(device)
    pruned = weight.to(device, copy=True)
    assert repr(magnitude_threshold(pruned, num_prune, mask=mask, **request)) == repr(threshold)
    result = prune_(pruned, num_prune=num_prune, masks=mask, **request)
    assert mask.to_bool().tolist() == new_kept
    assert result.num_pruned == [new_kept.count(False)] == [threshold.num_pruned]
    assert result.num_newly_pruned == [new_kept.count(False) - kept.tolist().count(False)]
    # By repr: it tells -0.0 from 0.0 and lets NaN equal itself.
    assert [*map(repr, pruned.tolist())] == [
        repr(value if stays else 0.0) for value, stays in zip(weight.tolist(), new_kept, strict=True)
    ]


@given(drawn=weights_and_masks(max_layers=4), data=st.data())
def test_global_scope_is_the_definition_on_all_layers_in_a_row(
    backend: str, device: torch.device, drawn: tuple, data: st.DataObject
) -> None:
    weights, kept = drawn
    ends = list(accumulate(map(len, weights), initial=0))
    num_prune = data.draw(st.integers(0, ends[-1]))
    new_kept, threshold = brute_force(torch.cat(weights).tolist(), torch.cat(kept).tolist(), num_prune)
    result = prune_(
        [weight.to(device, copy=True) for weight in weights],
        num_prune=num_prune,
        masks=[BitMask.from_bool(k).to(device) for k in kept],
        scope="global",
        nonfinite="keep",
        backend=backend,
    )
    assert [mask.to_bool().tolist() for mask in result.masks] == [new_kept[a:b] for a, b in pairwise(ends)]
    assert {repr(t) for t in result.thresholds} == {repr(threshold)}


@pytest.mark.parametrize("name", CASE_NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adversarial_cases_are_the_definition(
    backend: str, device: torch.device, dtype: torch.dtype, name: str
) -> None:
    weight = adversarial_cases(77, dtype)[name]
    for num_prune in (0, 1, 38, 76, 77):
        new_kept, threshold = brute_force(weight.tolist(), [True] * 77, num_prune)
        result = prune_(weight.to(device, copy=True), num_prune=num_prune, nonfinite="keep", backend=backend)
        assert result.masks[0].to_bool().tolist() == new_kept
        assert repr(result.thresholds[0]) == repr(threshold)
