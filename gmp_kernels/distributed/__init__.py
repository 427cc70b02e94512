"""Pruning of a model whose parameters are sharded or replicated over processes, with the masks of a single process.

Counts add up, so that the exact threshold of a sharded layer takes a few kilobytes on the wire, whatever its size. The
ranks first agree on a bracket that should hold it (one maximum over the ranks). Rounds of counts against the bracket
follow (one sum each) and, if some ties stay and others do not, counts or lists of ties. All layers share each
collective. Every rank comes to the same results from the same sums, and writes only when nothing can go wrong any more.
"""

from gmp_kernels.distributed.shards import Shards, refuse_flattened

__all__ = ["Shards", "refuse_flattened"]
