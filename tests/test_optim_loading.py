"""What state_dicts bring back: copies, masked by the masks of the time they are used, and all or nothing."""

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
    random_gradients,
    random_masks,
    set_gradients,
    started,
)
from optim_cases import one_thread as one_thread

from gmp_kernels.errors import StateError
from gmp_kernels.optim.compact import CompactState
from gmp_kernels.tools.testing import assert_bitwise_equal


@LAYOUTS
def test_what_is_loaded_is_copied_and_loads_again(compact: bool) -> None:
    params, optimizer = started("adamw", compact)
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    weights, results = clones(params), []
    for _ in range(2):
        with torch.no_grad():
            for p, q in zip(params, weights, strict=True):
                p.copy_(q)
        optimizer.load_state_dict(saved)
        set_gradients(params, random_gradients(params, 3), {})
        optimizer.step()
        results.append(copy.deepcopy((params, optimizer)))
        assert saved["param_groups"] == before["param_groups"]
        for index, state in before["state"].items():
            for key, value in state.items():
                assert_bitwise_equal(saved["state"][index][key], value)
    assert_same_run(*results[0], *results[1])


@LAYOUTS
def test_a_run_that_is_rolled_back_finds_the_state_of_weights_that_were_pruned_since(compact: bool) -> None:
    """Whichever is rolled back first: masks that are about to go do not take state along."""
    params, optimizer = started("adamw", compact)
    early = dict(optimizer._masks)
    saved, weights = copy.deepcopy(optimizer.state_dict()), clones(params)
    optimizer.set_masks(random_masks(params, 0.95))
    optimizer.load_state_dict(saved)
    optimizer.forget_masks(params[1:2])
    with torch.no_grad():
        for p, q in zip(params, weights, strict=True):
            p.copy_(q)
    optimizer.set_masks(early)
    for index, state in saved["state"].items():
        for key, value in state.items():
            assert_bitwise_equal(optimizer.state_dict()["state"][index][key], value)


@LAYOUTS
def test_state_that_was_loaded_is_masked_where_it_is_used_or_saved(compact: bool) -> None:
    params, optimizer = started("adamw", compact)
    saved = copy.deepcopy(optimizer.state_dict())
    masks = random_masks(params, 0.9)
    optimizer.set_masks(masks)
    optimizer.load_state_dict(saved)
    for state, mask in zip(optimizer.state_dict()["state"].values(), masks.values(), strict=True):
        assert not state["exp_avg"][~mask.to_bool()].any() and state["exp_avg"].any()
    set_gradients(params, random_gradients(params, 3), masks)
    optimizer.step()
    assert_zeros_exact(params, masks)
    assert isinstance(optimizer.state[params[0]], CompactState) == compact


BROKEN: dict[str, Callable[[dict[str, Any]], object]] = {
    "another shape": lambda saved: saved["state"][2].update(exp_avg=torch.zeros(3)),
    "float8": lambda saved: saved["state"][2].update(exp_avg=torch.zeros(65, 9, dtype=torch.float8_e5m2)),
    "integers": lambda saved: saved["state"][2].update(exp_avg=torch.zeros(65, 9, dtype=torch.int32)),
    "complex": lambda saved: saved["state"][2].update(exp_avg=torch.zeros(65, 9, dtype=torch.complex64)),
    "sparse": lambda saved: saved["state"][2].update(exp_avg=torch.zeros(65, 9).to_sparse()),
    "another class": lambda saved: saved["state"][2].update(exp_avg=torch.zeros(65, 9).as_subclass(Packed)),
    "no count": lambda saved: saved["state"][2].pop("step"),
    "two counts": lambda saved: saved["state"][2].update(step=torch.zeros(2)),
    "no state": lambda saved: saved.pop("state"),
    "no dictionary": lambda saved: saved["state"].update({2: [1, 2]}),
    "another group": lambda saved: saved["param_groups"].append(saved["param_groups"][0]),
    "fewer parameters": lambda saved: saved["param_groups"][0]["params"].pop(),
    "no groups": lambda saved: saved.pop("param_groups"),
}


@LAYOUTS
@pytest.mark.parametrize("broken", BROKEN)
def test_a_state_dict_that_cannot_be_loaded_changes_nothing(broken: str, compact: bool) -> None:
    params, optimizer = started("adamw", compact)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 0.5
    BROKEN[broken](saved)
    before, kept = clones(params), everything(params, optimizer)
    groups, batch = optimizer.param_groups[0], optimizer._batch
    with pytest.raises((ValueError, KeyError)) as caught:
        optimizer.load_state_dict(saved)
    assert isinstance(caught.value, StateError) == (broken not in {"no state", "no groups", *list(BROKEN)[-3:-1]})
    assert all(a is b for a, b in zip(everything(params, optimizer), kept, strict=True))
    assert optimizer.param_groups[0] is groups and groups["lr"] == 0.01 and optimizer._batch is batch
    for p, q in zip(params, before, strict=True):
        assert_bitwise_equal(p.detach(), q.detach())
