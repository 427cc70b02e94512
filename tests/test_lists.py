"""Lists that a selection keeps of the keys in its bracket: their length, and what is in them (see counter.cuh)."""

from __future__ import annotations

import pytest
import torch
from conftest import simt_extension

from gmp_kernels import BitMask, checks, magnitude_threshold, prune_
from gmp_kernels.backends import choose
from gmp_kernels.backends.cuda import selection_tables
from gmp_kernels.backends.cuda.selection_tables import SelectionTables
from gmp_kernels.backends.types import Layer
from gmp_kernels.tools.bench.gpu import resnet50_sizes
from gmp_kernels.tools.testing import assert_same_pruning

_simt = simt_extension()


def capacity_of(layers: list[Layer], group_sizes: list[int]) -> int:
    """Keys that there is room for in the list of each chunk."""
    return int(SelectionTables(_simt, 4, layers, group_sizes).tables.view(_simt.TABLES)["capacity"][0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_keys_of_16_bits_are_counted_where_lists_of_them_would_overflow(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Of many layers, each has room for few keys of so many that are alike."""
    generator = torch.Generator().manual_seed(0)
    layers = [(torch.randn(5 * 16384, generator=generator) * 0.02).to(dtype) for _ in range(4)]
    monkeypatch.setattr(selection_tables, "MEMORY_BYTES", 17_000)
    checks.forget()
    assert 64 < capacity_of([Layer(layer, None) for layer in layers], [1] * 4) < 200 < 0.014 * 16384
    _simt.take_traffic()
    prune_(layers, sparsity=0.9, backend="simt")
    moved = sum(row[2] + row[3] for row in _simt.take_traffic())
    # Two reads, new weights and masks, samples and the chunks of the cuts; lists that overflow cost one more read.
    assert moved / sum(layer.numel() for layer in layers) < 2 + 2 + 2.125 + 1.3
    assert_same_pruning(layers, num_prune=[80_000] * 4, backend="simt")


@pytest.mark.parametrize("std", [0.017, 0.02, 0.03, 1.0])
def test_lists_are_as_short_as_the_sample_allows(std: float) -> None:
    """Bins of the sample are wider than the bracket: where in them it ends is interpolated."""
    n = 1 << 20
    weight = torch.randn(n, generator=torch.Generator().manual_seed(0)) * std
    _simt.take_traffic()
    magnitude_threshold(weight, round(0.9 * n), backend="simt")
    (listed,) = (row[3] / weight.itemsize / n for row in _simt.take_traffic() if "count<" in row[0])
    assert 0.012 < listed < 0.017  # 6 standard deviations of a rank among 16384


def give_room(monkeypatch: pytest.MonkeyPatch, capacity: int, layers: list[Layer]) -> None:
    """Have lists of all chunks hold so many keys each, or a few less."""
    key_bytes = sum(-(-layer.weight.numel() // 16384) * layer.weight.itemsize for layer in layers)
    monkeypatch.setattr(selection_tables, "MEMORY_SHARE", 0.0)
    monkeypatch.setattr(selection_tables, "MEMORY_BYTES", 6_000 + capacity * key_bytes)
    checks.forget()
    assert capacity - 20 < capacity_of(layers, [len(layers)]) <= capacity + 20


def loaded_by(layers: list[Layer], num_prune: int) -> dict[str, int]:
    """Bytes that a selection of one group loads, by kernel."""
    _simt.take_traffic()
    found = choose("simt", torch.device("cpu")).select(layers, [num_prune], [len(layers)]).cutoffs
    assert found.num_below[-1] + found.num_ties[-1] - found.num_ties_kept[-1] == num_prune
    return {row[0].partition("<")[0].removeprefix("kernels::"): row[2] for row in _simt.take_traffic()}


@pytest.mark.parametrize(("capacity", "eights"), [(420, 2048), (300, 4096), (190, 8192)])
def test_a_sample_is_as_large_as_the_lists_need(monkeypatch: pytest.MonkeyPatch, capacity: int, eights: int) -> None:
    """Lists that overflow would have all weights read once more; eights that nobody needs cost their time."""
    n = 1 << 20
    layers = [Layer(torch.randn(n, generator=torch.Generator().manual_seed(0)), None)]
    give_room(monkeypatch, capacity, layers)
    loaded = loaded_by(layers, round(0.9 * n))
    assert 0.95 * eights < loaded["begin"] / 32 <= eights
    assert loaded["count"] < 1.1 * 4 * n


@pytest.mark.parametrize("n", [256, 2000, 16384])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 1.0])
def test_a_layer_of_one_chunk_is_found_in_a_bin_or_two(n: int, share: float) -> None:
    """Brackets of samples so small would hold a third of it, and take more passes than those of all other layers."""
    layers = [Layer(torch.randn(n, generator=torch.Generator().manual_seed(0)), None)]
    loaded = loaded_by(layers, max(1, round(share * n)))
    assert loaded["begin"] == -(-4 * n // 32) * 32  # whole sectors
    assert loaded["count"] <= 1.07 * 4 * n + 64


def test_what_is_pruned_already_needs_no_room_in_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    n = 1 << 20
    weight = torch.randn(n, generator=torch.Generator().manual_seed(0))
    mask = BitMask.from_bool(weight.abs() > weight.abs().sort().values[round(0.9 * n) - 200])
    layers = [Layer(weight, mask.packed)]
    give_room(monkeypatch, 300, layers)
    loaded = loaded_by(layers, round(0.9 * n))
    assert loaded["begin"] / 32 < 2 * 2048  # of weights, and of the mask
    assert loaded["count"] < 1.1 * 4 * n + n / 8


def test_layers_that_differ_get_a_sample_for_the_one_with_most_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of all layers have half as much in the bracket, on average, as those of one layer."""
    n = 1 << 19
    generator = torch.Generator().manual_seed(0)
    layers = [Layer(torch.randn(n, generator=generator) * std, None) for std in (1.0, 0.01)]
    give_room(monkeypatch, 420, layers)
    loaded = loaded_by(layers, round(0.9 * 2 * n))
    assert loaded["begin"] / 32 > 0.95 * 8192
    assert loaded["count"] < 1.1 * 4 * 2 * n


def test_the_layers_of_a_model_have_room_for_lists_and_flags() -> None:
    """Bins have a place for each group, not for each block, and leave many layers enough for both."""
    layers = [Layer(torch.empty(n), torch.empty(-(-n // 8), dtype=torch.uint8)) for n in resnet50_sizes()]
    taken = SelectionTables(_simt, 132, layers, [1] * len(layers), prunes=True)
    # 8 standard deviations wide, of a large sample
    assert taken.tables.view(_simt.TABLES)["capacity"] > 1.25 * 8 * 0.3 / 65536**0.5 * 16384
    assert taken.view(taken.rows)["layers"]["touched"].all()
