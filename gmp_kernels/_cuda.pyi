# The launches of csrc/cuda. Addresses are those of device memory that the caller keeps alive; a table is a tensor of
# eight-byte integers, one row of csrc/cuda/tables.h per layer, group or parameter. Only `fetch` waits for the device.
from typing_extensions import Buffer

CHUNK: int  # weights per chunk
LIST_CAPACITY: int  # candidates kept per chunk, at most
BINS: int  # counts per refinement of a bracket
MAX_ARGUMENT_CONSTANTS: int  # rows of constants that `update` takes as an argument of the launch
TOUCHED_BY: int  # weights whose flags are one word
MOST_STORED: int  # eight-byte numbers that `store` is faster for than a copy from pinned memory
CONSTANTS: dict[str, float]  # of an optimizer step, in the order of the kernels, with the values of absent ones

class Launch:
    @property
    def stream(self) -> int: ...

class Tables: ...

def launch_on(stream: int, device: int, multiprocessors: int) -> Launch: ...
def multiprocessors_of(device: int) -> int: ...
def num_counting_blocks(multiprocessors: int) -> int: ...
def load_kernels(launch: Launch) -> None: ...

# An address that the operation does not use is 0.
def tables(
    layers: int,
    num_layers: int,
    groups: int,
    num_groups: int,
    num_chunks: int,
    bins: int,
    lists: int,
    list_counts: int,
    tie_counts: int,
    capacity: int,
    nonfinite: int,
) -> Tables: ...
def begin(launch: Launch, dtype: str, tables: Tables) -> None: ...
def select(launch: Launch, dtype: str, tables: Tables) -> None: ...

# Parts are dtype, tables, and the address of the new bits' addresses, or 0 to write no bits. Nothing is written if the
# number at `stop` is not 0.
def apply(launch: Launch, parts: list[tuple[str, Tables, int]], stop: int) -> None: ...
def count(launch: Launch, dtype: str, rows: int, num_rows: int, num_chunks: int) -> None: ...

# Parts are dtype, address of the rows, number of rows, number of chunks. The constants are at an address, or, where it
# is 0, rows of float64 in `values`.
def update(
    launch: Launch, rule: str, parts: list[tuple[str, int, int, int]], constants: int, values: Buffer
) -> None: ...
def move_state(launch: Launch, rows: int, num_rows: int, num_chunks: int) -> None: ...
def chunk_offsets(launch: Launch, rows: int, num_rows: int, num_chunks: int, totals: int) -> None: ...
def sum_squares(launch: Launch, rows: int, num_rows: int, num_chunks: int, sums: int) -> None: ...

# Copy eight-byte numbers to an address, and as many bytes as `into` has from one.
def store(launch: Launch, to: int, values: Buffer) -> None: ...
def fetch(launch: Launch, source: int, into: Buffer) -> None: ...
