"""Backends: their common interface (``types``), the choice of one (``registry``), and the backends themselves."""

from gmp_kernels.backends.registry import Backend, available, choose, register

__all__ = ["Backend", "available", "choose", "register"]
