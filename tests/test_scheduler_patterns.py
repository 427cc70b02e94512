"""Schedulers with patterns, caps of each layer, and scores: against the oracle, and every refusal."""

from __future__ import annotations

import copy
import math
import pickle
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from faults import interrupted
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gmp_kernels import BitMask, GMPScheduler, prune_, schedules
from gmp_kernels.counts import Caps
from gmp_kernels.errors import NonFiniteError, ShapeError, SparsityError, StateError, TargetError
from gmp_kernels.ops import begin_prune
from gmp_kernels.patterns import NM, Block, Unstructured

BACKENDS = ["reference", "cpu", "simt"]
STEPS = {0: 0.1, 1: 0.27, 2: 0.5}


def model_of(*, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(8, 12, 3, bias=False), nn.Flatten(), nn.Linear(48, 24, bias=False), nn.Linear(24, 8))


def scheduler(model: nn.Module, schedule=None, *, optimizer=None, **options) -> GMPScheduler:
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    return GMPScheduler(model, optimizer, schedule or schedules.MultiStep(STEPS), count="calls", **options)


def weights_of(pruner: GMPScheduler) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in pruner.model.named_parameters() if name in pruner.masks}


def drift(model: nn.Module, step: int) -> None:
    """Write what training would; pruned weights are zeroed again by the next step of the pruner."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator) * (p != 0)


PATTERNS = [
    NM(2, 4),
    {"0": NM(1, 2), "3": Block(4, 2)},
    {"*": Block(2, 4)},
    Unstructured(min_kept_per_row=4),
    {"0": Unstructured(), nn.Linear: NM(4, 8, dim=0), "*": NM(2, 4)},
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_each_update_is_that_of_prune(backend, pattern):
    model = model_of()
    pruner = scheduler(model, pattern=pattern, backend=backend)
    expected = weights_of(pruner)
    masks = {name: BitMask.ones(w.shape) for name, w in expected.items()}
    own = dict.fromkeys(masks)
    for entry in reversed(pattern if isinstance(pattern, dict) else {"*": pattern}):
        chosen = pattern[entry] if isinstance(pattern, dict) else pattern
        own |= {
            name: chosen
            for name in masks
            if entry == "*"
            or (name.startswith(entry) if isinstance(entry, str) else masks[name].shape != (12, 8, 3, 3))
        }
    for step, sparsity in STEPS.items():
        report = pruner.step()
        for layer in report.layers:
            unit = 1 if own[layer.name] is None else own[layer.name].unit
            prune_(
                expected[layer.name],
                num_prune=round(sparsity * (layer.num_weights // unit)) * unit,
                masks=masks[layer.name],
                pattern=own[layer.name],
                backend="reference",
            )
            assert pruner.masks[layer.name] == masks[layer.name]
            assert layer.num_pruned == masks[layer.name].numel - masks[layer.name].num_kept
        assert all(torch.equal(w, expected[name]) for name, w in weights_of(pruner).items())
        drift(model, step)
        expected = {name: w * masks[name].to_bool() for name, w in weights_of(pruner).items()}
    for name, mask in pruner.masks.items():
        assert own[name] is None or not own[name].broken(mask.to_bool()).any()


def greedy(weights, masks, total: int, caps, pattern) -> list[torch.Tensor]:
    """The definition: the common order of all units, in which those of layers at their caps are passed over."""
    pattern = pattern or Unstructured()
    kept = [mask.to_bool() for mask in masks]
    order = []
    for i, (weight, own) in enumerate(zip(weights, kept, strict=True)):
        scores = pattern.ranked(weight.abs()).double().flatten().tolist()
        eligible = pattern.eligible(weight.abs().double().view(torch.int64), own).flatten().tolist()
        order += [(score, -i, -j) for j, (score, free) in enumerate(zip(scores, eligible, strict=True)) if free]
    pruned = [mask.numel - mask.num_kept for mask in masks]
    for _, i, j in sorted(order):
        if sum(pruned) < total and pruned[-i] < caps[-i]:
            chosen = torch.zeros(pattern.ranked_shape(kept[-i].shape), dtype=torch.bool)
            chosen.view(-1)[-j] = True
            kept[-i] = kept[-i] & ~pattern.spread(chosen, kept[-i].shape)
            pruned[-i] += pattern.unit
    return kept


SHAPES = [(8, 8), (4, 16), (16, 4), (8, 4)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", [None, NM(1, 4), Block(2, 2), Unstructured(min_kept_per_row=1)], ids=str)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_caps_are_the_greedy_order_without_the_layers_that_are_full(backend, pattern, data):
    unit = 1 if pattern is None else pattern.unit
    seed = data.draw(st.integers(0, 2**20))
    generator = torch.Generator().manual_seed(seed)
    num_values = data.draw(st.sampled_from([2, 5, 1000]))
    scales = data.draw(st.lists(st.sampled_from([1.0, 1.0, 10.0, 0.01]), min_size=4, max_size=4))
    weights = [
        (torch.randint(-num_values, num_values + 1, shape, generator=generator) * scale)
        for shape, scale in zip(SHAPES, scales, strict=True)
    ]
    sizes = [math.prod(shape) for shape in SHAPES]
    most = sizes if pattern is None else [pattern.most(shape) for shape in SHAPES]
    masks = [BitMask.ones(shape) for shape in SHAPES]
    if data.draw(st.booleans()):
        masks = prune_([w.clone() for w in weights], sparsity=[0.0, 0.1, 0.25, 0.0], pattern=pattern).masks
    caps = [data.draw(st.integers(0, n // unit)) * unit for n in most]
    before = [mask.numel - mask.num_kept for mask in masks]
    reachable = sum(map(max, caps, before))
    total = data.draw(st.integers(0, min(reachable, sum(most)) // unit)) * unit
    expected = greedy(weights, masks, total, caps, pattern)
    own = [mask.clone() for mask in masks]
    given_ = [w.clone() for w in weights]
    result = begin_prune(
        given_, own, "global", "error", None, None, backend, None, [total], pattern=pattern, caps=Caps(caps, before)
    )()
    for w, mask, kept, there in zip(given_, own, expected, weights, strict=True):
        assert torch.equal(mask.to_bool(), kept)
        assert torch.equal(w, torch.where(kept, there, torch.zeros(())))
    assert result.num_pruned == [int((~kept).sum()) for kept in expected]
    assert sum(result.num_pruned) == max(total, sum(before))


# -- caps in runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [None, NM(1, 4), Block(2, 2)], ids=str)
def test_global_updates_stop_at_the_cap_and_the_others_give_more(pattern):
    model = model_of()
    with torch.no_grad():
        model[2].weight.mul_(0.01)
    pruner = scheduler(model, scope="global", max_sparsity=0.55, pattern=pattern)
    unit = 1 if pattern is None else pattern.unit
    sizes = {name: mask.numel for name, mask in pruner.masks.items()}
    caps = [math.floor(Fraction(55, 100) * (n // unit)) * unit for n in sizes.values()]
    for step, sparsity in STEPS.items():
        weights = list(weights_of(pruner).values())
        masks = [mask.clone() for mask in pruner.masks.values()]
        total = round(sparsity * (sum(sizes.values()) // unit)) * unit
        expected = greedy(weights, masks, total, caps, pattern)
        report = pruner.step()
        assert all(torch.equal(m.to_bool(), kept) for m, kept in zip(pruner.masks.values(), expected, strict=True))
        assert sum(layer.num_pruned for layer in report.layers) == total
        drift(model, step)
        pruner._held.apply(pruner.masks)
    small = pruner.masks["2.weight"]
    assert small.numel - small.num_kept == caps[1], "the case must meet its cap"
    shown = {layer.name: layer.threshold for layer in report.layers}
    assert shown["0.weight"] == shown["3.weight"] != shown["2.weight"]


# 0.29 * 100 is 28.999999999999996; 0.9 * 24 is 21.6, and rounding alone would exceed the cap.
@pytest.mark.parametrize(("scope", "shape", "cap", "left"), [("global", (10, 10), 0.29, 71), ("layer", (6, 4), 0.9, 3)])
def test_a_run_may_end_at_its_cap_which_is_the_number_as_written(scope, shape, cap, left):
    pruner = scheduler(nn.Linear(*shape, bias=False), schedules.OneShot(cap), max_sparsity=cap, scope=scope)
    pruner.step()
    assert pruner.masks["weight"].num_kept == left


def test_a_cap_of_erk():
    model = nn.Sequential(*(nn.Linear(n, n, bias=False) for n in (10, 40, 60)))
    free, capped = (
        scheduler(copy.deepcopy(model), schedules.OneShot(0.7), distribution="erk", max_sparsity=cap)
        for cap in (None, 0.75)
    )
    for pruner in (free, capped):
        pruner.step()
    assert max(free.layer_sparsities().values()) > 0.75
    assert max(capped.layer_sparsities().values()) == 0.75
    assert sum(m.numel - m.num_kept for m in capped.masks.values()) == round(0.7 * (100 + 1600 + 3600))
    assert capped.layer_sparsities()["0.weight"] >= free.layer_sparsities()["0.weight"]


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (
            {"pattern": NM(2, 5)},
            ShapeError,
            r"'0.weight' cannot be 2:5.*'2.weight'.*ignore=\['0.weight', '2.weight', '3",
        ),
        ({"pattern": {"3": NM(1, 5)}}, ShapeError, r"size 24 of dim 1.*ignore=\['3.weight'\]"),
        ({"pattern": Block(5, 1)}, ShapeError, "12 x 72 is no whole number of blocks"),
        ({"pattern": {"0": Block(2, 2)}, "scope": "global"}, ShapeError, "whose scores cannot be compared"),
        ({"pattern": {"4": NM(2, 4)}}, TargetError, "pattern: expected names.*'4'"),
        ({"pattern": {"3.bias": NM(2, 4)}}, TargetError, "pattern: expected entries that reach a target.*'3.bias'"),
        ({"pattern": "2:4"}, TypeError, r"a pattern such as NM\(2, 4\) or Block\(4, 4\), got '2:4'"),
        ({"pattern": {"0": "2:4"}}, TypeError, "a pattern such as"),
        ({"pattern": NM(3, 4)}, SparsityError, r"at most 0.25 for '0.weight', '2.weight', '3.weight', as pattern=3:4"),
        ({"pattern": {"2": NM(2, 3)}}, SparsityError, "at most 0.333333 for '2.weight', as"),
        ({"pattern": NM(3, 4), "scope": "global"}, SparsityError, "at most 0.25 for .* together"),
        ({"pattern": NM(3, 4), "distribution": "erk"}, SparsityError, "at most 0.25 for .* together"),
        ({"pattern": {"0": NM(3, 4)}, "overrides": {"0": 0.3}}, SparsityError, "at most 0.25 for '0.weight'.*got 0.3"),
        ({"pattern": Unstructured(min_kept_per_row=40)}, SparsityError, "at most 0.166666 for '0.weight', '2.weight'"),
        ({"max_sparsity": 0.4}, SparsityError, "at most 0.4 for '0.weight'.*max_sparsity=0.4 allows, got 0.5"),
        ({"max_sparsity": 0.4, "scope": "global"}, SparsityError, "at most 0.39.* together"),
        ({"max_sparsity": 0.4, "distribution": "erk"}, SparsityError, "at most 0.39.* together"),
        ({"max_sparsity": 0}, SparsityError, "max_sparsity above 0"),
        ({"max_sparsity": 50}, SparsityError, "max_sparsity: expected a sparsity in"),
        ({"scores": torch.ones(3)}, TypeError, "expected scores to be a function"),
    ],
)
def test_what_does_not_fit_is_refused_at_construction(options, error, match):
    model = model_of()
    if "Unstructured" in repr(options):
        model = nn.Sequential(nn.Linear(72, 12, bias=False), nn.Flatten(), nn.Linear(48, 24, bias=False))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=match):
        scheduler(model, **options)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not GMPScheduler(model, torch.optim.SGD(model.parameters()), schedules.OneShot(0.1))._held.is_released


@pytest.mark.parametrize("options", [{}, {"pattern": NM(1, 4)}, {"pattern": Block(2, 2)}], ids=str)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_nan_is_found_also_where_weights_are_protected(options, scope):
    model = model_of()
    with torch.no_grad():
        model[3].weight[2, 5] = float("nan")
    capped = {"max_sparsity": 0.9} if scope == "global" else {}
    with pytest.raises(NonFiniteError, match=f"'3.weight' at flat index {2 * 24 + 5}"):
        scheduler(model, scope=scope, **options, **capped)
    pruner = scheduler(model_of(), scope=scope, **options, **capped)
    with torch.no_grad():
        pruner.model[3].weight[2, 5] = float("inf")
    with pytest.raises(NonFiniteError, match=f"'3.weight' at flat index {2 * 24 + 5}"):
        pruner.step()
    assert not pruner.history and pruner.sparsity == 0


def by_state(name, parameter, state):
    return parameter.abs() * state["exp_avg_sq"].sqrt()


def test_masks_to_start_from_keep_to_the_pattern():
    model = model_of()
    with torch.no_grad():
        model[2].weight[3, 4:7] = 0.0
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SparsityError, match=r"mask of '2.weight' that keeps to 2:4, got 1 groups"):
        scheduler(model, pattern=NM(2, 4), start="zeros")
    kept = torch.ones(24, 48, dtype=torch.bool)
    kept[0, 0] = False
    with pytest.raises(SparsityError, match=r"mask of '2.weight' that keeps to blocks of 2 x 2, got 1 blocks"):
        scheduler(model, pattern=Block(2, 2), start={"2.weight": BitMask.from_bool(kept)})
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    pruner = scheduler(model, pattern=NM(2, 4), start={"2.weight": BitMask.from_bool(kept)})
    pruner.step()
    assert not pruner.masks["2.weight"].to_bool()[0, 0]


def test_zeros_of_the_model_are_not_held_where_they_break_the_pattern():
    model = model_of()
    with torch.no_grad():
        model[2].weight[:, :3] = 0.0
    pruner = scheduler(model, pattern=NM(2, 4))
    with pytest.raises(SparsityError, match=r"zeros of the model to keep to the pattern of '2.weight' \(2:4\), got 24"):
        pruner.step()
    assert pruner.sparsity == 0
    allowed = scheduler(model, pattern=NM(2, 4), start={})
    allowed.step()
    assert not NM(2, 4).broken(allowed.masks["2.weight"].to_bool()).any()


def test_a_state_resumes_the_run_and_no_other():
    options = {"pattern": {"2": Block(2, 2), "0": NM(2, 4)}, "max_sparsity": 0.8}
    straight, first = scheduler(model_of(), **options), scheduler(model_of(), **options)
    for _ in STEPS:
        straight.step()
    first.step()
    resumed = scheduler(model_of(), **options)
    resumed.load_state_dict(first.state_dict())
    for _ in range(2):
        resumed.step()
    assert resumed.masks == straight.masks
    state = straight.state_dict()
    others = [
        ({"pattern": {"2": Block(2, 2)}, "max_sparsity": 0.8}, "pattern"),
        ({"pattern": {"2": Block(2, 2), "0": NM(1, 2)}, "max_sparsity": 0.8}, r"pattern\['0.weight'\]"),
        ({"pattern": options["pattern"]}, "max_sparsity"),
        ({**options, "scores": by_state}, "scores"),
        ({}, "pattern"),
    ]
    for other, setting in others:
        with pytest.raises(StateError, match=f"expected {setting} .*masks_only=True"):
            scheduler(model_of(), **other).load_state_dict(state)
    plain = scheduler(model_of())
    plain.step()
    with pytest.raises(StateError, match="expected pattern"):
        scheduler(model_of(), **options).load_state_dict(plain.state_dict())
    target = scheduler(model_of(), pattern=Block(4, 4))
    with pytest.raises(StateError, match=r"loaded masks to keep to the pattern of '0.weight' \(blocks of 4 x 4\)"):
        target.load_state_dict(plain.state_dict(), masks_only=True)
    assert target.sparsity == 0 and (target.model[0].weight != 0).all()


def test_a_copy_and_a_pickle_go_on_alike():
    pruner = scheduler(model_of(), pattern=NM(2, 4), scope="global", max_sparsity=0.5)
    pruner.step()
    others = [copy.deepcopy(pruner), pickle.loads(pickle.dumps(pruner))]
    for one in (pruner, *others):
        one.step()
    assert all(other.masks == pruner.masks for other in others)


def test_it_says_what_limits_it():
    shown = repr(scheduler(model_of(), pattern=NM(2, 4), max_sparsity=0.5, scores=by_state))
    assert "scope='layer', pattern=2:4, max_sparsity=0.5, scores=by_state)" in shown
    assert "scope='layer')" in repr(scheduler(model_of()))


def test_overrides_and_patterns_meet():
    pruner = scheduler(model_of(), pattern={"0": NM(1, 2), "*": Block(2, 2)}, overrides={"0": 0.25, "3": 0.0})
    for _ in STEPS:
        pruner.step()
    sizes = {name: mask.numel for name, mask in pruner.masks.items()}
    expected = [round(0.25 * sizes["0.weight"]), round(0.5 * sizes["2.weight"] / 4) * 4, 0]
    assert [mask.numel - mask.num_kept for mask in pruner.masks.values()] == expected


def test_pruned_counts_only_rise(tmp_path):
    pruner = scheduler(model_of(), schedules.Linear(0.0, 0.5, begin_step=0, end_step=9), pattern=NM(2, 4))
    sparsities = []
    for step in range(10):
        sparsities.append(pruner.step().sparsity)
        drift(pruner.model, step)
    assert all(a < b for a, b in pairwise(sparsities))
    assert all((m.to_bool().movedim(1, -1).reshape(-1, 4).sum(1) == 2).all() for m in pruner.masks.values())
    pruner.plot(tmp_path / "run.svg")


@pytest.mark.parametrize("pattern", [NM(1, 4), Block(2, 2)], ids=str)
def test_an_interrupted_update_has_changed_nothing_or_all(pattern):
    options = {"scope": "global", "max_sparsity": 0.55, "pattern": pattern, "scores": lambda name, p, state: p.abs()}

    def started() -> GMPScheduler:
        pruner = scheduler(model_of(), **options)
        pruner.step()
        return pruner

    def bits(pruner: GMPScheduler) -> list[torch.Tensor]:
        return [*weights_of(pruner).values(), *(mask.packed.clone() for mask in pruner.masks.values())]

    before, done = bits(started()), started()
    done.step()
    for after in range(0, 100_000, 211):
        pruner, came = started(), False
        try:
            with interrupted(after):
                pruner.step()
        except KeyboardInterrupt:
            came = True
        is_done = len(pruner.history) == 2
        expected = bits(done) if is_done else before
        assert all(torch.equal(a, b) for a, b in zip(bits(pruner), expected, strict=True)), after
        if not is_done:
            pruner.step()
        assert pruner.masks == done.masks
        if not came:
            break
    assert not came and after > 0
