"""torch's defaults for new tensors, device and dtype, are the user's: what the package makes does not go by them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from optim_cases import masked, parameters, random_gradients, random_masks, set_gradients

from gmp_kernels import BitMask, GMPScheduler, apply_masks_, magnitude_threshold, optim, prune_, schedules
from gmp_kernels.tools.testing import device_of

SHAPES = [(9, 5), (40,), (300,)]


@pytest.fixture(params=["meta device", "float64", "bfloat16"])
def defaults(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    """Context that sets other defaults; they are as before after the test."""
    before = torch.get_default_dtype()

    def set_them() -> None:
        if request.param == "meta device":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(getattr(torch, request.param))

    yield set_them
    torch.set_default_device(None)
    torch.set_default_dtype(before)


def weights_of(backend: str, seed: int = 0) -> list[torch.Tensor]:
    return [p.detach() for p in parameters(SHAPES, seed=seed, device=device_of(backend))]


def pruned(backend: str) -> Callable[[], Any]:
    weights, given = weights_of(backend), weights_of(backend, 1)
    masks = [BitMask.ones(weight.shape, weight.device) for weight in given]

    def run() -> Any:
        # Without masks, with them, and near an earlier threshold.
        first = prune_(weights, sparsity=0.5, backend=backend)
        second = prune_(given, sparsity=0.5, masks=masks, scope="global", backend=backend)
        third = prune_(weights, sparsity=0.501, masks=first.masks, previous=first.thresholds, backend=backend)
        return first, second, third, magnitude_threshold(given[0], 40, backend=backend), weights, given

    return run


def applied(backend: str) -> Callable[[], Any]:
    weights = weights_of(backend)
    masks = list(random_masks(weights, 0.5).values())

    def run() -> Any:
        apply_masks_(weights, masks, backend=backend)
        return weights

    return run


def mask_made(backend: str) -> Callable[[], Any]:
    kept = torch.rand(9, 5, device=device_of(backend)) < 0.5
    array = kept.cpu().numpy()

    def run() -> Any:
        mask = BitMask.from_bool(kept)
        assert BitMask.from_bool(array) == mask.to("cpu")
        assert BitMask(mask.packed, [9, 5]).clone() == mask
        return mask.num_kept - int(array.sum()), BitMask.ones((9, 5)).num_kept, torch.equal(mask.to_bool(), kept)

    return run


def stepped(case: str, backend: str, **settings: Any) -> Callable[[], Any]:
    params = parameters(SHAPES, device=device_of(backend))
    optimizer = masked(case, params, backend=backend, **settings)
    masks = [random_masks(params[:2], share, seed=1) for share in (0.3, 0.6)]
    gradients = [random_gradients(params, step) for step in range(3)]

    def run() -> Any:
        for step in range(3):
            if step:
                optimizer.set_masks(masks[step - 1])
            set_gradients(params, gradients[step], masks[max(0, step - 1)])
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
        return params, [v for p in params for v in optimizer.state[p].values()]

    return run


def averaged(backend: str) -> Callable[[], Any]:
    averages, weights = weights_of(backend), weights_of(backend, 1)
    masks = list(random_masks(averages, 0.5).values())

    def run() -> Any:
        optim.ema_update_(averages, weights, 0.9, masks=masks, backend=backend)
        return averages

    return run


def clipped(backend: str) -> Callable[[], Any]:
    params = parameters(SHAPES, device=device_of(backend))
    set_gradients(params, random_gradients(params, 0), {})
    masks = random_masks(params[:2], 0.5)

    def run() -> Any:
        norm = optim.clip_grad_norm_(params, 0.1, masks=[masks.get(p) for p in params], backend=backend)
        assert norm.dtype is torch.float32
        return norm, [p.grad for p in params]

    return run


def scheduled(own_optimizer: bool, backend: str) -> Callable[[], Any]:
    model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Linear(30, 7)).to(device_of(backend))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
            p.grad = torch.ones_like(p)
    # Unless it is fused, torch's AdamW counts its steps on the default device; on a GPU it then refuses to step.
    optimizer = (
        optim.AdamW(model.parameters(), backend=backend)
        if own_optimizer
        else torch.optim.AdamW(model.parameters(), fused=True)
    )

    def run() -> Any:
        pruner = GMPScheduler(model, optimizer, schedules.Cubic(0.1, 0.8, begin_step=0, end_step=4), backend=backend)
        for _ in range(4):
            optimizer.step()
            pruner.step()
            pruner.load_state_dict(pruner.state_dict())
        return list(model.parameters()), pruner.masks, pruner.layer_sparsities()

    return run


CASES: dict[str, Callable[[str], Callable[[], Any]]] = {
    "prune_": pruned,
    "apply_masks_": applied,
    "BitMask": mask_made,
    "SGD": lambda backend: stepped("momentum", backend),
    "AdamW": lambda backend: stepped("adamw", backend),
    "AdamW, compact": lambda backend: stepped("adamw", backend, compact_state=True),
    "ema_update_": averaged,
    "clip_grad_norm_": clipped,
    "scheduler": lambda backend: scheduled(False, backend),
    "scheduler with our AdamW": lambda backend: scheduled(True, backend),
}


def plain(result: Any) -> Any:
    """Bytes and numbers of whatever a case returns; step counts may be of any dtype."""
    if isinstance(result, torch.Tensor) and result.ndim == 0:
        return float(result)
    if isinstance(result, torch.Tensor):
        return result.dtype, bytes(result.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    if isinstance(result, BitMask):
        return plain(result.packed)
    if isinstance(result, dict):
        return {key: plain(value) for key, value in result.items()}
    return [plain(value) for value in result] if isinstance(result, (list, tuple)) else result


def test_steps_are_counted_in_a_dtype_that_can_count_them() -> None:
    """bfloat16 ends at 256."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        params = parameters([(3,)])
        optimizer = optim.AdamW(params)
        set_gradients(params, random_gradients(params, 0), {})
        optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert optimizer.state[params[0]]["step"].dtype is torch.float32


@pytest.mark.parametrize("case", CASES)
def test_other_defaults_change_nothing(backend: str, case: str, defaults: Callable[[], None]) -> None:
    expected = plain(CASES[case](backend)())
    run = CASES[case](backend)
    defaults()
    found = run()
    torch.set_default_device(None)
    assert plain(found) == expected
