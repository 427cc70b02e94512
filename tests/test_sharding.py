"""Parts of a tensor that boxes are, against numpy's own slicing."""

from __future__ import annotations

import numpy as np
import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from gmp_kernels.errors import LayoutError
from gmp_kernels.search.communicator import of_torchrun
from gmp_kernels.search.placement import Placement, Region


@st.composite
def regions(draw):
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    offsets = tuple(draw(st.integers(0, size)) for size in shape)
    return Region(shape, offsets, tuple(draw(st.integers(0, n - at)) for n, at in zip(shape, offsets, strict=True)))


def box(region):
    whole = np.arange(np.prod(region.shape)).reshape(region.shape)
    return whole[tuple(slice(at, at + n) for at, n in zip(region.offsets, region.sizes, strict=True))].ravel()


@given(regions())
def test_flat_indices_of_a_box_are_those_of_its_elements(region):
    expected = box(region)
    assert region.numel == len(expected)
    assert [region.to_global(i) for i in range(region.numel)] == expected.tolist()
    everywhere = np.arange(np.prod(region.shape) + 1)
    assert region.to_local(everywhere).tolist() == np.searchsorted(expected, everywhere).tolist()


@given(regions())
def test_a_box_is_a_run_exactly_if_its_indices_follow_each_other(region):
    expected = box(region)
    is_run = len(expected) == 0 or expected[-1] - expected[0] + 1 == len(expected)
    assert (region.flat_range is not None) == is_run
    if len(expected) and is_run:
        assert region.flat_range == (expected[0], expected[-1] + 1)


def rows(*ranges, of=6):
    return [Region((of, 4), (begin, 0), (end - begin, 4)) for begin, end in ranges]


def test_the_lowest_rank_counts_for_copies_and_runs_are_in_the_order_of_the_layer():
    held = rows((3, 6), (0, 3), (3, 6), (0, 3))
    placements = [Placement("layer", held, rank) for rank in range(4)]
    assert [placement.is_primary for placement in placements] == [True, True, False, False]
    assert [placement.slot for placement in placements] == [1, 0, 1, 0]
    assert all(
        placement.starts == [0, 12] and placement.num_copies == 1 and placement.has_copies for placement in placements
    )


def test_nothing_is_held_where_there_are_fewer_rows_than_ranks():
    placement = Placement("layer", rows((0, 1), (1, 2), (2, 2), of=2), 2)
    assert (placement.region.numel, placement.starts, placement.has_copies) == (0, [0, 4], False)


def test_columns_are_no_runs():
    held = [Region((6, 4), (0, begin), (6, 2)) for begin in (0, 2)]
    assert Placement("layer", held, 1).starts is None


@pytest.mark.parametrize("held", [rows((0, 3), (3, 5)), rows((0, 3), (2, 6))], ids=["missing", "twice"])
def test_layers_that_the_ranks_do_not_hold_between_them_are_refused(held):
    with pytest.raises(LayoutError, match="expected the ranks to hold the 24 weights of 'layer' between them"):
        Placement("layer", held, 0)


def test_layers_of_more_than_2_to_the_31_weights():
    region = Region((1 << 20, 1 << 20), ((1 << 20) - 1, 0), (1, 1 << 20))
    assert region.to_global(region.numel - 1) == (1 << 40) - 1
    assert region.to_local(np.array([(1 << 40) - 1])).tolist() == [(1 << 20) - 1]


def test_no_communicator_keeps_the_group_of_processes_that_have_parted(monkeypatch):
    """Python would end with an abort, now and then: the group's threads would still run."""
    begin = dist.init_process_group
    monkeypatch.setattr(
        dist, "init_process_group", lambda name: begin(name, store=dist.HashStore(), rank=0, world_size=1)
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    with of_torchrun("prune", "") as communicator:
        assert any(isinstance(value, dist.ProcessGroup) for value in vars(communicator).values())
    assert not any(isinstance(value, dist.ProcessGroup) for value in vars(communicator).values())
    assert not dist.is_initialized()
