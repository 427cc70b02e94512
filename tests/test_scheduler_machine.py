"""Everything that can happen to a pruned network, in any order: what the pruner says is what the weights are."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import pytest
import torch
from faults import OutOfMemory, interrupted
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from pruning_machine import (
    COPIES,
    KINDS,
    SCHEDULES,
    WRAPPERS,
    Expected,
    Trio,
    UntracedMasters,
    digest,
    digest_of_the_kept,
    digest_of_training,
    innermost,
    make_model,
    set_gradients,
    train_step,
)
from torch import nn

from gmp_kernels import GMPScheduler, scheduler
from gmp_kernels.enforcement import Enforcement
from gmp_kernels.errors import GMPError, NonFiniteError
from gmp_kernels.progress import Progress, StepCount
from gmp_kernels.watch import Watch
from gmp_kernels.zeroing import zero_all_where_pruned_

pytestmark = pytest.mark.filterwarnings("ignore::gmp_kernels.errors.GMPWarning")

TARGETS = ["0.weight", "2.weight", "3.weight"]
POSITIONS = st.integers(0, len(TARGETS) - 1)
SEEDS = st.integers(0, 99)
PARTS = st.lists(st.sampled_from(["model", "optimizer", "pruner"]), min_size=1, unique=True)
STARTS = ["dense", "zeros", "masks", "masks_only", "state"]


class PrunedTraining(RuleBasedStateMachine):
    """A network that is trained and pruned while all sorts of things happen to it.

    After every call of ``pruner.step()`` that returned, the weights are compared with the masks, and the counts with
    those that the machine keeps. After every call that raised, everything is as it was, or as the same call leaves an
    undisturbed copy.
    """

    @initialize(
        kind=st.sampled_from(list(KINDS)),
        wrapper=st.sampled_from(list(WRAPPERS)),
        schedule=st.sampled_from(list(SCHEDULES)),
        scope=st.sampled_from(["layer", "global"]),
    )
    def begin(self, kind: str, wrapper: str, schedule: str, scope: Any) -> None:
        self.schedule, self.scope = SCHEDULES[schedule], scope
        self.model = make_model()
        self.kinds: dict[int, str] = {}
        self.saves: list[dict[str, Any]] = []
        self.strays: list[Any] = []
        self.left: tuple[Trio, object] | None = None
        self.is_hidden = False  # whether something was written without a trace
        self.optimizer = self.build(kind, wrapper)
        self.adopt(self.scheduler())

    def build(self, kind: str, wrapper: str) -> Any:
        inner = KINDS[kind](self.model.parameters())
        return WRAPPERS[wrapper](inner)

    def scheduler(self, **options: Any) -> GMPScheduler:
        weights = [self.model.get_parameter(name).detach() for name in TARGETS]
        try:
            return GMPScheduler(self.model, self.optimizer, self.schedule, scope=self.scope, **options)
        except NonFiniteError:
            assert not all(weight.isfinite().all() for weight in weights)
            for weight in weights:
                weight.nan_to_num_(0.5, 0.5, -0.5)
        return self.scheduler(**options)

    def adopt(self, pruner: GMPScheduler) -> None:
        """Go on with a new pruner."""
        self.pruner = pruner
        self.expected = [Expected()]
        self.required: dict[str, int] = {}
        self.floor: dict[str, torch.Tensor] | None = None
        self.has_said: bool | None = False  # whether a repair was said; None: a call that was disturbed may have

    @property
    def trio(self) -> Trio:
        return self.model, self.optimizer, self.pruner

    @property
    def is_masked(self) -> bool:
        return hasattr(innermost(self.optimizer), "set_masks")

    def parameter(self, position: int) -> nn.Parameter:
        return self.model.get_parameter(TARGETS[position])

    def pruned(self, name: str) -> torch.Tensor:
        return ~self.pruner.masks[name].to_bool()

    # -- what must hold ----------------------------------------------------------------------------------------------

    def prune(self) -> None:
        """Call ``pruner.step()``; NaN has to be refused by an update, and is repaired then."""
        for _ in range(len(TARGETS) if self.is_hidden else 1):
            self.call_once()
        self.is_hidden = False
        self.look()

    def try_to_prune(self) -> None:
        """Prune, which may be refused by name."""
        if not any(self.is_refused(self.call_once) for _ in range(len(TARGETS) if self.is_hidden else 1)):
            self.is_hidden = False
            self.look()

    def call_once(self) -> None:
        weights = {name: self.model.get_parameter(name).detach() for name in TARGETS}
        is_alive = any(weights[name][self.pruned(name)].any() for name in TARGETS)
        has_nan = not all(weights[name][~self.pruned(name)].isfinite().all() for name in TARGETS)
        before = digest_of_the_kept(self.trio) if has_nan else None
        after = [(expected, expected.called(self.schedule)) for expected in self.expected]
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                report = self.pruner.step()
            except NonFiniteError:
                # What contradicted a mask may have been put right before.
                assert has_nan and digest_of_the_kept(self.trio) == before
                self.expected = [old for old, new in after if new.updates != old.updates]
                for weight in weights.values():
                    weight.nan_to_num_(0.5, 0.5, -0.5)
                return self.call_once()
        steps = tuple(report.step for report in self.pruner.history)
        self.expected = [
            new
            for old, new in after
            if (new.seen, new.updates) == (self.pruner.step_count, steps)
            if (report is None) == (new.updates == old.updates)
        ]
        assert self.expected, (after, self.pruner.step_count, steps)
        assert report is None or not has_nan
        words = [str(warning.message) for warning in said if "were not zero any more" in str(warning.message)]
        assert len(words) <= (self.has_said is not True)
        self.has_said = True if words else self.has_said
        if is_alive and report is None and not self.is_hidden:
            assert self.has_said is not False
        return None

    def require(self, step: int) -> None:
        sparsity = self.schedule.sparsity_at(step)
        sizes = {name: self.model.get_parameter(name).numel() for name in TARGETS}
        if self.scope == "global":
            self.required["all"] = round(sparsity * sum(sizes.values()))
        else:
            self.required.update({name: round(sparsity * n) for name, n in sizes.items()})

    def look(self) -> None:
        """Compare what the pruner says with what the weights are."""
        masks = {name: mask.to_bool() for name, mask in self.pruner.masks.items()}
        assert list(masks) == TARGETS
        for name, mask in masks.items():
            zeros = self.model.get_parameter(name).detach()[~mask]
            assert not zeros.any() and not zeros.signbit().any(), name
        self.pruner.verify()
        counts = {name: int((~mask).sum()) for name, mask in masks.items()}
        numel = sum(mask.numel() for mask in masks.values())
        assert self.pruner.sparsity == pytest.approx(sum(counts.values()) / numel)
        saved = self.pruner.state_dict()["layers"]
        assert {name: layer["num_pruned"] for name, layer in saved.items()} == counts
        if self.expected[0].updates:
            self.require(self.expected[0].updates[-1])
        for name, least in self.required.items():
            assert (sum(counts.values()) if name == "all" else counts[name]) >= least
        if self.floor is not None:
            assert not any((mask & ~self.floor[name]).any() for name, mask in masks.items())
        self.floor = masks
        (expected,) = {(e.seen, e.made) for e in self.expected}
        assert self.pruner.step_count == expected[0]
        assert self.pruner.finished == (expected[1] >= self.schedule.end_step)

    def look_at_state(self) -> None:
        """Pruned weights are dead in the optimizer too."""
        inner = innermost(self.optimizer)
        saved = inner.state_dict()["state"]
        owned = [p for group in inner.param_groups for p in group["params"]]
        for name in TARGETS:
            parameter = self.model.get_parameter(name)
            position = next(i for i, p in enumerate(owned) if p is parameter)
            for entry, value in saved.get(position, {}).items():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    assert not value[self.pruned(name)].any(), (name, entry)

    def train(self, seed: int, absent: Sequence[int] = ()) -> None:
        train_step(self.trio, seed, absent)
        self.expected = [expected.stepped() for expected in self.expected]
        self.is_hidden |= isinstance(self.optimizer, UntracedMasters)
        self.look_at_state()

    def is_refused(self, call: Callable[[], object]) -> bool:
        """Whether a call is refused by name, which changes nothing."""
        before = digest(self.trio)
        try:
            call()
        except GMPError:
            assert digest(self.trio) == before
            return True
        return False

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
                "rule": "momentum" in inner.defaults,
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
            elif saved["rule"] == ("momentum" in innermost(self.optimizer).defaults):
                innermost(self.optimizer).load_state_dict(saved["optimizer"])
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
        written = {"all": torch.ones_like(pruned), "pruned": pruned, "kept": ~pruned, "one": torch.zeros_like(pruned)}[
            where
        ]
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

    @rule(calls=st.lists(st.sampled_from(["prune", "train"]), max_size=4), seed=SEEDS)
    def move_format(self, calls: list[str], seed: int) -> None:
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for call in calls:
            if call == "prune":
                self.try_to_prune()
            else:
                self.is_refused(lambda: self.train(seed))
        self.model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
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


def run(examples: int, phases: Sequence[Phase] = tuple(Phase)) -> None:
    run_state_machine_as_test(
        PrunedTraining,
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


def test_what_the_pruner_says_is_what_the_weights_are() -> None:
    run(50)


def _unhooked(self: Enforcement, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._watch, self._hooks = Watch(self._model, list(self._parameters.values()), self._places), []


def _recorded_at_once(self: Watch) -> list[int]:
    written = WRITTEN(self)
    self.record()
    return written


def _weights_alone(self: Enforcement, weights: Any, masks: Any) -> None:
    zero_all_where_pruned_([(p.detach(), masks[p]) for p in weights], backend=None)


WRITTEN = Watch.written
ADD = StepCount.add
FAULTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "writes go unseen": (Watch, "written", lambda self: []),
    "writes are recorded before they are put right": (Watch, "written", _recorded_at_once),
    "samples show nothing": (Watch, "sees_life", lambda self, members, mask_of: False),
    "every module is in its place": (Watch, "are_in_place", lambda self: True),
    "shapes are not looked at": (Enforcement, "check_shapes", lambda self, positions: None),
    "skipped steps count": (StepCount, "add", lambda self, found_inf=None: ADD(self)),
    "nothing follows a step": (Enforcement, "_after_step", lambda self, *_: self.steps.add()),
    "state is left as it is": (Enforcement, "_zero", _weights_alone),
    "copies are left alone": (Enforcement, "__setstate__", _unhooked),
    "what is interrupted is not finished": (scheduler, "write_despite_interrupts", lambda write, shards: write()),
    "updates are repeated": (Progress, "_range", lambda self, now, before: range(now.known - self._offset + 1)),
    "a pruner that was replaced goes on": (Enforcement, "release", lambda self: None),
    "the new optimizer is not followed": (Enforcement, "_attach", lambda self: None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_machine_finds_what_a_check_that_is_switched_off_lets_pass(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*FAULTS[fault])
    with pytest.raises(Exception):  # noqa: B017  whatever a pruner that is wrong runs into
        run(300, [Phase.generate])
