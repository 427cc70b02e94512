"""Names of modules and parameters, without the parts that wrappers add."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

__all__ = ["named_modules", "named_parameters", "plain_name"]

# Attributes in which torch.compile, activation checkpointing, Lightning's Fabric and FullyShardedDataParallel hold a
# module. No other code uses these names.
WRAPPED = {"_orig_mod", "_checkpoint_wrapped_module", "_forward_module", "_fsdp_wrapped_module"}
PARALLEL = (DataParallel, DistributedDataParallel)


def plain_name(name: str) -> str:
    """Drop the levels that wrappers add to a name, so that names and checkpoints stay the same.

    The level of a data parallel wrapper stays, as a module may be called "module" too; ``named_modules`` drops it.
    """
    if not any(part in name for part in WRAPPED):  # as nearly always
        return name
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return every module under every name it has, as if nothing were wrapped."""
    modules = {}
    inside: set[str] = set()  # names of what data parallel wrappers hold, as the model has them
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PARALLEL):
            inside.add(f"{name}.module" if name else "module")
        if inside:
            parts = name.split(".")
            prefixes = (".".join(parts[: i + 1]) for i in range(len(parts)))
            name = ".".join(part for part, prefix in zip(parts, prefixes, strict=True) if prefix not in inside)
        modules[plain_name(name)] = module  # a wrapper comes before what it wraps, which replaces it
    return modules


def named_parameters(model: nn.Module, *, buffers: bool = False) -> dict[str, nn.Parameter]:
    """Return every parameter, and buffer if asked for, under every name it has, as if nothing were wrapped."""
    return {
        f"{path}.{key}" if path else key: member
        for path, module in named_modules(model).items()
        for kind in (["_parameters", "_buffers"] if buffers else ["_parameters"])
        for key, member in getattr(module, kind).items()
        if member is not None
    }
