"""Backends: what one has to offer (``types``), which one runs a call (``registry``), and the backends themselves."""

from gmp_kernels.backends.registry import Backend, available, choose, register

__all__ = ["Backend", "available", "choose", "register"]
