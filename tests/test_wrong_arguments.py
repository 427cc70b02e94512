"""Calls with what holds weights instead of weights themselves: the error says what to pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from gmp_kernels import BitMask, DTypeError, ShapeError, apply_masks_, magnitude_threshold, prune_

MODEL = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU())
WEIGHT = torch.ones(3)

INSTEAD = {
    "module": (MODEL, "Sequential; pass its weights, such as .*, or give the model to GMPScheduler"),
    "layer": (MODEL[0], "Linear; pass its weights"),
    "modules": ([MODEL[0]], "Linear; pass its weights"),
    "optimizer": (torch.optim.SGD(MODEL.parameters(), 0.1), "SGD; pass the weights it steps"),
    "state": (MODEL.state_dict(), "OrderedDict; pass its tensors that are to be pruned"),
    "dict": ({"w": WEIGHT}, "dict; pass its tensors that are to be pruned"),
    "named": (list(MODEL.named_parameters()), "tuple; pass the tensors without their names"),
    "iterator_of_named": (MODEL.named_parameters(), "tuple; pass the tensors without their names"),
    "name": ("0.weight", "str; pass weights, alone or in a list"),
    "names": (["0.weight"], "str; pass weights"),
    "number": (0.5, "float; pass weights"),
    "nothing": (None, "NoneType; pass weights"),
    "class": (torch.nn.Linear, "type; pass weights"),
}
CALLS: dict[str, Callable[[Any], object]] = {
    "prune_": lambda given: prune_(given, sparsity=0.5),
    "apply_masks_": lambda given: apply_masks_(given, BitMask.ones((3,))),
    "magnitude_threshold": lambda given: magnitude_threshold(given, 1),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "given", ["module", "layer", "optimizer", "state", "dict", "name", "number", "nothing", "class"]
)
def test_one_that_is_no_weight(call: str, given: str) -> None:
    before = [parameter.clone() for parameter in MODEL.parameters()]
    value, message = INSTEAD[given]
    with pytest.raises(
        DTypeError, match=rf"^{call}: expected a torch.Tensor or numpy.ndarray for weights\[0\], got {message}"
    ):
        CALLS[call](value)
    assert all(map(torch.equal, MODEL.parameters(), before))


@pytest.mark.parametrize("given", ["modules", "named", "iterator_of_named", "names"])
def test_a_list_of_what_are_no_weights(given: str) -> None:
    value, message = INSTEAD[given]
    with pytest.raises((DTypeError, ShapeError), match=rf"got {message}"):
        prune_(value, sparsity=0.5)


def test_whatever_yields_weights_is_a_list_of_them() -> None:
    weights = [torch.arange(1.0, 5.0) for _ in range(3)]
    prune_(iter(weights[:1]), sparsity=0.5)
    prune_(tuple(weights[1:2]), sparsity=0.5)
    prune_({1: weights[2]}.values(), sparsity=0.5)
    assert [weight.tolist() for weight in weights] == [[0.0, 0.0, 3.0, 4.0]] * 3
    array = np.arange(1.0, 5.0, dtype=np.float32)
    prune_(array, sparsity=0.5)
    assert array.tolist() == [0.0, 0.0, 3.0, 4.0]


@pytest.mark.parametrize("masks", [5, {"a": BitMask.ones((3,))}, "mask", torch.nn.Linear(2, 2)])
def test_what_is_no_mask(masks: Any) -> None:
    with pytest.raises(DTypeError, match=r"expected a BitMask for weights\[0\], got \w+; use BitMask\.from_bool"):
        apply_masks_(torch.ones(3), masks)
