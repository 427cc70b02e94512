"""Runs in channels_last, or through changes of the format, against contiguous runs: the same bits after every step."""

from __future__ import annotations

import copy
import io
import itertools
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import pytest
import torch
from faults import OutOfMemory
from optim_cases import one_thread as one_thread
from torch import nn

from gmp_kernels import BitMask, GMPScheduler, optim, prune_, schedules
from gmp_kernels.formats import CHANNELS_LAST, format_of
from gmp_kernels.optim import clip_grad_norm_, ema_update_
from gmp_kernels.pruner.watch import Watch
from gmp_kernels.tools.testing import assert_bitwise_equal

RAMP = schedules.Cubic(0.2, 0.9, begin_step=1, end_step=9, frequency=4)
STEPS = 12
OPTIMIZERS: dict[str, tuple[torch.dtype, Callable[..., Any]]] = {
    "torch": (torch.float32, lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)),
    "momentum": (torch.float32, lambda p: optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3)),
    "adamw": (torch.float32, lambda p: optim.AdamW(p, lr=0.01)),
    "compact": (torch.float32, lambda p: optim.AdamW(p, lr=0.01, compact_state=True)),
    "master": (torch.bfloat16, lambda p: optim.AdamW(p, lr=0.01, master_weights=True, compact_state=True)),
    "reference": (torch.float32, lambda p: optim.AdamW(p, lr=0.01, compact_state=True, backend="reference")),
    "simt": (torch.float32, lambda p: optim.AdamW(p, lr=0.01, compact_state=True, backend="simt")),
}

Trio = tuple[nn.Module, Any, GMPScheduler]


def network(dtype: torch.dtype) -> nn.Sequential:
    """Convolutions whose formats differ, or are one, and a layer without formats."""
    torch.manual_seed(1)
    layers = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 5, groups=4), nn.Conv2d(8, 5, 1), nn.Conv3d(5, 7, (2, 3, 2))
    return nn.Sequential(*layers, nn.Linear(20, 9)).to(dtype)


def convert(model: nn.Module, is_last: bool) -> None:
    """Do what ``model.to(memory_format=...)`` does, for convolutions in two and three dimensions."""
    for p in model.parameters():
        wanted = CHANNELS_LAST.get(p.ndim, torch.contiguous_format) if is_last else torch.contiguous_format
        p.data = p.data.contiguous(memory_format=wanted)


def begun(kind: str, scope: str, is_last: bool) -> Trio:
    dtype, make = OPTIMIZERS[kind]
    model = network(dtype)
    convert(model, is_last)
    optimizer = make(model.parameters())
    backend = kind if kind in ("simt", "reference") else None
    return model, optimizer, GMPScheduler(model, optimizer, RAMP, scope=scope, backend=backend)  # type: ignore[arg-type]


def train(trio: Trio, step: int, strides: str = "row-major") -> None:
    step_with_gradients(*trio[:2], step, strides)
    trio[2].step()


def step_with_gradients(model: nn.Module, optimizer: Any, step: int, strides: str = "row-major") -> None:
    """Take a step with made-up gradients, since those of a convolution depend on its format."""
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        gradient = torch.randn(p.shape, generator=generator).to(p.dtype)
        if strides == "as the weight":
            gradient = torch.empty_like(p).copy_(gradient)
        elif strides == "transposed":
            gradient = gradient.transpose(0, -1).contiguous().transpose(0, -1)
        p.grad = gradient
    optimizer.step()


def assert_same(actual: Trio, expected: Trio, what: str) -> None:
    for (name, p), q in zip(actual[0].named_parameters(), expected[0].parameters(), strict=True):
        assert_bitwise_equal(p.detach(), q.detach(), f"{name} {what}")
    states = [trio[1].state_dict()["state"] for trio in (actual, expected)]
    for i, values in states[1].items():
        for key, value in values.items():
            assert_bitwise_equal(states[0][i][key], value, f"{key} of {i} {what}")
    assert actual[2].masks == expected[2].masks
    saved, wanted = actual[2].state_dict(), expected[2].state_dict()
    for name, layer in wanted["layers"].items():
        assert torch.equal(saved["layers"][name].pop("mask"), layer.pop("mask"))
    assert saved["layers"] == wanted["layers"]
    actual[2].verify()


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_is_that_of_contiguous_weights(kind: str, scope: str) -> None:
    expected = begun(kind, scope, False)
    runs = {name: begun(kind, scope, True) for name in ("row-major", "as the weight", "transposed")}
    for step in range(STEPS):
        train(expected, step)
        for strides, run in runs.items():
            train(run, step, strides)
            assert_same(run, expected, f"{kind} {scope} {strides} step {step}")
    for name, mask in runs["row-major"][2].masks.items():
        assert mask.memory_format is format_of(runs["row-major"][0].get_parameter(name))
    assert {mask.memory_format for mask in run[2].masks.values()} == {torch.contiguous_format, *CHANNELS_LAST.values()}


