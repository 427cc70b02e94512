"""Everything that can happen to a pruned network, in any order: what the pruner says is what the weights are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import pytest
import torch
from faults import OutOfMemory, interrupted
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from pruned_runs import (
    COPIES,
    KINDS,
    SCHEDULES,
    WRAPPERS,
    Trio,
    UntracedMasters,
    digest,
    digest_of_the_kept,
    digest_of_training,
    innermost,
    set_gradients,
    train_step,
)
from pruning_invariants import TARGETS, CheckedTraining
from torch import nn

from gmp_kernels import GMPScheduler
from gmp_kernels.errors import GMPError, NonFiniteError

pytestmark = pytest.mark.filterwarnings("ignore::gmp_kernels.errors.GMPWarning")

POSITIONS = st.integers(0, len(TARGETS) - 1)
SEEDS = st.integers(0, 99)
PARTS = st.lists(st.sampled_from(["model", "optimizer", "pruner"]), min_size=1, unique=True)
STARTS = ["dense", "zeros", "masks", "masks_only", "state"]


def rule_of(optimizer: torch.optim.Optimizer) -> tuple[bool, bool]:
    """Return what optimizers have in common that can load each other's state."""
    return "momentum" in optimizer.defaults, bool(optimizer.defaults.get("fused"))


