"""torch's wrapper of ``step``, left out where nothing would notice it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from torch.autograd import profiler
from torch.optim import Optimizer
from torch.optim import optimizer as hooks

__all__ = ["hooked_where_observed"]

R = TypeVar("R")


def hooked_where_observed(step: Callable[..., R]) -> Callable[..., R]:
    """Wrap ``step`` of an optimizer's class as torch does: for profilers, and for the hooks around steps.

    Where there are none, the wrapper is passed by. It would take a quarter of a step of small tensors, because it tells
    a profiler of the step whether or not there is one. An ``ExecutionTraceObserver`` alone is not seen here.
    """
    hooked: Callable[..., R] = Optimizer.profile_hook_step(step)

    @wraps(hooked)
    def step_(self: Optimizer, *args: Any, **kwargs: Any) -> R:
        is_observed = (
            profiler._is_profiler_enabled
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or hooks._global_optimizer_pre_hooks
            or hooks._global_optimizer_post_hooks
        )
        return (hooked if is_observed else step)(self, *args, **kwargs)

    return step_