@pytest.mark.parametrize("steps_in_format", [1, 3])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_model_changes_format_in_the_middle(kind: str, steps_in_format: int) -> None:
    """Before and after updates, after the last one, and again and again."""
    expected, run = begun(kind, "layer", False), begun(kind, "layer", False)
    for step in range(STEPS):
        if step % steps_in_format == 0:
            convert(run[0], step // steps_in_format % 2 == 0)
        for trio in (expected, run):
            train(trio, step)
        assert_same(run, expected, f"{kind} step {step}")
        if kind == "torch" and step > RAMP.begin_step:
            # Or else every step would rearrange the bits.
            for name, mask in run[2].masks.items():
                assert mask.memory_format is format_of(run[0].get_parameter(name))


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("order", ["model first", "pruner first"])
def test_a_run_goes_on_in_another_format(kind: str, order: str) -> None:
    expected, run = begun(kind, "layer", False), begun(kind, "layer", True)
    for step in range(STEPS):
        if step in (4, 7, 10):
            buffer = io.BytesIO()
            torch.save([run[0].state_dict(), run[1].state_dict(), run[2].state_dict()], buffer)
            saved = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
            run = begun(kind, "layer", step == 7)
            for part, state in list(zip(run, saved, strict=True))[:: 1 if order == "model first" else -1]:
                part.load_state_dict(state)
        for trio in (expected, run):
            train(trio, step)
        assert_same(run, expected, f"{kind} {order} step {step}")


@pytest.mark.parametrize("kind", ["torch", "adamw", "compact"])
def test_copies_go_on_and_masks_start_other_runs(kind: str) -> None:
    expected, run = begun(kind, "layer", False), begun(kind, "layer", True)
    for step in range(6):
        for trio in (expected, run):
            train(trio, step)
    buffer = io.BytesIO()
    torch.save(run, buffer)
    copies = copy.deepcopy(run), torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    train(expected, 6)
    for copied in copies:
        train(copied, 6)
        assert_same(copied, expected, "copied")
    model = copy.deepcopy(run[0])
    for is_last, start in itertools.product((True, False), (run[2].masks, "zeros")):
        convert(model, is_last)
        pruner = GMPScheduler(model, OPTIMIZERS[kind][1](model.parameters()), RAMP, start=start)
        assert pruner.masks == run[2].masks


@pytest.mark.parametrize("kind", ["torch", "adamw", "compact"])
def test_other_writes_are_found_and_repaired_in_any_format(kind: str) -> None:
    run = begun(kind, "layer", True)
    for step in range(6):
        train(run, step)
    wanted = {name: p.detach().clone() for name, p in run[0].named_parameters()}
    for convert_to in (None, False, True):
        if convert_to is not None:
            convert(run[0], convert_to)
        with torch.no_grad():
            for p in run[0].parameters():
                p[p == 0] = 3.0
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run[2].step()
        # A pruner says so once.
        assert ["were not zero any more" in str(one.message) for one in caught] == [True] * (convert_to is None)
        for name, p in run[0].named_parameters():
            assert_bitwise_equal(p.detach(), wanted[name], name)


@pytest.mark.parametrize("kind", ["torch", "adamw", "master"])
def test_masks_are_applied_though_memory_ran_out_as_they_followed_a_format(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Watch, "sees_life", lambda *_: False)  # a sample may find what was left undone, or miss it
    for after in itertools.count():
        run = begun(kind, "layer", False)
        for step in range(RAMP.begin_step + RAMP.frequency):
            train(run, step)
        step_with_gradients(*run[:2], RAMP.begin_step + RAMP.frequency)
        convert(run[0], True)
        is_enough = False
        with suppress(MemoryError), OutOfMemory(after):
            run[2].step()
            is_enough = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the first call has not done it
            run[2].step()
        run[2].verify()
        if is_enough:
            assert after > 5
            return


@pytest.mark.parametrize("kind", ["torch", "adamw", "compact"])
def test_a_sample_finds_writes_that_no_version_shows(kind: str) -> None:
    model = nn.Conv2d(16, 64, 3, bias=False).to(memory_format=torch.channels_last)
    optimizer = OPTIMIZERS[kind][1](model.parameters())
    pruner = GMPScheduler(model, optimizer, schedules.OneShot(0.5))
    for step, is_last in enumerate((True, False, True)):
        convert(model, is_last)
        train((model, optimizer, pruner), step)
        mask = pruner.masks["weight"]
        for _ in range(4):  # samples are of pruned weights only
            assert not pruner._held.watch.sees_life(["weight"], pruner.masks)
        model.weight.data[~mask.to_bool()] = 1.0
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pruner.step()
        assert len(caught) == (step == 0)  # a pruner says so once
        assert torch.equal(model.weight != 0, mask.to_bool())


def test_a_compiled_norm_is_that_of_kept_weights_whatever_the_strides() -> None:
    shape = (9, 5, 3, 3)
    kept = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.4
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    norm = (gradient * kept).double().norm().float()
    mask, p = BitMask.from_bool(kept).to(memory_format=torch.channels_last), nn.Parameter(torch.zeros(shape))
    for order in ((0, 1, 2, 3), (0, 2, 3, 1), (3, 1, 2, 0)):
        inverse = [order.index(dimension) for dimension in range(4)]
        p.grad = gradient.permute(order).contiguous().permute(inverse)
        clip = torch.compile(lambda: clip_grad_norm_([p], 1e9, masks=[mask]), backend="aot_eager")
        torch.testing.assert_close(clip(), norm)


@pytest.mark.parametrize("backend", ["reference", "cpu", "simt", "triton"])
def test_norms_and_averages_ignore_pruned_weights(backend: str) -> None:
    shape = (9, 5, 3, 3)
    kept = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.4
    values, average = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    formats = (torch.contiguous_format, torch.channels_last)
    results = []
    for of_mask, first, second in itertools.product(formats, repeat=3):
        mask = BitMask.from_bool(kept).to(memory_format=of_mask)
        p = nn.Parameter(torch.zeros(shape))
        p.grad = torch.where(kept, values, torch.nan).contiguous(memory_format=first)
        norm = clip_grad_norm_([p], 1e9, masks=[mask], backend=backend)
        moved = (average * kept).contiguous(memory_format=first)
        ema_update_([moved], [values.contiguous(memory_format=second)], 0.75, masks=[mask], backend=backend)
        results.append((norm, moved))
        for actual, contiguous in zip(results[-1], results[0], strict=True):
            assert_bitwise_equal(actual, contiguous)
    norm, moved = results[0]
    torch.testing.assert_close(norm, (values * kept).double().norm().float())
    torch.testing.assert_close(moved, 0.75 * average * kept + 0.25 * values * kept)
    assert_bitwise_equal(moved[~kept], torch.zeros(int((~kept).sum())))


@pytest.mark.parametrize("kind", ["momentum", "adamw", "compact"])
def test_an_empty_part_has_any_strides(kind: str) -> None:
    """As a rank has it, if a layer in channels_last has fewer input channels than there are ranks."""
    whole = torch.randn(7, 3, 3, 3).to(memory_format=torch.channels_last)
    parts = [nn.Parameter(part) for part in (whole.clone(), whole[:, 3:], torch.empty_like(whole[:, 3:]))]
    optimizer = OPTIMIZERS[kind][1](parts)
    for _ in range(2):
        for p in parts:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert bool((parts[0] != whole).all()) and [p.shape for p in parts[1:]] == [(7, 0, 3, 3)] * 2


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList([nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norms[0](self.first(x)))
        return torch.relu(x + self.norms[1](self.second(y)))


def residual_network() -> nn.Module:
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 16, 3, bias=False), Residual(16), nn.Conv2d(16, 24, 1, bias=False), Residual(24)
    return nn.Sequential(*stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5))


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_residual_network_trains_under_autocast_with_the_masks_of_contiguous_weights(scope: str) -> None:
    model = residual_network().to(memory_format=torch.channels_last)
    optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    pruner = GMPScheduler(model, optimizer, RAMP, scope=scope)  # type: ignore[arg-type]
    masks: Sequence[BitMask] | None = None
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        x = torch.randn(8, 3, 10, 10, generator=generator).to(memory_format=torch.channels_last)
        y = torch.randint(5, (8,), generator=generator)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        before = [
            model.get_parameter(name).detach().clone(memory_format=torch.contiguous_format) for name in pruner.masks
        ]
        report = pruner.step()
        if report is not None:
            sizes = [weight.numel() for weight in before]
            wanted = [round(RAMP.sparsity_at(step) * n) for n in ([sum(sizes)] if scope == "global" else sizes)]
            masks = prune_(before, num_prune=wanted, masks=masks, scope=scope, backend="reference").masks  # type: ignore[arg-type]
        assert list(pruner.masks.values()) == (masks or [BitMask.ones(w.shape) for w in before])
        for name, mask in pruner.masks.items():
            assert torch.equal(model.get_parameter(name) != 0, mask.to_bool())
    assert pruner.finished and pruner.masks["1.first.weight"].memory_format is torch.channels_last
    batch = optimizer._batch
    assert batch is not None and batch.fits([p.grad for p in model.parameters()])
