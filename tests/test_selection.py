"""Counts against brackets add up: whatever the pieces and whatever the guesses, the cut is that of the whole."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
import torch
from conftest import thinned
from hypothesis import given
from hypothesis import strategies as st

from gmp_kernels.backends import choose
from gmp_kernels.backends.keys import key_of, keys_of, largest_key, magnitude_of
from gmp_kernels.backends.types import Brackets, Cutoffs, Implementation, Layer, Selection
from gmp_kernels.errors import StateError
from gmp_kernels.masks import BitMask
from gmp_kernels.ops import magnitude_threshold
from gmp_kernels.search import driver, ties
from gmp_kernels.search.brackets import brackets_near
from gmp_kernels.search.communicator import Communicator
from gmp_kernels.search.cutoffs import find_cutoffs
from gmp_kernels.search.driver import Search
from gmp_kernels.search.placement import Placement, Region
from gmp_kernels.search.sample import estimate
from gmp_kernels.search.ties import ChunkTies, TiedPieces, _count_slots, piece_of, tie_indices
from gmp_kernels.tools.testing import DTYPES, adversarial_cases, device_of

CPU = torch.device("cpu")
N = 40_003
MANY_AND_FEW = ((0.9, True), (0.001, True), (0.3, False))  # share of the weights that tie, and whether there is a mask


def random_mask(n: int, sparsity: float) -> torch.Tensor:
    return BitMask.from_bool(torch.rand(n, generator=torch.Generator().manual_seed(n)) >= sparsity).packed


def on(device: torch.device, layer: Layer) -> Layer:
    """A copy of a layer elsewhere, or the layer itself."""
    return Layer(layer.weight.to(device), None if layer.mask is None else layer.mask.to(device))


def cut_by_counts(
    implementation: Implementation, parts: list[Layer], num_prune: int, bracket: Brackets
) -> tuple[list[int], list[int]]:
    """A row of ``GroupCutoffs`` for layers that are pieces of one, and where the ties of each piece end."""
    dtypes, placements = zip(
        *((p.weight.dtype, Placement("part", [whole(p.weight.numel())], 0)) for p in parts), strict=True
    )
    search = Search(Communicator(None), implementation, parts, dtypes, placements, [len(parts)], [num_prune])
    cutoffs = search.find(bracket)
    search.locate_ties(cutoffs)
    return [column.item() for column in cutoffs], search.tie_indices.tolist()


def whole(n: int) -> Region:
    return Region((n,), (0,), (n,))


def kept_of(parts: list[Layer], key: int, tie_indices: Sequence[int]) -> torch.Tensor:
    """Return what stays, over all pieces, when each is pruned at its index."""
    kept = []
    for part, tie_index in zip(parts, tie_indices, strict=True):
        copy = on(CPU, Layer(part.weight.clone(), part.mask))
        bits = torch.empty(-(-part.weight.numel() // 8), dtype=torch.uint8)
        cutoffs = Cutoffs.of([(key, 0, 0, 0, tie_index, -1)])
        choose("reference", CPU).prune([copy], Selection(cutoffs), [bits])
        kept.append(BitMask(bits, part.weight.shape).to_bool())
    return torch.cat(kept)


def split(layer: Layer, places: list[int]) -> list[Layer]:
    ends = sorted({0, *(place // 8 * 8 for place in places), layer.weight.numel()})
    return [piece_of(layer, begin, end) for begin, end in itertools.pairwise(ends)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", adversarial_cases(8, torch.float32))
def test_pieces_are_cut_as_the_whole(backend: str, case: str, dtype: torch.dtype) -> None:
    device = device_of(backend)
    implementation = choose(backend, device)
    layer = on(device, Layer(adversarial_cases(N, dtype)[case], random_mask(N, 0.3)))
    parts = split(layer, [8, 12_000, 12_008, 30_000])
    for num_prune in thinned(backend, (1, N // 2, N - 1, N), len(case) + DTYPES.index(dtype)):
        expected = choose("reference", CPU).select([on(CPU, layer)], [num_prune], [1]).cutoffs
        bracket, _ = estimate([[layer]], [num_prune], [None], [N], [1])
        cutoff, ends = cut_by_counts(implementation, parts, num_prune, bracket)
        assert cutoff[:4] == [column[0] for column in expected[:4]]
        assert torch.equal(kept_of(parts, cutoff[0], ends), kept_of([layer], cutoff[0], expected.tie_indices))


@given(data=st.data())
def test_any_guess_and_any_pieces_give_the_same_cut(data: st.DataObject) -> None:
    implementation = choose("cpu", CPU)
    dtype = data.draw(st.sampled_from(DTYPES))
    n = data.draw(st.integers(1, 300))
    values = st.integers(-(2 ** (dtype.itemsize * 8 - 1)), 2 ** (dtype.itemsize * 8 - 1) - 1)
    integers = {2: np.int16, 4: np.int32, 8: np.int64}[dtype.itemsize]
    few = data.draw(st.lists(values, min_size=1, max_size=4))
    bits = data.draw(st.lists(st.sampled_from(few) | values, min_size=n, max_size=n))
    weight = torch.from_numpy(np.array(bits, integers)).view(dtype)
    kept = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    layer = Layer(weight, BitMask.from_bool(kept).packed)
    num_prune = data.draw(st.integers(0, n))
    lo, hi = sorted(data.draw(st.tuples(*[st.integers(0, largest_key(dtype))] * 2)))
    parts = split(layer, data.draw(st.lists(st.integers(0, n), max_size=3)))
    bits_of_round = data.draw(st.sampled_from([1, 6, 11]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "MOST_BITS", bits_of_round)
        patch.setattr(driver, "FEW_BITS", bits_of_round)
        cutoff, ends = cut_by_counts(implementation, parts, num_prune, Brackets.of([lo], [hi]))
    expected = choose("reference", CPU).select([layer], [num_prune], [1]).cutoffs
    assert cutoff[:4] == [column[0] for column in expected[:4]]
    assert cutoff[-1] == (expected.nonfinite[0] >= 0)
    assert torch.equal(kept_of(parts, cutoff[0], ends), kept_of([layer], cutoff[0], expected.tie_indices))


@pytest.mark.parametrize("most_listed", [0, ties.MOST_LISTED], ids=["counted", "listed"])
@pytest.mark.parametrize("with_chunks", [False, True], ids=["read", "chunks"])
@pytest.mark.parametrize("places", ["even", "early", "late", "runs", "all"])
def test_ties_are_found_wherever_they_lie(
    kernels: str, places: str, with_chunks: bool, most_listed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ties, "MOST_LISTED", most_listed)
    n, generator = 300_007, torch.Generator().manual_seed(1)
    index = torch.arange(n)
    tied = {
        "even": torch.rand(n, generator=generator) < 0.01,
        "early": (index > 100) & (index < 400),
        "late": index > n - 1000,
        "runs": index % 100_000 < 50,
        "all": index >= 0,
    }[places]
    weight = torch.where(tied, -0.5, torch.rand(n, generator=generator) + 1)
    mask = random_mask(n, 0.5)
    device = device_of(kernels)
    tie_places = (tied & BitMask(mask, weight.shape).to_bool()).nonzero().view(-1)
    kept = [0, 1, len(tie_places) // 2, len(tie_places) - 1]
    layers, four = [on(device, Layer(weight, mask))], np.ones(4, np.int64)
    columns = 0 * four, key_of(0.5, torch.float32) * four, len(tie_places) * four, four > 0, n * four
    pieces = TiedPieces(*columns, [whole(n)] * 4)
    if with_chunks:
        # Of one piece they are not known.
        before = np.array([(tie_places < end).sum().item() for end in range(0, n + 4096, 4096)])
        pieces = pieces._replace(chunks=ChunkTies(4096, before, np.array([0, 0, -1, 0])))
    own = len(tie_places) * four, np.array(kept)
    found = tie_indices(Communicator(None), choose(kernels, device), layers, pieces, *own)
    for index, num_kept in zip(found.tolist(), kept, strict=True):
        assert (tie_places < index).sum() == num_kept


def tied_layer(shape: tuple[int, ...], dtype: torch.dtype, share: float, *, masked: bool) -> Layer:
    """A layer of two values and NaN, the first of which as often as ``share`` says; channels_last if it has 4 sizes."""
    generator = torch.Generator().manual_seed(math.prod(shape))
    is_tied = torch.rand(shape, generator=generator) < share
    weight = torch.where(is_tied, -0.5, torch.where(torch.rand(shape, generator=generator) < 0.1, torch.nan, 1.0))
    weight = weight.to(dtype, memory_format=torch.channels_last if len(shape) == 4 else torch.contiguous_format)
    return Layer.of(weight, random_mask(weight.numel(), 0.5) if masked else None)


# On both sides of a block of the kernel and of a chunk; filters of an odd size, and larger than a chunk.
SLOTTED = [(1,), (127,), (129, 5), (16_385,), (3, 50_001), (7, 3, 3, 3), (5, 8, 3, 3), (3, 1900, 3, 3)]


def inside_of(shape: Sequence[int], margin: int) -> Region:
    """A box of this shape in a tensor that is longer on both sides of each dimension."""
    return Region(tuple(size + 2 * margin + 1 for size in shape), (margin,) * len(shape), tuple(shape))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slots_hold_the_ties_between_their_flat_indices(backend: str, dtype: torch.dtype) -> None:
    """The numpy of backends that have no such operation gives the same counts."""
    layers = [tied_layer(s, dtype, share, masked=masked) for s in SLOTTED for share, masked in MANY_AND_FEW]
    implementation = choose(backend, CPU)
    operation = implementation.count_slots or partial(_count_slots, implementation)
    generator = np.random.default_rng(1)
    for key, num_slots, margin, reads in (
        (0.5, 8, 0, "before"),
        (float("nan"), 512, 2, "after"),
        (0.5, 1, 1, "neither"),
    ):
        indices_of, places, ends, regions = [], [], [], []
        for layer in layers:
            region, n = inside_of(layer.tensor.shape, margin), layer.weight.numel()
            box = tuple(slice(at, at + size) for at, size in zip(region.offsets, region.sizes, strict=True))
            indices_of.append(torch.arange(math.prod(region.shape)).view(region.shape)[box].reshape(-1))
            regions.append(region)
            lo, end = np.sort(generator.integers(0, math.prod(region.shape) + 1, 2)).tolist()
            begin, until = (int((indices_of[-1] < index).sum()) for index in (lo, end))
            places.append([0 if reads == "before" else begin, begin, until, n if reads == "after" else until])
            ends.append((lo, end - 1))
        rows = np.arange(len(layers))[::-1]  # not all of them in the order of the layers
        brackets = Brackets.of(*zip(*(ends[row] for row in rows), strict=True))
        asked = np.full(len(rows), key_of(key, dtype)), np.array(places)[rows], brackets, [regions[row] for row in rows]
        indices = np.full((len(rows), 40), -1) if num_slots == 1 else None
        found = operation(layers, rows, *asked, num_slots, indices)
        for place, (row, shift, counts) in enumerate(
            zip(rows, brackets.shifts(num_slots), found.tolist(), strict=True)
        ):
            layer, (first, begin, end, last) = layers[row], places[row]
            is_kept = torch.ones(layer.weight.shape, dtype=torch.bool)
            if layer.mask is not None:
                is_kept = BitMask(layer.mask, layer.weight.shape).to_bool()
            is_match = (layer.weight.isnan() if key != key else layer.weight.abs() == key) & is_kept
            in_order = Layer(is_match, None, layer.is_channels_last).tensor.reshape(-1)
            slots = (indices_of[row][begin:end][in_order[begin:end]] - ends[row][0]) // 2**shift
            inner = [int((slots == slot).sum()) for slot in range(num_slots)]
            assert counts == [int(in_order[first:begin].sum()), *inner, int(in_order[end:last].sum())]
            if indices is not None:
                # As many as there is room for, in any order.
                own = sorted(set(indices[place].tolist()) - {-1})
                ties_here = (indices_of[row][begin:end][in_order[begin:end]] - ends[row][0]).tolist()
                assert len(own) == min(len(ties_here), 40)
                assert set(own) <= set(ties_here)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_count_is_the_oracles(kernels: str, dtype: torch.dtype) -> None:
    weights = [adversarial_cases(n, dtype)["any_bits"] for n in (1, 7, 16_384, 50_001)]
    layers = [Layer(weight, random_mask(weight.numel(), 0.5)) for weight in weights]
    layers[1] = Layer(weights[1], None)
    middle, device = key_of(1.0, dtype), device_of(kernels)
    for lo, hi in ((0, largest_key(dtype)), (middle, middle + 300), (middle, middle - 1)):
        brackets = Brackets.of([lo] * 4, [hi] * 4)
        candidates = [torch.zeros(n, dtype=dtype, device=device) for n in (0, 7, 20_000, 1)]
        found = choose(kernels, device).count([on(device, layer) for layer in layers], brackets, 64, candidates)
        expected = choose("reference", CPU).count(layers, brackets, 64)
        for column, right in zip(found, expected, strict=True):
            assert np.array_equal(column, right)
        for layer, num_inside, place in zip(layers, found.inside.tolist(), candidates, strict=True):
            if num_inside > place.numel():
                continue
            keys = keys_of(layer.weight)
            inside = (keys >= lo) & (keys <= hi)
            if layer.mask is not None:
                inside &= BitMask(layer.mask, layer.weight.shape).to_bool()
            assert torch.equal(keys_of(place[:num_inside].cpu()).sort().values, keys[inside].sort().values)


def test_ties_are_located_beside_layers_of_which_nothing_is_pruned(kernels: str) -> None:
    device = device_of(kernels)
    weight = torch.randn(N, generator=torch.Generator().manual_seed(0)).bfloat16()
    layers = [on(device, Layer(weight, None))] * 2
    placements, num_prune = [Placement("layer", [whole(N)], 0)] * 2, [N // 2, 0]
    search = Search(
        Communicator(None), choose(kernels, device), layers, [weight.dtype] * 2, placements, [1, 1], num_prune
    )
    middle = key_of(0.67, weight.dtype)
    found = search.find(Brackets.of([middle - 4] * 2, [middle + 4] * 2))
    search.locate_ties(found)
    expected = choose("reference", CPU).select([Layer(weight, None)] * 2, num_prune, [1, 1]).cutoffs
    assert 0 < expected.num_ties_kept[0] < expected.num_ties[0]
    assert torch.equal(
        kept_of([Layer(weight, None)], expected.keys[0], search.tie_indices[:1].tolist()),
        kept_of([Layer(weight, None)], expected.keys[0], expected.tie_indices[:1]),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bins_of_chunks_are_those_of_pieces(dtype: torch.dtype) -> None:
    weights = [adversarial_cases(n, dtype)[case] for n in (7, 16_384, 50_001) for case in ("any_bits", "constant")]
    layers = [Layer(weight, random_mask(weight.numel(), 0.5)) for weight in weights]
    implementation, middle = choose("cpu", CPU), key_of(1.0, dtype)
    chunks = [(i, a) for i, layer in enumerate(layers) for a in range(0, layer.weight.numel(), implementation.chunk)]
    pieces = [piece_of(layers[i], a, min(a + implementation.chunk, layers[i].weight.numel())) for i, a in chunks]
    for lo, hi in ((0, largest_key(dtype)), (middle, middle + 50), (middle, middle)):
        found = np.zeros((len(chunks), 64), np.uint16)
        bins = implementation.count(layers, Brackets.of([lo] * 6, [hi] * 6), 64, None, found).bins
        ends = Brackets.of([lo] * len(chunks), [hi] * len(chunks))
        assert np.array_equal(found, choose("reference", CPU).count(pieces, ends, 64).bins)
        assert np.array_equal(bins, implementation.count(layers, Brackets.of([lo] * 6, [hi] * 6), 64).bins)


def test_weights_that_change_while_they_are_ranked_end_the_search() -> None:
    """Weights that were counted and are gone must not be looked for without end."""

    def count(groups: np.ndarray, brackets: Brackets, most: int) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros((len(groups), 3), np.int64), np.zeros((len(groups), 64), np.int64)

    with pytest.raises(StateError, match="expected weights and masks that stay as they are"):
        find_cutoffs([5], [10], [largest_key(torch.float32)], Brackets.of([3], [7]), count)


def test_an_earlier_threshold_gives_a_bracket_around_it() -> None:
    weight = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    threshold = magnitude_threshold(weight, 50_000, backend="reference")
    brackets = brackets_near([threshold], [50_000], [100_000], [torch.float32])
    assert brackets is not None
    lo, hi = (int(end[0]) for end in brackets)
    value = threshold.value
    assert 0.97 * value < magnitude_of(lo, torch.float32) < value < magnitude_of(hi, torch.float32) < 1.03 * value


@pytest.mark.parametrize(("counts", "are_near"), [([50_000, 9], True), ([50_050, 9], True), ([50_200, 9], False)])
def test_no_bracket_is_tried_where_no_count_is_near(counts: list[int], are_near: bool) -> None:
    weight = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    thresholds = [magnitude_threshold(weight, 50_000, backend="reference"), None]
    brackets = brackets_near(thresholds, counts, [100_000, 10], [torch.float32] * 2)
    assert (brackets is not None) == are_near
    if brackets is not None:
        assert (brackets.lo <= brackets.hi).tolist() == [True, False]


def test_keys_and_magnitudes_are_inverse() -> None:
    for dtype in DTYPES:
        for magnitude in (0.0, float(torch.finfo(dtype).smallest_normal) / 4, 1.5, float("inf")):
            assert magnitude_of(key_of(magnitude, dtype), dtype) == magnitude
        assert key_of(float("nan"), dtype) == largest_key(dtype) == key_of(float("inf"), dtype) + 1
        assert key_of(-0.0, dtype) == 0
        assert key_of(1e300, dtype) == key_of(float("inf") if dtype != torch.float64 else 1e300, dtype)
