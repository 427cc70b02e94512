"""Sentences in which the pruner says what it found, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gmp_kernels.model.coverage import shown_names

__all__ = ["on_damage", "on_emptied_layers", "on_idle_calls", "on_new_zeros", "on_old_zeros"]


def on_damage(damaged: Mapping[str, int], optimizer: str) -> str:
    """Say that so many pruned weights of these layers held values."""
    first, *others = damaged
    more = f" and {len(others)} other layer{'s' * (len(others) > 1)}" if others else ""
    return (
        f"{sum(damaged.values())} pruned weights of '{first}'{more} were not zero any more and have been set to zero "
        f"again: something other than a whole step of {optimizer}, the optimizer the pruner knows, wrote to them. "
        "After loading earlier weights, load the pruner's state of that time as well; for a new optimizer, set "
        "pruner.optimizer = new_optimizer; a wrapper that writes the weights itself is repaired at every step"
    )


def on_old_zeros(share: float) -> str:
    """Say that a model had zeros before its first step."""
    return (
        f"{share:.1%} of the weights to be pruned are zero already and are held at zero from now on, as with "
        "start='zeros'. To resume a run, load the pruner's state_dict() too; to let them train, pass start={}"
    )


def on_new_zeros(share: float) -> str:
    """Say that weights which masks keep have become zero."""
    return (
        f"{share:.1%} of the weights to be pruned have become zero although their masks keep them, and are not held at "
        "zero. After loading later weights, load the pruner's state_dict() of that time too"
    )


def on_idle_calls(num_calls: int, optimizer: str, step_count: int) -> str:
    """Say that the schedule stands still."""
    return (
        f"step() was called {num_calls} times in a row without a step of {optimizer}, so that the schedule stays at "
        f"step {step_count}. In the micro-batches of an accumulation that is as it should be. If another optimizer "
        "steps these parameters, set pruner.optimizer to it; count='calls' is for loops whose optimizer cannot be "
        "watched"
    )


def on_emptied_layers(names: Sequence[str]) -> str:
    """Say which layers a ranking of all has left nothing of."""
    return (
        f"ranking all layers together has left {shown_names(names)} without a weight; prune less, use scope='layer', "
        "or add them to ignore="
    )
