# The launches of csrc/cuda. Addresses are those of device memory that the caller keeps alive; rows are those of
# csrc/cuda/tables.h, eight bytes to a field; a dtype is its position in csrc/order/dtypes.h. Only `fetch` waits for the
# device.
from typing import Any

import numpy as np
from typing_extensions import Buffer

CHUNK: int  # weights per chunk
LIST_CAPACITY: int  # candidates kept per chunk, at most
BINS: int  # counts per refinement of a bracket
READERS: int  # blocks per multiprocessor that read weights, at most
MAX_ARGUMENT_CONSTANTS: int  # rows of constants that `update` takes as an argument of the launch
TOUCHED_BY: int  # weights whose flags are one word
MOST_STORED: int  # eight-byte numbers that `store` is faster for than a copy from pinned memory
CONSTANTS: dict[str, float]  # of an optimizer step, in the order of the kernels, with the values of absent ones
TABLES: np.dtype[Any]
LAYER_ROW: np.dtype[Any]
GROUP_ROW: np.dtype[Any]
COUNT_ROW: np.dtype[Any]
PATTERN_ROW: np.dtype[Any]
TENSOR_ROW: np.dtype[Any]

class Launch:
    @property
    def stream(self) -> int: ...

def launch_on(stream: int, device: int, multiprocessors: int) -> Launch: ...
def load_kernels(device: int) -> int: ...  # returns its multiprocessors

# Tables are on the host, one or more of TABLES; what they name is not.
def select(launch: Launch, tables: Buffer) -> None: ...
def apply(launch: Launch, tables: Buffer) -> None: ...
def count(launch: Launch, dtype: int, rows: int, num_rows: int, num_chunks: int) -> None: ...

# Which kernels a pattern needs, a number for it; how many of its weights make a chunk of `rank`; whether `settle` can
# do without `rank`.
def plan_of(pattern: tuple[int, int, int, int], filter: tuple[int, int]) -> tuple[int, int, bool]: ...

# Parts of the rows are that number, a dtype, first row, number of rows, number of chunks.
def rank(launch: Launch, rows: int, parts: list[tuple[int, int, int, int, int]]) -> None: ...
def settle(launch: Launch, rows: int, parts: list[tuple[int, int, int, int, int]]) -> None: ...

# Parts of the rows are dtype, dtype of the state, first row, number of rows, number of chunks. The constants are at an
# address, or, where it is 0, rows of float64 in `values`.
def update(
    launch: Launch, rule: str, rows: int, parts: list[tuple[int, int, int, int, int]], constants: int, values: Buffer
) -> None: ...

# So many rows of sources, and as many of targets behind them.
def move_state(launch: Launch, rows: int, num_rows: int, num_chunks: int) -> None: ...
def count_kept(launch: Launch, rows: int, num_rows: int, num_chunks: int, counts: int) -> None: ...
def sum_squares(launch: Launch, rows: int, num_rows: int, num_chunks: int, sums: int) -> None: ...

# Copy eight-byte numbers to an address, and as many bytes as `into` has from one.
def store(launch: Launch, to: int, values: Buffer) -> None: ...
def fetch(launch: Launch, source: int, into: Buffer) -> None: ...
