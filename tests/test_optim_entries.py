"""State of any kind, whoever put it there: found before the first write, or brought into the form it is kept in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim_cases import (
    LAYOUTS,
    Packed,
    assert_same_run,
    assert_zeros_exact,
    clones,
    everything,
    masked,
    parameters,
    plain,
    random_gradients,
    random_masks,
    reference_step,
    set_gradients,
    started,
)
from optim_cases import one_thread as one_thread
from torch import nn

from gmp_kernels import BitMask, GMPScheduler, optim, schedules
from gmp_kernels.errors import CaptureError, DTypeError, LayoutError, ShapeError, StateError
from gmp_kernels.optim.compact import CompactState, layout_of
from gmp_kernels.tools.testing import assert_bitwise_equal

SHAPE = (24, 33)
BAD: dict[str, Callable[[torch.Tensor], Any]] = {
    "float8": lambda v: torch.zeros_like(v, dtype=torch.float8_e4m3fn),
    "16 bits": lambda v: v.half(),
    "complex": lambda v: v.to(torch.complex64),
    "integers": lambda v: v.int(),
    "another class": lambda v: v.as_subclass(Packed),
    "sparse": lambda v: v.to_sparse(),
    "another device": lambda v: v.to("meta"),
    "another shape": lambda v: v.flatten()[:-1],
    "freed memory": lambda v: _freed(v.clone()),
    "a number": lambda v: 0.0,
    "a list": lambda v: v.tolist(),
    "a view that negates": torch._neg_view,
}


def _freed(tensor: torch.Tensor) -> torch.Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


@LAYOUTS
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("kind", BAD)
def test_state_that_no_kernel_can_walk_is_refused_before_the_first_write(kind: str, key: str, compact: bool) -> None:
    params, optimizer = started("adamw", compact)
    whole = optimizer.state[params[2]][key]
    optimizer.state[params[2]][key] = BAD[kind](whole)
    set_gradients(params, random_gradients(params, 5), {})
    before, kept = clones(params), everything(params, optimizer)
    masks = random_masks(params, 0.9)
    for call in (optimizer.step, lambda: optimizer.set_masks(masks), lambda: optimizer.share_masks(masks)):
        with pytest.raises(StateError, match=f"expected '{key}' as torch.float32 of shape"):
            call()
        for p, q in zip(params, before, strict=True):
            assert_bitwise_equal(p.detach(), q.detach())
        assert all(a is b for a, b in zip(everything(params, optimizer), kept, strict=True))
        assert optimizer.state[params[0]]["step"] == 3
    optimizer.state[params[2]][key] = whole
    optimizer.set_masks(masks)
    optimizer.step()
    assert_zeros_exact(params, masks)


@LAYOUTS
def test_an_entry_of_somebody_else_is_masked_or_refused_or_left_alone(compact: bool) -> None:
    params, optimizer = started("adamw", compact)
    p, state = params[0], optimizer.state[params[0]]
    state["slow"], state["note"], state["ids"] = torch.ones(SHAPE), "mine", torch.ones(SHAPE, dtype=torch.int64)
    masks = random_masks([p], 0.9)
    optimizer.set_masks(masks)
    state = optimizer.state[p]
    dense = optimizer.state_dict()["state"][0]["slow"]
    assert torch.equal(dense != 0, masks[p].to_bool())
    assert state["note"] == "mine" and state["ids"].all()
    optimizer.state[p]["slow"] = torch.ones(SHAPE).as_subclass(Packed) if not compact else torch.ones(3)
    with pytest.raises(StateError, match="'slow'"):
        optimizer.set_masks(masks)


@pytest.mark.parametrize("missing", ["step", "exp_avg", "exp_avg_sq"])
def test_state_that_lacks_an_entry_is_refused(missing: str) -> None:
    params, optimizer = started()
    saved = copy.deepcopy(optimizer.state_dict())
    del optimizer.state[params[1]][missing], saved["state"][1][missing]
    before = clones(params)
    with pytest.raises(StateError, match=f"none of \\['{missing}'\\]"):
        optimizer.step()
    for p, q in zip(params, before, strict=True):
        assert_bitwise_equal(p.detach(), q.detach())
    assert optimizer.state[params[0]]["step"] == 3
    with pytest.raises(StateError, match=f"none of \\['{missing}'\\]"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize(
    "count", [torch.ones(2), "3", torch.tensor(1j), float("nan"), torch.ones(()).as_subclass(Packed)]
)
def test_a_step_count_that_is_no_number_is_refused(count: Any) -> None:
    params, optimizer = started()
    optimizer.state[params[1]]["step"] = count
    before = clones(params)
    with pytest.raises(StateError, match="expected one number as 'step'"):
        optimizer.step()
    assert_bitwise_equal(params[0].detach(), before[0].detach())


@pytest.mark.parametrize(
    "count", [300, 300.0, torch.tensor(300, dtype=torch.int64), torch.tensor([300.0]).half()], ids=repr
)
def test_a_step_count_of_another_type_goes_on_in_float32(count: Any) -> None:
    """In 16 bits it would stay where it is one day."""
    params, optimizer = started()
    expected_params, expected = copy.deepcopy((params, optimizer))
    optimizer.state[params[1]]["step"] = count
    expected.state[expected_params[1]]["step"] = torch.tensor(300.0)
    for group, stepping in ((params, optimizer), (expected_params, expected)):
        for number in range(3):
            set_gradients(group, random_gradients(group, number), {})
            stepping.step()
    assert_same_run(params, optimizer, expected_params, expected)
    assert optimizer.state[params[1]]["step"].dtype is torch.float32


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_counts_are_float32_whatever_the_defaults_and_whatever_is_loaded(dtype: torch.dtype, capturable: bool) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            params = [nn.Parameter(torch.ones(5, dtype=torch.float32, device="cpu"))]
            optimizer = optim.AdamW(params, capturable=capturable)
            params[0].grad = torch.ones(5, dtype=torch.float32, device="cpu")
            optimizer.step()
            count = optimizer.state[params[0]]["step"]
            assert (count.dtype, count.device.type, count.item()) == (torch.float32, "cpu", 1)
            saved = copy.deepcopy(optimizer.state_dict())
            saved["state"][0]["step"] = torch.tensor(256.0, dtype=dtype, device="cpu")
            optimizer.load_state_dict(saved)
            for _ in range(2):
                optimizer.step()
            count = optimizer.state[params[0]]["step"]
            assert (count.dtype, count.device.type, count.item()) == (torch.float32, "cpu", 258)
            saved["state"][0]["step"] = 7
            optimizer.load_state_dict(saved)
            assert optimizer.state[params[0]]["step"].dtype is torch.float32
    finally:
        torch.set_default_dtype(before)


@LAYOUTS
@pytest.mark.parametrize("case", ["momentum", "adamw"])
def test_state_follows_a_model_to_another_memory_format_and_back(case: str, compact: bool) -> None:
    """Also under masks, and state laid out by them, whose bits are in the order of memory."""
    params, mirror = parameters([(16, 8, 3, 3)]), parameters([(16, 8, 3, 3)])
    optimizer, expected = masked(case, params, compact_state=compact), masked(case, mirror, compact_state=compact)
    formats = [torch.contiguous_format, torch.channels_last, torch.channels_last, torch.contiguous_format]
    for number, memory_format in enumerate([*formats, torch.channels_last]):
        params[0].data = params[0].data.contiguous(memory_format=memory_format)
        if number in (1, 4):
            for group, one in ((params, optimizer), (mirror, expected)):
                one.set_masks(random_masks(group, 0.2 * number))
        for group, one in ((params, optimizer), (mirror, expected)):
            set_gradients(group, random_gradients(group, number), one._masks)
            one.step()
        assert_same_run(params, optimizer, mirror, expected)
    assert not params[0].is_contiguous()


def test_bits_changed_in_place_count_in_another_memory_format_too() -> None:
    params, mirror = parameters([(16, 8, 3, 3)]), parameters([(16, 8, 3, 3)])
    params[0].data = params[0].data.contiguous(memory_format=torch.channels_last)
    optimizer, expected = masked("momentum", params), masked("momentum", mirror)
    mask = BitMask.ones(params[0].shape)
    optimizer.set_masks({params[0]: mask})
    expected.set_masks({mirror[0]: mask})
    for number in range(3):
        for group, one in ((params, optimizer), (mirror, expected)):
            set_gradients(group, random_gradients(group, number), {})
            one.step()
        assert_same_run(params, optimizer, mirror, expected)
        mask.packed.bitwise_and_(random_masks(params, 0.3, number)[params[0]].packed)
        for group, one in ((params, optimizer), (mirror, expected)):
            one.set_masks({group[0]: mask})


def test_compact_state_of_other_strides_is_refused_and_nothing_changes() -> None:
    params = parameters([(16, 8, 3, 3)])
    optimizer = masked("momentum", params, compact_state=True)
    optimizer.set_masks(random_masks(params, 0.5))
    set_gradients(params, random_gradients(params, 0), {})
    optimizer.step()
    params[0].data = params[0].data.transpose(0, 1).contiguous().transpose(0, 1)
    before = params[0].detach().clone()
    with pytest.raises(LayoutError, match="contiguous or channels_last parameters with compact state"):
        optimizer.step()
    assert_bitwise_equal(params[0].detach(), before)


def test_a_pruner_prunes_after_state_was_left_in_another_memory_format() -> None:
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 8, 3))
    optimizer = optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    pruner = GMPScheduler(model, optimizer, schedules.Constant(0.5, begin_step=0))
    model.to(memory_format=torch.channels_last)
    model(torch.randn(2, 8, 9, 9)).square().sum().backward()
    optimizer.step()
    model.to(memory_format=torch.contiguous_format)
    pruner.step()
    for name, mask in pruner.masks.items():
        p = model.get_parameter(name)
        assert torch.equal(p != 0, mask.to_bool())
        assert torch.equal(optimizer.state[p]["momentum_buffer"] != 0, mask.to_bool())


@pytest.mark.parametrize("case", ["nesterov", "adamw"])
def test_a_parameter_that_is_a_view_which_negates_steps_as_in_torch(case: str) -> None:
    memory = [torch.randn(9, 4, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    params = [nn.Parameter(torch._neg_view(memory[0]))]
    mirror = [nn.Parameter(memory[1].neg())]
    optimizer, reference = masked(case, params), plain(case, mirror)
    mask = random_masks(params, 0.5)
    optimizer.set_masks(mask)
    with torch.no_grad():
        mirror[0].masked_fill_(~mask[params[0]].to_bool(), 0.0)
    for number in range(3):
        set_gradients(params, random_gradients(params, number), mask)
        optimizer.step()
        reference_step(reference, mirror, random_gradients(mirror, number), list(mask.values()))
        torch.testing.assert_close(params[0].detach().resolve_neg(), mirror[0].detach())
        torch.testing.assert_close(memory[0], params[0].detach().resolve_neg().neg())


# -- first steps -------------------------------------------------------------------------------------------------------

WRONG: dict[str, Callable[[list[Any], Any], object]] = {
    "lr": lambda params, optimizer: optimizer.param_groups[0].update(lr=None),
    "decay": lambda params, optimizer: optimizer.param_groups[0].update(weight_decay="much"),
    "gradient": lambda params, optimizer: setattr(params[2], "grad", _freed(torch.ones(65, 9))),
    "mask": lambda params, optimizer: setattr(optimizer._masks[params[0]], "packed", torch.ones(3, dtype=torch.uint8)),
    "backend": lambda params, optimizer: setattr(optimizer, "_backend", "cuda"),
}


@LAYOUTS
@pytest.mark.parametrize("case", ["sgd", "momentum_maximize", "adamw"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_first_step_that_raises_leaves_no_trace(wrong: str, case: str, compact: bool) -> None:
    """The next one is the first: of SGD's momentum that is without dampening."""
    shapes = [(24, 33), (7,), (65, 9)]
    params, mirror = parameters(shapes), parameters(shapes)
    optimizer, expected = (masked(case, group, compact_state=compact) for group in (params, mirror))
    for group, one in ((params, optimizer), (mirror, expected)):
        one.set_masks(random_masks(group[:1], 0.5))
        set_gradients(group, random_gradients(group, 0), {})
    group, bits, backend = dict(optimizer.param_groups[0]), optimizer._masks[params[0]].packed, optimizer._backend
    gradient = params[2].grad
    before = clones(params)
    WRONG[wrong](params, optimizer)
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        optimizer.step()
    assert not optimizer.state
    for p, q in zip(params, before, strict=True):
        assert_bitwise_equal(p.detach(), q.detach())
    optimizer.param_groups[0].update(group)
    optimizer._masks[params[0]].packed, optimizer._backend, params[2].grad = bits, backend, gradient
    optimizer.step()
    expected.step()
    assert_same_run(params, optimizer, mirror, expected)
    assert all(optimizer.state.values())