class PrunedTraining(CheckedTraining, RuleBasedStateMachine):
    """A network that is trained and pruned while all sorts of things happen to it."""

    kind: str  # of the optimizer

    @initialize(
        wrapper=st.sampled_from(list(WRAPPERS)),
        schedule=st.sampled_from(list(SCHEDULES)),
        scope=st.sampled_from(["layer", "global"]),
    )
    def begin(self, wrapper: str, schedule: str, scope: Any) -> None:
        self.saves: list[dict[str, Any]] = []
        self.strays: list[Any] = []
        self.left: tuple[Trio, object] | None = None
        self.start(self.kind, wrapper, schedule, scope)

    # -- training ----------------------------------------------------------------------------------------------------

    @rule(seed=SEEDS, absent=st.lists(st.integers(0, 5), max_size=3), num_calls=st.sampled_from([0, 1, 1, 1, 2]))
    def step(self, seed: int, absent: list[int], num_calls: int) -> None:
        self.train(seed, absent)
        for _ in range(num_calls):
            self.prune()

    @rule(seeds=st.lists(SEEDS, min_size=2, max_size=4))
    def steps(self, seeds: list[int]) -> None:
        for seed in seeds:
            self.train(seed)
            self.prune()

    @rule()
    def prune_alone(self) -> None:
        self.prune()

    @rule(seed=SEEDS)
    def skip(self, seed: int) -> None:
        """A step that found Inf in the gradients: what knows the flag is called, and the others are not."""
        inner = innermost(self.optimizer)
        if getattr(inner, "_step_supports_amp_scaling", False):
            set_gradients(self.model, seed)
            inner.found_inf, inner.grad_scale = torch.ones(()), torch.ones(())  # type: ignore[attr-defined]
            try:
                with self.heard():
                    self.optimizer.step()
            finally:
                del inner.found_inf, inner.grad_scale  # type: ignore[attr-defined]
        self.is_hidden |= isinstance(self.optimizer, UntracedMasters)
        self.prune()

    # -- copies and states -------------------------------------------------------------------------------------------

    @rule(how=st.sampled_from(list(COPIES)))
    def copy(self, how: str) -> None:
        self.look_at_what_was_left()
        before = self.trio
        self.model, self.optimizer, self.pruner = COPIES[how](before)
        self.left = before, digest(before)
        assert self.left[1] == digest(self.trio)
        self.strays.clear()

    def look_at_what_was_left(self) -> None:
        if self.left is not None:
            assert digest(self.left[0]) == self.left[1]
            self.left = None

    def teardown(self) -> None:
        if hasattr(self, "left"):
            self.look_at_what_was_left()

    @rule()
    def save(self) -> None:
        inner = innermost(self.optimizer)
        self.saves.append(
            {
                "model": copy.deepcopy(self.model.state_dict()),
                "optimizer": copy.deepcopy(inner.state_dict()),
                "pruner": self.pruner.state_dict(),
                "rule": rule_of(inner),
                "expected": self.expected[0].saved(),
                "required": dict(self.required),
            }
        )

    @precondition(lambda self: self.saves)
    @rule(parts=PARTS, which=st.integers(0, 9), seed=st.none() | SEEDS)
    def load(self, parts: list[str], which: int, seed: int | None) -> None:
        saved = self.saves[which % len(self.saves)]
        for part in parts:
            if part == "model":
                self.model.load_state_dict(saved["model"])
            elif part == "pruner":
                self.pruner.load_state_dict(saved["pruner"])
                self.loaded(saved)
            elif saved["rule"] == rule_of(innermost(self.optimizer)):
                # torch's optimizers take the tensors of the state as their own.
                innermost(self.optimizer).load_state_dict(copy.deepcopy(saved["optimizer"]))
        if seed is not None:
            self.train(seed)
        self.prune()

    def loaded(self, saved: dict[str, Any]) -> None:
        self.expected, self.required, self.floor = [saved["expected"]], dict(saved["required"]), None

    # -- optimizers and pruners --------------------------------------------------------------------------------------

    @rule(kind=st.sampled_from(list(KINDS)), wrapper=st.sampled_from(list(WRAPPERS)), seed=SEEDS)
    def step_by_another(self, kind: str, wrapper: str, seed: int) -> None:
        self.strays.append(self.build(kind, wrapper))
        set_gradients(self.model, seed)
        self.strays[-1].step()
        self.is_hidden |= isinstance(self.strays[-1], UntracedMasters)
        self.prune()

    @precondition(lambda self: self.strays)
    @rule(which=st.integers(0, 9), seed=SEEDS)
    def step_by_an_old_one(self, which: int, seed: int) -> None:
        stray = self.strays[which % len(self.strays)]
        set_gradients(self.model, seed)
        self.is_refused(stray.step)
        self.is_hidden |= isinstance(stray, UntracedMasters)
        self.prune()

    @precondition(lambda self: self.strays)
    @rule(which=st.integers(0, 9), after=st.none() | st.integers(0, 1500))
    def follow(self, which: int, after: int | None) -> None:
        new, old = self.strays[which % len(self.strays)], self.optimizer
        if after is not None:
            try:
                with interrupted(after):
                    self.pruner.optimizer = new
            except KeyboardInterrupt:
                assert self.pruner.optimizer in (old, new)
        self.pruner.optimizer = new
        assert self.pruner.optimizer is new
        self.optimizer = new
        self.strays = [stray for stray in self.strays if stray is not new] + [old]
        self.prune()

    @rule(start=st.sampled_from(STARTS), removes=st.booleans(), kind=st.none() | st.sampled_from(list(KINDS)))
    def new_pruner(self, start: str, removes: bool, kind: str | None) -> None:
        old, state = self.pruner, self.pruner.state_dict()
        saved = {"expected": self.expected[0].saved(), "required": self.required}
        masks = {name: mask.clone() for name, mask in old.masks.items()}
        zeros = {name: self.model.get_parameter(name).detach() == 0 for name in TARGETS}
        if removes:
            old.remove()
        if kind is not None:
            self.optimizer = self.build(kind, "none")
        options = {"zeros": {"start": "zeros"}, "masks": {"start": masks}}.get(start, {})
        self.adopt(self.scheduler(**options))
        assert self.is_refused(old.step)
        if start == "masks_only":
            self.pruner.load_state_dict(state, masks_only=True)
        elif start == "state":
            self.pruner.load_state_dict(state)
            self.loaded(saved)
        if start == "zeros":
            assert all(torch.equal(self.pruned(name), zero) for name, zero in zeros.items())
        elif start != "dense":
            assert self.pruner.masks == masks
            self.required = dict(saved["required"])
        if start != "dense":
            self.look()
        self.prune()

    # -- what is done to the parameters ------------------------------------------------------------------------------

    @rule(
        position=POSITIONS,
        traced=st.booleans(),
        where=st.sampled_from(["all", "pruned", "kept", "one"]),
        value=st.sampled_from([1.5, float("nan"), float("inf"), 0.0]),
        seed=st.none() | SEEDS,
    )
    def write(self, position: int, traced: bool, where: str, value: float, seed: int | None) -> None:
        parameter, pruned = self.parameter(position), self.pruned(TARGETS[position])
        places = {"all": pruned | True, "pruned": pruned, "kept": ~pruned, "one": pruned & False}
        written = places[where]
        if where == "one":
            written.view(-1)[-1] = traced  # one weight that is written without a trace may stay unseen
        with torch.no_grad():
            (parameter if traced else parameter.data).masked_fill_(written, value)
        self.is_hidden |= not traced
        if seed is not None and torch.tensor(value).isfinite():
            self.train(seed)
        self.prune()

    @rule(position=POSITIONS, seed=SEEDS)
    def resize(self, position: int, seed: int) -> None:
        parameter = self.parameter(position)
        is_pruned = bool(self.pruned(TARGETS[position]).any())
        # Without an update that is due, each layer is looked at in turn.
        num_refused = 0
        for _ in TARGETS:
            num_refused += (is_refused := self.is_refused_resized(parameter, self.pruner.step))
            if not is_refused:
                self.expected = [expected.called(self.schedule) for expected in self.expected]
        assert num_refused or not is_pruned
        if isinstance(self.optimizer, torch.optim.Optimizer):
            set_gradients(self.model, seed, [i for i, p in enumerate(self.model.parameters()) if p is parameter])
            if not self.is_refused_resized(parameter, self.optimizer.step):
                self.expected = [expected.stepped() for expected in self.expected]
        self.prune()

    def is_refused_resized(self, parameter: nn.Parameter, call: Callable[[], object]) -> bool:
        """Whether a call is refused while a parameter is larger, which changes nothing."""
        before, data = digest(self.trio), parameter.data
        parameter.data = torch.zeros(tuple(n + 1 for n in parameter.shape), dtype=parameter.dtype)
        try:
            call()
        except GMPError:
            parameter.data = data
            assert digest(self.trio) == before
            return True
        finally:
            parameter.data = data
        return False

    @rule(position=POSITIONS)
    def replace(self, position: int) -> None:
        name = TARGETS[position].removesuffix(".weight")
        module = self.model.get_submodule(name)
        setattr(self.model, name, copy.deepcopy(module))
        assert self.is_refused(self.pruner.step)
        setattr(self.model, name, module)
        self.prune()

    @rule(
        dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
        calls=st.lists(st.sampled_from(["prune", "train"]), max_size=2),
        seed=SEEDS,
    )
    def convert(self, dtype: torch.dtype, calls: list[str], seed: int) -> None:
        self.model.to(dtype)
        for call in calls:
            # torch's own optimizers may stop half-way over state of another type.
            if call == "prune":
                self.try_to_prune()
            elif self.is_masked:
                self.is_refused(lambda: self.train(seed))
        for optimizer in (self.optimizer, *self.strays):
            innermost(optimizer).load_state_dict(innermost(optimizer).state_dict())
        self.prune()

    @rule(is_last=st.booleans(), calls=st.lists(st.sampled_from(["prune", "train"]), max_size=4), seed=SEEDS)
    def move_format(self, is_last: bool, calls: list[str], seed: int) -> None:
        memory_format = torch.channels_last if is_last else torch.contiguous_format
        self.model.to(memory_format=memory_format)  # type: ignore[call-overload]
        for call in calls:
            if call == "prune":
                self.prune()
            else:
                self.train(seed)
        self.prune()

    # -- faults ------------------------------------------------------------------------------------------------------

    @rule(
        what=st.sampled_from(["prune", "train", "load", "new"]),
        fault=st.sampled_from(["interrupt", "memory"]),
        after=st.integers(0, 1500),
        seed=SEEDS,
        writes=st.booleans(),
    )
    def disturb(self, what: str, fault: str, after: int, seed: int, writes: bool) -> None:
        saved = self.saves[-1] if self.saves else None
        if what == "load" and saved is None:
            return
        if what == "train" and not self.is_masked:
            self.train(seed)  # torch's optimizers cannot be stopped while they make state
        if writes:
            with torch.no_grad():
                self.parameter(seed % len(TARGETS)).add_(0.25)

        def call(trio: Trio) -> None:
            if what == "prune":
                trio[2].step()
            elif what == "train":
                train_step(trio, seed)
            elif what == "load":
                trio[2].load_state_dict(saved["pruner"])  # type: ignore[index]
            else:
                GMPScheduler(trio[0], trio[1], self.schedule, scope=self.scope, start=dict(self.pruner.masks))

        twin: Trio = copy.deepcopy(self.trio)
        whole = digest if what in ("prune", "load") else digest_of_training
        if fault == "memory" or writes:
            # What is pruned may become zero before the call raises, and state with the next step alone.
            whole = digest_of_the_kept
        before, expected, masks = whole(self.trio), self.expected, dict(self.pruner.masks)
        has_raised = self.fails(call, fault, after)
        is_atomic = what != "train" or (innermost(self.optimizer) is self.optimizer and self.is_masked)
        if has_raised and is_atomic:
            with suppress(NonFiniteError):
                call(twin)
            assert whole(self.trio) in (before, whole(twin))
        torch.set_grad_enabled(True)
        self.has_said = self.has_said or None
        # Whether the call was made shows when the pruner is called the next time.
        if what == "prune":
            self.expected = [*expected, *(e.called(self.schedule) for e in expected)]
        elif what == "train":
            self.expected = [*expected, *(e.stepped() for e in expected)]
            self.is_hidden |= isinstance(self.optimizer, UntracedMasters)
        elif what == "load":
            assert saved is not None
            self.loaded(saved)
            self.required = {}
            self.expected = [*expected, *self.expected]
        else:
            required = self.required
            self.adopt(self.scheduler(start=masks))
            self.required = required
        self.prune()

    def fails(self, call: Callable[[Trio], None], fault: str, after: int) -> bool:
        """Make the call with a fault; return whether it raised."""
        try:
            with interrupted(after) if fault == "interrupt" else OutOfMemory(after % 30):
                call(self.trio)
        except (KeyboardInterrupt, MemoryError, NonFiniteError):
            return True
        return False


