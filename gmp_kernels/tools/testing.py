"""Tools for testing backends: adversarial weights, and comparisons bit by bit."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from gmp_kernels.backends import dtypes
from gmp_kernels.masks import BitMask
from gmp_kernels.ops import PruneResult, prune_

__all__ = ["DTYPES", "GuardedCopy", "adversarial_cases", "assert_bitwise_equal", "assert_same_pruning", "device_of"]

CACHE_LINE_BYTES = 64
SAMPLE_STRIDE_LINES = 16  # the CPU kernels sample at most one in this many cache lines of a large tensor
DTYPES = tuple(dtypes.DTYPES)
GUARD = 7.0  # not a value that pruning writes, and its bytes do not look like a mask


def device_of(backend: str) -> torch.device:
    """Return the device where tests keep the tensors of ``backend``.

    It is the first GPU for "cuda", and for "triton" unless its interpreter runs the kernels (``TRITON_INTERPRET``). For
    all others it is the CPU.
    """
    interpreted = os.environ.get("TRITON_INTERPRET", "0") != "0"
    on_gpu = backend == "cuda" or (backend == "triton" and not interpreted)
    return torch.device("cuda", 0) if on_gpu else torch.device("cpu")


def adversarial_cases(n: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return weights that are hard for a selection, by name.

    Parameters
    ----------
    n : int
        Number of weights in each tensor.
    dtype : torch.dtype
        float32, float64, bfloat16 or float16.

    Returns
    -------
    dict of str to torch.Tensor
        1-d, contiguous, on the CPU; the same on every call. ``any_bits`` holds Inf and NaN of every kind, so it needs
        ``nonfinite="keep"``. All others are finite.
    """
    generator = torch.Generator().manual_seed(n)
    line = CACHE_LINE_BYTES // dtype.itemsize
    index = torch.arange(n)
    normal = torch.randn(n, generator=generator, dtype=torch.float64)
    uniform = torch.rand(n, generator=generator, dtype=torch.float64)
    sign = torch.where(normal < 0, -1.0, 1.0).double()
    by_magnitude = normal[normal.abs().argsort()]
    outlier = normal.clone()
    outlier[n // 2] = 3e4
    # Each dtype has its own range of exponents; float16 has the smallest.
    exponents = np.log2(torch.finfo(dtype).max) * (2 * uniform - 1) * 0.99
    cases = {
        "random": normal,
        "constant": torch.full((n,), -0.5),
        "two_values": torch.where(torch.randperm(n, generator=generator) < n // 2, 0.25, 1.0) * sign,
        "small_integers": (uniform * 4).floor() * sign,
        "sorted": by_magnitude,
        "reversed": by_magnitude.flip(0),
        "period_of_a_line": (1.0 + index % line) * sign,
        "period_of_the_sample": (1.0 + index // line % SAMPLE_STRIDE_LINES) * sign,
        "one_outlier": outlier,
        "zeros": torch.zeros(n),
        "signed_zeros": 0.0 * sign,
        "mostly_zeros": torch.where(uniform < 0.99, 0.0 * sign, normal),
        "subnormals": uniform * torch.finfo(dtype).smallest_normal * sign,
        "bfloat16_ties": normal.bfloat16(),
        "every_exponent": 2.0**exponents * sign,
    }
    cases = {name: weight.to(dtype) for name, weight in cases.items()}
    random_bytes = torch.randint(256, (n * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return cases | {"any_bits": random_bytes.view(dtype)}


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    """Return the bytes of a tensor, with one row per element."""
    flat = tensor.detach().cpu().reshape(-1).contiguous()
    return flat.view(torch.uint8).numpy().reshape(flat.numel(), flat.itemsize)


def assert_bitwise_equal(actual: torch.Tensor, expected: torch.Tensor, what: str = "tensors") -> None:
    """Compare dtype, shape and every bit, so that +0 differs from -0 and a NaN equals itself.

    Parameters
    ----------
    actual, expected : torch.Tensor
        On any devices, which may differ.
    what : str
        Name of the tensors in the message.

    Raises
    ------
    AssertionError
        The tensors differ. The message gives the number of different elements and, for the first of them, flat index,
        both values and both bit patterns.
    """
    if (actual.dtype, actual.shape) != (expected.dtype, expected.shape):
        raise AssertionError(
            f"{what}: expected {expected.dtype} of shape {tuple(expected.shape)}, "
            f"got {actual.dtype} of shape {tuple(actual.shape)}"
        )
    got, wanted = _bytes(actual), _bytes(expected)
    different = np.flatnonzero((got != wanted).any(axis=1))
    if different.size:
        i = int(different[0])

        def shown(tensor: torch.Tensor, bits: np.ndarray) -> str:
            return f"{tensor.detach().reshape(-1)[i].item()!r} (0x{bits[i][::-1].tobytes().hex()})"

        raise AssertionError(
            f"{what}: {different.size} of {actual.numel()} elements differ, first at flat index {i}: "
            f"expected {shown(expected, wanted)}, got {shown(actual, got)}"
        )


class GuardedCopy:
    """A copy of a tensor between guard elements, which show writes outside the copy.

    Parameters
    ----------
    tensor : torch.Tensor
        Not modified.
    offset : int
        Number of elements in front of the copy. An odd number makes the copy as misaligned as its dtype allows.
    device : torch.device, optional
        Device of the copy; default: that of ``tensor``.

    Attributes
    ----------
    view : torch.Tensor
        The copy: contiguous, of the same shape and dtype.
    """

    def __init__(self, tensor: torch.Tensor, offset: int, device: torch.device | None = None) -> None:
        n = tensor.numel()
        after = 2 * CACHE_LINE_BYTES // tensor.itemsize
        self._buffer = torch.full((offset + n + after,), GUARD, dtype=tensor.dtype, device=device or tensor.device)
        self._before = self._buffer[:offset]
        self._after = self._buffer[offset + n :]
        self.view = self._buffer[offset : offset + n].view(tensor.shape)
        self.view.copy_(tensor)

    def assert_intact(self, what: str = "tensor") -> None:
        """Raise AssertionError if a guard element has changed."""
        for where, guard in (("before", self._before), ("after", self._after)):
            assert_bitwise_equal(guard, torch.full_like(guard, GUARD), f"guard {where} {what}")


def assert_same_pruning(
    weights: Sequence[torch.Tensor],
    *,
    backend: str,
    masks: Sequence[BitMask] | None = None,
    offset: int | None = None,
    against: str = "reference",
    **request: Any,
) -> PruneResult:
    """Prune copies with two backends and compare weights, masks, thresholds and counts bit by bit.

    Parameters
    ----------
    weights, masks
        As in ``prune_``; not modified.
    backend, against : str
        The tested backend, and the trusted one. Each gets its copies on its own device.
    offset : int, optional
        If given, the tested backend gets guarded copies, this many elements into their buffers; None: plain copies.
    **request
        All other arguments of ``prune_``. Only the tested backend gets ``previous``.

    Returns
    -------
    PruneResult
        Result of the tested backend.

    Raises
    ------
    AssertionError
        The results differ, or a guard was overwritten.
    """
    trusted = device_of(against)
    expected_weights = [weight.to(trusted, copy=True) for weight in weights]
    expected_masks = None if masks is None else [mask.clone().to(trusted) for mask in masks]
    hintless = {name: value for name, value in request.items() if name != "previous"}
    expected = prune_(expected_weights, masks=expected_masks, backend=against, **hintless)

    device = device_of(backend)
    guarded = [] if offset is None else [GuardedCopy(weight, offset, device) for weight in weights]
    guarded_bits = []
    if offset is not None and masks is not None:
        guarded_bits = [GuardedCopy(mask.packed, offset, device) for mask in masks]
    actual_weights = [copy.view for copy in guarded] or [weight.to(device, copy=True) for weight in weights]
    actual_masks = None if masks is None else [mask.clone().to(device) for mask in masks]
    if masks is not None and guarded_bits:
        actual_masks = [BitMask(copy.view, mask.shape) for copy, mask in zip(guarded_bits, masks, strict=True)]
    actual = prune_(actual_weights, masks=actual_masks, backend=backend, **request)

    for i in range(len(weights)):
        assert_bitwise_equal(actual.masks[i].packed, expected.masks[i].packed, f"packed masks[{i}]")
        assert_bitwise_equal(actual_weights[i], expected_weights[i], f"weights[{i}]")
    # Compared by repr, because a threshold may be NaN, which does not equal itself.
    assert repr(actual.thresholds) == repr(expected.thresholds), (actual.thresholds, expected.thresholds)
    assert actual[2:] == expected[2:], (actual[2:], expected[2:])
    for copy in guarded + guarded_bits:
        copy.assert_intact()
    return actual
