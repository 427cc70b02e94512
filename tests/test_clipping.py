"""Gradients scaled to a norm: the same bits on a device that multiplies otherwise, and little memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from optim_cases import parameters, random_gradients
from peak_memory import peak, reset_peak

from gmp_kernels.errors import LayoutError
from gmp_kernels.optim import clip_grad_norm_, gradients
from gmp_kernels.tools.testing import assert_bitwise_equal

HALF = [torch.bfloat16, torch.float16]
SHAPES = [(41, 243), (), (0, 3), (7,), (5, 4)]


def rounded_first(factor: object, dtype: torch.dtype) -> object:
    """A factor as CUDA multiplies by it: one without dimensions is rounded to the dtype of the other first."""
    is_scalar = isinstance(factor, torch.Tensor) and factor.ndim == 0
    return factor.to(dtype) if is_scalar else factor


@pytest.fixture(params=["host", "device"])
def multiplication(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of this machine, and as CUDA makes them."""
    if request.param == "host":
        return
    one, many = torch.Tensor.mul_, torch._foreach_mul_

    def each(tensors: list[torch.Tensor], factor: object) -> None:
        for tensor in tensors:
            many([tensor], rounded_first(factor, tensor.dtype))

    monkeypatch.setattr(torch, "_foreach_mul_", each)
    monkeypatch.setattr(
        torch.Tensor, "mul_", lambda self, other: one(self, rounded_first(other, self.dtype) if self.ndim else other)
    )


@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64], ids=str)
def test_gradients_are_scaled_in_float32_and_rounded_once(multiplication: None, dtype: torch.dtype) -> None:
    params = parameters(SHAPES, dtype)
    params[4] = torch.nn.Parameter(torch.randn(4, 5, generator=torch.Generator().manual_seed(3)).to(dtype).t())
    given = random_gradients(params, 0)
    for p, gradient in zip(params, given, strict=True):
        p.grad = gradient.clone(memory_format=torch.preserve_format)
    norm = clip_grad_norm_(params, 1.0)
    factor = 1.0 / (norm + 1e-6)
    assert factor < 0.5 and (factor.to(dtype) != factor or dtype not in HALF)
    wide = torch.promote_types(dtype, torch.float32)
    for p, gradient in zip(params, given, strict=True):
        assert_bitwise_equal(p.grad, (gradient.to(wide) * factor.to(wide)).to(dtype))


def test_gradients_with_gaps_are_scaled_too(multiplication: None) -> None:
    p = torch.nn.Parameter(torch.zeros(6, 4, dtype=torch.bfloat16))
    whole = torch.full((6, 8), 3.0, dtype=torch.bfloat16)
    p.grad = whole[:, ::2]
    norm = clip_grad_norm_([p], 1.0)
    assert whole[:, ::2].eq((3.0 / (norm + 1e-6)).bfloat16()).all() and whole[:, 1::2].eq(3.0).all()


def expanded(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(1, 1, dtype=dtype).expand(4, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (expanded, r"memory of their own in 'gradient 3', got strides \(0, 0\) for shape \(4, 4\); use .contiguous"),
        (lambda: expanded(torch.bfloat16), "memory of their own in 'gradient 3'"),
        (lambda: torch._neg_view(torch.ones(4, 4)), "a plain tensor for 'gradient 3', got a view that negates"),
        (lambda: torch.eye(4).to_sparse(), "a dense tensor for 'gradient 3', got layout torch.sparse_coo"),
    ],
    ids=["expanded", "expanded bfloat16", "negated", "sparse"],
)
def test_a_gradient_that_cannot_be_scaled_leaves_the_others_alone(
    make: Callable[[], torch.Tensor], message: str
) -> None:
    given = [torch.full((4, 4), 3.0, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)]
    params = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in [*given, make()]]
    for p, gradient in zip(params, [*given, make()], strict=True):
        p.grad = gradient
    with pytest.raises(LayoutError, match=message):
        clip_grad_norm_(params, 1.0)
    assert all(gradient.eq(3.0).all() for gradient in given)


def test_no_memory_for_the_last_gradient_leaves_the_first_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [torch.nn.Parameter(torch.ones(40, dtype=dtype)) for dtype in (torch.float32, *HALF)]
    for p in params:
        p.grad = torch.full_like(p, 3.0)
    allocate, left = torch.empty, [1]

    def empty(*args: object, **kwargs: object) -> torch.Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise torch.OutOfMemoryError("no memory")
        return allocate(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(torch.OutOfMemoryError):
        clip_grad_norm_(params, 1.0)
    assert all(p.grad.eq(3.0).all() for p in params)


def test_a_gradient_that_parameters_share_is_scaled_once_and_inference_tensors_are() -> None:
    with torch.inference_mode():
        unversioned = torch.full((4,), 3.0)
    params = [torch.nn.Parameter(torch.zeros(4)) for _ in range(3)]
    params[0].grad = params[1].grad = torch.full((4,), 3.0)
    params[2].grad = unversioned
    norm = clip_grad_norm_(params, 1.0)
    assert float(norm) == pytest.approx(3.0 * 12**0.5)
    assert all(p.grad.eq(3.0 / (norm + 1e-6)).all() for p in params)


def raised_by(run: Callable[[], object]) -> int:
    reset_peak()
    before = peak()
    run()
    return peak() - before


def test_no_copy_of_a_large_gradient_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    p = torch.nn.Parameter(torch.ones(1 << 25, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    clip_grad_norm_([p], 1.0)  # threads and their stacks come once
    allowed = 4 * gradients.PIECE + (1 << 23)
    assert raised_by(lambda: clip_grad_norm_([p], 1e-3)) < allowed < p.nbytes
    monkeypatch.setattr(gradients, "PIECE", p.numel())
    assert raised_by(lambda: clip_grad_norm_([p], 1e-6)) > 3 * p.numel()  # of the float32 copy's four bytes each