# -- masks -------------------------------------------------------------------------------------------------------------


@LAYOUTS
def test_masks_that_are_let_go_leave_weights_and_state_and_hold_nothing(compact: bool) -> None:
    params, optimizer = started("adamw", compact)
    saved = copy.deepcopy(optimizer.state_dict()["state"])
    before = clones(params)
    optimizer.forget_masks(params[:2])
    assert [p in optimizer._masks for p in params] == [False, False, True]
    assert type(optimizer.state[params[0]]) is dict
    assert isinstance(optimizer.state[params[2]], CompactState) == compact
    for p, q in zip(params, before, strict=True):
        assert_bitwise_equal(p.detach(), q.detach())
    for key, value in saved[0].items():
        assert_bitwise_equal(optimizer.state_dict()["state"][0][key], value)
    set_gradients(params, random_gradients(params, 4), {})
    optimizer.step()
    assert (params[0] != 0).all() and (params[2] == 0).any()
    assert layout_of(optimizer.state[params[0]]) is None


def test_a_mask_that_a_graph_reads_is_not_let_go() -> None:
    params, optimizer = started()
    optimizer._graph_masks.update((p, 1 if p in optimizer._masks else 0) for p in params)
    with pytest.raises(CaptureError, match="forget_masks: expected a parameter whose mask no CUDA graph reads"):
        optimizer.forget_masks(params)
    assert params[0] in optimizer._masks and params[2] in optimizer._masks
    optimizer.forget_masks(params[1:2])  # it has none


