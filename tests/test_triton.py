"""The Triton kernels beyond what every backend is tested for: that GPUs can run what the interpreter runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from optim_cases import masked, parameters, random_gradients, random_masks, set_gradients
from subprocesses import run_python

import gmp_kernels
from gmp_kernels import BitMask, prune_
from gmp_kernels.backends import choose, triton
from gmp_kernels.backends.keys import key_of, largest_key
from gmp_kernels.backends.layers import Layers
from gmp_kernels.backends.triton import Triton
from gmp_kernels.backends.triton import kernels as triton_kernels
from gmp_kernels.backends.triton.interpreter import _fma
from gmp_kernels.backends.types import Brackets, Layer
from gmp_kernels.optim import clip_grad_norm_, ema_update_
from gmp_kernels.patterns import NM, Block, Pattern, Unstructured
from gmp_kernels.search import driver
from gmp_kernels.search.driver import select_with
from gmp_kernels.tools.testing import (
    DTYPES,
    GuardedCopy,
    adversarial_cases,
    assert_bitwise_equal,
    assert_same_pruning,
    device_of,
)

DEVICE = device_of("triton")
COMPILE = Path(__file__).with_name("triton_compile.py")


def as_json(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return {"torch": str(value.dtype).removeprefix("torch.")}
    return value if isinstance(value, bool | int | str) else {"tl": value.name}


class Launches:
    """All that the backend launches while it is open, each once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: dict[str, Any] = {}
        launch = Triton._launch

        def recording(backend: Triton, name: str, num_programs: int, *args: Any, **constants: Any) -> None:
            spec = [name, [as_json(a) for a in args], {key: as_json(value) for key, value in constants.items()}]
            self.found[json.dumps(spec)] = spec
            launch(backend, name, num_programs, *args, **constants)

        monkeypatch.setattr(Triton, "_launch", recording)


def prune_everything(dtype: torch.dtype) -> None:
    weights = [torch.randn(n, dtype=dtype, device=DEVICE) for n in (40_000, 100)]
    prune_(weights[0].view(50, 10, 8, 10).movedim(-1, 1).clone(), sparsity=0.5, backend="triton")
    for scope in ("layer", "global"):
        copies = [weight.clone() for weight in weights]
        masks = prune_(copies, sparsity=0.5, scope=scope, backend="triton").masks
        prune_(copies, sparsity=0.6, scope=scope, masks=masks, backend="triton")
    prune_(GuardedCopy(weights[0], 1).view, sparsity=0.5, backend="triton")
    layers = [Layer(weight, None) for weight in weights]
    rooms = [torch.empty_like(weight) for weight in weights]
    choose("triton", DEVICE).count(layers, Brackets.of([0] * 2, [largest_key(dtype)] * 2), 64, rooms)


PATTERNS = {
    "four": NM(2, 4),
    "stride": NM(3, 8, dim=0),
    "blocks": Block(2, 4),
    "rows": Unstructured(min_kept_per_row=3),
}


def prune_in_every_pattern(dtype: torch.dtype) -> None:
    """Memory is row-major or not; scores of each dtype rank weights without a pattern, and in one."""
    weight = torch.randn(8, 16, 3, 2, dtype=dtype, device=DEVICE)
    for own in (weight.flatten(1), weight.contiguous(memory_format=torch.channels_last)):
        for pattern in PATTERNS.values():
            prune_(own.clone(), sparsity=0.25, pattern=pattern, backend="triton")
        for scores in (torch.rand_like(own), torch.rand(own.shape, device=DEVICE)):
            for pattern in (None, PATTERNS["stride"]):
                prune_(own.clone(), sparsity=0.25, pattern=pattern, scores=scores, backend="triton")


def train_with_everything(dtype: torch.dtype, **options: Any) -> None:
    for case in ("sgd", "momentum", "adamw", "adamw_amsgrad"):
        params = parameters([(40,)], dtype, device=DEVICE)
        optimizer = masked(case, params, backend="triton", **options)
        set_gradients(params, random_gradients(params, 0), {})
        clip_grad_norm_(params, 1.0, backend="triton")
        for step in range(2):
            masks = random_masks(params, 0.5, step)
            optimizer.set_masks(masks)
            optimizer.step()
        optimizer.state_dict()
    ema_update_([p.detach().clone() for p in params], params, 0.9, backend="triton")


