"""Holding pruned weights at zero, whichever code writes to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from gmp_kernels.backends import capture
from gmp_kernels.distributed.placement import local, sum_over_shards
from gmp_kernels.errors import CaptureError, StateError, TargetError, warn
from gmp_kernels.masks import BitMask
from gmp_kernels.model.targets import Place, check_present
from gmp_kernels.model.wrappers import inside, optimizer_chain, with_own_hooks
from gmp_kernels.optim.masked import MaskedOptimizer
from gmp_kernels.pruner.advice import on_damage, on_idle_calls, on_new_zeros, on_old_zeros
from gmp_kernels.pruner.layers import Agreement
from gmp_kernels.pruner.owners import let_go, owners_of, register
from gmp_kernels.pruner.progress import StepCount
from gmp_kernels.pruner.watch import Watch, compare
from gmp_kernels.pruner.zeroing import state_beside, zero_all_where_pruned_

__all__ = ["Enforcement", "refuse_capture"]

# Of all weights: more of them are not zero by accident.
MANY_ZEROS = 0.01


def refuse_capture(device: torch.device, what: str, use: str) -> None:
    """Raise CaptureError while a CUDA graph is captured, whose replays do not run what Python does here."""
    if capture.is_capturing(device):
        raise CaptureError(f"expected nothing that a CUDA graph would leave out, got {what}; use {use}")


class Enforcement:
    """Masks of a pruner, applied whenever something has written to its parameters.

    A hook of the optimizer applies them after every step; under an optimizer of ``gmp_kernels.optim``, whose step
    applies them itself, it only looks. ``check`` looks for what was written in between.

    Parameters
    ----------
    model : torch.nn.Module
    parameters : mapping of str to Parameter
    places : mapping of str to Place
    masks : mapping of str to BitMask
        Shared with the pruner, which changes their bits.
    optimizer : object
        Perhaps a wrapper. Followed from ``own`` on.
    backend : str, optional
    counts_steps : bool
        Whether the pruner counts the optimizer's steps, which the replays of a CUDA graph hide.
    expects_dense : bool
        Whether zeros that the model has before its first step are worth a word.

    Attributes
    ----------
    optimizer : object
        As it was attached, perhaps a wrapper.
    num_pruned : dict of str to int
        Pruned weights of the whole layers.
    steps : StepCount
        Steps of the innermost optimizer.
    masked_optimizer : MaskedOptimizer or None
        The innermost optimizer, if it applies masks itself.
    agreement : Agreement
        Of the ranks, without which none waits for another.
    pruner : callable
        A weak reference to the pruner. What it has pruned stays zero when it is gone.
    is_released : bool
        Whether the parameters are let go.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        places: Mapping[str, Place],
        masks: Mapping[str, BitMask],
        optimizer: Any,
        *,
        backend: str | None,
        counts_steps: bool,
        expects_dense: bool,
    ) -> None:
        self._model = model
        self._parameters = dict(parameters)
        self._names = list(parameters)
        self._places = [places[name] for name in parameters]
        self._masks = masks
        self._backend = backend
        self._counts_steps = counts_steps
        self._expects_dense = expects_dense
        self.num_pruned = dict.fromkeys(parameters, 0)
        self._pruned: list[int] = []  # positions of targets that have pruned weights
        self._said: set[str] = set()
        self._has_repaired = False  # since the step that is under way began
        self.steps = StepCount()
        self.is_released = False
        self.pruner: Callable[[], object | None] = lambda: None
        self.agreement: Agreement | None = None
        self._choose(optimizer)
        self._watch = Watch(list(self._parameters.values()), self._places)
        self._hooks: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        # The optimizer's hooks, and versions, belong to the objects of the original.
        return {name: value for name, value in self.__dict__.items() if name not in ("_watch", "_hooks", "pruner")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._watch = Watch(list(self._parameters.values()), self._places)
        self._watch.record()
        self._hooks = []
        self.pruner = lambda: None
        if not self.is_released:
            self.own()

    @property
    def held(self) -> list[nn.Parameter]:
        """The parameters, in the order of their masks."""
        return list(self._parameters.values())

    # -- who holds what ----------------------------------------------------------------------------------------------

    def follow(self, optimizer: Any) -> None:
        """Follow this optimizer, and no longer the one before.

        Raises
        ------
        TargetError
            Its steps cannot be watched.
        StateError, CaptureError
            It cannot take the masks over, or the one before cannot let them go. Nothing has changed.
        """
        innermost, before = optimizer_chain(optimizer)[-1], self.masked_optimizer
        if isinstance(innermost, MaskedOptimizer):
            innermost.check_masks(dict(zip(self.held, self._masks.values(), strict=True)))
        if before is not None and before is not innermost:
            # Their bits are written in place from now on, and nobody would tell it.
            before.forget_masks(self.held)
        self._unhook()
        self._choose(optimizer)
        self._attach()

    def _choose(self, optimizer: Any) -> None:
        self.optimizer, self._innermost = optimizer, optimizer_chain(optimizer)[-1]
        self._inside = inside(self._innermost)
        self.masked_optimizer = self._innermost if isinstance(self._innermost, MaskedOptimizer) else None

    def _attach(self) -> None:
        if self.masked_optimizer is not None:
            self._hooks.append(self.masked_optimizer.watch_steps(self._before_step, self._after_masked_step))
        else:
            self._hooks.append(self._innermost.register_step_pre_hook(_left_alone_by_compilers(self._before_step)))
            self._hooks.append(self._innermost.register_step_post_hook(_left_alone_by_compilers(self._after_step)))
        # A wrapper may write the weights itself once the step inside it is over.
        for wrapper in with_own_hooks(optimizer_chain(self.optimizer))[:-1]:
            self._hooks.append(wrapper.register_step_post_hook(_left_alone_by_compilers(self._after_wrapper)))

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def own(self) -> None:
        """Begin to hold the parameters; a pruner that held them, and no others, lets go.

        Raises
        ------
        TargetError
            Another pruner holds some of them and other parameters too. Nothing has changed.
        """
        others = owners_of(self._parameters.values()) - {self}
        mine = set(map(id, self._parameters.values()))
        for other in others:
            left = [name for name, p in other._parameters.items() if id(p) not in mine]
            if left and other.pruner() is not None:
                raise TargetError(
                    f"GMPScheduler: expected parameters that no other pruner holds, got some of one that also holds "
                    f"'{left[0]}', which this one leaves out; call remove() on that one first"
                )
        for other in others:
            other._give_up(mine)
        register(self)
        self._attach()

    def _give_up(self, identities: set[int]) -> None:
        """Let some parameters go. Others stay held where the pruner is gone: nobody could let go of them by name."""
        parameters = {name: p for name, p in self._parameters.items() if id(p) not in identities}
        if not parameters:
            self.release()
            return
        gone = [p for p in self._parameters.values() if id(p) in identities]
        if self.masked_optimizer is not None:
            self.masked_optimizer.forget_masks(gone)
        places = dict(zip(self._names, self._places, strict=True))
        self._parameters, self._names = parameters, list(parameters)
        self._places = [places[name] for name in parameters]
        self._watch = Watch(list(parameters.values()), self._places)
        self.masks_changed({name: self.num_pruned[name] for name in parameters})

    def release(self) -> None:
        """Let the parameters go, with the zeros they have.

        Raises
        ------
        CaptureError
            A CUDA graph holds their masks. Nothing has changed.
        """
        if self.masked_optimizer is not None:
            self.masked_optimizer.forget_masks(self._parameters.values())
        self.detach()

    def detach(self) -> None:
        """Let the parameters go, and leave their masks to the optimizer."""
        self._unhook()
        self.is_released = True
        let_go(self)

    # -- masks -------------------------------------------------------------------------------------------------------

    def masks_changed(self, num_pruned: dict[str, int]) -> None:
        """Go on with masks that have changed, of which so many weights are pruned."""
        self.num_pruned = num_pruned
        self._pruned = [i for i, name in enumerate(self._names) if num_pruned[name]]
        self._expects_dense = False
        self._watch.forget_samples()

    def apply(self, names: Iterable[str], *, ranked_is_pruned: bool = False, are_checked: bool = False) -> None:
        """Zero what is pruned of these targets and of their optimizer state.

        Parameters
        ----------
        names : iterable of str
        ranked_is_pruned : bool
            The tensor whose magnitudes decided, the master copy or else the weight, is zero there already.
        are_checked : bool
            An optimizer that applies masks itself has just checked them.
        """
        masks: dict[torch.Tensor, BitMask] = {self._parameters[name]: self._masks[name] for name in names}
        self._watch.distrust()
        if self.masked_optimizer is not None:
            self.masked_optimizer.share_masks(masks, ranked_is_pruned=ranked_is_pruned, are_checked=are_checked)
        else:
            self._zero([] if ranked_is_pruned else masks, masks)
        self._watch.record()

    def _zero(self, weights: Iterable[torch.Tensor], masks: Mapping[torch.Tensor, BitMask]) -> None:
        """Zero what is pruned of these weights, and of the state of all parameters in ``masks``."""
        entries = [("weight", p.detach(), masks[p]) for p in weights]
        for state in [optimizer.state for optimizer in self._inside]:
            for p, mask in masks.items():
                entries += [(f"state '{key}'", value, mask) for key, value in state_beside(p, state)]
        for i in zero_all_where_pruned_([entry[1:] for entry in entries], backend=self._backend):
            key, tensor, _ = entries[i]
            self.say(
                key,
                f"the {key} of a parameter, {type(tensor).__name__} of {tensor.dtype}, cannot be set to zero where "
                "weights are pruned and is left as it is",
            )

    # -- around the optimizer's steps --------------------------------------------------------------------------------

    def _before_step(self, *_: object) -> None:
        if self.masked_optimizer is None:
            self._refuse_capture("after which masks are applied from Python", "gmp_kernels.optim")
            self.check_shapes()
        elif self._counts_steps:
            self._refuse_capture("that the pruner counts, whose replays would not tell it", "count='calls'")
        self._has_repaired = False
        self.check()

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self.steps.add(getattr(optimizer, "found_inf", None))
        self._after_wrapper()

    def _after_masked_step(self, found_inf: torch.Tensor | None, *, is_direct: bool) -> None:
        self.steps.add(found_inf)
        if is_direct:
            self._watch.record()
        elif not self._has_repaired:
            # What stands in for a parameter in a compiled step is written back to it later. If the parameter had to be
            # repaired the other was not, and that write is looked at like any.
            self._watch.expect_writes()

    def _after_wrapper(self, *_: object) -> None:
        self.apply(self._names[i] for i in self._pruned)

    def _refuse_capture(self, what: str, use: str) -> None:
        refuse_capture(next(iter(self._parameters.values())).device, f"a step of {self._name} {what}", use)

    # -- what others wrote -------------------------------------------------------------------------------------------

    def check(self, *, sample: bool = False) -> None:
        """Look whether anything but the optimizer has written to the parameters, and put right what contradicts a mask.

        Parameters
        ----------
        sample : bool
            Also look at a few weights, for writes that leave no trace.

        Raises
        ------
        TargetError
            A parameter is not the model's any more.

        Notes
        -----
        Reads no weights unless something was written, and then those. What is found is said once, as ``GMPWarning``.
        """
        written = self._watch.written()
        if self._expects_dense:
            self._look_for_zeros()
        elif sample and self._watch.sees_life(self._pruned, self._mask_at):
            written = self._pruned
        if written:
            if self.masked_optimizer is not None:
                self.masked_optimizer.follow_weights([self._parameters[self._names[i]] for i in written])
            self._compare(written)
            # Only now: what an interrupt comes before is looked at again.
            self._watch.record()

    def verify(self) -> dict[str, int]:
        """Return the number of zeros of each target, counted from the weights.

        Raises
        ------
        StateError
            A pruned weight is not zero.
        """
        zeros = {}
        for name, found in zip(self._names, self._contradictions(range(len(self._names))), strict=True):
            mask = self._masks[name]
            if found[0]:
                raise StateError(
                    f"verify: expected {mask.numel - mask.num_kept} zeros in '{name}' where its mask says pruned, got "
                    f"{found[0]} that are not zero: something other than {self._name} wrote to them; step() sets "
                    "them to zero again"
                )
            zeros[name] = mask.numel - mask.num_kept + found[1]
        return zeros

    def check_alive(self, what: str) -> None:
        """Raise StateError if the parameters are let go."""
        if self.is_released:
            taken = owners_of(self._parameters.values())
            reason = "a newer one holds; use that one" if taken else "were let go by remove(); build a new one"
            raise StateError(
                f"GMPScheduler: expected {what} of a pruner that holds its parameters, got one whose parameters "
                f"{reason}"
            )

    def say_idle(self, num_calls: int, step_count: int) -> None:
        """Say that the schedule stands still."""
        self.say("idle", on_idle_calls(num_calls, self._name, step_count))

    def check_present(self) -> None:
        """Raise TargetError for a target that was removed from the model, replaced or reshaped."""
        if not self._watch.are_in_place():
            self._compare_with_model()
            # It is the first look, or another module leads to the same parameters now.
            self._watch.locate(self._model)

    def check_shapes(self) -> None:
        """Raise TargetError for a parameter that was given other data, of another shape than its mask."""
        if not self._watch.have_their_shapes():
            self._compare_with_model()

    def _compare_with_model(self) -> None:
        check_present(self._model, self._parameters, dict(zip(self._names, self._watch.shapes, strict=True)))

    def _contradictions(self, positions: Sequence[int]) -> list[tuple[int, int]]:
        """Return, by parameter, how many pruned weights are not zero here and how many kept ones are."""
        self.check_shapes()
        parameters = [self._parameters[self._names[i]] for i in positions]
        found = [compare(local(p), self._mask_at(i)) for i, p in zip(positions, parameters, strict=True)]
        return [(alive, zeros) for alive, zeros in (counts.tolist() for counts in found)]

    def _compare(self, positions: Sequence[int]) -> None:
        self.check_shapes()
        if "repair" in self._said:
            # It happens at every step, perhaps: to count first would double the cost.
            self._repair([self._names[i] for i in self._pruned if i in positions])
            return
        found = dict(zip(positions, self._contradictions(positions), strict=True))
        damaged = {self._names[i]: alive for i, (alive, _) in found.items() if alive}
        sizes = {i: self._mask_at(i).numel for i in positions}
        # Layers that start as zeros alone are another thing.
        zeros = sum(zeros for i, (_, zeros) in found.items() if zeros < sizes[i])
        share = zeros / max(1, sum(sizes.values()))
        if damaged:
            self._repair(damaged)
            self.say("repair", on_damage(damaged, self._name))
        elif share > MANY_ZEROS:
            self.say("zeros", on_new_zeros(share))

    def _look_for_zeros(self) -> None:
        """Hold the zeros of a model that was pruned before, on all ranks alike: nobody else knows of them."""
        assert self.agreement is not None
        self.agreement.make()
        counts = self._contradictions(range(len(self._names)))
        found = zip(self._parameters.items(), counts, strict=True)
        zeros = {name: int(sum_over_shards(here, p)) for (name, p), (_, here) in found}
        # Layers that start as zeros alone are another thing.
        zeros = {name: number for name, number in zeros.items() if 0 < number < self._parameters[name].numel()}
        share = sum(zeros.values()) / sum(p.numel() for p in self._parameters.values())
        self._expects_dense = False
        if share <= MANY_ZEROS:
            return
        for name in zeros:
            self._masks[name].packed.copy_(BitMask.from_zeros(local(self._parameters[name])).packed)
        self.masks_changed(dict.fromkeys(self._names, 0) | zeros)
        self.apply(zeros)
        self.say("zeros", on_old_zeros(share))

    def _repair(self, names: Iterable[str]) -> None:
        self._has_repaired = True
        self.apply(names)

    def _mask_at(self, position: int) -> BitMask:
        return self._masks[self._names[position]]

    @property
    def _name(self) -> str:
        return type(self._innermost).__name__

    def say(self, what: str, message: str) -> None:
        """Warn once for each kind of thing."""
        if what not in self._said:
            self._said.add(what)
            warn(f"GMPScheduler: {message}")


def _left_alone_by_compilers(hook: Callable[..., None]) -> Callable[..., None]:
    """Keep a hook out of compiled steps: it depends on the masks, and would be compiled again at every update."""
    return torch.compiler.disable(hook)  # type: ignore[no-any-return,no-untyped-call]
