"""The look of a step at all parameters in one call, against the look at each of them: the same results and errors."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optim_cases import masked, parameters, random_gradients
from optim_cases import one_thread as one_thread

from gmp_kernels import BitMask
from gmp_kernels.backends.layouts import EXCHANGE, by_getters
from gmp_kernels.errors import LayoutError
from gmp_kernels.optim import batch
from gmp_kernels.optim import masked as masked_module
from gmp_kernels.optim.batch import Batch
from gmp_kernels.optim.constants import Settings
from gmp_kernels.tools.testing import assert_bitwise_equal

SHAPES = [(6, 6), (5,), (9, 3), (4, 2, 3, 3)]
RULES = ["momentum", "sgd", "adamw", "amsgrad"]


def looks(*_: object) -> None:
    """Answer as if nothing could be seen in one call."""


@contextmanager
def looking_closely() -> Iterator[None]:
    with (
        patch.object(masked_module, "gradients_if_unchanged", looks),
        patch.object(Settings, "hold", looks),
        patch.object(Batch, "with_states", looks),
        patch.object(batch, "layouts_of", by_getters),
    ):
        yield


class Side:
    """Parameters and an optimizer, and what a test does to them."""

    def __init__(self, case: str, compact: bool) -> None:
        self.params = parameters(SHAPES)
        groups = [{"params": self.params[:2]}, {"params": self.params[2:], "lr": 0.03}]
        self.optimizer = masked(case, groups, compact_state=compact)
        self.masks: dict[Any, BitMask] = {}
        self.saved: dict[str, Any] = self.optimizer.state_dict()
        for i, p in enumerate(self.params[:3]):
            self.masks[p] = BitMask.from_bool(torch.rand(p.shape, generator=torch.Generator().manual_seed(i)) > 0.4)
        self.optimizer.share_masks(self.masks)
        for step in range(2):
            set_all_gradients(self, step)
            self.optimizer.step()

    @property
    def owned(self) -> list[Any]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]


def set_all_gradients(side: Side, step: int) -> None:
    for p, gradient in zip(side.params, random_gradients(side.params, step), strict=True):
        p.grad = gradient


def written_gradient(side: Side, i: int) -> None:
    if side.params[i].grad is not None and not side.params[i].grad.is_sparse:
        side.params[i].grad.mul_(-0.5)


def other_gradient(side: Side, i: int) -> None:
    side.params[i].grad = torch.full_like(side.params[i], 0.25)


def no_gradient(side: Side, i: int) -> None:
    side.params[i].grad = None


def sparse_gradient(side: Side, i: int) -> None:
    side.params[i].grad = torch.full_like(side.params[i], 0.25).to_sparse()


def negated_gradient(side: Side, i: int) -> None:
    side.params[i].grad = torch._neg_view(torch.full_like(side.params[i], 0.25))


def transposed_gradient(side: Side, i: int) -> None:
    p = side.params[i]
    p.grad = torch.arange(p.numel(), dtype=p.dtype).view(p.shape[::-1]).permute(*range(p.ndim)[::-1]) / 50


def expanded_gradient(side: Side, i: int) -> None:
    side.params[i].grad = torch.tensor(0.5, dtype=side.params[i].dtype).expand(side.params[i].shape)


def gradient_in_place_of(side: Side, i: int) -> None:
    p = side.params[i]
    if p.grad is not None and not p.grad.is_sparse:
        p.grad.data = torch._neg_view(p.grad.data)


def step_while_freed(side: Side, tensor: torch.Tensor) -> None:
    """Take a step while a tensor has no memory, which later events could not read."""
    storage, values = tensor.untyped_storage(), tensor.clone()
    size = storage.nbytes()
    storage.resize_(0)
    try:
        side.optimizer.step()
    finally:
        storage.resize_(size)
        tensor.copy_(values)


def freed_gradient(side: Side, i: int) -> None:
    side.params[i].grad = torch.ones_like(side.params[i])
    step_while_freed(side, side.params[i].grad)


def freed_weight(side: Side, i: int) -> None:
    step_while_freed(side, side.params[i].data)


def other_memory(side: Side, i: int) -> None:
    side.params[i].data = side.params[i].data.clone() + 0.125


def other_strides(side: Side, i: int) -> None:
    values = side.params[i].data
    side.params[i].data = (
        values.clone().permute(*range(values.ndim)[::-1]).contiguous().permute(*range(values.ndim)[::-1])
    )


def transposed_in_place(side: Side, i: int) -> None:
    """The square one at the same address."""
    side.params[0].data = side.params[0].data.t()


def negated_weight(side: Side, i: int) -> None:
    side.params[i].data = torch._neg_view(side.params[i].data)


def frozen_weight(side: Side, i: int) -> None:
    side.params[i].requires_grad_(not side.params[i].requires_grad)


def other_dtype(side: Side, i: int) -> None:
    side.params[i].data = side.params[i].data.bfloat16()


def other_entry(side: Side, i: int) -> None:
    state = side.optimizer.state[side.params[i]]
    for name in ("momentum_buffer", "exp_avg"):
        if state.get(name) is not None:
            state[name] = state[name].clone() + 0.5


def gone_entry(side: Side, i: int) -> None:
    side.optimizer.state[side.params[i]].pop("momentum_buffer", None)


def other_dictionary(side: Side, i: int) -> None:
    p = side.params[i]
    side.optimizer.state[p] = copy.copy(side.optimizer.state[p])


def no_state(side: Side, i: int) -> None:
    side.optimizer.state.pop(side.params[i], None)


def foreign_entry(side: Side, i: int) -> None:
    side.optimizer.state[side.params[i]]["seen"] = torch.zeros(3)


def written_count(side: Side, i: int) -> None:
    if "step" in side.optimizer.state[side.params[i]]:
        side.optimizer.state[side.params[i]]["step"] += 3


def saved(side: Side, i: int) -> None:
    side.saved = copy.deepcopy(side.optimizer.state_dict())


def loaded(side: Side, i: int) -> None:
    side.optimizer.load_state_dict(side.saved)


def fewer_kept(side: Side, i: int) -> None:
    """An update by the scheduler: masks stay, and so do their bits if no state is laid out by them."""
    changed = {}
    for p, mask in list(side.masks.items())[: i + 1]:
        kept = mask.to_bool()
        kept.view(-1)[i::3] = False
        fewer = BitMask.from_bool(kept).to(memory_format=mask.memory_format)
        if side.optimizer.compact_state:
            mask.become(fewer)
        else:
            mask.packed.copy_(fewer.packed)
        changed[p] = mask
    side.optimizer.share_masks(changed)


def other_bits(side: Side, i: int) -> None:
    """Replaced, and nobody is told. A parameter without a gradient may follow at any later step, so it is left out."""
    if side.params[i % 3].grad is None:
        return
    mask = side.masks[side.params[i % 3]]
    mask.packed = mask.packed & 0x5A


def written_bits(side: Side, i: int) -> None:
    side.masks[side.params[i % 3]].packed[0] &= 0xFE


def new_masks(side: Side, i: int) -> None:
    p = side.params[i]
    side.masks[p] = BitMask.from_bool(torch.arange(p.numel()).view(p.shape) % 3 != i % 3)
    side.optimizer.share_masks({p: side.masks[p]})


def inference_bits(side: Side, i: int) -> None:
    p = side.params[i]
    with torch.inference_mode():
        side.masks[p] = BitMask.from_bool(torch.arange(p.numel()).view(p.shape) % 2 == 0)
    side.optimizer.share_masks({p: side.masks[p]})


def forgotten_mask(side: Side, i: int) -> None:
    side.masks.pop(side.params[i], None)
    side.optimizer.forget_masks([side.params[i]])


def another_rate(side: Side, i: int) -> None:
    side.optimizer.param_groups[i % 2].update(lr=0.2 / (i + 1), weight_decay=0.01 * i)


def another_rate_alone(side: Side, i: int) -> None:
    side.optimizer.param_groups[i % 2]["lr"] = 0.3 / (i + 1)


def rate_in_place(side: Side, i: int) -> None:
    """A learning rate in a tensor, which changes without being replaced."""
    group = side.optimizer.param_groups[i % 2]
    if isinstance(group["lr"], torch.Tensor):
        group["lr"] *= 0.5
    else:
        group["lr"] = torch.tensor(group["lr"])


def another_average(side: Side, i: int) -> None:
    group = side.optimizer.param_groups[i % 2]
    changed = {"momentum": 0.2 * i, "dampening": 0.1 * i, "betas": (0.2 * i, 0.99), "eps": 1e-6 * (i + 1)}
    group.update({key: value for key, value in changed.items() if key in group})


def unknown_setting(side: Side, i: int) -> None:
    side.optimizer.param_groups[i % 2]["note"] = [i]


def another_rule(side: Side, i: int) -> None:
    group = side.optimizer.param_groups[i % 2]
    group.update({key: not group[key] for key in ("amsgrad", "maximize") if key in group})


def another_order(side: Side, i: int) -> None:
    side.optimizer.param_groups[i % 2]["params"].reverse()


def another_group(side: Side, i: int) -> None:
    own = side.optimizer.param_groups[0]["params"]
    if len(own) > 1:
        side.optimizer.param_groups[1]["params"].insert(0, own.pop())


def another_parameter(side: Side, i: int) -> None:
    p = torch.nn.Parameter(torch.linspace(-1, 1, 6))
    p.grad = torch.ones(6)
    side.optimizer.add_param_group({"params": [p]})


def parameter_in_place_of(side: Side, i: int) -> None:
    """Another object over the same memory."""
    for group in side.optimizer.param_groups:
        for place, p in enumerate(group["params"]):
            if p is side.params[i]:
                group["params"][place] = torch.nn.Parameter(p.data)
                group["params"][place].grad = p.grad


def overflow(side: Side, i: int) -> None:
    side.optimizer.found_inf = torch.tensor(float(i % 2))
    side.optimizer.grad_scale = torch.tensor(2.0**i)


def step(side: Side, i: int) -> None:
    side.optimizer.step()


def step_with_gradients(side: Side, i: int) -> None:
    set_all_gradients(side, i)
    side.optimizer.step()


EVENTS: list[Callable[[Side, int], None]] = [
    *(written_gradient, other_gradient, no_gradient, sparse_gradient, negated_gradient, transposed_gradient),
    *(expanded_gradient, gradient_in_place_of, freed_gradient, other_memory, other_strides, transposed_in_place),
    *(negated_weight, freed_weight, frozen_weight, other_dtype, other_entry, gone_entry, other_dictionary, no_state),
    *(foreign_entry, written_count, saved, loaded, fewer_kept, other_bits, written_bits, new_masks, inference_bits),
    *(forgotten_mask, another_rate, another_rate_alone, rate_in_place, another_average, unknown_setting, another_rule),
    *(another_order, another_group, another_parameter),
    *(parameter_in_place_of, overflow, step, step_with_gradients),
]


def outcome(event: Callable[[Side, int], None], side: Side, i: int) -> tuple[type, str] | None:
    try:
        event(side, i)
    except Exception as error:
        return type(error), re.sub(r"\d{9,}", "an id", str(error))  # torch tells that of a parameter it misses
    return None


def values_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().resolve_neg().contiguous()


def assert_alike(quick: Side, close: Side) -> None:
    for i, (p, q) in enumerate(zip(quick.owned, close.owned, strict=True)):
        assert_bitwise_equal(values_of(p), values_of(q), f"parameter {i}")
        assert p._version == q._version
        one, other = quick.optimizer.state.get(p, {}), close.optimizer.state.get(q, {})
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert_bitwise_equal(values_of(value), values_of(other[name]), f"'{name}' of parameter {i}")


def run(case: str, compact: bool, events: Sequence[tuple[Callable[[Side, int], None], int]]) -> None:
    """Make the events happen to two optimizers, of which one looks at each parameter at every step."""
    quick = Side(case, compact)
    with looking_closely():
        close = Side(case, compact)
    for event, i in events:
        # A step after every event, because a second one may hide what it has changed.
        for happens in (event, step):
            found = outcome(happens, quick, i)
            with looking_closely():
                expected = outcome(happens, close, i)
            assert found == expected, happens.__name__
            assert_alike(quick, close)


@pytest.mark.parametrize("compact", [False, True], ids=["dense", "compact"])
@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
def test_one_call_sees_what_a_look_at_each_parameter_sees(event: Callable[[Side, int], None], compact: bool) -> None:
    for case in RULES[::2]:
        for i in range(len(SHAPES)):
            run(case, compact, [(event, i), (step_with_gradients, i)])


@given(
    st.sampled_from(RULES),
    st.booleans(),
    st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(0, len(SHAPES) - 1)), max_size=8),
)
@settings(max_examples=150, deadline=None)
def test_any_order_of_events_is_seen(
    case: str, compact: bool, events: list[tuple[Callable[[Side, int], None], int]]
) -> None:
    run(case, compact, events)


@pytest.mark.skipif(EXCHANGE is None, reason="torch 2.10 is the first with a table of C functions")
@pytest.mark.parametrize("compact", [False, True], ids=["dense", "compact"])
def test_one_call_is_enough_where_nothing_has_changed(compact: bool) -> None:
    """Also after an update of the masks, which replaces compact state."""
    side = Side("adamw", compact)
    set_all_gradients(side, 5)
    with patch.object(type(side.optimizer), "_checked", side_effect=AssertionError("looked at each parameter")):
        side.optimizer.step()
        fewer_kept(side, 2)
        set_all_gradients(side, 6)
        side.optimizer.step()


def test_a_parameter_whose_hook_knows_the_optimizer_is_collected_with_it() -> None:
    """Facts found at the check refer to parameters, which may refer to the optimizer."""
    side = Side("momentum", False)
    gone = weakref.ref(side.optimizer)
    side.params[0].optimizer = side.optimizer
    del side
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("negated", [False, True])
def test_a_weight_without_memory_is_refused_before_it_is_read(negated: bool) -> None:
    side = Side(RULES[0], False)
    if negated:
        negated_weight(side, 0)
        side.optimizer.step()
    found = outcome(freed_weight, side, 0)
    assert found is not None and found[0] is LayoutError and "freed or cut" in found[1]
