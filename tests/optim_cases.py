"""The optimizers under every option, and what they are compared with: torch.optim, held to the masks by hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch

from gmp_kernels import BitMask, optim, prune_
from gmp_kernels.tools.testing import assert_bitwise_equal

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {"lr": 0.1}),
    "sgd_decay": ("SGD", {"lr": 0.1, "weight_decay": 0.02}),
    "momentum": ("SGD", {"lr": 0.05, "momentum": 0.9}),
    "momentum_maximize": (
        "SGD",
        {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1, "maximize": True},
    ),
    "nesterov": ("SGD", {"lr": 0.05, "momentum": 0.8, "nesterov": True, "weight_decay": 0.01}),
    "adam": ("Adam", {"lr": 0.01}),
    "adam_l2": ("Adam", {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-3}),
    "adam_short_betas": ("Adam", {"lr": 0.01, "betas": (0.4, 0.5), "maximize": True}),
    "adam_half_beta": ("Adam", {"lr": 0.01, "betas": (0.5, 0.9)}),
    "adam_no_betas": ("Adam", {"lr": 0.01, "betas": (0.0, 0.0)}),
    "adam_decoupled": ("Adam", {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    "amsgrad": ("Adam", {"lr": 0.01, "betas": (0.9, 0.7), "amsgrad": True, "weight_decay": 0.01}),
    "adamw": ("AdamW", {"lr": 0.01}),
    "adamw_amsgrad": ("AdamW", {"lr": 0.01, "amsgrad": True, "weight_decay": 0.2, "maximize": True}),
}

SHAPES = [(24, 33), (7,), (65, 9)]
LAYOUTS = pytest.mark.parametrize("compact", [False, True], ids=["dense", "compact"])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from a second thread, and waiting for it is most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def masked(case: str, params: Any, **options: Any) -> optim.SGD | optim.Adam:
    """The optimizer of this package for ``case``."""
    name, arguments = CASES[case]
    return getattr(optim, name)(params, **{**arguments, **options})


def plain(case: str, params: Any, **options: Any) -> torch.optim.Optimizer:
    """torch's optimizer for ``case``, in the loop over single tensors whose arithmetic is the reference."""
    name, arguments = CASES[case]
    return getattr(torch.optim, name)(params, **{**arguments, "foreach": False, **options})


def parameters(
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in shapes]


def clones(tensors: Sequence[torch.Tensor]) -> list[Any]:
    return [torch.nn.Parameter(t.detach().clone()) for t in tensors]


def random_gradients(params: Sequence[torch.Tensor], step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(p.shape, generator=generator).to(p) for p in params]


def random_masks(params: Sequence[torch.Tensor], sparsity: float, seed: int = 0) -> dict[torch.Tensor, BitMask]:
    generator = torch.Generator().manual_seed(seed)
    kept = [torch.rand(p.shape, generator=generator) >= sparsity for p in params]
    return {p: BitMask.from_bool(k.to(p.device)) for p, k in zip(params, kept, strict=True)}


def set_gradients(
    params: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor], masks: Mapping[torch.Tensor, BitMask]
) -> None:
    """Hand out copies of the gradients, with NaN and Inf wherever a mask says that they do not matter."""
    for p, gradient in zip(params, gradients, strict=True):
        p.grad = gradient.clone(memory_format=torch.preserve_format)
        if p in masks:
            pruned = ~masks[p].to_bool()
            p.grad[pruned] = float("nan")
            p.grad.view(-1)[::2][pruned.view(-1)[::2]] = float("-inf")


def reference_step(
    reference: torch.optim.Optimizer,
    params: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    masks: Sequence[BitMask | None],
) -> None:
    """Gradients masked before, torch's step, then weights and state zeroed where masked."""
    for p, gradient, mask in zip(params, gradients, masks, strict=True):
        p.grad = gradient.clone() if mask is None else torch.where(mask.to_bool(), gradient, 0.0)
    reference.step()
    enforce(reference, params, masks)