def test_masks_that_are_none_are_refused_by_set_masks() -> None:
    params, optimizer = started()
    p = params[0]
    cut = BitMask.ones(SHAPE)
    cut.packed = cut.packed[:-1]
    for wrong, error in ((torch.ones(SHAPE), DTypeError), (cut, ShapeError), (BitMask.ones((3,)), ShapeError)):
        with pytest.raises(error, match="set_masks"):
            optimizer.set_masks({p: wrong})
    meta = BitMask.of(torch.empty(99, dtype=torch.uint8, device="meta"), torch.Size(SHAPE))
    with pytest.raises(LayoutError, match=r"expected the mask of a parameter of shape \(.*\) on cpu, got meta"):
        optimizer.set_masks({p: meta})


def test_compact_state_follows_other_bits_before_the_next_step() -> None:
    """Whoever owns a mask may give it other bits, and be interrupted before it can say so."""
    params, optimizer = started("adamw", compact=True)
    expected_params, expected = copy.deepcopy((params, optimizer))
    other = random_masks(params[:1], 0.9)[params[0]]
    optimizer._masks[params[0]].packed = other.packed
    expected.set_masks({expected_params[0]: other})
    assert optimizer.state_dict()["state"].keys() == expected.state_dict()["state"].keys()
    for group, one in ((params, optimizer), (expected_params, expected)):
        set_gradients(group, random_gradients(group, 5), {})
        one.step()
    assert_same_run(params, optimizer, expected_params, expected)


def test_a_copy_knows_the_bits_it_was_laid_out_by_as_they_are_now() -> None:
    """They were written before they became the layout's, which their copies have not been."""
    params = parameters([(24, 33)])
    optimizer = masked("adamw", params, compact_state=True)
    mask = BitMask.ones(SHAPE)
    for end in (10, 20, 40):
        mask.packed[:end] = 0
    set_gradients(params, random_gradients(params, 0), {})
    optimizer.step()
    optimizer.share_masks({params[0]: mask})
    other_params, other = copy.deepcopy((params, optimizer))
    for group, one in ((params, optimizer), (other_params, other)):
        set_gradients(group, random_gradients(group, 1), {})
        one.step()
    assert_same_run(params, optimizer, other_params, other)
    other._masks[other_params[0]].packed[50] = 0
    with pytest.raises(StateError, match="written in place"):
        other.step()