def machine_of(kind: str) -> type[PrunedTraining]:
    """Return the machine of one optimizer: left to itself, Hypothesis tries some kinds of them hardly ever."""
    return type("PrunedTraining", (PrunedTraining,), {"kind": kind})


def run(kind: str, examples: int, phases: Sequence[Phase] = tuple(Phase)) -> None:
    run_state_machine_as_test(
        machine_of(kind),
        settings=settings(
            max_examples=examples,
            stateful_step_count=15,
            deadline=None,
            derandomize=True,
            database=None,
            phases=phases,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_pruner_says_is_what_the_weights_are(kind: str) -> None:
    run(kind, 60)


BEGUN = {"wrapper": "none", "schedule": "stairs", "scope": "layer"}
FOUND: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "a write to a copy before its first step": [
        ("copy", {"how": "deepcopy"}),
        ("write", {"position": 0, "traced": True, "where": "all", "value": 1.5, "seed": None}),
    ],
    "a module that is replaced between updates": [("replace", {"position": 1})],
    "a parameter resized between updates": [("resize", {"position": 0, "seed": 3})],
    "another memory format": [
        ("move_format", {"is_last": is_last, "calls": ["train", "prune", "train"], "seed": 1})
        for is_last in (True, False)
    ],
    "no memory for one of the masks that are loaded": [
        ("save", {}),
        ("steps", {"seeds": [3, 4, 5, 6]}),
        *(("disturb", {"what": "load", "fault": "memory", "after": n, "seed": 1, "writes": False}) for n in range(4)),
    ],
    "an interrupt between a look and the repair": [
        ("disturb", {"what": "prune", "fault": "interrupt", "after": n, "seed": 1, "writes": True})
        for n in range(0, 900, 30)
    ],
    "an interrupt while an update writes": [
        ("steps", {"seeds": [3]}),
        ("save", {}),
        *(
            call
            for n in range(0, 4000, 100)
            for call in (
                ("load", {"parts": ["model", "optimizer", "pruner"], "seed": None, "which": 0}),
                ("step", {"seed": 1, "absent": [], "num_calls": 0}),
                ("step", {"seed": 1, "absent": [], "num_calls": 0}),
                ("disturb", {"what": "prune", "fault": "interrupt", "after": n, "seed": 1, "writes": False}),
            )
        ),
    ],
}


def replay(kind: str, found: str) -> None:
    machine = machine_of(kind)()
    machine.begin(**BEGUN)
    machine.steps(seeds=[1, 2])
    for name, arguments in FOUND[found]:
        getattr(machine, name)(**arguments)
    machine.teardown()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("found", FOUND)
def test_what_the_machine_has_found(found: str, kind: str) -> None:
    replay(kind, found)
