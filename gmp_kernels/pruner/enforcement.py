"""Holding pruned weights at zero, whichever code writes to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar
from weakref import WeakSet

import torch
from torch import nn

from gmp_kernels.backends import devices
from gmp_kernels.distributed import Shards
from gmp_kernels.distributed.placement import local, sum_over_shards
from gmp_kernels.errors import CaptureError, StateError, TargetError, warn
from gmp_kernels.masks import BitMask
from gmp_kernels.model.wrappers import optimizer_chain, with_own_hooks
from gmp_kernels.ops import Threshold, apply_masks_
from gmp_kernels.optim.masked import MaskedOptimizer
from gmp_kernels.pruner.interrupts import write_despite_interrupts
from gmp_kernels.pruner.limits import Limits, check_kept
from gmp_kernels.pruner.progress import Progress
from gmp_kernels.pruner.watch import Watch
from gmp_kernels.pruner.zeroing import zero_with_state_

__all__ = ["Enforcement"]

# A share of all weights: more zeros than this are no accident.
MANY_ZEROS = 0.01


class Enforcement:
    """Layers of a pruner, whose masks are enforced whenever something has written to the weights.

    A hook of the optimizer applies the masks after every step. The step of an optimizer of ``gmp_kernels.optim``
    applies them itself, so there the hook only checks. ``check`` detects writes in between. The hooks keep this object
    alive, but not the pruner: pruned weights stay zero when the pruner is gone.

    Parameters
    ----------
    masks : mapping of str to BitMask
        Shared with the pruner, which changes their bits.
    optimizer : object
        May be a wrapper. Followed from ``own`` on.
    progress : Progress
        Counts the steps of the innermost optimizer.
    shards : Shards, optional
        Given if parameters are shards or copies of those of other ranks.
    limits : Limits
    settings : dict of str to object
        Settings that have to be the same on every rank.
    expects_dense : bool
        Whether to hold zeros that the model has before its first step, with a warning, if there are many.

    Attributes
    ----------
    masked_optimizer : MaskedOptimizer or None
        The innermost optimizer, if it applies masks itself.
    num_pruned : dict of str to int
        Pruned weights of the whole layers.
    thresholds : dict of str to Threshold
        Threshold of the latest update of each layer.
    have_agreed : bool
        Whether all ranks have found that they are in the same run.
    watch : Watch
        Detects writes by other code.
    pruner : callable
        A weak reference to the pruner.
    is_released : bool
        Whether the parameters are released.
    """

    # All instances that hold parameters. References to the parameters themselves, even weak ones, would keep torch from
    # swapping them when a model is converted.
    holders: ClassVar[WeakSet[Enforcement]] = WeakSet()

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        masks: Mapping[str, BitMask],
        optimizer: Any,
        progress: Progress,
        *,
        shards: Shards | None,
        limits: Limits,
        settings: Mapping[str, object],
        backend: str | None,
        expects_dense: bool,
    ) -> None:
        self._model = model
        self.parameters = dict(parameters)
        self.masks = masks
        self.progress = progress
        self.shards = shards
        self.limits = limits
        self.settings = settings
        self.backend = backend
        self._expects_dense = expects_dense
        self.num_pruned = dict.fromkeys(parameters, 0)
        self.thresholds: dict[str, Threshold] = {}
        self._pruned: list[str] = []  # targets that have pruned weights
        self.have_agreed = False
        self._said: set[str] = set()
        self._has_repaired = False  # since the current step began
        self.is_released = False
        self.pruner: Callable[[], object | None] = lambda: None
        self._choose(optimizer)
        self.watch = Watch(self._model, self.parameters)
        self._hooks: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        # Hooks and versions belong to the optimizer and the parameters of the original.
        return {name: value for name, value in self.__dict__.items() if name not in ("watch", "_hooks", "pruner")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.watch = Watch(self._model, self.parameters)
        self.watch.record()
        self._hooks = []
        self.pruner = lambda: None
        if not self.is_released:
            self.own()

    @property
    def name(self) -> str:
        """Class of the optimizer that takes the steps."""
        return type(self._innermost).__name__

    def say(self, what: str, message: str) -> None:
        """Warn once for each ``what``."""
        if what not in self._said:
            self._said.add(what)
            warn(f"GMPScheduler: {message}")

    # -- holding and releasing ---------------------------------------------------------------------------------------

    def follow(self, optimizer: Any) -> None:
        """Follow this optimizer instead of the previous one; if it raises, nothing has changed.

        Raises
        ------
        TargetError
            Its steps cannot be watched.
        StateError, CaptureError
            It cannot take over the masks, or the previous one cannot drop them.
        """
        innermost, before = optimizer_chain(optimizer)[-1], self.masked_optimizer
        if isinstance(innermost, MaskedOptimizer):
            innermost.check_masks(self._masks_of(self.parameters))
        if before is not None and before is not innermost:
            # The bits of the masks are written in place from now on, and the previous optimizer would not notice.
            before.forget_masks(self.parameters.values())
        self._unhook()
        self._choose(optimizer)
        self._attach()

    def _choose(self, optimizer: Any) -> None:
        self.optimizer, self._innermost = optimizer, optimizer_chain(optimizer)[-1]
        self.masked_optimizer = self._innermost if isinstance(self._innermost, MaskedOptimizer) else None

    def _attach(self) -> None:
        # A wrapper may write the weights itself after the step inside it.
        wrappers = with_own_hooks(optimizer_chain(self.optimizer))[:-1]
        hooks: list[Any] = [(wrapper.register_step_post_hook, self._after_wrapper) for wrapper in wrappers]
        if self.masked_optimizer is not None:
            self._hooks.append(self.masked_optimizer.watch_steps(self._before_step, self._after_masked_step))
        else:
            hooks.append((self._innermost.register_step_pre_hook, self._before_step))
            hooks.append((self._innermost.register_step_post_hook, self._after_step))
        for register, hook in hooks:
            # Hooks depend on the masks. Compiled with the step, they would be compiled again at every update.
            self._hooks.append(register(torch.compiler.disable(hook)))  # type: ignore[no-untyped-call]

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def own(self) -> None:
        """Begin to hold the parameters; a pruner that held these and no others releases them.

        Raises
        ------
        TargetError
            Another pruner holds some of them and other parameters too. Nothing has changed.
        """
        others = self._others()
        for other, shared in others.items():
            left = [name for name in other.parameters if name not in shared]
            if left and other.pruner() is not None:
                raise TargetError(
                    f"GMPScheduler: expected parameters that no other pruner holds, got some of one that also holds "
                    f"'{left[0]}', which this one leaves out; call remove() on that one first"
                )
        for other, shared in others.items():
            # If that pruner is gone, its other parameters stay held, because nobody could release them by name.
            other.release(shared)
        self.holders.add(self)
        self._attach()

    def _others(self) -> dict[Enforcement, list[str]]:
        """Return all other instances that hold some of these parameters, with the names they use for them."""
        mine = set(map(id, self.parameters.values()))
        shared = {
            other: [name for name, p in other.parameters.items() if id(p) in mine]
            for other in self.holders
            if other is not self
        }
        return {other: names for other, names in shared.items() if names}

    def release(self, names: Iterable[str] | None = None) -> None:
        """Release parameters, by default all; they keep the zeros they have.

        Raises
        ------
        CaptureError
            A CUDA graph holds their masks. Nothing has changed.
        """
        gone = self.parameters if names is None else {name: self.parameters[name] for name in names}
        if self.masked_optimizer is not None:
            self.masked_optimizer.forget_masks(gone.values())
        kept = {name: p for name, p in self.parameters.items() if name not in gone}
        if not kept:
            self.detach()
            return
        self.parameters = kept
        self.watch = Watch(self._model, kept)
        self.masks_changed({name: self.num_pruned[name] for name in kept})

    def detach(self) -> None:
        """Release the parameters, and leave their masks to the optimizer."""
        self._unhook()
        self.is_released = True
        self.holders.discard(self)

    # -- masks -------------------------------------------------------------------------------------------------------

    def check_masks(self, names: Iterable[str]) -> None:
        """Raise the error of an optimizer that applies masks itself, if it cannot take over those of these targets."""
        if self.masked_optimizer is not None:
            self.masked_optimizer.check_masks(self._masks_of(names))

    def masks_changed(self, num_pruned: dict[str, int]) -> None:
        """Take note that masks have changed; ``num_pruned`` counts the pruned weights of every layer."""
        self.num_pruned = num_pruned
        self._pruned = [name for name in self.parameters if num_pruned[name]]
        self._expects_dense = False
        self.watch.forget_samples()

    def apply(self, names: Iterable[str], *, ranked_is_pruned: bool = False, are_checked: bool = False) -> None:
        """Zero the pruned places of these targets and of their optimizer state.

        With ``ranked_is_pruned`` the tensor that was ranked (the master copy if there is one, else the weight) is zero
        there already. With ``are_checked`` an optimizer that applies masks itself has just checked them.
        """
        masks = self._masks_of(names)
        self.watch.distrust()
        if self.limits.regrow:
            # State is not masked. An optimizer with master weights had these ranked.
            optimizer = self.masked_optimizer
            own = [p for p in masks if optimizer is not None and optimizer.master_weight(p) is not None]
            apply_masks_([local(p) for p in own], [masks[p] for p in own], backend=self.backend)
            self.watch.record()
            return
        if self.masked_optimizer is not None:
            self.masked_optimizer.share_masks(masks, ranked_is_pruned=ranked_is_pruned, are_checked=are_checked)
        else:
            for p, mask in masks.items():
                mask.follow(local(p))
            self._zero([] if ranked_is_pruned else masks, masks)
        self.watch.record()

    def _zero(self, weights: Iterable[torch.Tensor], masks: Mapping[torch.Tensor, BitMask]) -> None:
        for key, tensor in zero_with_state_(self._innermost, weights, masks, backend=self.backend):
            self.say(
                key,
                f"the {key} of a parameter, {type(tensor).__name__} of {tensor.dtype}, cannot be set to zero where "
                "weights are pruned and is left as it is",
            )

    def _masks_of(self, names: Iterable[str]) -> dict[torch.Tensor, BitMask]:
        return {self.parameters[name]: self.masks[name] for name in names}

    # -- around the optimizer's steps --------------------------------------------------------------------------------

    def _before_step(self, *_: object) -> None:
        if self.masked_optimizer is None and not self.limits.regrow:
            self.refuse_capture("a step of {} after which masks are applied from Python", "gmp_kernels.optim")
            self.watch.check_shapes()
        elif not self.progress.counts_calls:
            self.refuse_capture("a step of {} that the pruner counts, whose replays would not tell it", "count='calls'")
        self._has_repaired = False
        if self._expects_dense or self.watch.written():
            self.check()

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self.progress.add(getattr(optimizer, "found_inf", None))
        self._after_wrapper()

    def _after_masked_step(self, found_inf: torch.Tensor | None, *, is_direct: bool) -> None:
        self.progress.add(found_inf)
        if is_direct:
            self.watch.record()
        elif not self._has_repaired:
            # A compiled step may write to a stand-in, which is copied to the parameter later. If the parameter had to
            # be repaired, the stand-in was not, so that copy is checked like any other write.
            self.watch.expect_writes()

    def _after_wrapper(self, *_: object) -> None:
        if not self.limits.regrow:
            self.apply(self._pruned)

    def refuse_capture(self, what: str, use: str) -> None:
        """Raise CaptureError while a CUDA graph is captured, whose replays do not run what Python does here.

        ``what`` has a place for the name of the optimizer.
        """
        if devices.is_capturing(next(iter(self.parameters.values())).device):
            got = what.format(self.name)
            raise CaptureError(f"expected nothing that a CUDA graph would leave out, got {got}; use {use}")

    # -- writes by other code ----------------------------------------------------------------------------------------

    def check(self, *, sample: bool = False) -> None:
        """Repair what contradicts a mask, if anything but the optimizer has written to the parameters.

        Reads only weights that were written; with ``sample`` also a few others, for writes that leave no trace. Warns
        of each kind of finding once, as ``GMPWarning``.

        Raises
        ------
        TargetError
            A parameter is not in the model any more.
        """
        written = self.watch.written()
        if self.limits.regrow:
            pass  # weights may be anything until the next update
        elif self._expects_dense:
            self._look_for_zeros()
        elif sample and self.watch.sees_life(self._pruned, self.masks):
            written = self._pruned
        if written:
            if self.masked_optimizer is not None:
                self.masked_optimizer.follow_weights([self.parameters[name] for name in written])
            if not self.limits.regrow:
                self._compare(written)
            # Recorded last, so that after an interrupt the weights are checked again.
            self.watch.record()

    def verify(self) -> dict[str, int]:
        """Return the number of zeros of each target, counted from the weights.

        Raises
        ------
        StateError
            A pruned weight is not zero.
        """
        zeros = {}
        for name, (num_alive, num_zeros) in self.watch.contradictions(self.parameters, self.masks).items():
            pruned = self.masks[name].numel - self.masks[name].num_kept
            if num_alive and not self.limits.regrow:
                raise StateError(
                    f"verify: expected {pruned} zeros in '{name}' where its mask says pruned, got {num_alive} that are "
                    f"not zero: something other than {self.name} wrote to them; step() sets them to zero again"
                )
            zeros[name] = pruned - num_alive + num_zeros
        return zeros

    def check_alive(self, what: str) -> None:
        """Raise StateError if the parameters are released."""
        if self.is_released:
            reason = "a newer one holds; use that one" if self._others() else "were let go by remove(); build a new one"
            raise StateError(
                f"GMPScheduler: expected {what} of a pruner that holds its parameters, got one whose parameters "
                f"{reason}"
            )

    def agree(self) -> None:
        """Wait until all ranks have found that they are in the same run, unless they have; raise if they differ."""
        if self.shards is None or self.have_agreed:
            return
        thresholds = {f"threshold of '{name}'": value for name, value in self.thresholds.items()}
        self.shards.agree({**self.settings, "step": self.progress.step_count, **thresholds})
        self.have_agreed = True

    def _compare(self, names: Iterable[str]) -> None:
        """Compare targets with their masks, and repair those whose pruned weights are not all zero."""
        if "repair" in self._said:
            # This may happen at every step, and counting first would double the cost.
            self.watch.check_shapes()
            self._has_repaired = True
            self.apply([name for name in self._pruned if name in names])
            return
        found = self.watch.contradictions(names, self.masks)
        damaged = {name: alive for name, (alive, _) in found.items() if alive}
        sizes = {name: self.masks[name].numel for name in found}
        # Layers of zeros only do not count: some start that way.
        zeros = sum(zeros for name, (_, zeros) in found.items() if zeros < sizes[name])
        share = zeros / max(1, sum(sizes.values()))
        if damaged:
            self._has_repaired = True
            self.apply(damaged)
            first, *others = damaged
            more = f" and {len(others)} other layer{'s' * (len(others) > 1)}" if others else ""
            self.say(
                "repair",
                f"{sum(damaged.values())} pruned weights of '{first}'{more} were not zero any more and have been set "
                f"to zero again: something other than a whole step of {self.name}, the optimizer the pruner knows, "
                "wrote to them. After loading earlier weights, load the pruner's state of that time as well; for a new "
                "optimizer, set pruner.optimizer = new_optimizer; a wrapper that writes the weights itself is repaired "
                "at every step",
            )
        elif share > MANY_ZEROS:
            self.say(
                "zeros",
                f"{share:.1%} of the weights to be pruned have become zero although their masks keep them, and are not "
                "held at zero. After loading later weights, load the pruner's state_dict() of that time too",
            )

    def _look_for_zeros(self) -> None:
        """Hold the zeros of a model that was pruned before, on all ranks alike."""
        self.agree()
        zeros = {name: int(sum_over_shards(n, self.parameters[name])) for name, n in self.watch.zeros().items()}
        # Layers of zeros only do not count: some start that way.
        zeros = {name: number for name, number in zeros.items() if 0 < number < self.parameters[name].numel()}
        share = sum(zeros.values()) / sum(p.numel() for p in self.parameters.values())
        if share <= MANY_ZEROS:
            self._expects_dense = False
            return
        masks = {name: BitMask.from_zeros(local(self.parameters[name])) for name in zeros}
        advice = "pass start={} to let them train"
        check_kept(self.limits.patterns, masks, self.parameters, "zeros of the model", advice)

        def hold() -> None:
            for name, mask in masks.items():
                if self.masks[name] != mask:  # a second call must not write bits by which state is laid out by now
                    self.masks[name].packed.copy_(mask.to(memory_format=self.masks[name].memory_format).packed)
            self.masks_changed(dict.fromkeys(self.parameters, 0) | zeros)
            self.apply(zeros)

        write_despite_interrupts(hold, self.shards)
        self.say(
            "zeros",
            f"{share:.1%} of the weights to be pruned are zero already and are held at zero from now on, as with "
            "start='zeros'. To resume a run, load the pruner's state_dict() too; to let them train, pass start={}",
        )
