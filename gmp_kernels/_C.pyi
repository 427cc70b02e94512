from collections.abc import Mapping, Sequence
from typing import TypeAlias

# (address of the weights, number of weights, address of the packed mask or 0); the caller keeps the memory alive.
_Layer: TypeAlias = tuple[int, int, int]
_Threshold: TypeAlias = tuple[float, int, int, int]
# from, its mask and ranks (0: dense), to, its mask and ranks, n, bytes per value
_Move: TypeAlias = tuple[int, int, int, int, int, int, int, int]

class Rows:
    def __init__(self, dtype: str, layers: list[_Layer]) -> None: ...

# value, num_below, num_ties and num_ties_kept per selection; cut and nonfinite per layer
def select(
    rows: Rows, num_prune: Sequence[int], hints: Sequence[_Threshold | None], num_threads: int
) -> tuple[list[float], list[int], list[int], list[int], list[int], list[int]]: ...
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

# kept before and kept, per layer
def prune(
    rows: Rows, values: Sequence[float], cuts: Sequence[int], out: Sequence[int], num_threads: int
) -> tuple[list[int], list[int]]: ...
def apply_masks(rows: Rows, num_threads: int) -> None: ...

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
