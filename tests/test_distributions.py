"""Division of one sparsity among layers: totals to the last weight, and counts that never fall."""

import math
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmp_kernels.pruner.groups import erk, uniform

SHAPES = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=4), min_size=1, max_size=12)
SPARSITY = st.floats(0.0, 1.0)


def density_by_rigl(sparsity: float, shapes: list[list[int]]) -> list[Fraction]:
    """The loop of the paper in exact fractions: layers denser than 1 become dense and the rest is solved again."""
    sizes = [math.prod(shape) for shape in shapes]
    raw = [Fraction(sum(shape), size) for shape, size in zip(shapes, sizes, strict=True)]
    num_keep = sum(sizes) - round(sparsity * sum(sizes))
    dense: set[int] = set()
    while True:
        rest = [i for i in range(len(shapes)) if i not in dense]
        left = num_keep - sum(sizes[i] for i in dense)
        scale = Fraction(left) / sum(raw[i] * sizes[i] for i in rest) if rest else Fraction(0)
        too_dense = {i for i in rest if scale * raw[i] > 1}
        if not too_dense:
            return [Fraction(1) if i in dense else scale * raw[i] for i in range(len(shapes))]
        dense |= too_dense


@given(SPARSITY, SHAPES)
def test_uniform_rounds_each_layer(sparsity, shapes):
    assert uniform(sparsity, shapes) == [round(sparsity * math.prod(shape)) for shape in shapes]


@given(SPARSITY, SHAPES)
def test_erk_total_is_exact_and_every_count_is_possible(sparsity, shapes):
    counts = erk(sparsity, shapes)
    sizes = [math.prod(shape) for shape in shapes]
    assert sum(counts) == round(sparsity * sum(sizes))
    assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))


@given(SPARSITY, SHAPES)
def test_erk_follows_the_density_of_the_paper_up_to_rounding(sparsity, shapes):
    sizes = [math.prod(shape) for shape in shapes]
    kept = [size - count for size, count in zip(sizes, erk(sparsity, shapes), strict=True)]
    ideal = [d * size for d, size in zip(density_by_rigl(sparsity, shapes), sizes, strict=True)]
    # Divisor rounding moves the common level by less than half a weight per layer.
    dims = [sum(shape) for shape in shapes]
    for k, exact, d in zip(kept, ideal, dims, strict=True):
        assert abs(k - exact) <= Fraction(1, 2) + Fraction(len(shapes) * d, 2 * min(dims))


@given(SHAPES, SPARSITY, SPARSITY)
def test_erk_counts_never_fall_when_sparsity_rises(shapes, first, second):
    low, high = sorted((first, second))
    assert all(before <= after for before, after in zip(erk(low, shapes), erk(high, shapes), strict=True))


def test_erk_takes_one_weight_more_from_one_layer_at_a_time():
    # The classic case against largest remainders: they share 11 kept weights as 5, 5, 1 and 10 as 4, 4, 2.
    shapes = [[6, 6], [6, 6], [2, 2]]
    counts = [erk(num_prune / 76, shapes) for num_prune in range(77)]
    for before, after in pairwise(counts):
        assert sorted(a - b for b, a in zip(before, after, strict=True)) == [0, 0, 1]


def test_erk_of_a_small_and_a_large_layer():
    # 10100 weights of which half are kept; the ratio of dims is 20 to 200, and 459 > 100, so the small one stays dense.
    assert erk(0.5, [[10, 10], [100, 100]]) == [0, 5050]
    # 1010 kept: 20/220 and 200/220 of them are 91.8 and 918.2.
    assert erk(0.9, [[10, 10], [100, 100]]) == [100 - 92, 10000 - 918]


def test_erk_prefers_the_earlier_layer_where_shares_tie():
    assert erk(0.5, [[3], [3], [3]]) == [1, 1, 2]


@pytest.mark.parametrize(("sparsity", "expected"), [(0.0, [0, 0]), (1.0, [12, 30])])
def test_erk_at_the_ends(sparsity, expected):
    assert erk(sparsity, [[3, 4], [5, 6]]) == expected
