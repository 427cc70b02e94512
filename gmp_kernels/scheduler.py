"""Gradual pruning in any training loop, used like a ``torch.optim.lr_scheduler``."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, Literal, get_args

import torch
from torch import nn

from gmp_kernels.checks import check_choice
from gmp_kernels.distributed import Shards, refuse_flattened
from gmp_kernels.distributed.placement import sum_over_shards
from gmp_kernels.errors import warn
from gmp_kernels.model.coverage import Coverage, gap_in
from gmp_kernels.model.parametrized import follow_update_
from gmp_kernels.model.targets import Entry, ParameterIndex, check_optimized
from gmp_kernels.model.wrappers import optimizer_chain
from gmp_kernels.ops import NonFinite, Scope
from gmp_kernels.pruner.enforcement import Enforcement
from gmp_kernels.pruner.groups import groups_of, warning_of_emptied
from gmp_kernels.pruner.interrupts import write_despite_interrupts
from gmp_kernels.pruner.layers import prune_nothing
from gmp_kernels.pruner.limits import Limits, Patterns, Scores, check_kept
from gmp_kernels.pruner.progress import PATIENCE, Position, Progress
from gmp_kernels.pruner.state import Start, begin_load, pack, starting_masks
from gmp_kernels.pruner.updates import say_emptied, update
from gmp_kernels.reports import StepReport
from gmp_kernels.schedules import Schedule

__all__ = ["GMPScheduler", "StepReport"]


class GMPScheduler:
    """Prunes a model by magnitude while it trains, and keeps pruned weights at zero.

    Call ``step()`` after every ``optimizer.step()``. At the schedule's update steps it prunes; between them a hook of
    the optimizer sets pruned weights and their optimizer state (momentum, Adam's averages, whatever has the shape of
    the weight) back to zero after each step, for as long as the optimizer lives. Nothing is added to the model itself.
    With an optimizer of ``gmp_kernels.optim`` the step itself applies the mask and the hook only checks. Both read the
    same bits, which an update changes in place, so a captured CUDA graph of the step stays valid. If that optimizer
    keeps master weights, the scheduler ranks those.

    Parameters
    ----------
    model : torch.nn.Module
        May be compiled or wrapped; names are those of ``model.named_parameters()`` without the wrapper.
        May be sharded (``fully_shard``, tensor parallel, anything that makes parameters DTensors) or replicated
        (``DistributedDataParallel``); the masks equal those of a run on one process. Every rank builds a scheduler and
        steps it.
    optimizer : torch.optim.Optimizer
        Any optimizer of all the parameters to prune, or a wrapper around one, such as those of Accelerate and
        Lightning.
    schedule : gmp_kernels.schedules.Schedule
        Gives the sparsity at each optimizer step.
    targets : str, module type or list of them, optional
        Weights to prune: exact names of parameters or modules, globs, ``"re:"`` regular expressions, or module types;
        see ``gmp_kernels.model.targets``. A module means everything in it. Default: every weight of two or more
        dimensions that multiplies activations. These are weights of Linear, Conv, attention, recurrent and expert
        modules, but not norms, biases, embeddings, routers of experts, low-rank adapters or output heads of language
        models; ``coverage()`` lists them. A tied parameter is one parameter: it is pruned if one of its names is in
        ``targets``, and left alone if one of them is ignored or, by default, an embedding.
    ignore : as targets, optional
        Weights to leave alone.
    overrides : dict, optional
        {entry as in targets: final sparsity or Schedule} for layers that differ. A number keeps the schedule's steps
        and changes its final sparsity; 0.0 means never pruned. The first entry that matches a layer applies. Layer
        scope only.
    scope : {"layer", "global"}
        "layer" ranks each layer by itself, "global" ranks all layers together.
    distribution : {"uniform", "erk"}
        For layer scope. "uniform" prunes every layer to the schedule's sparsity. "erk" (Erdos-Renyi-Kernel) keeps small
        layers denser and reaches the schedule's sparsity over all layers together, except those in ``overrides``.
    pattern : Pattern, or dict of Pattern, optional
        ``patterns.NM``, ``Block`` or ``Unstructured``: which weights may be pruned, and which only together, as in
        ``prune_``. One for all layers, or {entry as in targets: pattern}: the first entry that matches a layer applies,
        and any weight of other layers may be pruned. Counts of blocks are rounded to whole blocks.
    max_sparsity : float, optional
        Of each layer, in (0, 1]: no more than floor(max_sparsity * n) of its n weights are pruned. With
        ``scope="global"`` and ``distribution="erk"`` the other layers lose what this withholds.
    min_kept_per_row : int, optional
        As in ``patterns.Unstructured``: so many weights of each row, which are those of one output, are kept whatever
        their rank. For layers without a pattern.
    scores : callable, optional
        Called as ``scores(name, parameter, state)`` for each layer at each of its updates. Returns a tensor with a
        score per weight, not negative: those of lowest score are pruned, instead of those of smallest magnitude.
        ``state`` holds the optimizer's state of the parameter, such as ``exp_avg_sq`` of Adam, in tensors of its shape,
        also with compact state; it is empty before the first step. Of a sharded parameter each rank returns the scores
        of the whole as a DTensor, or those of its local part. Memory: the scores of all layers of an update.
    regrow : bool
        Whether pruned weights may come back: each update ranks all weights anew, and until the next one the optimizer
        steps all of them, their gradients and state untouched by masks. Updates go on after the end of the schedule, at
        its frequency; that of a step follows the step itself. For training that projects onto the largest weights at
        every step (``frequency=1``) or every few.
    start : mapping of str to BitMask, str, path or None
        Weights that are pruned before the first update. "zeros": the zeros of the model. A mapping: the weights that
        its masks prune; layers it does not name start dense. A path: masks that ``gmp-kernels prune --masks`` wrote.
        None: nothing. But if more than 1 % of the weights are zero at the first step (not counting layers of zeros
        only), these zeros are held as with "zeros", with a warning; pass {} to let them train. Weights masked by
        ``torch.nn.utils.prune`` are pruned whatever is passed; with None they are then the only ones.
    count : {"optimizer_steps", "calls"}
        "optimizer_steps" advances the schedule only if the optimizer has stepped since the last ``step()``. "calls"
        advances it at every ``step()``, for loops whose optimizer cannot be watched, such as those that replay CUDA
        graphs.
    nonfinite : {"error", "keep"}
        Treatment of NaN or Inf in unpruned weights at an update; as in ``prune_``.
    backend : str, optional
        As in ``prune_``.

    Attributes
    ----------
    masks : dict of str to BitMask
        1 bit per weight, 1 = kept; without ``start``, all ones until the first update. The mask of a sharded parameter
        is that of the local shard. Only read them: with compact state, the optimizer refuses to step after other code
        has written them.
    history : list of StepReport
        One per update, with ``regrow`` the latest 1024; the figures are for whole layers, not shards.

    Raises
    ------
    TargetError
        An entry matches nothing that can be pruned, or nothing is left to prune. Or a parameter given by its exact name
        is not in the optimizer, or the model computes a weight from it in a way that does not keep zeros.
    SparsityError
        An override outside [0, 1]; a final sparsity above what ``pattern`` or ``max_sparsity`` allows; masks to start
        from that break the pattern.
    DTypeError, ShapeError, LayoutError, BackendUnavailableError
        A target that ``prune_`` does not take. ShapeError: targets that do not fit the pattern, all of them named.
    ValueError
        An unknown ``scope``, ``distribution``, ``count`` or ``nonfinite``; ``min_kept_per_row`` beside a pattern; masks
        to start from with ``regrow``.

    Warns
    -----
    GMPWarning
        The default leaves out more than half of the weights in matrices, most weights are frozen, or the schedule ends
        with a layer that has no weight left. At an update: a row under weight_norm has no weight left and becomes NaN.

    References
    ----------
    M. Zhu and S. Gupta, "To prune, or not to prune", 2017, arXiv:1710.01878.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        *,
        targets: Entry | Iterable[Entry] | None = None,
        ignore: Entry | Iterable[Entry] | None = None,
        overrides: Mapping[Entry, float | Schedule] | None = None,
        scope: Scope = "layer",
        distribution: str = "uniform",
        pattern: Patterns = None,
        max_sparsity: float | None = None,
        min_kept_per_row: int | None = None,
        scores: Scores | None = None,
        regrow: bool = False,
        start: Start = None,
        count: Literal["optimizer_steps", "calls"] = "optimizer_steps",
        nonfinite: NonFinite = "error",
        backend: str | None = None,
    ) -> None:
        for value, kind in ((model, nn.Module), (schedule, Schedule)):
            if not isinstance(value, kind):
                raise TypeError(
                    f"GMPScheduler: expected a {kind.__module__}.{kind.__name__}, got a {type(value).__name__}; the "
                    "order is model, optimizer, schedule"
                )
        check_choice("GMPScheduler", "count", count, ("optimizer_steps", "calls"))
        check_choice("GMPScheduler", "nonfinite", nonfinite, get_args(NonFinite))
        refuse_flattened(model)
        self.model = model
        self.schedule = schedule
        self._options: dict[str, Any] = {"scope": scope, "nonfinite": nonfinite}
        index = ParameterIndex(model, optimizer_chain(optimizer)[-1])
        parameters, self._coverage = index.select(targets, ignore)
        shapes = {name: p.shape for name, p in parameters.items()}
        self._num_weights = {name: shape.numel() for name, shape in shapes.items()}
        check_choice("GMPScheduler", "scope", scope, get_args(Scope))
        limits = Limits.of(
            *(index, shapes, scope, pattern, max_sparsity, min_kept_per_row, scores, regrow),
        )
        main, others = groups_of(index, shapes, schedule, distribution, overrides or {}, scope, limits)
        self._groups = [main, *others] if main.shapes else others
        self._schedules = [group.schedule for group in self._groups]
        self._end_step = max(schedule.end_step for schedule in self._schedules)
        self.masks, has_start = starting_masks(start, model, parameters, regrow=regrow)
        self.history: list[StepReport] = []
        self._held = Enforcement(
            model,
            parameters,
            self.masks,
            optimizer,
            Progress(counts_calls=count == "calls", schedules=self._schedules, repeats=regrow),
            shards=Shards.of(model, parameters, limits.patterns),
            limits=limits,
            settings={
                "schedule": schedule.to_dict(),
                "overrides": {name: group.schedule.to_dict() for group in others for name in group.shapes},
                "scope": scope,
                "distribution": distribution,
                **limits.settings(),
            },
            backend=backend,
            expects_dense=not has_start,
        )
        # Pruning nothing finds every tensor that prune_ would refuse, now rather than epochs later.
        prune_nothing(self._held, parameters, **self._options)
        num_pruned = {}
        if has_start:
            check_kept(limits.patterns, self.masks, parameters, "masks to start from", "start without them")
            here = {name: mask.numel - mask.num_kept for name, mask in self.masks.items()}
            num_pruned = {name: int(sum_over_shards(n, parameters[name])) for name, n in here.items()}
        self._held.pruner = weakref.ref(self)
        gap = gap_in(self._coverage, by_default=targets is None)
        for word in filter(None, (gap, warning_of_emptied(self._groups, scope))):
            warn(word)
        # Side effects begin here. The first of them may still be refused.
        self._held.own()
        try:
            if has_start:
                self._held.masks_changed(num_pruned)
            optimizer_of_ours = self._held.masked_optimizer
            if has_start or optimizer_of_ours is None or not optimizer_of_ours.compact_state:
                # Masks are set even before the first update, for CUDA graphs captured before it.
                self._held.apply(parameters, ranked_is_pruned=not has_start)
            self._follow_masks()
        except BaseException:
            self._held.detach()
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._held.pruner = weakref.ref(self)

    @property
    def optimizer(self) -> Any:
        """The optimizer that is followed. Assign another when it takes over; the step count continues."""
        return self._held.optimizer

    @optimizer.setter
    def optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        self._held.check_alive("assigning optimizer")
        check_optimized(optimizer_chain(optimizer)[-1], self._held.parameters)
        self._held.follow(optimizer)
        self._held.apply(self._held.parameters)

    @property
    def step_count(self) -> int:
        """Optimizer steps counted by ``step()`` so far; calls, with ``count="calls"``."""
        return self._held.progress.step_count

    @property
    def _num_steps_seen(self) -> int:
        """As ``step_count``, with those steps that a GPU may have skipped, so that nothing waits for it."""
        return self._held.progress.position.num_steps

    @property
    def finished(self) -> bool:
        """Whether the last update has been made."""
        return self._held.progress.position.made >= self._end_step

    def step(self) -> StepReport | None:
        """Prune if an update is due, and make sure that pruned weights are zero; call it after ``optimizer.step()``.

        The update of schedule step ``n`` is made by the call that follows optimizer step ``n``, counted from 0, or by
        one before it, if there is any: a call before training makes that of step 0. A call after a step that a
        GradScaler skipped, or in a micro-batch of an accumulation, does not count.

        Returns
        -------
        StepReport or None
            None if no update was due. Reports are also kept in ``history``.

        Raises
        ------
        NonFiniteError
            NaN or Inf among the unpruned weights and ``nonfinite="error"``; on every rank, if on one.
        TargetError
            A parameter was removed from the model, replaced or reshaped.
        DTypeError, LayoutError
            A parameter was changed into one that ``prune_`` does not take, or moved to another device.
        StateError
            The ranks differ in arguments, layers, step or masks; on every rank, at the first step or the next update.
            Or ``remove()`` or another pruner has released the parameters from this one.
        CaptureError
            A CUDA graph is being captured; its replays would not call this.
        DistributedError
            A rank does not answer, within the time-out of the process group.

        Warns
        -----
        GMPWarning
            Once for each: other code has written to pruned weights, which are zero again now; the model had zeros,
            which are held from now on; calls keep coming without an optimizer step.

        Notes
        -----
        If it raises, nothing has changed and the step is not counted, except that pruned weights that were not zero may
        be zero now. Repair the weights and call it again. The exception are replicas whose weights have drifted apart:
        their masks are compared after they were made. An interrupt while an update writes takes effect once the update
        is finished.
        """
        held = self._held
        held.check_alive("step()")
        held.refuse_capture("GMPScheduler.step()", "it outside of the graph, after optimizer.step()")
        held.watch.check_present()
        held.agree()
        held.check(sample=True)
        due, position = held.progress.due(self._schedules)
        report = self._update(due, position) if due.count(None) < len(due) else None
        if report is None:
            held.progress.position = position
        if position.num_idle == PATIENCE:
            held.say(
                "idle",
                f"step() was called {PATIENCE} times in a row without a step of {held.name}, so that the schedule "
                f"stays at step {self.step_count}. This is expected for the micro-batches of an accumulation. If "
                "another optimizer steps these parameters, set pruner.optimizer to it; count='calls' is for loops "
                "whose optimizer cannot be watched",
            )
        return report

    def coverage(self) -> Coverage:
        """Return which weights are pruned, which are left out, and why, as of when the scheduler was built."""
        return self._coverage

    def __repr__(self) -> str:
        """Return the schedule, its progress, and the table of the coverage."""
        state = "finished" if self.finished else f"not finished: the last update is due at step {self._end_step}"
        state = "removed" if self._held.is_released else state
        num_calls = self._held.progress.position.num_calls
        num_others = sum(len(group.shapes) for group in self._groups if group.schedule is not self.schedule)
        others = f" and {num_others} layers by overrides" if num_others else ""
        limits = ", ".join(filter(None, (f"scope={self._options['scope']!r}", str(self._held.limits))))
        return (
            f"{type(self).__name__}({self.schedule!r}, {limits}){others}\n"
            f"step {self.step_count} after {num_calls} calls, sparsity {self.sparsity:.4f}, {state}\n"
            f"{self._coverage}"
        )

    @property
    def sparsity(self) -> float:
        """Fraction of pruned weights over all targets."""
        total = sum(self._num_weights.values())
        return 1.0 - (total - sum(self._held.num_pruned.values())) / total

    def layer_sparsities(self) -> dict[str, float]:
        """Return {name: fraction of pruned weights} of all targets."""
        num_pruned = self._held.num_pruned
        return {name: 1.0 - (n - num_pruned[name]) / n for name, n in self._num_weights.items()}

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw the sparsity so far, and what the schedule asks for, into a PNG or SVG file, as its suffix tells.

        Layers that differ from the total have lines of their own. What no report tells is left blank. Of several
        processes only the first writes. Raises OutputError for other suffixes; ModuleNotFoundError without matplotlib.
        """
        from gmp_kernels.pruner.course import draw  # imports matplotlib

        draw(path, self.history, self._groups, self._held.num_pruned, self.step_count)

    def verify(self) -> dict[str, int]:
        """Return {name: number of zeros} of all targets, counted from the weights (for sharded ones, the local shard).

        Reads every weight once. Temporary memory: about 4 MB.

        Raises
        ------
        StateError
            A weight is not zero although its mask says so; the message names the layer.
        """
        return self._held.verify()

    def remove(self) -> None:
        """Release model and optimizer: pruned weights are zero now, but nothing keeps them zero any more.

        Raises
        ------
        CaptureError
            A CUDA graph holds the masks.
        """
        if not self._held.is_released:
            self._held.release()

    def state_dict(self) -> dict[str, Any]:
        """Return everything a bit-exact resume needs besides the model's and the optimizer's own state.

        It holds copies of the packed masks as uint8 tensors, and plain data, so ``torch.load(..., weights_only=True)``
        reads it. Masks of sharded parameters are bool tensors sharded alike (1 byte per weight), so
        ``torch.distributed.checkpoint`` saves the scheduler and loads it on any number of ranks. Only the latest 64
        reports of ``history`` are saved, and layers only for the last, so the size does not grow with the updates.
        """
        return pack(self._held, self.history)

    def load_state_dict(self, state_dict: Mapping[str, Any], masks_only: bool = False) -> None:
        """Continue where ``state_dict()`` was taken; the masks are applied to weights and optimizer state at once.

        The order in which model, optimizer and pruner are loaded does not matter. The prefixes that
        ``DistributedDataParallel`` and ``torch.compile`` add to names may differ between the two.

        Parameters
        ----------
        state_dict : mapping
        masks_only : bool
            Load the masks only and keep the schedule, step count and history of this scheduler: for a run of another
            length, or with another number of steps per epoch.

        Raises
        ------
        StateError
            The state is of another version, other layers, or other settings. Nothing has been changed.
        """
        self._begin_load(state_dict, masks_only)()

    def _begin_load(self, state_dict: Mapping[str, Any], masks_only: bool = False) -> Callable[[], None]:
        """Check everything that ``load_state_dict`` refuses, and return the function that loads."""
        self._held.check_alive("load_state_dict()")
        load = begin_load(state_dict, self._held, self.history, masks_only=masks_only)
        self._held.check_masks(self.masks)

        def write() -> None:
            write_despite_interrupts(load, self._held.shards)
            self._follow_masks()

        return write

    def _follow_masks(self) -> None:
        """Update the weights that the model computes from pruned ones."""
        if warning := follow_update_(self.model, self._held.parameters):
            self._held.say("computed", warning)

    def _update(self, due: Sequence[int | None], position: Position) -> StepReport:
        """Make the updates of these steps, one per group, or change nothing."""
        held = self._held
        report = update(held, self.history, self.schedule, self._groups, due, position, self._options)
        self._follow_masks()
        if self._options["scope"] == "global":
            say_emptied(held, report)
        return report
