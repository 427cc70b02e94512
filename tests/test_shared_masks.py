"""One mask per weight, read by scheduler and optimizer alike; and an update that masks nothing twice."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from optim_cases import (
    assert_same_run,
    assert_zeros_exact,
    clones,
    masked,
    parameters,
    random_gradients,
    random_masks,
    set_gradients,
)
from torch import nn

from gmp_kernels import BitMask, GMPScheduler, StateError, prune_, schedules
from gmp_kernels.backends import choose
from gmp_kernels.backends.cpu import Cpu
from gmp_kernels.backends.types import Layer
from gmp_kernels.errors import GMPWarning
from gmp_kernels.optim.compact import layout_of

SHAPES = [(24, 33), (65, 9)]
NUM_WEIGHTS = 24 * 33 + 65 * 9
LAYOUTS = pytest.mark.parametrize("compact", [False, True], ids=["dense", "compact"])


def model_of(params: Sequence[Any]) -> nn.Module:
    model = nn.Module()
    model.weights = nn.ParameterList(params)
    return model


def training(
    make: Callable[[list[Any]], torch.optim.Optimizer], dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[list[Any], torch.optim.Optimizer, GMPScheduler]:
    """A run in which every second step is an update, after its first step."""
    params = parameters(SHAPES, dtype)
    optimizer = make(params)
    schedule = schedules.Linear(0.1, 0.9, begin_step=1, end_step=9, frequency=2)
    pruner = GMPScheduler(model_of(params), optimizer, schedule, targets="*", **options)
    go(params, optimizer, pruner, range(1))
    return params, optimizer, pruner


def go(params: Sequence[Any], optimizer: torch.optim.Optimizer, pruner: GMPScheduler, steps: Sequence[int]) -> None:
    for step in steps:
        set_gradients(params, random_gradients(params, step), {})
        optimizer.step()
        pruner.step()


def ours(case: str, **options: Any) -> Callable[[list[Any]], torch.optim.Optimizer]:
    return lambda params: masked(case, params, **options)


# Elements that an update hands to `apply`, in units of the number of weights: the state, and a 16-bit copy whose master
# was pruned. What is ranked was pruned already, and compact state drops what goes as it moves.
APPLIED: dict[str, tuple[Callable[[list[Any]], torch.optim.Optimizer], torch.dtype, int]] = {
    "torch_momentum": (lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9), torch.float32, 1),
    "torch_adamw": (lambda params: torch.optim.AdamW(params), torch.float32, 2),
    "sgd": (ours("sgd"), torch.float32, 0),
    "momentum": (ours("momentum"), torch.float32, 1),
    "adamw": (ours("adamw"), torch.float32, 2),
    "amsgrad": (ours("amsgrad"), torch.bfloat16, 3),
    "compact_adamw": (ours("adamw", compact_state=True), torch.float32, 0),
    "adamw_with_master_weights": (ours("adamw", master_weights=True), torch.bfloat16, 3),
    "compact_adamw_with_master_weights": (
        ours("adamw", master_weights=True, compact_state=True),
        torch.float16,
        1,
    ),
}


@pytest.mark.parametrize("case", APPLIED)
def test_an_update_masks_what_it_did_not_just_prune(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, dtype, expected = APPLIED[case]
    params, optimizer, pruner = training(make, dtype)
    set_gradients(params, random_gradients(params, 1), {})
    optimizer.step()
    sizes: list[int] = []
    apply, prune = Cpu.apply, Cpu.prune
    pruned: list[int] = []

    def counting_apply(self: Cpu, layers: Sequence[Layer]) -> None:
        sizes.extend(layer.weight.numel() for layer in layers)
        apply(self, layers)

    def counting_prune(self: Cpu, layers: Sequence[Layer], *args: Any, **kwargs: Any) -> Any:
        pruned.extend(layer.weight.numel() for layer in layers)
        return prune(self, layers, *args, **kwargs)

    monkeypatch.setattr(Cpu, "apply", counting_apply)
    monkeypatch.setattr(Cpu, "prune", counting_prune)
    assert pruner.step() is not None
    assert (sum(sizes), sum(pruned)) == (expected * NUM_WEIGHTS, NUM_WEIGHTS)
    masks = dict(zip(params, pruner.masks.values(), strict=True))
    assert_zeros_exact(params, masks)
    for index, mask in enumerate(masks.values()):
        for key, value in optimizer.state_dict()["state"].get(index, {}).items():
            assert key == "step" or value is None or not value[~mask.to_bool()].any()


def test_masks_that_are_set_zero_weights_and_state(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters(SHAPES)
    optimizer = masked("adamw", params)
    set_gradients(params, random_gradients(params, 0), {})
    optimizer.step()
    masks = random_masks(params, 0.7)
    optimizer.set_masks(masks)
    for p, mask in masks.items():
        for tensor in (p.detach(), optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]):
            assert torch.equal(tensor != 0, mask.to_bool())


@LAYOUTS
def test_scheduler_and_optimizer_read_the_same_bits(compact: bool) -> None:
    params, optimizer, pruner = training(ours("adamw", compact_state=compact))
    addresses = [mask.packed.data_ptr() for mask in pruner.masks.values()]
    for start in range(1, 9, 2):
        go(params, optimizer, pruner, range(start, start + 2))
        for p, mask in zip(params, pruner.masks.values(), strict=True):
            assert optimizer._masks[p] is mask
            layout = layout_of(optimizer.state[p])
            assert (layout is None) == (not compact)
            assert layout is None or layout.mask is mask.packed
    if not compact:
        assert [mask.packed.data_ptr() for mask in pruner.masks.values()] == addresses


def test_dense_rows_stay_for_the_whole_run() -> None:
    params, optimizer, pruner = training(ours("adamw"))
    batch = optimizer._batch
    go(params, optimizer, pruner, range(1, 12))
    assert pruner.sparsity == pytest.approx(0.9, abs=1e-3)
    assert optimizer._batch is batch


def test_bits_changed_in_place_count_from_the_next_step_on() -> None:
    params = parameters(SHAPES)
    optimizer = masked("adamw", params)
    masks = random_masks(params, 0.2)
    optimizer.set_masks(masks)
    for step in range(3):
        set_gradients(params, random_gradients(params, step), {})
        optimizer.step()
        for p in params:
            prune_(p, sparsity=0.3 + 0.2 * step, masks=masks[p])
        set_gradients(params, random_gradients(params, 10 + step), masks)  # NaN where pruned
        optimizer.step()
        assert_zeros_exact(params, masks)


def test_bits_in_another_tensor_are_seen_too() -> None:
    params = parameters(SHAPES)
    optimizer = masked("momentum", params)
    masks = random_masks(params, 0.2)
    optimizer.set_masks(masks)
    for step in range(2):
        set_gradients(params, random_gradients(params, step), {})
        optimizer.step()
        for p, mask in masks.items():
            mask.packed = prune_(p, sparsity=0.5 + 0.2 * step, masks=mask.clone()).masks[0].packed
    set_gradients(params, random_gradients(params, 5), masks)
    optimizer.step()
    assert_zeros_exact(params, masks)


def test_compact_state_is_laid_out_by_a_copy_of_masks_that_are_set() -> None:
    """Whose owner may prune in place and set them again, or forget to."""
    params, mirror = parameters(SHAPES), parameters(SHAPES)
    optimizer, dense = masked("adamw", params, compact_state=True), masked("adamw", mirror)
    masks = random_masks(params, 0.2)
    optimizer.set_masks(masks)
    dense.set_masks({q: masks[p].clone() for p, q in zip(params, mirror, strict=True)})
    for step in range(4):
        for group, stepping in ((params, optimizer), (mirror, dense)):
            set_gradients(group, random_gradients(group, step), {})
            stepping.step()
        assert_same_run(params, optimizer, mirror, dense)
        for p in params:
            prune_(p, sparsity=0.3 + 0.1 * step, masks=masks[p])
        if step % 2:
            optimizer.set_masks(masks)
            dense.set_masks({q: masks[p].clone() for p, q in zip(params, mirror, strict=True)})
        else:
            with torch.no_grad():
                for p, q in zip(params, mirror, strict=True):
                    q.copy_(p)


def test_a_layout_whose_bits_were_written_is_refused() -> None:
    params, optimizer, pruner = training(ours("adamw", compact_state=True))
    go(params, optimizer, pruner, range(1, 5))  # with a step after the update
    mask = pruner.masks["weights.1"]
    prune_(params[1].detach().clone(), sparsity=0.8, masks=mask)
    set_gradients(params, random_gradients(params, 5), {})
    before, state = clones(params), {p: dict(optimizer.state[p]) for p in params}
    for refused in (optimizer.step, lambda: optimizer.set_masks({params[1]: BitMask.ones(params[1].shape)})):
        with pytest.raises(StateError, match=r"shape \(65, 9\) as it was .* written in place"):
            refused()
        for p, q in zip(params, before, strict=True):
            assert torch.equal(p, q)
            assert all(optimizer.state[p][key] is value for key, value in state[p].items())
    assert optimizer.state[params[0]]["step"] == 5


def test_a_layer_that_has_grown_is_refused_where_its_state_is_compact() -> None:
    """The kernel would walk past the end of the state."""
    (p,) = params = parameters([(24, 33)])
    optimizer = masked("adamw", params, compact_state=True)
    set_gradients(params, random_gradients(params, 0), {})
    optimizer.step()
    optimizer.set_masks({p: BitMask.ones(p.shape)})
    state = dict(optimizer.state[p])
    p.grad, p.data = None, torch.ones(300, 1000)
    with pytest.raises(StateError, match=r"laid out, got one of shape \(300, 1000\)"):
        optimizer.set_masks({p: BitMask.from_bool(torch.rand(300, 1000) > 0.5)})
    p.grad = torch.ones_like(p)
    with pytest.raises(StateError, match=r"laid out, got one of shape \(300, 1000\)"):
        optimizer.step()
    assert (p == 1).all()
    assert all(optimizer.state[p][key] is value for key, value in state.items())


def test_a_copy_cannot_forget_that_bits_were_written() -> None:
    """Its own would count their versions anew, and the kernel walk past the end of the state."""
    params, optimizer, pruner = training(ours("adamw", compact_state=True))
    go(params, optimizer, pruner, range(1, 5))
    pruner.masks["weights.1"].packed.fill_(0)
    for again in (copy.deepcopy, pickle.dumps):
        with pytest.raises(StateError, match=r"copying an optimizer: .* written in place"):
            again((params, optimizer))


def test_an_update_that_the_optimizer_refuses_changes_nothing() -> None:
    params, optimizer, pruner = training(ours("adamw", compact_state=True))
    go(params, optimizer, pruner, range(1, 5))
    pruner.masks["weights.0"].packed.bitwise_and_(0xFF)  # the same bits, written
    before, bits = clones(params), [mask.packed.clone() for mask in pruner.masks.values()]
    saved = pruner.state_dict()
    count, updates = pruner.step_count, len(pruner.history)
    for refused in (pruner.step, lambda: pruner.load_state_dict(saved)):
        with pytest.raises(StateError, match="written in place"):
            refused()
        assert (pruner.step_count, len(pruner.history)) == (count, updates)
        for p, q in zip(params, before, strict=True):
            assert torch.equal(p, q)
        assert all(torch.equal(m.packed, b) for m, b in zip(pruner.masks.values(), bits, strict=True))


@LAYOUTS
def test_state_from_before_the_first_update_brings_all_weights_back_to_life(compact: bool) -> None:
    params = parameters(SHAPES)
    optimizer = masked("adamw", params, compact_state=compact)
    pruner = GMPScheduler(model_of(params), optimizer, schedules.Constant(0.9, begin_step=2), targets="*")
    go(params, optimizer, pruner, range(1))
    saved = copy.deepcopy((pruner.state_dict(), [p.detach() for p in params]))
    go(params, optimizer, pruner, range(1, 5))
    assert pruner.sparsity > 0.8
    pruner.load_state_dict(saved[0])
    with torch.no_grad():
        for p, weights in zip(params, saved[1], strict=True):
            p.copy_(weights)
    set_gradients(params, random_gradients(params, 9), {})
    optimizer.step()
    assert pruner.sparsity == 0.0
    assert all((p != 0).all() for p in params)
    state = optimizer.state_dict()["state"]
    assert all((state[i]["exp_avg"] != 0).all() for i in state)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda run: pickle.loads(pickle.dumps(run))], ids=["copy", "pickle"])
def test_copies_of_a_compact_run_go_on(again: Callable[[Any], Any]) -> None:
    """Copied bits begin to count their versions anew."""
    run = training(ours("adamw", compact_state=True))
    go(*run, range(1, 5))
    other = again(run)
    for parts in (run, other):
        go(*parts, range(5, 12))
    assert_same_run(*run[:2], *other[:2])
    assert run[2].masks == other[2].masks


@LAYOUTS
def test_a_loaded_scheduler_leaves_the_old_bits_to_the_layout(compact: bool) -> None:
    run = training(ours("adamw", compact_state=compact))
    go(*run, range(1, 8))
    saved = copy.deepcopy([run[1].state_dict(), run[2].state_dict(), [p.detach() for p in run[0]]])
    other = training(ours("adamw", compact_state=compact))
    go(*other, range(1, 4))
    bits = [mask.packed for mask in other[2].masks.values()]
    before = [packed.clone() for packed in bits]
    other[2].load_state_dict(saved[1])
    assert all(torch.equal(a, b) for a, b in zip(bits, before, strict=True)) == compact
    assert all(a.data_ptr() != b["mask"].data_ptr() for a, b in zip(bits, saved[1]["layers"].values(), strict=True))
    other[1].load_state_dict(saved[0])
    with torch.no_grad():
        for p, weights in zip(other[0], saved[2], strict=True):
            p.copy_(weights)
    for parts in (run, other):
        go(*parts, range(8, 12))
    assert_same_run(*run[:2], *other[:2])


def test_state_that_cannot_be_repacked_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    run, steady = training(ours("adamw", compact_state=True)), training(ours("adamw", compact_state=True))
    for params, optimizer, pruner in (run, steady):
        go(params, optimizer, pruner, range(1, 4))
        set_gradients(params, random_gradients(params, 4), {})
        optimizer.step()
        pruner.step()
        set_gradients(params, random_gradients(params, 5), {})
        optimizer.step()
    params, optimizer, pruner = run
    state = {p: dict(optimizer.state[p]) for p in params}

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory left")

    with monkeypatch.context() as patch:
        patch.setattr(choose(None, params[0].device), "move_state", fail, raising=False)
        with pytest.raises(torch.OutOfMemoryError):
            pruner.step()
    for p in params:
        assert all(optimizer.state[p][key] is value for key, value in state[p].items())
    assert pruner.history[-1].step == steady[2].step().step == 5
    assert pruner.step() is None
    for parts in (run, steady):
        go(*parts, range(6, 12))
    assert_same_run(params, optimizer, *steady[:2])


@LAYOUTS
def test_a_second_scheduler_takes_over_the_zeros_it_finds(compact: bool) -> None:
    params, optimizer, pruner = training(ours("adamw", compact_state=compact))
    go(params, optimizer, pruner, range(1, 6))
    masks = {name: mask.clone() for name, mask in pruner.masks.items()}
    with pytest.warns(GMPWarning, match="zero already and are held"):
        second = GMPScheduler(model_of(params), optimizer, schedules.OneShot(0.95, step=3), targets="*")
        set_gradients(params, random_gradients(params, 7), {})
        optimizer.step()
    assert second.masks == masks
    assert_zeros_exact(params, dict(zip(params, masks.values(), strict=True)))
    with pytest.raises(StateError, match="a newer one holds"):
        pruner.step()
