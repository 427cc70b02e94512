"""How the CUDA kernels deal the chunks of many groups out to blocks (see csrc/cuda/deal.cuh): the share of each, and
that any share gives the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby

import pytest
import torch
from conftest import simt_extension
from hypothesis import given, settings
from hypothesis import strategies as st

from gmp_kernels import BitMask, checks
from gmp_kernels.backends import choose
from gmp_kernels.backends.cuda.selection_tables import SelectionTables
from gmp_kernels.backends.types import Layer
from gmp_kernels.tools.testing import DTYPES, adversarial_cases, assert_same_pruning

_simt = simt_extension()
CPU = torch.device("cpu")
CHUNK, READERS = _simt.CHUNK, _simt.READERS


@pytest.fixture(scope="module")
def resize() -> Iterator[Callable[[int], None]]:
    """Have the device be one of so many multiprocessors."""
    simt = choose("simt", CPU)
    own = simt._size

    def set_size(multiprocessors: int) -> None:
        simt._size = lambda index: multiprocessors
        checks.forget()  # templates are made for a number of blocks

    yield set_size
    _simt.set_seed(0)
    simt._size = own
    checks.forget()


def runs_of(sizes: list[int]) -> list[int]:
    """Weights of each run of chunks that one block takes of one group, in order.

    Where all weights of a group tie, a block leaves their number in place of the size of its first list.
    """
    layers = [Layer(torch.ones(n), None) for n in sizes]
    tables = choose("simt", CPU).select(layers, [0 if n == 1 else n // 2 for n in sizes], [1] * len(sizes))
    assert isinstance(tables, SelectionTables)
    (list_counts,) = tables.tables.view(_simt.TABLES)["list_counts"]
    left_at = tables.buffer.view(torch.int32)[(list_counts - tables.buffer.data_ptr()) // 4 :]
    runs, chunk = [], 0
    for n in sizes:
        end = chunk - (-n // CHUNK)
        while chunk < end:
            runs.append(int(left_at[chunk]))
            chunk -= -runs[-1] // CHUNK
        assert chunk == end
    return runs


def dealt(sizes: list[int], num_blocks: int) -> list[list[list[int]]]:
    """The same by block and group: the beginning of each group but the first takes a place, as each chunk does."""
    chunks = [(g, min(CHUNK, n - i)) for g, n in enumerate(sizes) for i in range(0, n, CHUNK)]
    padding = len(chunks) > num_blocks
    num_places = len(chunks) + padding * (len(sizes) - 1)
    blocks: list[list[list[int]]] = []
    for b in range(num_blocks):
        first, last = b * num_places // num_blocks, (b + 1) * num_places // num_blocks
        own = [(g, n) for c, (g, n) in enumerate(chunks) if first <= c + padding * g < last]
        blocks.append([[n for _, n in run] for _, run in groupby(own, key=lambda chunk: chunk[0])])
    return blocks


def test_many_small_groups_leave_their_block_less_of_the_large_ones(resize: Callable[[int], None]) -> None:
    resize(1)
    assert READERS == 3
    # Six and six chunks if chunks alone counted, behind a block that meets six groups.
    assert runs_of([10] * 6 + [12 * CHUNK]) == [10] * 6 + [4 * CHUNK, 8 * CHUNK]
    # Where there is a block for each chunk, it takes one.
    assert runs_of([2 * CHUNK, 10]) == [CHUNK, CHUNK, 10]
    # One group is dealt out evenly.
    assert runs_of([6 * CHUNK]) == [2 * CHUNK] * 3


small_or_large = st.integers(2, 600) | st.builds(
    lambda chunks, more: CHUNK * chunks + more, st.integers(0, 5), st.integers(2, 9)
)


@settings(max_examples=40, deadline=None)
@given(st.lists(small_or_large, min_size=1, max_size=25), st.integers(1, 5))
def test_each_group_counts_as_one_chunk_more(
    resize: Callable[[int], None], sizes: list[int], multiprocessors: int
) -> None:
    num_chunks = sum(-(-n // CHUNK) for n in sizes)
    blocks = dealt(sizes, min(READERS * multiprocessors, num_chunks))
    resize(multiprocessors)
    assert runs_of(sizes) == [sum(run) for block in blocks for run in block]


TREES = {
    "small between large": [3 * CHUNK + 5, *[64] * 9, 2 * CHUNK, 300, 7, 4 * CHUNK + 1, *[64, 2048] * 4],
    "small ones alone": [1, 64, 5, 300] * 6,
    "fewer chunks than blocks": [CHUNK + 3, 64],
    "one large": [7 * CHUNK + 9],
    "large behind small": [*[128] * 11, 8 * CHUNK],
    "two large that go on": [*[64] * 4, 4 * CHUNK, 17 * CHUNK],
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tree", TREES)
def test_any_share_gives_the_same_bits(
    resize: Callable[[int], None], tree: str, dtype: torch.dtype, scope: str
) -> None:
    """Groups more than blocks and fewer, blocks with nothing to do; ties that go on from block to block."""
    generator = torch.Generator().manual_seed(0)
    sizes = TREES[tree]
    masks = [BitMask.from_bool(torch.rand(n, generator=generator) < 0.4) for n in sizes]
    for multiprocessors in (1, 3, 5):
        resize(multiprocessors)
        _simt.set_seed(multiprocessors)  # blocks come in any order
        for case in ("random", "small_integers", "constant"):
            layers = [adversarial_cases(n, dtype)[case] for n in sizes]
            for given_masks in (None, masks):
                assert_same_pruning(layers, masks=given_masks, sparsity=0.7, scope=scope, backend="simt")
