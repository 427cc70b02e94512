from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch

# Address of a tensor and the number of its elements, zeros for none; the caller keeps the memory alive.
_Array: TypeAlias = tuple[int, int]
# dtype of what ranks the weights, that itself, dtype that is ranked, and kind and numbers of the pattern
_Ranking: TypeAlias = tuple[str, _Array, str, tuple[int, int, int, int]]
# dtype, the weights, their packed mask, channels and positions of their filters, and a ranking of their own, if any
_Layer: TypeAlias = tuple[str, _Array, _Array, tuple[int, int], _Ranking | None]
# values, and of compact ones mask and chunk offsets
_State: TypeAlias = tuple[_Array, _Array, _Array]
# source, target, number of weights, bytes per value
_Move: TypeAlias = tuple[_State, _State, int, str]

class Layers: ...
class UpdateTensor: ...
class UpdateBatch: ...
class Gradients: ...

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
    chunk_bins: _Array,
    num_bins: int,
    num_threads: int,
) -> list[tuple[int, int, int, int]]: ...

DRAW_SLACK_BYTES: int  # that a row of keys has to have after the weights wanted

# first layer, number of layers, weights wanted of each group; a row of keys for each; returns how many weights of each
# sample are unpruned and pruned
def draw(
    layers: Layers, groups: Sequence[tuple[int, int, int]], keys: _Array, row_size: int, num_threads: int
) -> list[tuple[int, int]]: ...

# ties: position of a layer, key, four flat indices of it, first slot, shift, position of a region; a region has length,
# offset and size per dimension; counts: num_slots + 2 for each row of ties; indices: none, or a row for each
def count_slots(
    layers: Layers,
    ties: Sequence[tuple[int, int, Sequence[int], int, int, int]],
    regions: Sequence[Sequence[tuple[int, int, int]]],
    counts: _Array,
    num_slots: int,
    indices: _Array,
    capacity: int,
    num_threads: int,
) -> None: ...

# key, tie index and place for the bits of every layer; per layer: kept before, and kept
def prune(
    layers: Layers, keys: Sequence[int], tie_indices: Sequence[int], out: Sequence[_Array], num_threads: int
) -> tuple[list[int], list[int]]: ...
def apply_masks(layers: Layers, num_threads: int) -> None: ...
def update_tensor(
    dtype: str,
    weights: _Array,
    master: _Array,
    state: list[_Array],
    state_dtype: str,
    mask: _Array,
    chunk_offsets: _Array,
    num_kept: int,
) -> UpdateTensor: ...
def update_batch(tensors: list[UpdateTensor]) -> UpdateBatch: ...
def gradients(arrays: list[_Array]) -> Gradients: ...
def gradients_at(exchange: object, tensors: list[torch.Tensor]) -> Gradients | None: ...
def gradients_if_unchanged(
    exchange: object, expected: tuple[object, ...], groups: list[dict[str, Any]], state: dict[Any, Any]
) -> list[torch.Tensor] | None: ...
def has_settings(groups: list[dict[str, Any]], settings: list[dict[str, Any]]) -> bool: ...
def update(
    rule: str,
    batch: UpdateBatch,
    gradients: Gradients,
    rows: Sequence[int],
    constants: Sequence[Mapping[str, float]],
    num_threads: int,
) -> None: ...
def sum_squares(gradients: Layers, num_threads: int) -> float: ...

CHUNK: int  # weights

# masks and their numbers of weights, and the place for the offsets; returns how many weights each keeps
def chunk_offsets(masks: list[tuple[_Array, int]], out: _Array) -> list[int]: ...
def move_state(moves: list[_Move], num_threads: int) -> None: ...
def isa() -> str: ...
def describe(
    exchange: object, tensors: list[torch.Tensor], with_addresses: bool, with_storages: bool
) -> bytes | None: ...
def sees_life(
    exchange: object,
    weight: torch.Tensor,
    packed: torch.Tensor,
    shape: Sequence[int],
    is_row_major: bool,
    turn: int,
) -> bool | None: ...
