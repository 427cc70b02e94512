"""Tensors of more elements than 32 bits count, in memory that only a large GPU has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conftest import usable
from on_gpu import GPU, ON_GPU, random_weight
from torch import nn

from gmp_kernels import BitMask, Threshold, apply_masks_, optim, prune_
from gmp_kernels.tools.testing import assert_bitwise_equal

N = 2**31 + 5
# Pieces that are compared with the CPU: the ends, and around where 31 and 32 bits of elements or bytes end.
PIECE = 1 << 16
PIECES = [slice(max(0, middle - PIECE) // 8 * 8, min(N, middle + PIECE)) for middle in (0, 2**29, 2**30, 2**31, N)]


@pytest.fixture(params=ON_GPU)
def gpu(request: pytest.FixtureRequest) -> Iterator[str]:
    """Name of every backend whose tensors are on a GPU; its memory is free before and after."""
    torch.cuda.empty_cache()
    yield usable(request.param)
    torch.cuda.empty_cache()


def needs(gibibytes: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gibibytes << 30:
        pytest.skip(f"needs {gibibytes} GiB of GPU memory, {free >> 30} are free")


def kept_by(threshold: Threshold, weight: torch.Tensor, chunk: int = 1 << 28) -> Iterator[tuple[slice, torch.Tensor]]:
    """The mask that a threshold means, in pieces: what is above it, and of the ties those of lowest index."""
    ties_before = 0
    for start in range(0, weight.numel(), chunk):
        piece = slice(start, start + chunk)
        magnitude = weight[piece].abs()
        tie = magnitude == threshold.value
        rank = ties_before + tie.cumsum(0, dtype=torch.int64)  # from 1
        ties_before += int(tie.sum())
        yield piece, (magnitude > threshold.value) | (tie & (rank <= threshold.num_ties_kept))
    assert ties_before == threshold.num_ties


@pytest.mark.parametrize(("dtype", "gibibytes"), [(torch.bfloat16, 30), (torch.float32, 40)], ids=str)
def test_more_weights_than_32_bits_count(gpu: str, dtype: torch.dtype, gibibytes: int) -> None:
    needs(gibibytes)
    weight = random_weight(N, dtype)
    before = weight.clone()
    result = prune_(weight, sparsity=0.9, backend=gpu)
    assert result.num_pruned == result.num_newly_pruned == [round(0.9 * N)]
    (threshold,), (mask,) = result.thresholds, result.masks
    kept = mask.to_bool()
    assert mask.num_kept == N - round(0.9 * N)
    for piece, expected in kept_by(threshold, before):
        assert torch.equal(kept[piece], expected)
        assert torch.equal(weight[piece], torch.where(expected, before[piece], 0.0))
    before[-1] = float("nan")
    assert int(prune_(before, num_prune=5, nonfinite="keep", backend=gpu).num_pruned[0]) == 5
    apply_masks_(before, mask, backend=gpu)
    assert int((before != 0).sum()) == int(kept.sum())  # a NaN is not 0 either, so it counts if it was kept


def mask_of(n: int, sparsity: float) -> BitMask:
    """A random mask, made in pieces: at once it would take eight bytes for every weight."""
    generator = torch.Generator(GPU).manual_seed(1)
    chunk = 1 << 27
    packed = [
        BitMask.from_bool(torch.rand(min(chunk, n - start), device=GPU, generator=generator) >= sparsity).packed
        for start in range(0, n, chunk)
    ]
    return BitMask(torch.cat(packed), (n,))


def part_of(mask: BitMask, piece: slice) -> BitMask:
    """The mask of a piece that begins at a multiple of 8."""
    return BitMask(mask.packed[piece.start // 8 : -(-piece.stop // 8)].clone(), (piece.stop - piece.start,))


@pytest.mark.parametrize("compact", [False, True], ids=["dense", "compact"])
def test_a_step_of_more_weights_than_32_bits_count(gpu: str, compact: bool) -> None:
    needs(42)
    options = {"lr": 0.01, "weight_decay": 0.1}
    parameter = nn.Parameter(random_weight(N))
    parameter.grad = random_weight(N, seed=2)
    mask = mask_of(N, 0.9)
    apply_masks_(parameter.detach(), mask, backend=gpu)
    pieces = [nn.Parameter(parameter.detach()[piece].cpu()) for piece in PIECES]
    for p, piece in zip(pieces, PIECES, strict=True):
        p.grad = parameter.grad[piece].cpu()
    optimizer = optim.AdamW([parameter], compact_state=compact, backend=gpu, **options)
    optimizer.set_masks({parameter: mask})
    expected = optim.AdamW(pieces, backend="cpu", **options)
    expected.set_masks({p: part_of(mask, piece).to("cpu") for p, piece in zip(pieces, PIECES, strict=True)})
    for _ in range(3):  # the second and the third find what the one before has left in the state
        optimizer.step()
        expected.step()
    for p, piece in zip(pieces, PIECES, strict=True):
        assert_bitwise_equal(
            parameter.detach()[piece].cpu(), p.detach(), f"weights from {piece.start} to {piece.stop} of {N}"
        )
    for start in range(0, N, 1 << 28):
        piece = slice(start, min(N, start + (1 << 28)))
        pruned = ~part_of(mask, piece).to_bool()
        assert not parameter.detach()[piece][pruned].any()
