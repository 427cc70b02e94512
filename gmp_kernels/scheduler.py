"""Gradual pruning in any training loop, used like a ``torch.optim.lr_scheduler``."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from gmp_kernels.coverage import Coverage, gap_in, shown_names
from gmp_kernels.distributed import Shards
from gmp_kernels.distributions import DISTRIBUTIONS, Distribution, emptied_layers, uniform
from gmp_kernels.enforcement import enforce_masks_, refuse_capture
from gmp_kernels.errors import StateError, TargetError
from gmp_kernels.masks import BitMask
from gmp_kernels.ops import NonFinite, PruneResult, Scope, Threshold, prune_
from gmp_kernels.optim.masked import MaskedOptimizer
from gmp_kernels.parametrized import follow_update_
from gmp_kernels.reports import LayerReport, StepReport
from gmp_kernels.schedules import Schedule
from gmp_kernels.sharding import local, local_mask, whole_mask
from gmp_kernels.targets import Entry, ParameterIndex, check_present

__all__ = ["GMPScheduler", "StepReport"]

STATE_VERSION = 2


class _Group(NamedTuple):
    """Layers that follow one schedule, and how its sparsity is divided among them."""

    schedule: Schedule
    names: list[str]
    distribute: Distribution


class GMPScheduler:
    """Prunes a model by magnitude while it trains, and keeps what is pruned at zero.

    Call ``step()`` after every ``optimizer.step()``. At the schedule's update steps it prunes; between them a hook of
    the optimizer sets pruned weights and their optimizer state (momentum, Adam's averages, whatever has the shape of
    the weight) back to zero after each step, for as long as the optimizer lives. The model itself carries nothing.
    With an optimizer of ``gmp_kernels.optim`` the mask is part of the step itself and there is no such hook: both read
    the same bits, which an update changes in place, so that a CUDA graph of the step stays right. Where it keeps master
    weights, they are what is ranked.

    Parameters
    ----------
    model : torch.nn.Module
        May be compiled or wrapped; names are those of ``model.named_parameters()``, less compile's ``_orig_mod``.
        May be sharded (``fully_shard``, tensor parallel, all that makes parameters DTensors) or replicated
        (``DistributedDataParallel``); its masks are those of one process. Every rank builds a scheduler and steps it.
    optimizer : torch.optim.Optimizer
        Any, over all parameters that are pruned.
    schedule : gmp_kernels.schedules.Schedule
        Sparsity against optimizer steps.
    targets : str, module type or list of them, optional
        What to prune: exact names of parameters or modules, globs, ``"re:"`` regular expressions, or module types; see
        ``gmp_kernels.targets``. A module means everything in it. Default: every weight of two or more dimensions that
        multiplies activations: of Linear, Conv, attention, recurrent and expert modules, but no norms, biases,
        embeddings, routers of experts, low-rank adapters or output heads of language models; ``coverage()`` says what
        that comes to. A tied parameter is one parameter: it is pruned if one of its names is in ``targets``, and left
        alone if one of them is ignored or, by default, an embedding.
    ignore : as targets, optional
        What not to prune.
    overrides : dict, optional
        {entry as in targets: final sparsity or Schedule} for layers that differ. A number keeps the schedule's steps
        and changes where it ends, 0.0 meaning never pruned. The first entry that reaches a layer decides. Layer scope
        only.
    scope : {"layer", "global"}
        Whether each layer is ranked for itself, or all together.
    distribution : {"uniform", "erk"}
        In layer scope: every layer at the schedule's sparsity, or small layers kept denser after Erdos-Renyi-Kernel,
        the schedule's sparsity holding for all layers together (those in ``overrides`` aside).
    nonfinite : {"error", "keep"}
        What NaN or Inf in unpruned weights does at an update; as in ``prune_``.
    backend : str, optional
        As in ``prune_``.

    Attributes
    ----------
    masks : dict of str to BitMask
        1 bit per weight, 1 = kept; all ones before the first update. Of a sharded parameter: for the shard held here.
        To be read: under compact state, an optimizer refuses to step once somebody else has written them.
    history : list of StepReport
        One per update; its figures are those of whole layers.
    step_count : int
        Calls of ``step()`` so far.

    Raises
    ------
    TargetError
        An entry matches nothing that can be pruned, nothing is left to prune, or a parameter named exactly is not among
        the optimizer's or is one from which a weight is computed in a way that does not keep zeros.
    SparsityError
        An override outside [0, 1].
    DTypeError, ShapeError, LayoutError, BackendUnavailableError
        A target that ``prune_`` does not take.

    Warns
    -----
    UserWarning
        The default leaves out more than half of the weights in matrices, most weights are frozen, or the schedule ends
        with a layer that has no weight left. At an update: a row under weight_norm has none, which makes it NaN.

    References
    ----------
    .. [1] M. Zhu and S. Gupta, "To prune, or not to prune", 2017, arXiv:1710.01878.
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
        nonfinite: NonFinite = "error",
        backend: str | None = None,
    ) -> None:
        for value, kind in ((model, nn.Module), (optimizer, torch.optim.Optimizer), (schedule, Schedule)):
            if not isinstance(value, kind):
                raise TypeError(f"GMPScheduler: expected a {kind.__module__}.{kind.__name__}, got {value!r}")
        if distribution not in DISTRIBUTIONS:
            raise ValueError(
                f"GMPScheduler: expected distribution to be one of {tuple(DISTRIBUTIONS)}, got {distribution!r}"
            )
        if scope == "global" and distribution != "uniform":
            raise ValueError(
                f"GMPScheduler: expected distribution='uniform' with scope='global', got {distribution!r}; ranking all "
                "layers together decides what each gives up"
            )
        if scope == "global" and overrides:
            raise TargetError(
                f"GMPScheduler: expected no overrides with scope='global', got {overrides!r}; use scope='layer', or "
                "ignore= for layers to leave alone"
            )
        self.model = model
        self.optimizer = optimizer
        self.schedule = schedule
        self._masked_optimizer = optimizer if isinstance(optimizer, MaskedOptimizer) else None
        self._scope: Scope = scope
        self._distribution = distribution
        self._nonfinite: NonFinite = nonfinite
        self._backend = backend
        index = ParameterIndex(model, optimizer)
        self._parameters, self._coverage = index.select(targets, ignore)
        if gap := gap_in(self._coverage, by_default=targets is None):
            warnings.warn(gap, stacklevel=2)
        self._overrides = self._override_groups(index, overrides or {})
        overridden = {name for group in self._overrides for name in group.names}
        rest = [name for name in self._parameters if name not in overridden]
        groups = [_Group(schedule, rest, DISTRIBUTIONS[distribution]), *self._overrides]
        self._groups = [group for group in groups if group.names]
        self._shapes = {name: p.shape for name, p in self._parameters.items()}
        self._warn_of_emptied_layers()
        self.masks = {name: BitMask.ones(local(p).shape, p.device) for name, p in self._parameters.items()}
        self.history: list[StepReport] = []
        self.step_count = 0
        self._thresholds: dict[str, Threshold] = {}
        self._shards = Shards.of(model, self._parameters)
        self._is_agreed = False
        self._device = next(iter(self._parameters.values())).device
        # Pruning nothing finds every tensor prune_ would refuse now rather than epochs later.
        for names in self._batches(self._parameters):
            self._prune_nothing(names)
        if self._masked_optimizer is None:
            # What it does depends on the masks: compiled into the step, it would be compiled again at every update.
            optimizer.register_step_post_hook(torch.compiler.disable(self._after_optimizer_step))  # type: ignore[no-untyped-call]
        elif not self._masked_optimizer.compact_state:
            # Before the first update already, for graphs captured until then. Masks that are there stay until then.
            new = {p: self.masks[name] for name, p in self._parameters.items()}
            self._masked_optimizer.share_masks(
                {p: mask for p, mask in new.items() if not self._masked_optimizer.has_mask(p)}, ranked_is_pruned=True
            )

    def step(self) -> StepReport | None:
        """Count one optimizer step and, at the schedule's update steps, prune; call it after ``optimizer.step()``.

        Returns
        -------
        StepReport or None
            None where the schedule has no update. Reports are also kept in ``history``.

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
        CaptureError
            A CUDA graph is being captured, whose replays would not call this.
        DistributedError
            A rank does not answer, within the time-out of the process group.

        Notes
        -----
        When it raises nothing has changed and the step is not counted: repair the weights and call it again. (Copies
        whose weights had drifted apart are the exception: their masks are compared after they were made.)
        """
        refuse_capture(self._device, "GMPScheduler.step()", "it outside of the graph, after optimizer.step()")
        if self._shards is not None and not self._is_agreed:
            thresholds = {f"threshold of '{name}'": threshold for name, threshold in self._thresholds.items()}
            self._shards.agree({**self._settings(), "step": self.step_count, **thresholds})
            self._is_agreed = True
        num_prune = self._due()
        report = self._update(num_prune) if num_prune else None
        self.step_count += 1
        if report is not None and (warning := follow_update_(self.model, self._parameters)):
            # Last, since a filter may turn it into an error.
            warnings.warn(warning, stacklevel=2)
        return report

    def coverage(self) -> Coverage:
        """Return what of the model is pruned, what is left out, and why, as it was when the scheduler was built."""
        return self._coverage

    def __repr__(self) -> str:
        """Return the schedule and the table of the coverage."""
        return f"{type(self).__name__}({self.schedule!r}, scope={self._scope!r})\n{self._coverage}"

    @property
    def sparsity(self) -> float:
        """Fraction of pruned weights over all targets."""
        return 1.0 - sum(self._num_kept().values()) / self._num_weights(self._parameters)

    def layer_sparsities(self) -> dict[str, float]:
        """Return {name: fraction of pruned weights} of all targets."""
        return {name: 1.0 - kept / self._num_weights([name]) for name, kept in self._num_kept().items()}

    def state_dict(self) -> dict[str, Any]:
        """Return everything a bit-exact resume needs beside the model's and the optimizer's own state.

        Copies of the packed masks as uint8 tensors, the rest plain data, which ``torch.load(..., weights_only=True)``
        reads. Masks of sharded parameters are bool tensors sharded alike (1 byte per weight):
        ``torch.distributed.checkpoint`` saves the scheduler and loads it on any number of ranks.
        """
        # Tuples are what torch.distributed.checkpoint stores as they are, whatever they hold.
        return {
            "version": STATE_VERSION,
            "settings": tuple(self._settings().items()),
            "step_count": self.step_count,
            "history": tuple(report.to_dict() for report in self.history),
            "layers": {
                name: {
                    "shape": tuple(self._shapes[name]),
                    "mask": whole_mask(mask, self._parameters[name]),
                    "threshold": list(self._thresholds[name]) if name in self._thresholds else None,
                }
                for name, mask in self.masks.items()
            },
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where ``state_dict()`` was taken; the masks are applied to weights and optimizer state at once.

        The order in which model, optimizer and pruner are loaded does not matter.

        Raises
        ------
        StateError
            It comes from another version, other layers, or other settings. Nothing has been changed.
        """
        if not isinstance(state_dict, Mapping) or state_dict.get("version") != STATE_VERSION:
            found = state_dict.get("version") if isinstance(state_dict, Mapping) else type(state_dict).__name__
            raise StateError(
                f"load_state_dict: expected what GMPScheduler.state_dict() returned, of version {STATE_VERSION}, got "
                f"{found!r}; load the pruner's own part of the checkpoint"
            )
        try:
            layers = state_dict["layers"]
            shapes = {name: torch.Size(layer["shape"]) for name, layer in layers.items()}
            settings = dict(state_dict["settings"])
            self._check_same_run(settings, shapes)
            masks = {name: local_mask(layers[name]["mask"], p) for name, p in self._parameters.items()}
            thresholds = {n: Threshold(*layer["threshold"]) for n, layer in layers.items() if layer["threshold"]}
            history = [StepReport.from_dict(report) for report in state_dict["history"]]
            step_count = int(state_dict["step_count"])
        except StateError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise StateError(
                f"load_state_dict: expected what state_dict() returned, got damaged data ({error!r}); load another file"
            ) from error
        if self._masked_optimizer is not None:
            self._masked_optimizer.check_masks({p: self.masks[name] for name, p in self._parameters.items()})
        for name, mask in masks.items():
            written = self._written_masks([name])[0]
            written.packed.copy_(mask.packed)
            self.masks[name].packed = written.packed
        self._thresholds, self.step_count, self._is_agreed = thresholds, step_count, False
        self.history[:] = history
        self._apply_masks(self._parameters, with_weights=True)
        if warning := follow_update_(self.model, self._parameters):
            warnings.warn(warning, stacklevel=2)

    def _warn_of_emptied_layers(self) -> None:
        """Warn if the schedules, where they end, leave a layer without a weight."""
        emptied: list[str] = []
        for group in self._groups:
            sizes = [self._num_weights([name]) for name in group.names]
            sparsity = group.schedule.final_sparsity
            if self._scope == "layer":
                counts = group.distribute(sparsity, [self._shapes[name] for name in group.names])
            else:
                # Any layer may lose more than its share; only when all lose everything is it known before.
                counts = sizes if round(sparsity * sum(sizes)) == sum(sizes) else [0] * len(sizes)
            emptied += emptied_layers(group.names, sizes, counts)
        if emptied:
            is_alone = self._scope == "layer"
            advice = "give them a lower sparsity in overrides=, or add them to ignore=" if is_alone else "end lower"
            warnings.warn(
                f"GMPScheduler: expected weights left in every layer, got a schedule that prunes all of "
                f"{shown_names(emptied)}; {advice}",
                stacklevel=3,
            )

    def _override_groups(self, index: ParameterIndex, overrides: Mapping[Entry, float | Schedule]) -> list[_Group]:
        left = set(self._parameters)
        groups = []
        for entry, value in overrides.items():
            reached = [name for name in index.find("overrides", entry) if name in self._parameters]
            if not reached:
                raise TargetError(
                    f"overrides: expected entries that reach a target, got {entry!r}, which reaches only parameters "
                    "that are not pruned; add them to targets="
                )
            schedule = value if isinstance(value, Schedule) else self.schedule.with_final_sparsity(value)
            groups.append(_Group(schedule, [name for name in reached if name in left], uniform))
            left.difference_update(reached)
        return groups

    def _batches(self, names: Iterable[str]) -> list[list[str]]:
        """Split ``names`` by device for layer scope; ``prune_`` itself refuses global scope over several."""
        batches: dict[torch.device | None, list[str]] = {}
        for name in names:
            device = self._parameters[name].device if self._scope == "layer" else None
            batches.setdefault(device, []).append(name)
        return list(batches.values())

    def _due(self) -> dict[str, int]:
        """Return how many weights of which layers are to be pruned after the step that ``step_count`` numbers."""
        step = self.step_count
        num_prune: dict[str, int] = {}
        for group in self._groups:
            if group.schedule.is_update_step(step):
                shapes = [self._shapes[name] for name in group.names]
                counts = group.distribute(group.schedule.sparsity_at(step), shapes)
                num_prune.update(zip(group.names, counts, strict=True))
        return {name: num_prune[name] for name in self._parameters if name in num_prune} if num_prune else {}

    def _counts(self, num_prune: Mapping[str, int], names: Sequence[str]) -> list[int]:
        """Return what ``prune_`` is told for these layers, which are due now."""
        if self._scope == "layer":
            return [num_prune[name] for name in names]
        return [round(self.schedule.sparsity_at(self.step_count) * self._num_weights(names))]

    def _num_weights(self, names: Iterable[str]) -> int:
        return sum(math.prod(self._shapes[name]) for name in names)

    def _num_kept(self) -> dict[str, int]:
        """By layer: counted from the masks, where they are all here, or else what the last update of each counted."""
        if self._shards is None:
            return {name: mask.num_kept for name, mask in self.masks.items()}
        pruned = {layer.name: layer.num_pruned for report in self.history for layer in report.layers}
        return {name: self._num_weights([name]) - pruned.get(name, 0) for name in self._parameters}

    def _prune(self, names: Sequence[str], num_prune: list[int]) -> PruneResult:
        request: dict[str, Any] = {
            "names": names,
            "scope": self._scope,
            "nonfinite": self._nonfinite,
            "previous": [self._thresholds.get(name) for name in names],
            "backend": self._backend,
        }
        weights, masks = [self._ranked(name) for name in names], self._written_masks(names)
        if self._shards is not None:
            result = self._shards.prune_(weights, masks, num_prune, step=self.step_count, **request)
        else:
            result = prune_(weights, num_prune=num_prune, masks=masks, **request)
        for name, mask in zip(names, masks, strict=True):
            self.masks[name].packed = mask.packed
        return result

    def _written_masks(self, names: Iterable[str]) -> list[BitMask]:
        """The masks as an update may write them: compact state needs the old bits until it has been repacked."""
        masks = [self.masks[name] for name in names]
        if self._masked_optimizer is not None and self._masked_optimizer.compact_state:
            return [mask.clone() for mask in masks]
        return masks

    def _prune_nothing(self, names: Sequence[str]) -> None:
        names = [name for name in names if self.masks[name].numel or self._shards is None]
        prune_(
            [self._ranked(name) for name in names],
            num_prune=0,
            masks=self._written_masks(names),
            scope=self._scope,
            # One rank must not fail where the others go on: together they look at the first update.
            nonfinite=self._nonfinite if self._shards is None else "keep",
            names=names,
            backend=self._backend,
        )

    def _ranked(self, name: str) -> torch.Tensor:
        """The tensor whose magnitudes decide: the master copy where the optimizer keeps one."""
        parameter = self._parameters[name]
        master = None if self._masked_optimizer is None else self._masked_optimizer.master_weight(parameter)
        return local(parameter) if master is None else master

    def _update(self, num_prune: Mapping[str, int]) -> StepReport:
        start = time.perf_counter()
        check_present(self.model, self._parameters, self._shapes)
        names = list(num_prune)
        if self._masked_optimizer is not None:
            self._masked_optimizer.check_masks({self._parameters[name]: self.masks[name] for name in names})
        batches = self._batches(names)
        if len(batches) > 1:
            # One call per device: let each find its NaN before the first one writes.
            for batch in batches:
                self._prune_nothing(batch)
        layers: dict[str, LayerReport] = {}
        for batch in batches:
            result = self._prune(batch, self._counts(num_prune, batch))
            self._thresholds.update(zip(batch, result.thresholds, strict=True))
            layers.update(
                (name, LayerReport(name, cut.value, self._num_weights([name]), num_pruned, num_new, cut.num_ties))
                for name, _, cut, num_pruned, num_new in zip(batch, *result, strict=True)
            )
        self._apply_masks(names, with_weights=False)
        report = StepReport(
            step=self.step_count,
            target_sparsity=self.schedule.sparsity_at(self.step_count),
            sparsity=sum(layer.num_pruned for layer in layers.values()) / self._num_weights(names),
            seconds=time.perf_counter() - start,
            layers=tuple(layers[name] for name in names),
        )
        self.history.append(report)
        return report

    def _after_optimizer_step(self, *_: object) -> None:
        name = type(self.optimizer).__name__
        refuse_capture(
            self._device, f"a step of {name}, after which masks are applied from Python", "gmp_kernels.optim"
        )
        self._apply_masks(self._parameters, with_weights=True)

    def _apply_masks(self, names: Iterable[str], *, with_weights: bool) -> None:
        """Zero what is pruned in the optimizer's state, and in the weights where asked."""
        if self._masked_optimizer is None:
            # Nothing pruned yet, or never: nothing to hold at zero.
            names = [name for name in names if name in self._thresholds and self._thresholds[name].num_pruned]
        masks: dict[torch.Tensor, BitMask] = {self._parameters[name]: self.masks[name] for name in names}
        if self._masked_optimizer is not None:
            self._masked_optimizer.share_masks(masks, ranked_is_pruned=not with_weights)
        else:
            enforce_masks_(self.optimizer, masks, with_weights=with_weights, backend=self._backend)

    def _settings(self) -> dict[str, Any]:
        return {
            "schedule": self.schedule.to_dict(),
            "overrides": {name: group.schedule.to_dict() for group in self._overrides for name in group.names},
            "scope": self._scope,
            "distribution": self._distribution,
        }

    def _check_same_run(self, settings: Mapping[str, Any], shapes: Mapping[str, torch.Size]) -> None:
        expected, found = ({f"{name} {tuple(s)}" for name, s in ss.items()} for ss in (self._shapes, shapes))
        if expected != found:
            raise StateError(
                f"load_state_dict: expected the layers of this scheduler, got missing: {sorted(expected - found)}, "
                f"unexpected: {sorted(found - expected)}; load it into the same model with the same targets"
            )
        for setting, value in self._settings().items():
            if settings.get(setting) != value:
                raise StateError(
                    f"load_state_dict: expected {setting} {value!r}, got {settings.get(setting)!r}; build the "
                    "scheduler with the same arguments"
                )
