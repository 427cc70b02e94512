from typing import TypeAlias

# (address of the weights, number of weights, address of the packed mask or 0); the caller keeps the memory alive.
_Layer: TypeAlias = tuple[int, int, int]
_Threshold: TypeAlias = tuple[float, int, int, int]

def select(
    dtype: str, layers: list[_Layer], num_prune: list[int], hints: list[_Threshold | None], num_threads: int
) -> list[tuple[_Threshold, list[int], list[int]]]: ...
def apply(
    dtype: str, layers: list[_Layer], cuts: list[tuple[float, int]], kept: list[int], num_threads: int
) -> list[tuple[int, int]]: ...
def isa() -> str: ...
