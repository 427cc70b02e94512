from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch

# Address of a tensor and the number of its elements, zeros for none; the caller keeps the memory alive.
_Array: TypeAlias = tuple[int, int]
# dtype, the weights, their packed mask, and channels and positions of their filters
_Layer: TypeAlias = tuple[str, _Array, _Array, tuple[int, int]]
# values, and of compact ones mask and chunk offsets
_State: TypeAlias = tuple[_Array, _Array, _Array]
# source, target, number of weights, bytes per value
_Move: TypeAlias = tuple[_State, _State, int, int]

class Layers: ...
class UpdateTensor: ...
class UpdateBatch: ...

def layers(layers: list[_Layer]) -> Layers: ...

# per layer: key, num_below, num_ties, num_ties_kept, tie index, nonfinite
def select(
    layers: Layers,
    num_prune: Sequence[int],
    group_sizes: Sequence[int],
    brackets: Sequence[tuple[int, int]],
    num_threads: int,
) -> tuple[list[int], list[int], list[int], list[int], list[int], list[int]]: ...
def count(
    layers: Layers,
    brackets: Sequence[tuple[int, int]],
    candidates: Sequence[_Array],
    bins: _Array,
    num_bins: int,
    num_threads: int,
) -> list[tuple[int, int, int, int]]: ...

# a row of flat indices per layer, and one of counts
def count_slots(
    layers: Layers, keys: Sequence[int], places: _Array, counts: _Array, num_slots: int, num_threads: int
) -> None: ...

# key, tie index and place for the bits of every layer; per layer: kept before, and kept
def prune(
    layers: Layers, keys: Sequence[int], tie_indices: Sequence[int], out: Sequence[_Array], num_threads: int
) -> tuple[list[int], list[int]]: ...
def apply_masks(layers: Layers, num_threads: int) -> None: ...
def update_tensor(
    dtype: str, weights: _Array, master: _Array, state: list[_Array], mask: _Array, chunk_offsets: _Array, num_kept: int
) -> UpdateTensor: ...
def update_batch(tensors: list[UpdateTensor]) -> UpdateBatch: ...
def update(
    rule: str,
    batch: UpdateBatch,
    gradients: Sequence[int],
    sizes: Sequence[int],
    rows: Sequence[int],
    constants: Sequence[Mapping[str, float]],
    num_threads: int,
) -> None: ...
def sum_squares(gradients: Layers, num_threads: int) -> float: ...
def chunk_offsets(mask: _Array, n: int) -> list[int]: ...
def move_state(moves: list[_Move], num_threads: int) -> None: ...
def isa() -> str: ...
def describe(exchange: object, tensors: list[torch.Tensor], with_addresses: bool) -> bytes | None: ...
