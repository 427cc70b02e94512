"""Division of one sparsity among layers: totals to the last weight, and counts that never fall."""

import math
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmp_kernels.pruner.distributions import Limit, erk, uniform

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


@st.composite
def limited_layers(draw):
    """Shapes of layers with one unit, limits, and a number of units that these allow to prune."""
    unit = draw(st.sampled_from([1, 2, 6]))
    shapes = draw(st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=3), min_size=1, max_size=8))
    shapes = [[unit * first, *rest] for first, *rest in shapes]
    most = [draw(st.integers(0, math.prod(shape) // unit)) * unit for shape in shapes]
    return shapes, [Limit(unit, n) for n in most], draw(st.integers(0, sum(most) // unit))


@given(limited_layers())
def test_erk_keeps_to_limits_and_spreads_what_they_withhold(layers):
    shapes, limits, num_units = layers
    unit, sizes = limits[0].unit, list(map(math.prod, shapes))
    counts = erk(num_units * unit / sum(sizes), shapes, limits)
    assert sum(counts) == num_units * unit
    assert all(0 <= n <= limit.most and n % unit == 0 for n, limit in zip(counts, limits, strict=True))
    # One level explains them all: it rounds to what each layer keeps, unless that is all it has or all it may lose.
    kept = [n - count for n, count in zip(sizes, counts, strict=True)]
    rows = list(zip(kept, map(sum, shapes), counts, limits, strict=True))
    lower = [Fraction(2 * k - unit, 2 * d) for k, d, count, limit in rows if count < limit.most]
    upper = [Fraction(2 * k + unit, 2 * d) for k, d, count, _ in rows if count > 0]
    assert max(lower, default=0) <= min(upper, default=math.inf)


@given(limited_layers(), st.floats(0, 1))
def test_erk_with_limits_never_gives_a_layer_less_when_more_is_pruned(layers, share):
    shapes, limits, num_units = layers
    total = sum(map(math.prod, shapes)) // limits[0].unit
    low, high = (erk(n / total, shapes, limits) for n in (int(share * num_units), num_units))
    assert all(before <= after for before, after in zip(low, high, strict=True))


@given(st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=3), min_size=1, max_size=8), st.floats(0, 1))
def test_limits_that_allow_everything_change_nothing(shapes, sparsity):
    limits = [Limit(1, math.prod(shape)) for shape in shapes]
    for distribution in (erk, uniform):
        assert distribution(sparsity, shapes, limits) == distribution(sparsity, shapes)


def test_erk_of_blocks_of_several_sizes_stops_less_than_one_block_short():
    shapes, limits = [[8, 8], [6, 6], [5, 5]], [Limit(16, 64), Limit(4, 36), Limit(1, 25)]
    for wanted in range(126):
        counts = erk(wanted / 125, shapes, limits)
        assert wanted - 16 < sum(counts) <= wanted
        assert all(n % limit.unit == 0 for n, limit in zip(counts, limits, strict=True))


def test_uniform_counts_whole_blocks():
    assert uniform(0.3, [[8, 8], [4, 4]], [Limit(16, 64), Limit(1, 16)]) == [round(0.3 * 4) * 16, 5]
