"""Averages of the weights that are as sparse as the weights themselves."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn

from gmp_kernels.distributed.placement import local
from gmp_kernels.errors import TargetError
from gmp_kernels.model.names import named_parameters
from gmp_kernels.ops import apply_masks_
from gmp_kernels.run import Run
from gmp_kernels.scheduler import GMPScheduler

__all__ = ["keep_masked"]

UPDATES = ("update_parameters", "update")  # what AveragedModel and ModelEmaV3 call it

_Average = TypeVar("_Average", bound=nn.Module)


def keep_masked(average: _Average, run: Run | GMPScheduler) -> _Average:
    """Keep an averaged model exactly zero wherever the model is pruned.

    An average still holds values of weights that have been pruned since. From now on, each of its updates ends with the
    masks of that moment applied to it. Pruners of other parameters may be added by further calls. A pickled average is
    loaded without them.

    Parameters
    ----------
    average : torch.optim.swa_utils.AveragedModel, timm.utils.ModelEmaV3 or alike
        A module that holds a copy of the model as ``module`` and is updated by ``update_parameters()`` or ``update()``.
        The copy may be of another dtype or on another device.
    run : Run or GMPScheduler
        Prunes the model itself. Update the average after its ``step()``.

    Returns
    -------
    torch.nn.Module
        ``average``.

    Raises
    ------
    TypeError
        ``average`` is not such a module, or ``run`` no pruner.
    TargetError
        It is the average of another model.

    Notes
    -----
    Writes the pruned weights of the average once per update. With an average of your own, call
    ``gmp_kernels.optim.ema_update_``, which does all in one pass.
    """
    copy = getattr(average, "module", None)
    name = next((name for name in UPDATES if callable(getattr(type(average), name, None))), None)
    if not isinstance(copy, nn.Module) or name is None:
        raise TypeError(
            f"keep_masked: expected an AveragedModel, a ModelEmaV3, or another module that holds the average as "
            f"'module' and has a method {' or '.join(UPDATES)}, got a {type(average).__name__}"
        )
    if not isinstance(run, (Run, GMPScheduler)):
        raise TypeError(f"keep_masked: expected a Run or GMPScheduler, got a {type(run).__name__}; pass average, run")
    pruners = run.pruners if isinstance(run, Run) else (run,)
    shapes = {target: local(p).shape for target, p in named_parameters(copy).items()}
    missing = [
        f"'{target}' of shape {tuple(mask.shape)}"
        for pruner in pruners
        for target, mask in pruner.masks.items()
        if shapes.get(target) != mask.shape
    ]
    if missing:
        raise TargetError(
            f"keep_masked: expected an average of the pruned model, got one without {missing[0]}; pass its own run"
        )
    earlier = getattr(vars(average).get(name), "pruners", ())
    pruners = (*(one for one in earlier if one not in pruners and not one._held.is_released), *pruners)
    _apply_masks(average, pruners)
    # Bound to the average, so that a copy of the average has a method of its own.
    setattr(average, name, MethodType(_masked(getattr(type(average), name), pruners), average))
    return average


def _masked(update: Callable[..., Any], pruners: tuple[GMPScheduler, ...]) -> Callable[..., Any]:
    @wraps(update)
    def masked_update(average: nn.Module, *arguments: Any, **options: Any) -> Any:
        result = update(average, *arguments, **options)
        _apply_masks(average, pruners)
        return result

    masked_update.__dict__["pruners"] = pruners
    return masked_update


@torch.no_grad()
def _apply_masks(average: nn.Module, pruners: tuple[GMPScheduler, ...]) -> None:
    copies = named_parameters(average.module)  # type: ignore[arg-type]  # checked above
    for pruner in pruners:
        weights = [local(copies[name]) for name in pruner.masks]
        masks = [mask.to(weight.device) for mask, weight in zip(pruner.masks.values(), weights, strict=True)]
        apply_masks_(weights, masks)
