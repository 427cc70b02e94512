"""The state machine of the scheduler with its checks switched off, one at a time: it must fail then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import Phase
from pruned_runs import KINDS
from test_scheduler_machine import FOUND, replay, run

from gmp_kernels.pruner import updates
from gmp_kernels.pruner.enforcement import Enforcement
from gmp_kernels.pruner.progress import Progress
from gmp_kernels.pruner.watch import Watch
from gmp_kernels.pruner.zeroing import zero_all_where_pruned_

pytestmark = [pytest.mark.thorough, pytest.mark.filterwarnings("ignore::gmp_kernels.errors.GMPWarning")]


def _unhooked(self: Enforcement, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self.watch, self._hooks = Watch(self._model, self.parameters), []


def _recorded_at_once(self: Watch) -> list[str]:
    written = WRITTEN(self)
    self.record()
    return written


def _weights_alone(self: Enforcement, weights: Any, masks: Any) -> None:
    zero_all_where_pruned_([(p.detach(), masks[p]) for p in weights], backend=None)


def _repeated(self: Progress, schedules: Any) -> Any:
    self.position = self.position._replace(made=-1)
    return DUE(self, schedules)


WRITTEN = Watch.written
DUE = Progress.due
ADD = Progress.add
FAULTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "writes go unseen": (Watch, "written", lambda self: []),
    "writes are recorded before they are put right": (Watch, "written", _recorded_at_once),
    "samples show nothing": (Watch, "sees_life", lambda self, names, masks: False),
    "every module is in its place": (Watch, "check_present", lambda self: None),
    "shapes are not looked at": (Watch, "check_shapes", lambda self: None),
    "skipped steps count": (Progress, "add", lambda self, found_inf=None: ADD(self)),
    "nothing follows a step": (Enforcement, "_after_step", lambda self, *_: self.progress.add()),
    "state is left as it is": (Enforcement, "_zero", _weights_alone),
    "copies are left alone": (Enforcement, "__setstate__", _unhooked),
    "what is interrupted is not finished": (updates, "write_despite_interrupts", lambda write, shards: write()),
    "updates are repeated": (Progress, "due", _repeated),
    "a pruner that was replaced goes on": (Enforcement, "release", lambda self, names=None: None),
    "the new optimizer is not followed": (Enforcement, "_attach", lambda self: None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_machine_finds_what_a_check_that_is_switched_off_lets_pass(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*FAULTS[fault])
    with pytest.raises(Exception) as caught:  # whatever a pruner that is wrong runs into
        for kind in KINDS:
            for found in FOUND:
                replay(kind, found)
            run(kind, 100, [Phase.generate])
    # That would be what was switched off by the wrong hand.
    assert not isinstance(caught.value, (AttributeError, TypeError)), caught.value
