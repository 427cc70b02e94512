"""What must hold for a network that is pruned while it trains, looked at after every call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from pruned_runs import (
    KINDS,
    SCHEDULES,
    WRAPPERS,
    Expected,
    Trio,
    UntracedMasters,
    digest,
    digest_of_the_kept,
    innermost,
    make_model,
    train_step,
)
from torch import nn

from gmp_kernels import GMPScheduler
from gmp_kernels.errors import GMPError, NonFiniteError

TARGETS = ["0.weight", "2.weight", "3.weight"]


class CheckedTraining:
    """A network, its optimizer and its pruner, and what is known of them without asking the pruner.

    After every call of ``pruner.step()`` that returned, the weights are compared with the masks, and the counts with
    those that are kept here. After every call that raised, everything is as it was.
    """

    def start(self, kind: str, wrapper: str, schedule: str, scope: Any) -> None:
        self.schedule, self.scope = SCHEDULES[schedule], scope
        self.model = make_model()
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
        self.has_said: bool | None = False  # whether a repair was said; None: an interrupted call may have

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

    def prune(self) -> None:
        """Call ``pruner.step()``; NaN has to be refused by an update, and is repaired then."""
        for _ in range(len(TARGETS) if self.is_hidden else 1):
            self.call_once()
        self.is_hidden = False
        self.look()

    def try_to_prune(self) -> None:
        """Prune, which may be refused by name."""
        if not any(
            self.is_refused(self.call_once, digest_of_the_kept) for _ in range(len(TARGETS) if self.is_hidden else 1)
        ):
            self.is_hidden = False
            self.look()

    def call_once(self) -> None:
        weights = {name: self.model.get_parameter(name).detach() for name in TARGETS}
        is_alive = any(weights[name][self.pruned(name)].any() for name in TARGETS)
        has_nan = not all(weights[name][~self.pruned(name)].isfinite().all() for name in TARGETS)
        before = digest_of_the_kept(self.trio) if has_nan else None
        after = [(expected, expected.called(self.schedule)) for expected in self.expected]
        try:
            with self.heard():
                report = self.pruner.step()
        except NonFiniteError:
            # What contradicted a mask may have been put right before.
            assert has_nan and digest_of_the_kept(self.trio) == before
            self.expected = [old for old, new in after if new.updates != old.updates]
            for weight in weights.values():
                weight.nan_to_num_(0.5, 0.5, -0.5)
            return self.call_once()
        steps = tuple(report.step for report in self.pruner.history)
        is_current = self.pruner.state_dict()["is_current"]
        fitting = (
            new
            for old, new in after
            if (new.seen, new.updates) == (self.pruner.step_count, steps)
            if (report is None) == (new.updates == old.updates) and is_current == (new.made >= new.seen)
        )
        self.expected = list(dict.fromkeys(fitting))
        assert self.expected, (after, self.pruner.step_count, steps)
        assert report is None or not has_nan
        if is_alive and report is None and not self.is_hidden:
            assert self.has_said is not False
        return None

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Note whether a repair is said, which may be once, in a step of the pruner or of its optimizer."""
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                yield
            finally:
                words = [warning for warning in said if "were not zero any more" in str(warning.message)]
                assert len(words) <= (self.has_said is not True)
                self.has_said = True if words else self.has_said

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
        with self.heard():
            train_step(self.trio, seed, absent)
        self.expected = [expected.stepped() for expected in self.expected]
        self.is_hidden |= isinstance(self.optimizer, UntracedMasters)
        self.look_at_state()

    def is_refused(self, call: Callable[[], object], whole: Callable[[Trio], object] = digest) -> bool:
        """Whether a call is refused by name, which changes nothing of the whole."""
        before = whole(self.trio)
        try:
            call()
        except GMPError:
            assert whole(self.trio) == before
            return True
        return False
