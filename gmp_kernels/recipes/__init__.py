"""SparseML recipes: read, planned and attached to a model and an optimizer."""

from gmp_kernels.recipes.recipe import Recipe, Trace, load

__all__ = ["Recipe", "Trace", "load"]
