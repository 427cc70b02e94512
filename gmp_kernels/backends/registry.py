"""The registry of backends, and the choice of the one that runs a call.

Each backend is a file or folder that ends in ``register(...)``. The choice is ``backend=``, then the environment
variable ``GMP_KERNELS_BACKEND``, then the highest priority whose ``probe`` and ``supports`` pass.
"""

from __future__ import annotations

import importlib
import logging
import os
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from gmp_kernels.backends.types import Implementation
from gmp_kernels.errors import BackendUnavailableError

__all__ = ["Backend", "available", "choose", "register", "why_not_built"]

logger = logging.getLogger("gmp_kernels")


@dataclass(frozen=True)
class Backend:
    """One row of the registry.

    Attributes
    ----------
    name : str
    priority : int
        If no backend is named, the usable one of highest priority runs.
    probe : callable
        Returns None if the backend is usable on this machine, else a sentence saying why not and what to do; called
        once.
    supports : callable
        Returns None if it can take tensors of this device, else a sentence.
    load : callable
        Returns the implementation; called once.
    """

    name: str
    priority: int
    probe: Callable[[], str | None]
    supports: Callable[[torch.device], str | None]
    load: Callable[[], Implementation]


_REGISTRY: dict[str, Backend] = {}
SOURCES = Path(__file__).parents[2]  # if the package was not installed, but lies in a copy of the repository


def why_not_built(error: str, advice: str) -> str:
    """Say that an extension is missing, and what to do; Python may have found the sources before what is installed."""
    found = f"its extension was not built ({error}); {advice}"
    if (SOURCES / "setup.py").exists():
        found += (
            f". Python has imported the sources in {SOURCES}: to use an installed package, start it in another folder"
        )
    return found


def register(backend: Backend) -> None:
    """Add a backend to the registry."""
    _REGISTRY[backend.name] = replace(backend, probe=cache(backend.probe), load=cache(backend.load))
    _choose.cache_clear()


@cache
def available() -> tuple[Backend, ...]:
    """Return all backends, highest priority first; the first call imports the files and folders beside this one."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"{__package__}.{module.name}")
    return tuple(sorted(_REGISTRY.values(), key=lambda backend: -backend.priority))


@cache
def _say_once(message: str) -> None:
    logger.warning(message)


def _why_not(backend: Backend, device: torch.device) -> str | None:
    return backend.probe() or backend.supports(device)


def choose(name: str | None, device: torch.device) -> Implementation:
    """Return the implementation that runs tensors of ``device``.

    Raises
    ------
    BackendUnavailableError
        The backend named (by argument or environment) is unknown or cannot run here, or none can.
    """
    return _choose(name or os.environ.get("GMP_KERNELS_BACKEND") or None, device)


@cache
def _choose(name: str | None, device: torch.device) -> Implementation:
    if name is not None:
        available()
        if name not in _REGISTRY:
            raise BackendUnavailableError(f"backend: expected one of {sorted(_REGISTRY)}, got '{name}'")
        if reason := _why_not(_REGISTRY[name], device):
            raise BackendUnavailableError(f"backend '{name}' cannot run: {reason}")
        return _REGISTRY[name].load()
    reasons = []
    for backend in available():
        if reason := _why_not(backend, device):
            reasons.append(f"{backend.name}: {reason}")
            continue
        # A missing backend is worth a warning only if it is for this device: "cuda" for a CPU tensor is not.
        missed = [b for b in available() if b.priority > backend.priority and b.supports(device) is None]
        for other in missed:
            _say_once(f"using backend '{backend.name}': '{other.name}' cannot run ({other.probe()})")
        return backend.load()
    raise BackendUnavailableError(f"no backend can run tensors on {device}: " + "; ".join(reasons))
