from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch

# Address of a tensor and the number of its elements, zeros for none; the caller keeps the memory alive.
_Array: TypeAlias = tuple[int, int]
# the weights, and their packed mask
_Layer: TypeAlias = tuple[_Array, _Array]
_Threshold: TypeAlias = tuple[float, int, int, int]
# values, and of compact ones mask and ranks
_State: TypeAlias = tuple[_Array, _Array, _Array]
# from, to, number of weights, bytes per value
_Move: TypeAlias = tuple[_State, _State, int, int]

class Rows: ...
class UpdateRow: ...
class UpdateBatch: ...

def rows(dtype: str, layers: list[_Layer]) -> Rows: ...

# value, num_below, num_ties and num_ties_kept per selection; cut and nonfinite per layer
def select(
    rows: Rows, num_prune: Sequence[int], hints: Sequence[_Threshold | None], num_threads: int
) -> tuple[list[float], list[int], list[int], list[int], list[int], list[int]]: ...
def sample(dtype: str, layers: list[_Layer], num_prune: list[int], num_threads: int) -> list[tuple[int, int]]: ...
def count(
    dtype: str,
    layers: list[_Layer],
    brackets: list[tuple[int, int]],
    rooms: list[_Array],
    bins: _Array,
    num_bins: int,
    num_threads: int,
) -> list[tuple[int, int, int, int]]: ...

# Parts with value, cut and place for the bits of every layer; kept before and kept, of one part after the other.
def prune(
    parts: list[tuple[Rows, Sequence[float], Sequence[int], Sequence[_Array]]], num_threads: int
) -> tuple[list[int], list[int]]: ...
def apply_masks(parts: list[Rows], num_threads: int) -> None: ...
def update_row(
    dtype: str, weights: _Array, master: _Array, state: list[_Array], mask: _Array, ranks: _Array, num_kept: int
) -> UpdateRow: ...
def update_batch(rows: list[UpdateRow]) -> UpdateBatch: ...
def update(
    rule: str,
    batch: UpdateBatch,
    gradients: Sequence[int],
    sizes: Sequence[int],
    rows: Sequence[int],
    constants: Sequence[Mapping[str, float]],
    num_threads: int,
) -> None: ...
def sum_squares(gradients: list[tuple[str, _Array, _Array]], num_threads: int) -> float: ...
def ranks(mask: _Array, n: int) -> list[int]: ...
def repack(moves: list[_Move], num_threads: int) -> None: ...
def isa() -> str: ...
def describe(exchange: object, tensors: list[torch.Tensor]) -> bytes | None: ...
