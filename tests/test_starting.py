"""Masks taken along: into a run that starts from them, another schedule, other names."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from scheduler_cases import OPTIMIZERS, RAMP, assert_dead, make, make_model, run, train_step
from torch import nn

from gmp_kernels import BitMask, GMPScheduler, optim, prune_, schedules
from gmp_kernels.checkpoints import PruneJob
from gmp_kernels.errors import CheckpointError, ShapeError, StateError, TargetError

NAMES = ["0.weight", "3.weight", "4.weight"]


def sparse_model(sparsity: float = 0.6) -> nn.Module:
    model = make_model()
    prune_([model.get_parameter(name).data for name in NAMES], sparsity=sparsity)
    return model


def masks_of(model: nn.Module) -> dict[str, BitMask]:
    return {name: BitMask.from_zeros(model.get_parameter(name)) for name in NAMES}


@pytest.mark.parametrize("optimizer", ["momentum", "adamw", "gmp", "gmp_compact"])
@pytest.mark.parametrize("schedule", [RAMP, schedules.Constant(None), schedules.Constant(0.0)], ids=repr)
def test_zeros_that_are_there_are_held(optimizer: str, schedule: schedules.Schedule) -> None:
    model = sparse_model()
    expected = masks_of(model)
    makers = {
        **OPTIMIZERS,
        "gmp": lambda p: optim.AdamW(p, lr=0.01),
        "gmp_compact": lambda p: optim.AdamW(p, lr=0.01, compact_state=True),
    }
    made = makers[optimizer](model.parameters())
    pruner = GMPScheduler(model, made, schedule, start="zeros")
    assert pruner.masks == expected
    for step in range(12):
        train_step(model, made, step)
        pruner.step()
        for name, mask in pruner.masks.items():
            assert not (mask.to_bool() & ~expected[name].to_bool()).any()
            assert int((model.get_parameter(name) == 0).sum()) == mask.numel - mask.num_kept
        pruner.verify()
    assert pruner.sparsity == pytest.approx(0.9 if schedule is RAMP else 0.6, abs=2e-3)
    if schedule == schedules.Constant(None):
        assert not pruner.history


def test_masks_given_prune_at_once_and_stay_as_they_are() -> None:
    masks = {name: mask for name, mask in masks_of(sparse_model()).items() if name != "4.weight"}
    given = {name: mask.clone() for name, mask in masks.items()}
    parts = model, optimizer, pruner = make(schedules.Constant(0.7, begin_step=2), start=masks)
    assert_dead(*parts)
    assert pruner.layer_sparsities() == {**{name: mask.sparsity for name, mask in masks.items()}, "4.weight": 0.0}
    run(model, optimizer, pruner, range(4))
    assert [layer.num_pruned for layer in pruner.history[0].layers] == [round(0.7 * n) for n in (36, 1024, 48)]
    newly = [layer.num_newly_pruned for layer in pruner.history[0].layers]
    assert newly == [round(0.7 * 36) - round(0.6 * 36), round(0.7 * 1024) - round(0.6 * 1024), round(0.7 * 48)]
    assert masks == given


@pytest.mark.parametrize("form", ["file", "folder", "masks_folder"])
def test_masks_that_the_command_line_wrote(form: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = make_model()
    source = tmp_path / "in"
    source.mkdir()
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.ndim > 1}
    save_file(weights, source / "model.safetensors")
    if form == "file":
        PruneJob(source / "model.safetensors", tmp_path / "out.safetensors", sparsity=0.5, masks=True).run()
        path = tmp_path / "out.masks.safetensors"
    else:
        PruneJob(source, tmp_path / "out", sparsity=0.5, masks=True).run()
        path = tmp_path / "out" / "masks" if form == "masks_folder" else tmp_path / "out"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = GMPScheduler(model, optimizer, schedules.Constant(None), start=path)
    assert {name: mask.numel - mask.num_kept for name, mask in pruner.masks.items()} == dict(
        zip(NAMES, (18, 512, 24), strict=True)
    )
    assert_dead(model, optimizer, pruner)


@pytest.mark.parametrize(
    ("start", "error", "message"),
    [
        ({"1.weight": BitMask.ones((4,))}, TargetError, r"'1\.weight'; add it to targets="),
        ({"5.weight": BitMask.ones((3,))}, TargetError, r"'5\.weight'; the model has no .* that name.* start='zeros'"),
        ({"3.weight": BitMask.ones((64, 16))}, ShapeError, r"\(16, 64\), got \(64, 16\)"),
        ({"3.weight": torch.ones(16, 64)}, TypeError, "BitMask"),
        (7, TypeError, "'zeros'"),
        ("nowhere", CheckpointError, "nowhere: expected masks"),
    ],
)
def test_masks_that_do_not_fit_are_refused(start: Any, error: type[Exception], message: str) -> None:
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        GMPScheduler(model, torch.optim.SGD(model.parameters(), lr=0.1), RAMP, start=start)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_files_of_something_else_are_no_masks(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.ones(3)}, tmp_path / "w.safetensors")
    (tmp_path / "text.safetensors").write_text("masks")
    for name in ("w.safetensors", "text.safetensors"):
        with pytest.raises(CheckpointError, match="got something else"):
            make(start=tmp_path / name)


def test_masks_only_go_to_another_schedule() -> None:
    parts = make()
    run(*parts, range(8))
    state = parts[2].state_dict()
    longer = schedules.Cubic(0.05, 0.95, begin_step=0, end_step=50, frequency=5)
    model, optimizer, pruner = make(longer)
    with pytest.raises(StateError, match=r"masks_only=True"):
        pruner.load_state_dict(state)
    pruner.load_state_dict(state, masks_only=True)
    assert pruner.masks == parts[2].masks
    assert (pruner.step_count, pruner.history) == (0, [])
    assert_dead(model, optimizer, pruner)
    run(model, optimizer, pruner, range(51))
    assert pruner.sparsity == pytest.approx(0.95, abs=1e-3)
    assert pruner.finished


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "_forward_module."])
def test_prefixes_of_wrappers_that_are_gone(prefix: str) -> None:
    parts = make()
    run(*parts, range(8))
    state = parts[2].state_dict()
    state["layers"] = {f"{prefix}{name}": layer for name, layer in state["layers"].items()}
    again = make()
    again[2].load_state_dict(state)
    assert again[2].masks == parts[2].masks
    started = make(start={f"{prefix}{name}": mask for name, mask in parts[2].masks.items()})
    assert started[2].masks == parts[2].masks


@pytest.mark.parametrize("optimizer", ["adamw", "gmp"])
def test_a_step_not_counted_yet_when_the_state_was_saved_is_counted_after(optimizer: str) -> None:
    parts = make() if optimizer == "adamw" else made_of_ours()
    run(*parts, range(5))
    train_step(*parts[:2], 5)
    saved = copy.deepcopy([part.state_dict() for part in parts])
    again = make() if optimizer == "adamw" else made_of_ours()
    for part, state in zip(again, saved, strict=True):
        part.load_state_dict(state)
    for trio in (parts, again):
        trio[2].step()
        assert trio[2].step_count == 6
        run(*trio, range(6, 12))
    assert [report.step for report in again[2].history] == [2, 6, 10]
    assert again[2].masks == parts[2].masks


def made_of_ours() -> Any:
    model = make_model()
    optimizer = optim.AdamW(model.parameters(), lr=0.01)
    return model, optimizer, GMPScheduler(model, optimizer, RAMP)


def test_a_state_can_be_loaded_twice() -> None:
    parts = make()
    run(*parts, range(8))
    state = parts[2].state_dict()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    for _ in range(2):
        again = make()
        again[2].load_state_dict(state)
        run(*again, range(8, 12))
    after = io.BytesIO()
    torch.save(state, after)
    assert after.getvalue() == buffer.getvalue()


def test_the_size_of_a_state_does_not_grow_with_the_updates() -> None:
    sizes = []
    for updates in (70, 700):
        model = nn.Linear(8, 8)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        pruner = GMPScheduler(model, optimizer, schedules.Linear(0.0, 0.5, 0, 10**6), count="calls")
        for _ in range(updates):
            pruner.step()
        assert len(pruner.history) == updates
        state = pruner.state_dict()
        buffer = io.BytesIO()
        torch.save(state, buffer)
        sizes.append(buffer.tell())
        again = GMPScheduler(model, optimizer, schedules.Linear(0.0, 0.5, 0, 10**6), count="calls")
        again.load_state_dict(state)
        assert again.history[-1] == pruner.history[-1] and again.history[-1].layers
        assert not any(report.layers for report in again.history[:-1])
        assert [report.step for report in again.history] == list(range(updates - 64, updates))
    assert sizes[1] - sizes[0] < 1024


def test_the_sparsity_of_before_is_known_after_a_resume() -> None:
    parts = make()
    run(*parts, range(8))
    again = make()
    again[2].load_state_dict(parts[2].state_dict())
    assert again[2].layer_sparsities() == parts[2].layer_sparsities()
    run(*again, range(8, 11))
    last = again[2].history[-1]
    assert [layer.num_newly_pruned for layer in last.layers] == [
        round(0.9 * n) - round(RAMP.sparsity_at(6) * n) for n in (36, 1024, 48)
    ]
