from collections.abc import Mapping, Sequence
from typing import TypeAlias

# (address of the weights, number of weights, address of the packed mask or 0); the caller keeps the memory alive.
_Layer: TypeAlias = tuple[int, int, int]
_Threshold: TypeAlias = tuple[float, int, int, int]
_Selection: TypeAlias = tuple[_Threshold, list[int], list[int]]
# from, its mask and ranks (0: dense), to, its mask and ranks, n, bytes per value
_Move: TypeAlias = tuple[int, int, int, int, int, int, int, int]

def select(
    dtype: str, layers: list[_Layer], num_prune: list[int], hints: list[_Threshold | None], num_threads: int
) -> list[_Selection]: ...
def sample(dtype: str, layers: list[_Layer], num_prune: list[int], num_threads: int) -> list[tuple[int, int]]: ...
def count(
    dtype: str,
    layers: list[_Layer],
    brackets: list[tuple[int, int]],
    rooms: list[tuple[int, int]],
    bins: int,
    num_bins: int,
    num_threads: int,
) -> list[tuple[int, int, int, int]]: ...
def apply(
    dtype: str, layers: list[_Layer], cuts: list[tuple[float, int]], kept: list[int], num_threads: int
) -> list[tuple[int, int]]: ...

class UpdateRow:
    # Addresses, 0: not there.
    def __init__(
        self, dtype: str, n: int, weights: int, master: int, state: list[int], mask: int, ranks: int
    ) -> None: ...

class UpdateBatch:
    def __init__(self, rows: list[UpdateRow]) -> None: ...

def update(
    rule: str,
    batch: UpdateBatch,
    gradients: Sequence[int],
    rows: Sequence[int],
    constants: Sequence[Mapping[str, float]],
    num_threads: int,
) -> None: ...
def sum_squares(gradients: list[tuple[str, int, int, int]], num_threads: int) -> float: ...
def ranks(mask: int, n: int) -> list[int]: ...
def repack(moves: list[_Move], num_threads: int) -> None: ...
def isa() -> str: ...
