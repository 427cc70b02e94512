"""Patterns and scores in prune_: every backend against the oracle, bit by bit, and every refusal by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gmp_kernels import BitMask, DTypeError, LayoutError, NonFiniteError, ShapeError, SparsityError, prune_
from gmp_kernels.patterns import NM, Block, Pattern, Unstructured
from gmp_kernels.tools.testing import DTYPES, GuardedCopy, adversarial_cases, assert_bitwise_equal

SIZES = {
    "of 2": (NM(1, 2), (6, 10)),
    "2:4": (NM(2, 4), (16, 132)),
    "1:4": (NM(1, 4), (5, 20)),
    "3:4": (NM(3, 4), (5, 20)),
    "4:8": (NM(4, 8), (9, 64)),
    "odd": (NM(2, 5), (7, 35)),
    "of 32": (NM(30, 32), (3, 96)),
    "rows of transposed": (NM(2, 4, dim=0), (12, 35)),
    "conv": (NM(2, 4), (6, 8, 3, 3)),
    "conv dim 0": (NM(3, 7, dim=0), (14, 5, 3, 3)),
    "kernel": (NM(1, 3, dim=2), (4, 5, 3, 2)),
    "block": (Block(4, 4), (12, 20)),
    "odd block": (Block(3, 5), (9, 35)),
    "row block": (Block(1, 16), (3, 48)),
    "column block": (Block(8, 1), (16, 7)),
    "conv block": (Block(2, 3), (6, 5, 3, 3)),
    "kept rows": (Unstructured(3), (8, 50)),
    "long rows": (Unstructured(2), (5, 700)),
    "conv rows": (Unstructured(4), (6, 7, 3, 3)),
}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def cases() -> list[Any]:
    return [
        pytest.param(pattern, shape, memory_format, id=f"{name}, {word}")
        for name, (pattern, shape) in SIZES.items()
        for word, memory_format in FORMATS.items()
        if word == "contiguous" or len(shape) == 4
    ]


# Backends that run kernels for a GPU on the host, which takes a hundred times as long.
SLOW = "simt", "triton"


def steps(most: int, unit: int, backend: str) -> list[int]:
    """Counts on the way from nothing to all that the pattern allows."""
    return [share * most // 8 // unit * unit for share in ((1, 6, 8) if backend in SLOW else (0, 1, 1, 3, 6, 8))]


@pytest.mark.parametrize(("pattern", "shape", "memory_format"), cases())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.sampled(2)
def test_prunes_what_the_oracle_prunes(
    backend: str,
    device: torch.device,
    pattern: Pattern,
    shape: tuple[int, ...],
    memory_format: torch.memory_format,
    dtype: torch.dtype,
) -> None:
    given = adversarial_cases(int(np.prod(shape)), dtype)
    del given["any_bits"]
    if backend in SLOW:
        given = {name: given[name] for name in ("small_integers", "mostly_zeros", "bfloat16_ties", "every_exponent")}
    weights = [w.view(shape).contiguous(memory_format=memory_format) for w in given.values()]
    expected = [w.clone(memory_format=torch.preserve_format) for w in weights]
    weights = [w.to(device, copy=True, memory_format=torch.preserve_format) for w in weights]
    masks, oracle = None, None
    for count in steps(pattern.most(shape), pattern.unit, backend):
        result = prune_(weights, num_prune=count, pattern=pattern, masks=masks, backend=backend)
        reference = prune_(expected, num_prune=count, pattern=pattern, masks=oracle, backend="reference")
        masks, oracle = result.masks, reference.masks
        assert [mask.to("cpu") for mask in masks] == oracle
        assert result.num_pruned == reference.num_pruned == [count] * len(weights)
        assert result.num_newly_pruned == reference.num_newly_pruned
        assert repr(result.thresholds) == repr(reference.thresholds)
        for name, weight, wanted, mask in zip(given, weights, expected, oracle, strict=True):
            assert_bitwise_equal(weight.cpu(), wanted, name)
            assert not pattern.broken(mask.to_bool()).any(), name


@pytest.mark.parametrize(("pattern", "shape", "memory_format"), cases())
def test_scores_rank_instead_of_magnitudes(
    backend: str, device: torch.device, pattern: Pattern, shape: tuple[int, ...], memory_format: torch.memory_format
) -> None:
    n = int(np.prod(shape))
    weights = torch.arange(1.0, n + 1).bfloat16().view(shape).contiguous(memory_format=memory_format)
    cases_ = adversarial_cases(n, torch.float32)
    scores = [cases_[name].abs().view(shape) for name in ("random", "constant", "small_integers", "mostly_zeros")]
    found = [weights.to(device, copy=True, memory_format=torch.preserve_format) for _ in scores]
    expected = [weights.clone(memory_format=torch.preserve_format) for _ in scores]
    count = pattern.most(shape) // 2 // pattern.unit * pattern.unit
    given = [score.to(device) for score in scores]
    result = prune_(found, num_prune=count, pattern=pattern, scores=given, backend=backend)
    reference = prune_(expected, num_prune=count, pattern=pattern, scores=scores, backend="reference")
    assert [mask.to("cpu") for mask in result.masks] == reference.masks
    for weight, wanted, score, untouched in zip(found, expected, given, scores, strict=True):
        assert_bitwise_equal(weight.cpu(), wanted, "weights")
        assert_bitwise_equal(score.cpu(), untouched, "scores")


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(2, 4, dim=0), Block(4, 4), Unstructured(4)], ids=str)
def test_large_layers_in_many_chunks(backend: str, device: torch.device, pattern: Pattern) -> None:
    shape = (132, 516) if backend in ("reference", "triton", "simt") else (260, 2060)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found, expected = weight.to(device, copy=True), weight.clone()
    masks, oracle = None, None
    for count in steps(pattern.most(shape), pattern.unit, backend)[1:]:
        masks = prune_(found, num_prune=count, pattern=pattern, masks=masks, backend=backend).masks
        oracle = prune_(expected, num_prune=count, pattern=pattern, masks=oracle, backend="reference").masks
        assert masks[0].to("cpu") == oracle[0]
    assert_bitwise_equal(found.cpu(), expected, "weights")


@st.composite
def small_matrices(draw: st.DrawFn) -> tuple[NM, torch.Tensor, torch.Tensor]:
    """A pattern, weights with many ties, and a mask that keeps to it."""
    of = draw(st.integers(2, 9))
    pattern = NM(draw(st.integers(1, of - 1)), of)
    shape = draw(st.integers(1, 5)), draw(st.integers(1, 6)) * of
    values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 1e-40])
    n = shape[0] * shape[1]
    weight = torch.tensor(draw(st.lists(values, min_size=n, max_size=n))).view(shape)
    kept = torch.tensor(draw(st.lists(st.booleans(), min_size=n, max_size=n))).view(-1, of)
    order = torch.tensor(draw(st.permutations(range(of))))
    kept[:, order[: pattern.keep]] = True
    return pattern, weight, kept.view(shape)


@given(case=small_matrices(), share=st.floats(0, 1))
def test_groups_that_are_partly_pruned(
    backend: str, device: torch.device, case: tuple[NM, torch.Tensor, torch.Tensor], share: float
) -> None:
    pattern, weight, kept = case
    most, before = pattern.most(weight.shape), int((~kept).sum())
    found, expected = weight.to(device, copy=True), weight.clone()
    options = {"num_prune": round(share * most), "pattern": pattern}
    result = prune_(found, masks=BitMask.from_bool(kept.to(device)), backend=backend, **options)
    reference = prune_(expected, masks=BitMask.from_bool(kept), backend="reference", **options)
    assert result.masks[0].to("cpu") == reference.masks[0]
    assert result.num_pruned == [max(before, options["num_prune"])]
    assert_bitwise_equal(found.cpu(), expected, "weights")


def test_groups_of_equal_weights_keep_the_lowest_index(backend: str, device: torch.device) -> None:
    weight = torch.ones(2, 8, device=device)
    result = prune_(weight, sparsity=0.5, pattern=NM(2, 4), backend=backend)
    assert result.masks[0].to_bool().cpu().int().tolist() == [[1, 1, 0, 0, 1, 1, 0, 0]] * 2
    weight = torch.ones(4, 8, device=device)
    result = prune_(weight, num_prune=16, pattern=Block(2, 4), backend=backend)
    assert result.masks[0].to_bool().cpu().int().tolist() == [[1] * 8] * 2 + [[0] * 8] * 2


def test_the_ramp_takes_the_smallest_of_all_groups_first(backend: str, device: torch.device) -> None:
    weight = torch.tensor([[8.0, 7, 1, 2, 6, 5, 4, 3]], device=device)
    result = prune_(weight, num_prune=1, pattern=NM(2, 4), backend=backend)
    assert weight.tolist() == [[8, 7, 0, 2, 6, 5, 4, 3]]
    result = prune_(weight, num_prune=2, pattern=NM(2, 4), masks=result.masks, backend=backend)
    assert weight.tolist() == [[8, 7, 0, 0, 6, 5, 4, 3]]
    assert result.thresholds[0].value == 2.0
    result = prune_(weight, num_prune=4, pattern=NM(2, 4), masks=result.masks, backend=backend)
    assert weight.tolist() == [[8, 7, 0, 0, 6, 5, 0, 0]]
    assert result.thresholds[0].value == torch.inf  # the pattern alone decides


def test_ranks_all_layers_together(backend: str, device: torch.device) -> None:
    shapes = {"a": (8, 12), "b": (4, 8, 3, 3), "c": (6, 20)}
    patterns: list[Pattern | None] = [NM(2, 4), NM(1, 4), None]
    weights = [torch.randn(s, generator=torch.Generator().manual_seed(len(n))) for n, s in shapes.items()]
    weights[1] = weights[1].to(memory_format=torch.channels_last)
    found = [w.to(device, copy=True, memory_format=torch.preserve_format) for w in weights]
    options: dict[str, Any] = {"num_prune": 200, "pattern": patterns, "scope": "global"}
    result = prune_(found, backend=backend, **options)
    reference = prune_(weights, backend="reference", **options)
    assert sum(result.num_pruned) == 200
    assert result.num_pruned == reference.num_pruned
    assert result.thresholds == reference.thresholds
    assert [mask.to("cpu") for mask in result.masks] == reference.masks


@pytest.mark.parametrize("pattern", [NM(2, 4), Block(4, 4), Unstructured(2)], ids=str)
@pytest.mark.parametrize("offset", [1, 3])
def test_views_at_odd_offsets(backend: str, device: torch.device, pattern: Pattern, offset: int) -> None:
    weight = torch.randn(8, 36, generator=torch.Generator().manual_seed(2))
    copy = GuardedCopy(weight.to(device), offset)
    count = pattern.most(weight.shape) // 2 // pattern.unit * pattern.unit
    result = prune_(copy.view, num_prune=count, pattern=pattern, backend=backend)
    reference = prune_(weight, num_prune=count, pattern=pattern, backend="reference")
    copy.assert_intact()
    assert result.masks[0].to("cpu") == reference.masks[0]
    assert_bitwise_equal(copy.view.cpu(), weight, "weights")


@pytest.mark.parametrize("pattern", [NM(2, 4), Block(4, 4), Unstructured(2), None], ids=str)
@pytest.mark.parametrize("is_full", [False, True])
def test_nan_is_found_wherever_it_is(
    backend: str, device: torch.device, pattern: Pattern | None, is_full: bool
) -> None:
    weight = torch.randn(8, 36, generator=torch.Generator().manual_seed(3)).to(device)
    weight[5, 7] = torch.nan  # the largest in its group, and so protected
    before = weight.clone()
    count = 64 if not is_full or pattern is None else pattern.most(weight.shape)
    with pytest.raises(NonFiniteError, match=rf"flat index {5 * 36 + 7}"):
        prune_(weight, num_prune=count, pattern=pattern, backend=backend)
    assert_bitwise_equal(weight, before, "weights")
    mask = prune_(weight, num_prune=64, pattern=pattern, nonfinite="keep", backend=backend).masks[0]
    assert mask.to_bool()[5, 7]


def test_sums_that_overflow_are_no_nan(backend: str, device: torch.device) -> None:
    weight = torch.full((4, 8), 3e38, device=device)
    weight[:, :4] = 1.0
    result = prune_(weight, num_prune=16, pattern=Block(4, 4), backend=backend)
    assert weight[:, :4].count_nonzero() == 0
    assert result.num_pruned == [16]


@pytest.mark.parametrize(
    ("pattern", "options", "error", "words"),
    [
        (NM(2, 4), {"sparsity": 0.6}, SparsityError, "at most 0.5 .*weights.0.*2:4"),
        (NM(2, 4), {"num_prune": 49}, SparsityError, "at most 0.5"),
        (NM(2, 5), {"sparsity": 0.1}, ShapeError, "not divisible by 5"),
        (NM(2, 4, dim=2), {"sparsity": 0.1}, ShapeError, "no dim 2"),
        (Block(3, 3), {"sparsity": 0.1}, ShapeError, "no whole number of blocks"),
        (Block(2, 2), {"num_prune": 7}, SparsityError, "give 4 or 8"),
        (Unstructured(13), {"sparsity": 0.1}, ShapeError, "rows of 12"),
        (Unstructured(6), {"sparsity": 0.6}, SparsityError, "at most 0.5"),
        ("2:4", {"sparsity": 0.1}, TypeError, "expected a pattern such as"),
        ([NM(2, 4), None], {"sparsity": 0.1}, ShapeError, "one pattern, or one per weight"),
    ],
)
def test_refuses_what_a_pattern_does_not_allow(
    backend: str, device: torch.device, pattern: Any, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    weight = torch.randn(8, 12, device=device)
    before = weight.clone()
    with pytest.raises(error, match=words):
        prune_(weight, pattern=pattern, backend=backend, **options)
    assert_bitwise_equal(weight, before, "weights")


def test_names_all_layers_that_do_not_fit(device: torch.device) -> None:
    weights = [torch.randn(4, n, device=device) for n in (8, 9, 10)]
    with pytest.raises(ShapeError, match=r"'b'.*9.*'c'.*10.*ignore=\['b', 'c'\]"):
        prune_(weights, sparsity=0.1, pattern=NM(2, 4), names=["a", "b", "c"])


def test_refuses_masks_that_break_the_pattern(backend: str, device: torch.device) -> None:
    kept = torch.ones(4, 8, dtype=torch.bool, device=device)
    kept[1, 4:7] = False
    weight = torch.randn(4, 8, device=device)
    before = weight.clone()
    for pattern, words in ((NM(2, 4), "group 3"), (Block(2, 4), "block 1")):
        with pytest.raises(SparsityError, match=words):
            prune_(weight, num_prune=8, masks=BitMask.from_bool(kept), pattern=pattern, backend=backend)
    assert_bitwise_equal(weight, before, "weights")


@pytest.mark.parametrize(
    ("scores", "error", "words"),
    [
        (torch.full((4, 8), -1.0), SparsityError, "no negative number"),
        (torch.full((4, 8), torch.nan), SparsityError, "no NaN"),
        (torch.ones(8, 4), ShapeError, r"\(4, 8\)"),
        (torch.ones(4, 8, dtype=torch.int64), DTypeError, "the scores of weights"),
        ([torch.ones(4, 8)] * 2, ShapeError, "got 2 tensors"),
    ],
)
def test_refuses_scores_that_rank_nothing(
    backend: str, device: torch.device, scores: Any, error: type[Exception], words: str
) -> None:
    weight = torch.randn(4, 8, device=device)
    before = weight.clone()
    given = [s.to(device) for s in scores] if isinstance(scores, list) else scores.to(device)
    with pytest.raises(error, match=words):
        prune_(weight, num_prune=8, scores=given, backend=backend)
    assert_bitwise_equal(weight, before, "weights")


def test_refuses_scores_in_the_memory_of_the_weights(backend: str, device: torch.device) -> None:
    weight = torch.rand(4, 8, device=device)
    with pytest.raises(LayoutError, match="share no memory"):
        prune_(weight, num_prune=8, scores=weight, backend=backend)


def test_refuses_blocks_beside_single_weights_in_global_scope(device: torch.device) -> None:
    weights = [torch.randn(4, 8, device=device) for _ in range(2)]
    with pytest.raises(ShapeError, match="blocks of one size"):
        prune_(weights, num_prune=16, scope="global", pattern=[Block(2, 2), None])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: NM(4, 2), "1 <= keep < of <= 32"),
        (lambda: NM(2, 33), "of=33"),
        (lambda: NM(2, 4, dim=-1), "dim of 0 or more"),
        (lambda: Block(1, 1), "not both 1"),
        (lambda: Block(33, 1), "33 x 1"),
        (lambda: Unstructured(-1), "0 or more"),
    ],
)
def test_refuses_patterns_that_are_none(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_refuses_numbers_that_are_no_integers() -> None:
    with pytest.raises(TypeError, match="an integer keep"):
        NM(2.0, 4)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="an integer rows"):
        Block(True, 4)


def test_the_hardware_format_takes_the_result() -> None:
    """Torch converts a weight to the 2:4 format of NVIDIA's kernels and back, which loses what is no 2:4."""
    from torch.sparse import _semi_structured_conversions as conversions

    weight = torch.randn(64, 128).half()
    prune_(weight, sparsity=0.5, pattern=NM(2, 4))
    compressed, meta = conversions.sparse_semi_structured_from_dense_cutlass(weight)
    assert compressed.shape == (64, 64)
    assert_bitwise_equal(conversions.sparse_semi_structured_to_dense_cutlass(compressed, meta), weight, "weights")