@pytest.fixture(scope="module")
def launches() -> list[Any]:
    """One of every launch that the operations make."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        recorded = Launches(monkeypatch)
        for dtype in DTYPES:
            prune_everything(dtype)
            prune_in_every_pattern(dtype)
            for compact in (False, True):
                train_with_everything(dtype, compact_state=compact)
        train_with_everything(torch.bfloat16, compact_state=False, master_weights=True)
        train_with_everything(torch.float16, compact_state=True, master_weights=True)
    return list(recorded.found.values())


# NVIDIA's two differ in their assembler only: of one, a fourth will do.
@pytest.mark.thorough
@pytest.mark.parametrize(("target", "every"), [("sm_80", 4), ("sm_90", 1), ("gfx942", 1)])
def test_every_launch_compiles_for_real_gpus_and_fits_their_registers(
    launches: list[Any], target: str, every: int
) -> None:
    """The interpreter takes programs that no compiler does."""
    names = {name for name, *_ in launches}
    assert names == set(triton_kernels.__all__) - {"FLOATS", "INTEGERS"}
    launches = launches[::every]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, COMPILE, target],
        input=json.dumps(launches),
        env=environment | {"PYTHONPATH": str(Path(gmp_kernels.__file__).parent.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(compiled) == len(launches)
    for name, constants, resources in compiled:
        # A word or two the compiler may give away for one more block at a time.
        assert resources["spilled"] <= 16, (name, constants, resources)


# What a selection may be wrong about, or short of, without the result being so.
HINDRANCES = [
    "bracket_below",
    "bracket_above",
    "bracket_empty",
    "bracket_reversed",
    "no_candidates",
    "few_candidates",
    "one_bit",
]


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("hindrance", HINDRANCES)
def test_a_selection_is_exact_whatever_hinders_it(
    monkeypatch: pytest.MonkeyPatch, hindrance: str, dtype: torch.dtype, scope: str
) -> None:
    one = key_of(1.0, dtype)
    wrong = {"bracket_below": (0, 3), "bracket_above": (one * 2, largest_key(dtype)), "bracket_empty": (one, one - 1)}
    # Weights lie between its ends: to count them twice would move the threshold.
    wrong["bracket_reversed"] = (key_of(0.5, dtype), key_of(0.1, dtype))
    estimated = driver.estimate

    def estimate(*args: Any) -> tuple[Brackets, np.ndarray]:
        found, densities = estimated(*args)
        if hindrance in wrong:
            found = Brackets(*(np.full_like(found.lo, end) for end in wrong[hindrance]))
        return found, densities / 50 if hindrance == "few_candidates" else densities

    monkeypatch.setattr(driver, "estimate", estimate)
    if hindrance == "no_candidates":
        monkeypatch.setattr(driver, "CANDIDATE_BYTES", -(1 << 40))
    if hindrance == "one_bit":
        monkeypatch.setattr(driver, "MOST_BITS", 1)
        monkeypatch.setattr(driver, "FEW_BITS", 1)
    for name in ("small_integers", "random"):
        sizes = (70_000, 5, 20_000) if name == "small_integers" else (20_000, 300)
        layers = [adversarial_cases(n, dtype)[name] for n in sizes]
        assert_same_pruning(layers, backend="triton", sparsity=0.6, scope=scope)


def pattern_layers(memory_format: torch.memory_format) -> list[torch.Tensor]:
    """Small integers, which tie in most groups; the longer one takes several programs and ends in none of theirs."""
    torch.manual_seed(0)
    shapes = [(8, 16, 3, 2), (48, 80, 3, 3)]
    return [torch.randint(-3, 4, shape).float().to(DEVICE).contiguous(memory_format=memory_format) for shape in shapes]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_places_of_64_bits_change_nothing(
    monkeypatch: pytest.MonkeyPatch, pattern: Pattern, memory_format: torch.memory_format
) -> None:
    """As of tensors that no test has the memory for."""
    monkeypatch.setattr(triton, "LARGE", 0)
    recorded = Launches(monkeypatch)
    assert_same_pruning(pattern_layers(memory_format), backend="triton", sparsity=0.25, pattern=pattern)
    assert {constants["INDEX"]["tl"] for _, _, constants in recorded.found.values() if "INDEX" in constants} == {
        "int64"
    }


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_what_was_written_of_a_pattern_changes_no_later_write(
    pattern: Pattern, memory_format: torch.memory_format
) -> None:
    """Programs read what others write in the same group, and an interrupted write is done again."""
    weights = pattern_layers(memory_format)
    masks = [BitMask.ones(weight.shape, device=DEVICE, memory_format=memory_format) for weight in weights]
    backend = choose("triton", DEVICE)
    layers = Layers(weights, [mask.packed for mask in masks], None, [pattern] * len(weights))
    numbers = [weight.numel() // pattern.unit // 4 for weight in weights]
    # What is protected counts as pruned where the rest is ranked.
    wanted = [number + pattern.num_protected(weight.shape) for number, weight in zip(numbers, weights, strict=True)]
    selection = select_with(backend)(layers, wanted, [1] * len(weights))
    results = []
    for _ in range(2):
        counts = backend.prune(layers, selection, [mask.packed for mask in masks])
        results.append(([weight.clone() for weight in weights], [mask.packed.tolist() for mask in masks]))
    assert results[0][1] == results[1][1]
    for first, second in zip(results[0][0], results[1][0], strict=True):
        assert_bitwise_equal(first, second)
    assert counts == ([number * pattern.unit for number in numbers], [0] * len(weights))


def test_the_interpreter_rounds_a_fused_multiply_add_once() -> None:
    """Or the optimizers' bits would be those of no GPU."""
    random = np.random.default_rng(0)
    a, b, c = (random.standard_normal(2000) * 10.0 ** random.uniform(-9, 9, 2000) for _ in range(3))
    c[::2] = -(a * b)[::2] * (1 + random.integers(-3, 4, 1000) * 2.0**-53)  # nearly all of it cancels
    exact = [
        float(Fraction(x) * Fraction(y) + Fraction(z))
        for x, y, z in zip(*map(np.ndarray.tolist, (a, b, c)), strict=True)
    ]
    assert _fma(a, b, c).tolist() == exact


def test_nobody_pays_for_triton_who_does_not_use_it() -> None:
    program = "import sys, gmp_kernels.backends as b; b.available(); print('triton' in sys.modules)"
    done = run_python("-c", program, TRITON_INTERPRET="0")
    assert done.stdout.strip() == "False", done.stderr