@torch.no_grad()
def enforce(reference: torch.optim.Optimizer, params: Sequence[torch.Tensor], masks: Sequence[BitMask | None]) -> None:
    for p, mask in zip(params, masks, strict=True):
        if mask is not None:
            per_weight = [value for key, value in reference.state[p].items() if key != "step"]
            for tensor in (p, *per_weight):
                tensor.masked_fill_(~mask.to_bool(), 0.0)


def prune_more(
    optimizer: Any, params: Sequence[torch.Tensor], masks: dict[torch.Tensor, BitMask], sparsity: float
) -> None:
    """One update as GMPScheduler makes it: what is ranked may be the master, and the masks go to the optimizer."""
    for p in params:
        master = optimizer.master_weight(p)
        ranked = p if master is None else master
        masks[p] = prune_(ranked, sparsity=sparsity, masks=masks.get(p)).masks[0]
    optimizer.set_masks(masks)


def assert_zeros_exact(params: Sequence[torch.Tensor], masks: Mapping[torch.Tensor, BitMask]) -> None:
    """Pruned weights are +0.0; nothing else is zero."""
    for p, mask in masks.items():
        pruned = ~mask.to_bool()
        assert_bitwise_equal(p.detach()[pruned], torch.zeros(int(pruned.sum()), dtype=p.dtype), "pruned weights")
        assert int((p == 0).sum()) == int(pruned.sum()) == p.numel() - mask.num_kept
    assert all(torch.isfinite(p).all() for p in params)


def assert_within_ulps(actual: torch.Tensor, expected: torch.Tensor, before: torch.Tensor, ulps: int = 2) -> None:
    """Of the largest of the weight before, after, and the step: what cancels between them cannot be more exact."""
    larger = torch.stack([before.abs(), expected.abs(), (expected - before).abs()]).amax(0)
    ulp = torch.nextafter(larger, torch.full_like(larger, float("inf"))) - larger
    error = ((actual - expected).abs() / ulp).max().item()
    assert error <= ulps, f"expected at most {ulps} ulp, got {error}"


def assert_same_state(actual: Mapping[int, Any], expected: Mapping[int, Any]) -> None:
    """Entries of two state dicts, to the bit. An empty entry is none: torch's SGD has none without momentum."""
    actual, expected = ({i: s for i, s in states.items() if s} for states in (actual, expected))
    assert {i: set(s) for i, s in actual.items()} == {i: set(s) for i, s in expected.items()}
    for i, state in expected.items():
        for key, value in state.items():
            assert_bitwise_equal(actual[i][key], value, f"state[{i}]['{key}']")


def assert_same_run(
    params: Sequence[torch.Tensor], optimizer: Any, expected_params: Sequence[torch.Tensor], expected: Any
) -> None:
    """Weights and state of two runs, to the bit, whatever the layout of the state."""
    for i, (p, q) in enumerate(zip(params, expected_params, strict=True)):
        assert_bitwise_equal(p, q, f"params[{i}]")
    assert_same_state(optimizer.state_dict()["state"], expected.state_dict()["state"])


def masks_of(params, sparsity=0.6):
    return random_masks([params[0], params[2]], sparsity)


def run(params, optimizer, steps):
    masks = masks_of(params)
    optimizer.set_masks(masks)
    for step in steps:
        set_gradients(params, random_gradients(params, step), masks)
        optimizer.step()


def started(case="adamw", compact=False, steps=3, dtype=torch.float32, **options):
    params = parameters(SHAPES, dtype)
    optimizer = masked(case, params, compact_state=compact, **options)
    run(params, optimizer, range(steps))
    return params, optimizer


class Packed(torch.Tensor):
    """A tensor whose memory nobody but its class knows, as quantized state is."""


def everything(params: list[Any], optimizer: Any) -> list[Any]:
    return [*params, *(v for p in params for v in optimizer.state[p].values()), *optimizer._masks.values()]
