"""Exact cutoffs from counts, for layers that no single call sees whole: shards on ranks, pieces of a file."""
