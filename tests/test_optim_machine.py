"""Optimizers in any order of events, with interrupts and failing allocations at any point, against torch's.

What is compared with: torch's optimizer, whose gradients, weights and state are held to the masks by plain torch.
"""

from __future__ import annotations

import copy
import pickle
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from faults import OutOfMemory, interrupted
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from optim_cases import assert_within_ulps, clones, masked, parameters, plain, random_gradients
from optim_cases import one_thread as one_thread

from gmp_kernels import BitMask

SHAPES = [(6, 7), (5,), (9, 3)]
FAULTS = st.one_of(
    st.none(),
    st.tuples(st.just(interrupted), st.integers(0, 10_000)),
    st.tuples(st.just(OutOfMemory), st.integers(0, 8)),
)


def under(fault: tuple[Any, int] | None) -> AbstractContextManager[Any]:
    return nullcontext() if fault is None else fault[0](fault[1])


class Reference:
    """torch's optimizer under masks; state that was loaded is masked when something else happens to it."""

    def __init__(self, case: str) -> None:
        self.params = parameters(SHAPES)
        self.optimizer = plain(case, self.params)
        self.masks: dict[int, torch.Tensor] = {}

    @torch.no_grad()
    def enforce(self) -> None:
        for i, kept in self.masks.items():
            p = self.params[i]
            for tensor in (p, *(v for k, v in self.optimizer.state.get(p, {}).items() if k != "step")):
                if tensor is not None:
                    tensor.masked_fill_(~kept, 0.0)

    def step(self, gradients: list[torch.Tensor | None]) -> None:
        self.enforce()
        for i, (p, gradient) in enumerate(zip(self.params, gradients, strict=True)):
            kept = self.masks.get(i, torch.ones(p.shape, dtype=torch.bool))
            p.grad = None if gradient is None else torch.where(kept, gradient, 0.0)
        self.optimizer.step()
        self.enforce()

    def set_masks(self, masks: dict[int, torch.Tensor]) -> None:
        self.masks = {**self.masks, **masks}
        self.enforce()

    def forget_masks(self, gone: list[int]) -> None:
        self.masks = {i: kept for i, kept in self.masks.items() if i not in gone}

    def load(self, saved: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(copy.deepcopy(saved))


class Machine(RuleBasedStateMachine):
    """``ours`` and ``reference`` do the same; ``saved`` are pairs of their state dicts."""

    case: str

    @initialize(case=st.sampled_from(["momentum_maximize", "nesterov", "adamw", "amsgrad"]), compact=st.booleans())
    def start(self, case: str, compact: bool) -> None:
        self.params = parameters(SHAPES)
        self.ours: Any = masked(case, self.params, compact_state=compact)
        self.reference = Reference(case)
        self.saved: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.number = 0

    @rule(has_gradient=st.tuples(*[st.booleans()] * 3), fault=FAULTS)
    def step(self, has_gradient: tuple[bool, ...], fault: Any) -> None:
        self.number += 1
        drawn = random_gradients(self.params, self.number)
        gradients = [g if has else None for g, has in zip(drawn, has_gradient, strict=True)]
        for p, gradient in zip(self.params, gradients, strict=True):
            p.grad = gradient
        self.happen(lambda ref: ref.step(gradients), self.ours.step, fault)

    @rule(
        sparsities=st.dictionaries(st.integers(0, 2), st.sampled_from([0.0, 0.4, 0.8, 1.0]), max_size=3),
        seed=st.integers(0, 3),
        fault=FAULTS,
    )
    def set_masks(self, sparsities: dict[int, float], seed: int, fault: Any) -> None:
        generator = torch.Generator().manual_seed(seed)
        kept = {i: torch.rand(SHAPES[i], generator=generator) >= s for i, s in sparsities.items()}
        masks = {self.params[i]: BitMask.from_bool(k) for i, k in kept.items()}
        self.happen(lambda ref: ref.set_masks(kept), lambda: self.ours.set_masks(masks), fault)

    @rule(gone=st.lists(st.integers(0, 2), max_size=2), fault=FAULTS)
    def forget_masks(self, gone: list[int], fault: Any) -> None:
        named = [self.params[i] for i in gone]
        # What a mask that is let go has not been applied to stays; here all have been.
        self.happen(Reference.enforce, lambda: self.ours.share_masks({}), None)
        self.happen(lambda ref: ref.forget_masks(gone), lambda: self.ours.forget_masks(named), fault)

    @rule(fault=FAULTS)
    def save(self, fault: Any) -> None:
        reference = copy.deepcopy(self.reference)
        reference.enforce()
        with under(fault):
            try:
                saved = self.ours.state_dict()
            except (KeyboardInterrupt, MemoryError):
                return
        self.saved.append((copy.deepcopy(saved), copy.deepcopy(reference.optimizer.state_dict())))

    @rule(which=st.integers(0, 9), fault=FAULTS)
    def load(self, which: int, fault: Any) -> None:
        if self.saved:
            ours, expected = self.saved[which % len(self.saved)]
            self.happen(lambda ref: ref.load(expected), lambda: self.ours.load_state_dict(ours), fault)

    @rule(pickled=st.booleans(), fault=FAULTS)
    def copied(self, pickled: bool, fault: Any) -> None:
        both = self.params, self.ours
        with under(fault):
            try:
                again = pickle.loads(pickle.dumps(both)) if pickled else copy.deepcopy(both)
            except (KeyboardInterrupt, MemoryError):
                return
        self.params, self.ours = again

    def happen(self, expected: Any, event: Any, fault: Any) -> None:
        before, after = self.reference, copy.deepcopy(self.reference)
        expected(after)
        weights = clones(self.params)
        raised: BaseException | None = None
        with under(fault):
            try:
                event()
            except (KeyboardInterrupt, MemoryError) as error:
                raised = error
        if isinstance(raised, KeyboardInterrupt) and self.differs_from(before, None) is not None:
            # What the interrupt has kept from following the masks follows them before anything else.
            self.ours.share_masks({})
            raised = None
        if raised is None:
            self.reference = after
            found = self.differs_from(after, weights)
        else:
            found = self.differs_from(before, None)
        assert found is None, (found, raised)
        with torch.no_grad():
            for p, q in zip(self.params, self.reference.params, strict=True):
                q.copy_(p)

    def differs_from(self, reference: Reference, before: Any) -> str | None:
        """Say what is not as in ``reference``; with the weights ``before``, weights may differ as steps may."""
        expected = copy.deepcopy(reference)
        expected.enforce()
        masks = {i: self.ours._masks[p].to_bool() for i, p in enumerate(self.params) if p in self.ours._masks}
        if masks.keys() != expected.masks.keys() or any(
            not torch.equal(m, expected.masks[i]) for i, m in masks.items()
        ):
            return "masks"
        states = self.ours.state_dict()["state"], expected.optimizer.state_dict()["state"]
        states = tuple({i: s for i, s in one.items() if s} for one in states)
        if {i: set(s) for i, s in states[0].items()} != {i: set(s) for i, s in states[1].items()}:
            return f"entries: {states}"
        for i, state in states[1].items():
            for key, value in state.items():
                if value is not None and not torch.equal(states[0][i][key], value):
                    return f"{key} of {i}: {states[0][i][key]} and not {value}"
        for i, (p, q) in enumerate(zip(self.params, expected.params, strict=True)):
            held = p.detach().masked_fill(~masks[i], 0.0) if i in masks else p.detach()
            if before is None and not torch.equal(held, q):
                return f"weights {i}: {held} and not {q}"
            if before is not None:
                # A step from 0 is a root, two quotients and a product, each rounded, in another order than torch's.
                assert_within_ulps(held, q.detach(), before[i].detach(), ulps=4)
        return None

    @invariant()
    def parts_agree(self) -> None:
        """No state is empty, and none is compact without a layout or the other way round."""
        if hasattr(self, "ours"):
            assert all(self.ours.state.values())


def test_any_order_of_events_leaves_the_old_or_the_new_state() -> None:
    # Without shrinking, which takes many minutes here.
    phases = (Phase.reuse, Phase.generate)
    chosen = settings(max_examples=200, stateful_step_count=25, deadline=None, phases=phases)
    run_state_machine_as_test(Machine, settings=chosen)
