"""Pruning a model whose parameters are sharded or replicated over processes: the masks one process would have made.

Counts add up, so that the exact threshold of a sharded layer takes a few kilobytes on the wire, whatever its size: an
interval that should hold it (one maximum over the ranks), then rounds of counts against the interval (one sum each),
then, where equal magnitudes have to be told apart, counts of those. All layers share each collective. Every rank
draws the same conclusions from the same sums, and writes when there is nothing left that could go wrong.
"""

from gmp_kernels.distributed.shards import Shards, refuse_flattened

__all__ = ["Shards", "refuse_flattened"]
